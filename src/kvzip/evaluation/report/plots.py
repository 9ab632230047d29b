"""The plots, as PNG in light or dark colours. matplotlib is imported when one is drawn."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from kvzip.evaluation.optional import require
from kvzip.evaluation.report.cells import FULL
from kvzip.evaluation.report.files import Series
from kvzip.evaluation.report.intervals import Interval
from kvzip.evaluation.report.kept import Kept
from kvzip.evaluation.report.making import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 120
PANEL = (3.6, 2.8)
"""Inches of a small plot."""

MOST_COLUMNS = 3
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
MARKERS = "osD^vP*X<>"
LINES = {"pair": "-", "pair-uniform": "--", "head": ":"}
MOST_NUMBERED = 256
"""Heads whose share is written into the heat map."""


@dataclass(frozen=True)
class Theme:
    """Colours of a plot; those of the lines can be told apart by the colour-blind."""

    name: str
    background: str
    text: str
    grid: str
    lines: tuple[str, ...]


LIGHT = Theme(
    "light",
    "#ffffff",
    "#1f2328",
    "#d8dde3",
    ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7f6000", "#56b4e9", "#444444", "#e69f00"),
)
DARK = Theme(
    "dark",
    "#15181c",
    "#e6e8ea",
    "#3a4047",
    ("#56b4e9", "#ff8a4c", "#2fd0a0", "#e6a0c8", "#d9c35a", "#9ad7ff", "#bbbbbb", "#ffc04d"),
)


def check() -> None:
    """Raise KVzipError unless plots can be drawn."""
    require("matplotlib.figure", "a plot")


def plots(report: Report, theme: Theme) -> dict[str, bytes]:
    """The plots of a report, by name, as PNG files."""
    drawers: dict[str, Callable[[Report, Theme], Figure]] = {"accuracy": _accuracy}
    if report.averages.points:
        drawers["averages"] = _averages
    drawn = {}
    with _style(theme):
        for name, draw in drawers.items():
            drawn[name] = _png(draw(report, theme))
        if report.kept is not None:
            drawn["kept"] = _png(_kept(report.kept))
    return drawn


@contextmanager
def _style(theme: Theme) -> Iterator[None]:
    """Settings of matplotlib that do not depend on the user's."""
    matplotlib = require("matplotlib", "a plot")
    style = require("matplotlib.style", "a plot")
    settings = {
        "figure.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "axes.edgecolor": theme.grid,
        "axes.grid": True,
        "axes.labelcolor": theme.text,
        "axes.titlecolor": theme.text,
        "axes.titlesize": 10,
        "axes.labelsize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": theme.grid,
        "grid.linewidth": 0.6,
        "text.color": theme.text,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.frameon": False,
        "legend.fontsize": 9,
    }
    with matplotlib.rc_context(), style.context(["default", settings]):
        yield


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with as many small plots, and no others."""
    figures: Any = require("matplotlib.figure", "a plot")
    columns = min(count, MOST_COLUMNS)
    rows = ceil(count / columns)
    width, height = max(columns, 2) * PANEL[0], rows * PANEL[1] + 0.8
    figure: Figure = figures.Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    axes = list(grid.flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _accuracy(report: Report, theme: Theme) -> Figure:
    """A plot for each task: accuracy against the realised ratio."""
    figure, panels = _panels(len(report.tasks))
    for axes, task in zip(panels, report.tasks, strict=True):
        for series in report.series:
            of_series = [f for cell, f in report.cells.items() if cell[:2] == (task, series)]
            of_series.sort(key=lambda one: one.realised)
            _line(
                axes,
                [one.realised for one in of_series],
                [one.accuracy for one in of_series],
                [one.interval for one in of_series],
                _look(report, series, theme),
            )
        axes.set_title(task)
        axes.set_ylim(-0.03, 1.03)
        axes.set_ylabel("accuracy")
        _ratio_axis(axes, [f.realised for cell, f in report.cells.items() if cell.task == task])
    _legend(figure, report, theme)
    return figure


def _averages(report: Report, theme: Theme) -> Figure:
    """Relative accuracy against the realised ratio; accuracy against memory."""
    points = report.averages.points
    figure, (left, right) = _panels(2)
    for series in report.series:
        look = _look(report, series, theme)
        of_series = [average for point, average in points.items() if point.series == series]
        told = sorted(
            (a.realised, a.relative, a.interval) for a in of_series if a.relative is not None
        )
        _line(left, [a for a, _, _ in told], [b for _, b, _ in told], [c for *_, c in told], look)
        memory = sorted((average.kv_bytes / 1e6, average.accuracy) for average in of_series)
        _line(right, [a for a, _ in memory], [b for _, b in memory], [None] * len(memory), look)
    left.axhline(1, color=theme.text, linewidth=0.8, linestyle=(0, (1, 3)))
    left.set_ylim(bottom=-0.03)
    left.set_title("relative accuracy, averaged over tasks")
    left.set_ylabel("accuracy / that of the full cache")
    _ratio_axis(left, [average.realised for average in points.values()])
    right.set_ylim(-0.03, 1.03)
    right.set_xlim(left=0)
    right.set_title("memory and accuracy, averaged over tasks")
    right.set_xlabel("keys and values in MB")
    right.set_ylabel("accuracy")
    _legend(figure, report, theme)
    return figure


def _line(
    axes: Axes,
    x: list[float],
    y: list[float],
    intervals: list[Interval | None],
    look: Mapping[str, Any],
) -> None:
    """A line with whiskers."""
    if not x:
        return
    ends = [one or Interval(value, value) for one, value in zip(intervals, y, strict=True)]
    # An interval of the bootstrap may just miss its mean.
    below = [max(value - end.low, 0) for value, end in zip(y, ends, strict=True)]
    above = [max(end.high - value, 0) for value, end in zip(y, ends, strict=True)]
    axes.errorbar(x, y, yerr=[below, above], elinewidth=0.9, capsize=2, clip_on=False, **look)


def _look(report: Report, series: Series, theme: Theme) -> dict[str, Any]:
    """A colour and a marker for a scorer, a dash for a level."""
    number = sorted({one.scorer for one in report.series}).index(series.scorer)
    return {
        "color": theme.lines[number % len(theme.lines)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES.get(series.level, "-."),
        "markersize": 4,
        "markerfacecolor": None if series.level == "pair" else theme.background,
        "linewidth": 1.4,
    }


def _ratio_axis(axes: Axes, ratios: list[float]) -> None:
    positive = [ratio for ratio in ratios if ratio > 0]
    low = min(positive, default=FULL)
    if len(positive) == len(ratios):
        axes.set_xscale("log")
        axes.set_xlim(low / 1.15, 1.15)
    ticks = [tick for tick in TICKS if tick >= low / 1.15]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("share of the pairs kept")


def _legend(figure: Figure, report: Report, theme: Theme) -> None:
    lines: Any = require("matplotlib.lines", "a plot")
    handles = [lines.Line2D([], [], **_look(report, series, theme)) for series in report.series]
    labels = [report.label(series) for series in report.series]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)))


def _kept(kept: Kept) -> Figure:
    """Heat maps: layer by head, and the tokens of the document line by line."""
    figures: Any = require("matplotlib.figure", "a plot")
    layers, heads = kept.heads.shape
    figure: Figure = figures.Figure(figsize=(2.4 * PANEL[0], 1.6 * PANEL[1]), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
    image = left.imshow(kept.heads, cmap="magma", vmin=0, vmax=1, aspect="auto")
    left.set_title("tokens kept by each head")
    left.set_xlabel("KV head")
    left.set_ylabel("layer")
    left.set_xticks(range(0, heads, ceil(heads / 16)))
    step = ceil(layers / 16)
    left.set_yticks(range(0, layers, step), [str(layer) for layer in kept.layers[::step]])
    figure.colorbar(image, ax=left)
    if kept.heads.size <= MOST_NUMBERED and heads <= 8:
        for (row, column), share in np.ndenumerate(kept.heads):
            colour = "black" if share > 0.6 else "white"
            number = f"{100 * share:.0f}"
            left.text(column, row, number, color=colour, ha="center", va="center", fontsize=7)
    columns = max(1, ceil(sqrt(1.5 * len(kept.tokens))))
    rows = ceil(len(kept.tokens) / columns)
    grid = np.full(rows * columns, np.nan)
    grid[: len(kept.tokens)] = kept.tokens
    image = right.imshow(
        grid.reshape(rows, columns), cmap="magma", vmin=0, aspect="auto", interpolation="nearest"
    )
    right.set_title("heads that kept each token")
    right.set_xlabel(f"token in a line of {columns}")
    right.set_ylabel("line")
    figure.colorbar(image, ax=right)
    for axes in (left, right):
        axes.grid(visible=False)
    return figure
