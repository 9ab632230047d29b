"""How much `kvzip zip` keeps: its options, and what they come to."""

import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer

from kvzip.budget import Span
from kvzip.errors import KVzipError, KVzipWarning

Tokens = Annotated[
    float | None,
    typer.Option(
        help="Instead of a ratio: pairs to keep of each head, on average.", show_default=False
    ),
]
Bytes = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Instead of a ratio: bytes of keys and values to end with, such as 2GB or 512MiB.",
        show_default=False,
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(help="Instead of a ratio: the least score to keep.", show_default=False),
]
MinPerHead = Annotated[int, typer.Option(min=0, help="Pairs that every head keeps, its best ones.")]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        metavar="START:END",
        help="Characters of FILE whose tokens every head keeps; may be repeated.",
        show_default=False,
    ),
]
KeepText = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="The same, wherever FILE says TEXT; may be repeated.",
        show_default=False,
    ),
]


def parts_to_keep(keep: Sequence[str], keep_text: Sequence[str]) -> list[str | Span]:
    """Parts of a document as `kvzip.spans` takes them.

    Args:
        keep: characters, as `START:END`.
        keep_text: texts.

    Raises:
        KVzipError: for characters that are not two numbers.
    """
    return [*map(_characters, keep), *keep_text]


@contextmanager
def warnings_shown() -> Iterator[None]:
    """Print the warnings of kvzip in the way of its errors, a line each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", KVzipWarning)
        yield
    for warning in caught:
        print("kvzip: warning:", warning.message, file=sys.stderr)


def _characters(written: str) -> Span:
    numbers = re.fullmatch(r"(\d+):(\d+)", written)
    if numbers is None:
        raise KVzipError(f"--keep takes characters as START:END, such as 0:200: got {written!r}")
    return int(numbers[1]), int(numbers[2])
