"""What the commands print in the same way: sizes, times, and a list of facts."""

from collections.abc import Mapping

from rich.filesize import decimal
from rich.text import Text


def facts(rows: Mapping[str, str]) -> Text:
    """A label and a value in each line."""
    width = max(map(len, rows))
    lines = (Text.assemble((f"{label:<{width}}  ", "dim"), value) for label, value in rows.items())
    return Text("\n").join(lines)


def shrinking(before: int, after: int) -> str:
    """Two sizes in bytes and how they compare."""
    return f"{decimal(before)} → {decimal(after)} ({after / before:.1%})"


def durations(seconds: Mapping[str, float]) -> str:
    """Stages and their times, in one line."""
    return ", ".join(f"{stage} {duration(time)}" for stage, time in seconds.items())


def duration(seconds: float) -> str:
    """A time with the digits that matter."""
    if seconds >= 60:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02} s"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"
