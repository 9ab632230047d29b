"""Parts of a context that must stay: from texts to characters, and from characters to tokens."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from operator import index

from kvzip.budget import Span
from kvzip.errors import KVzipError

SHOWN = 40
"""Characters of a text that an error quotes."""


def characters(context: str, parts: Iterable[str | Span]) -> list[Span]:
    """Characters of a context that parts of it take.

    Args:
        context: the text.
        parts: texts, each of which stands for every place where it occurs, or (start, end) in
            characters.

    Returns:
        (start, end) in characters, in the order of the parts.

    Raises:
        KVzipError: if a text does not occur, or characters are outside the context or reversed.
    """
    if isinstance(parts, str):
        raise KVzipError("spans takes a list of parts: put the text in brackets")
    return [span for part in parts for span in _places(context, part)]


def tokens(offsets: Sequence[Span], spans: Iterable[Span]) -> list[Span]:
    """Tokens that hold any of some characters.

    Args:
        offsets: the characters of each token, in order. What lies between two tokens counts as a
            part of the second.
        spans: (start, end) in characters.

    Returns:
        (start, end) in tokens, for each of the spans.

    Raises:
        KVzipError: if no token holds a span.
    """
    ends = list(accumulate((end for _, end in offsets), max))
    starts = list(map(min, (start for start, _ in offsets), chain([0], ends)))
    found = []
    for start, end in spans:
        first, last = bisect_right(ends, start), bisect_left(starts, end)
        if first >= last:
            raise KVzipError(
                f"no token holds characters {start} to {end} of the context: take more of it"
            )
        found.append((first, last))
    return found


def _places(context: str, part: str | Span) -> list[Span]:
    if isinstance(part, str):
        places = [match.span() for match in re.finditer(re.escape(part), context) if part]
        if not places:
            raise KVzipError(
                f"{part[:SHOWN]!r} does not occur in the context: spaces and line breaks count, too"
            )
        return places
    try:
        start, end = map(index, part)
    except (TypeError, ValueError) as error:
        raise KVzipError(f"a part is a text, or characters (start, end): got {part!r}") from error
    if not 0 <= start < end <= len(context):
        raise KVzipError(
            f"characters {start} to {end} are not a part of the context, which has {len(context)}: "
            "give start and end with 0 <= start < end"
        )
    return [(start, end)]
