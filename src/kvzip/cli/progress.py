"""Progress bars on the standard error, when that is a terminal."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from time import perf_counter

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

LABELS = {
    "prefill": "reading",
    "score": "scoring",
    "fit": "fitting",
    "check": "checking",
    "full": "asking",
    "zipped": "asking zipped",
}


@contextmanager
def progress_bar(stages: Sequence[str]) -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar for each stage as it comes, and clear them at the end.

    Args:
        stages: names of the stages that will report, in order.

    Yields:
        The function to report with: a stage's name, what is done and what there is in all.
    """
    with _bars() as bars:
        tasks: dict[str, TaskID] = {}
        waiting = iter(stages)

        def start_next() -> None:
            for stage in islice(waiting, 1):
                tasks[stage] = bars.add_task(LABELS[stage], total=None)

        def report(stage: str, done: int, total: int) -> None:
            bars.update(tasks[stage], completed=done, total=total)
            if done == total:
                start_next()

        start_next()
        yield report


@contextmanager
def streaming_bar(size: int | None) -> Iterator[Callable[[int, int, int], None]]:
    """Show a bar with tokens a second and the memory held, and clear it at the end.

    Args:
        size: bytes of the document, None if that is not known.

    Yields:
        The function to report with: bytes of the document read so far, tokens compressed so far,
        and bytes of keys and values held.
    """
    with _bars(TextColumn("{task.fields[status]}")) as bars:
        task = bars.add_task("compressing", total=size, status="")
        start = perf_counter()

        def report(read: int, tokens: int, held: int) -> None:
            speed = tokens / max(perf_counter() - start, 1e-9)
            status = f"{tokens:,} tokens, {speed:,.0f} tokens/s, {decimal(held)} held"
            bars.update(task, completed=read, status=status)

        yield report


def _bars(*more: ProgressColumn) -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<14}"), BarColumn(), TaskProgressColumn())
    return Progress(
        *columns,
        TimeElapsedColumn(),
        *more,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
