"""Heat maps in the terminal: which tokens of a document, and which heads, hold how much.

With colours a share is a background; without, it is a glyph below the text.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil

from rich.cells import cell_len
from rich.console import Console, Group
from rich.style import Style
from rich.text import Text

# From nothing to all, after matplotlib's magma.
_DARK = ("#150f2e", "#3b0f70", "#721f81", "#b5367a")
_LIGHT = ("#e95562", "#fb8861", "#fec287", "#fcfdbf")
STYLES = (
    Style(color="#77758f", bgcolor=_DARK[0]),
    *(Style(color="#ffffff", bgcolor=colour) for colour in _DARK[1:]),
    *(Style(color="#000000", bgcolor=colour) for colour in _LIGHT),
)
GLYPHS = " ▁▂▃▄▅▆█"
PLAIN = Style.null()

WIDEST = 100
"""Columns of text that read well."""

SCALE_END = 0.99
"""Part of a document's pieces that the scale tells apart."""

CELL = 5
"""Columns of a head."""

LONGEST_CHARACTER = 8
"""Tokens that may share one character or a few that are entangled; UTF-8 takes up to 4 bytes."""


@dataclass(frozen=True)
class Piece:
    """Text of one token, or of some that share a character, and the share of heads keeping it."""

    text: str
    share: float


def pieces(
    token_ids: Sequence[int], shares: Sequence[float], decode: Callable[[Sequence[int]], str]
) -> Iterator[Piece]:
    """Cut a document into the text of its tokens.

    A token may end inside a character; it is then joined with those after it. Each token is decoded
    together with the piece before it, since some tokenizers trim what they decode.

    Args:
        token_ids: n tokens.
        shares: what to say of each.
        decode: text of some tokens.
    """
    context, start = 0, 0
    for end in range(1, len(token_ids) + 1):
        before = decode(token_ids[context:start])
        text = decode(token_ids[context:end])
        unfinished = text.endswith("\ufffd") and end - start < LONGEST_CHARACTER
        if unfinished and end < len(token_ids):
            continue
        yield Piece(text[len(before) :], sum(shares[start:end]) / (end - start))
        context, start = start, end


def document_map(document: Iterable[Piece], console: Console, max_lines: int) -> Group:
    """The text of a document, each piece coloured by its share.

    The scale ends where all but the few highest shares do, so that they do not dim the others.

    Args:
        document: the pieces in order.
        console: where it will be printed.
        max_lines: lines of text to show, 0 for all.
    """
    document = list(document)
    ascending = sorted(piece.share for piece in document)
    top = ascending[ceil(SCALE_END * (len(ascending) - 1))] or 1.0
    text = Text()
    for piece in document:
        text.append(_printable(piece.text), STYLES[_level(piece.share / top)])
    lines = list(text.wrap(console, min(console.width, WIDEST), overflow="fold"))
    shown = lines[: max_lines or None]
    rows = []
    for line in shown:
        rows += [line] if _coloured(console) else [Text(line.plain), _glyphs(line)]
    if len(shown) < len(lines):
        rows.append(Text(f"... and {len(lines) - len(shown)} more lines", "dim"))
    scale = _scale(console, "share of the heads that kept a token", f"{top:.0%} or more")
    return Group(scale, Text(), *rows)


def head_map(shares: Sequence[Sequence[float]], layers: Sequence[int], console: Console) -> Group:
    """Shares by layer (rows) and KV head (columns), in percent where that fits.

    Args:
        shares: `[L][H]`.
        layers: the number of each layer.
        console: where it will be printed.
    """
    labels = [f"layer {layer} " for layer in layers]
    label_width = max(map(len, labels))
    heads = len(shares[0])
    numbers = label_width + CELL * heads <= console.width
    rows = []
    for label, row in zip(labels, shares, strict=True):
        line = Text(label.ljust(label_width), "dim")
        for share in row:
            level = _level(share)
            cell = f"{100 * share:.0f} ".rjust(CELL) if numbers else GLYPHS[level]
            line.append(cell, STYLES[level] if _coloured(console) else PLAIN)
        rows.append(line)
    columns = "".join(f"{head} ".rjust(CELL) for head in range(heads))
    title = Text(" " * label_width + (columns if numbers else f"{heads} heads"), "dim")
    scale = _scale(console, "share of the tokens that a head kept, in percent", "100%")
    return Group(scale, Text(), title, *rows)


def _scale(console: Console, meaning: str, top: str) -> Text:
    """What the colours or glyphs mean."""
    text = Text(f"{meaning}: 0% ")
    for glyph, style in zip(GLYPHS, STYLES, strict=True):
        text.append("   ", style) if _coloured(console) else text.append(glyph)
    return text.append(f" {top}")


def _level(share: float) -> int:
    return min(int(share * len(STYLES)), len(STYLES) - 1)


def _coloured(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def _printable(text: str) -> str:
    """Text without what would steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "·" for c in text.replace("\r", ""))


def _glyphs(line: Text) -> Text:
    """A glyph under each character of a line."""
    row = ""
    for span in line.spans:
        level = STYLES.index(span.style)
        row += GLYPHS[level] * cell_len(line.plain[span.start : span.end])
    return Text(row)
