"""`kvzip eval`: what eviction costs on tasks, at one ratio after the other."""

import fnmatch
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.box import ROUNDED
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvzip.cli.facts import duration, facts
from kvzip.cli.load_model import load_model
from kvzip.cli.options import Device, Dtype, Json, Level, Model, Quantization
from kvzip.errors import KVzipError

if TYPE_CHECKING:
    from kvzip.evaluation.results import Results
    from kvzip.evaluation.runner import Settings

EXAMPLES = (
    "Examples:\n\n"
    "kvzip eval -d 'synthetic_*' --num 4 -o results/synthetic\n\n"
    "kvzip eval -m qwen2.5-7b -d squad,scbench_kv_tiny --num 100 --ratios 0.5,0.3 -o results/qwen"
)

Number = TypeVar("Number", int, float)

Scorer = Annotated[str, typer.Option(help="How pairs are scored.")]
DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Folder with local copies of data sets (json, jsonl, parquet).",
        show_default="the Hugging Face hub",
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Of what tasks draw at random.")]


def evaluate(
    tasks: Annotated[
        str,
        typer.Option(
            "--data",
            "-d",
            metavar="TASK[,TASK...]",
            help="Tasks, with commas between; * stands for anything, as in 'ruler_*'.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Folder for the results, of one run."),
    ],
    model: Model = None,
    num: Annotated[
        int | None,
        typer.Option(min=1, help="Samples of each task.", show_default="all that there are"),
    ] = None,
    ratios: Annotated[
        str,
        typer.Option(
            help="Shares of the pairs to keep, with commas between; 1.0, the full cache, is always "
            "among them."
        ),
    ] = "1.0,0.5,0.3",
    level: Annotated[Level, typer.Option(help="What is compared with what.")] = Level.pair,
    scorer: Scorer = "reconstruction",
    data_dir: DataDir = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Context lengths in tokens, with commas between, for tasks that are generated.",
            show_default="those of the task",
        ),
    ] = None,
    shard: Annotated[
        str,
        typer.Option(metavar="I/N", help="Do part I of N only, I from 0; all parts share the DIR."),
    ] = "0/1",
    seed: Seed = 0,
    dtype: Dtype = None,
    quantization: Quantization = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Ask the questions of tasks at one ratio after the other, and judge the answers.

    A run that was stopped goes on where it was when it is started again.
    """
    from kvzip.evaluation import results
    from kvzip.evaluation.runner import Settings, run, run_record, with_instructions
    from kvzip.loading import resolve

    settings = Settings(
        tasks=task_list(tasks),
        ratios=number_list("--ratios", ratios, float),
        num=num,
        level=level.value,
        scorer=scorer,
        lengths=None if lengths is None else number_list("--lengths", lengths, int),
        seed=seed,
        data_dir=data_dir,
        shard=results.Shard.parse(shard),
    )
    resolve(model)
    results.check_folder(output)
    results.check_run(output, settings.asked())
    start = perf_counter()
    loaded = load_model(
        model,
        device=device,
        dtype=dtype and dtype.value,
        quantization=quantization and quantization.value,
    )
    results.begin(output, run_record(settings, loaded, ["kvzip", *sys.argv[1:]]))
    with results.open_results(output, settings.shard, ratios=len(settings.ratios)) as written:
        with _bar(settings) as progress:
            run(settings, with_instructions(loaded), written, progress)
        seconds = perf_counter() - start
        if as_json:
            print(json.dumps(_report(loaded.model_id, output, written, seconds), indent=2))
        else:
            _show(loaded.model_id, output, settings, written, seconds)


def task_list(text: str) -> tuple[str, ...]:
    """Names of tasks with commas between, in which * stands for anything."""
    from kvzip.evaluation import task_names

    names: list[str] = []
    for name in filter(None, map(str.strip, text.split(","))):
        found = fnmatch.filter(task_names(), name) if "*" in name else [name]
        if not found:
            raise KVzipError(f"no task is called {name!r}: known are {', '.join(task_names())}")
        names += found
    return tuple(names)


def number_list(option: str, text: str, kind: type[Number]) -> tuple[Number, ...]:
    """Numbers with commas between, of an option."""
    try:
        numbers = tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise KVzipError(f"{option} takes numbers with commas between: got {text!r}") from error
    if kind is int and min(numbers) < 1:
        raise KVzipError(f"{option} takes positive numbers: got {text!r}")
    return numbers


@contextmanager
def _bar(settings: "Settings") -> Iterator[Callable[[str], None]]:
    """Show the samples done on the standard error, when that is a terminal.

    Yields:
        The function to call with the task's name behind every sample.
    """
    shard, total = settings.shard, None
    if settings.num is not None:
        total = len(range(shard.index, settings.num * len(settings.tasks), shard.count))
    console = Console(stderr=True)
    bars = Progress(
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("samples"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bars:
        bar = bars.add_task(settings.tasks[0], total=total)
        yield lambda task: bars.update(bar, advance=1, description=task)


def _report(model_id: str, output: Path, written: "Results", seconds: float) -> dict[str, object]:
    from kvzip.evaluation.results import mean_scores

    scores = mean_scores(written.lines)
    return {
        "folder": str(output),
        "model": model_id,
        "samples": len(written.complete),
        "skipped": len(written.skipped),
        "scores": {
            task: {str(ratio): mean for ratio, mean in by_ratio.items()}
            for task, by_ratio in scores.items()
        },
        "seconds": seconds,
    }


def _show(
    model_id: str, output: Path, settings: "Settings", written: "Results", seconds: float
) -> None:
    from kvzip.evaluation.results import mean_scores

    console = Console(highlight=False)
    scores = mean_scores(written.lines)
    asked = Counter(line["task"] for line in written.lines)
    skipped = Counter(task for task, _ in written.skipped)
    table = Table(box=ROUNDED, header_style="bold", border_style="dim")
    table.add_column("Task", overflow="fold")
    table.add_column("Questions", justify="right")
    for ratio in settings.ratios:
        table.add_column(str(ratio), justify="right")
    if skipped:
        table.add_column("Skipped", justify="right")
    for task in settings.tasks:
        means = [scores.get(task, {}).get(ratio) for ratio in settings.ratios]
        cells = ["-" if mean is None else f"{mean:.3f}" for mean in means]
        left_out = [f"{skipped[task]:,}"] if skipped else []
        table.add_row(task, f"{asked[task] // len(settings.ratios):,}", *cells, *left_out)
    console.print(table)
    rows = {
        "model": model_id,
        "samples": f"{len(written.complete):,}, {len(written.skipped):,} skipped",
        "results": str(output),
        "time": duration(seconds),
    }
    console.print(facts(rows), soft_wrap=True)
