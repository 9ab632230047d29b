"""A progress bar on the standard error, when that is a terminal."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

LABELS = {"prefill": "reading", "score": "scoring", "full": "asking", "zipped": "asking zipped"}


@contextmanager
def progress_bar(stages: Sequence[str]) -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar for each stage as it comes, and clear them at the end.

    Args:
        stages: names of the stages that will report, in order.

    Yields:
        The function to report with: a stage's name, what is done and what there is in all.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<14}"), BarColumn(), TaskProgressColumn())
    with Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bars:
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
