"""How much of a context to keep, in the words of the user: a share, pairs, bytes or a score."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import isfinite, nan
from operator import index
from typing import Any

from kvzip.errors import KVzipError

Span = tuple[int, int]
"""Start and end, the end not included: tokens of a context, counted from 0 behind the prefix."""

KINDS = ("ratio", "tokens", "bytes", "threshold")
OF_TOKENS = ("ratio", "threshold")
"""Those that make sense for some tokens of a context, without the rest."""
UNITS = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)},
}


@dataclass(frozen=True)
class Footprint:
    """What the keys and values of a cache take.

    Attributes:
        fixed: bytes that no pruning frees: the prefix, and layers that slide.
        pair: bytes of one pair, its key and its value.
    """

    fixed: int
    pair: int


@dataclass(frozen=True)
class Budget:
    """How much of a context's pairs to keep: exactly one of the first four, and what must stay.

    Attributes:
        ratio: share of the context's pairs, in (0, 1]; exactly that many are kept.
        tokens: pairs of a head on average, over all heads that are pruned; exactly that many, or
            all there are.
        bytes: bytes of all keys and values after pruning, those of the prefix and of sliding layers
            included: a number, or a text such as `"512MB"`, `"2GB"` (powers of 1,000) or
            `"1.5GiB"` (powers of 1,024); as many pairs are kept as fit, or all there are.
        threshold: keep the pairs with at least this score, rounded to the scores' dtype.
        min_per_head: pairs that every head keeps, its best ones, or all where a context has fewer
            tokens; they count as a part of the budget.
        keep: tokens whose pairs every head keeps, as (start, end), counted in the context; they
            count as a part of the budget, and of `min_per_head`. `ModelKVzip.spans` finds texts.

    Raises:
        KVzipError: if not exactly one of the first four is given, or a number makes no sense.
    """

    ratio: float | None = None
    tokens: float | None = None
    bytes: int | str | None = None
    threshold: float | None = None
    min_per_head: int = 0
    keep: Sequence[Span] = ()

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if not given:
            raise KVzipError(
                f"say how much to keep, by one of {', '.join(KINDS)}: "
                "ratio is the share of pairs to keep, in (0, 1]"
            )
        if len(given) > 1:
            raise KVzipError(f"there can be one budget only: got {' and '.join(given)}, choose one")
        if self.ratio is not None:
            object.__setattr__(self, "ratio", float(check_ratio(self.ratio)))
        if self.tokens is not None:
            if _exact(self.tokens) <= 0:
                raise KVzipError(f"tokens is a number of pairs a head, above 0: got {self.tokens}")
            plain = self.tokens if isinstance(self.tokens, int) else float(self.tokens)
            object.__setattr__(self, "tokens", plain)
        if self.bytes is not None:
            object.__setattr__(self, "bytes", parse_bytes(self.bytes))
        if self.threshold is not None:
            object.__setattr__(self, "threshold", _score("threshold", self.threshold))
        object.__setattr__(self, "min_per_head", _count("min_per_head", self.min_per_head))
        spans = self.keep if isinstance(self.keep, Iterable) else [self.keep]
        object.__setattr__(self, "keep", tuple(map(_span, spans)))

    @classmethod
    def of(cls, ratio: "float | Budget | None" = None, **others: Any) -> "Budget":
        """A budget of these parts, or the one that is given in the place of a ratio.

        Raises:
            KVzipError: as `Budget`, and for a budget and parts of another.
        """
        if not isinstance(ratio, Budget):
            return cls(ratio, **others)
        given = [name for name, part in others.items() if _is_given(name, part)]
        if given:
            raise KVzipError(f"a Budget says all of it: leave out {' and '.join(given)}")
        return ratio

    @classmethod
    def as_before(cls, ratio: float) -> "Budget":
        """The share of what comes behind a context, if it is to be that of the context.

        Args:
            ratio: the keep ratio of the context, or the share that another budget came to.

        Raises:
            KVzipError: if nothing of the context was kept.
        """
        if not ratio:
            raise KVzipError(
                f"nothing of the context was kept (ratio {ratio}), which is no measure for what "
                "comes behind it: say how much of that to keep by a ratio in (0, 1], such as 0.3"
            )
        return cls(ratio)

    def __str__(self) -> str:
        (kind,) = (kind for kind in KINDS if getattr(self, kind) is not None)
        return f"{kind} {getattr(self, kind)}"

    def asked(self) -> dict[str, Any]:
        """What was asked for, by name, without what was left out."""
        return {name: part for name, part in asdict(self).items() if _is_given(name, part)}

    def refuse_all_but(self, kinds: Sequence[str], who: str) -> None:
        """Raise KVzipError if anything else was asked for than `who` knows."""
        refused = [name for name in self.asked() if name not in kinds]
        if refused:
            raise KVzipError(
                f"{who} knows {' and '.join(kinds)} only: leave out {' and '.join(refused)}"
            )

    def required(self, n: int) -> int:
        """Pairs that every head must keep of a context of n tokens."""
        protected = {i for start, end in self.keep for i in range(start, end)}
        return max(len(protected), min(self.min_per_head, n))

    def per_head(self, n: int, heads: int, footprint: Footprint | None = None) -> Fraction | None:
        """Pairs that a head keeps on average; everything that can be checked without scores.

        Args:
            n: tokens of the context.
            heads: heads that are pruned, over all layers.
            footprint: what the cache takes, for a budget in bytes.

        Returns:
            At most n; None for a threshold, which promises no number.

        Raises:
            KVzipError: if `keep` leaves the context, the bytes do not even hold what is never
                pruned, or less is allowed than must stay.
        """
        for start, end in self.keep:
            if end > n:
                raise KVzipError(
                    f"keep names tokens {start} to {end}, the context has {n}: stay within it"
                )
        if self.threshold is not None:
            return None
        if self.ratio is not None:
            allowed = check_ratio(self.ratio) * n
        elif self.tokens is not None:
            allowed = min(_exact(self.tokens), Fraction(n))
        else:
            allowed = min(Fraction(self._pairs(footprint), heads), Fraction(n))
        if self.required(n) > allowed:
            raise KVzipError(
                f"{self} allows {float(allowed):,.6g} pairs a head, keep and min_per_head ask for "
                f"{self.required(n):,}: raise the budget, or ask for less"
            )
        return allowed

    def _pairs(self, footprint: Footprint | None) -> int:
        """Pairs that fit into the bytes."""
        if footprint is None:
            raise KVzipError("a budget in bytes needs a cache: call kv.prune(bytes=...)")
        left = parse_bytes(self.bytes) - footprint.fixed
        if left < 0:
            raise KVzipError(
                f"bytes is {self.bytes:,}, but the prefix and layers that slide take "
                f"{footprint.fixed:,} by themselves: allow more"
            )
        return left // footprint.pair


def check_ratio(ratio: object) -> Fraction:
    """The keep ratio as the decimal number that was written, so that 0.29 of 100 is 29.

    Raises:
        KVzipError: unless 0 < ratio <= 1.
    """
    exact = _exact(ratio)
    if not 0 < exact <= 1:
        raise KVzipError(f"ratio is the share of pairs to keep, in (0, 1]: got {ratio}")
    return exact


def parse_bytes(size: object) -> int:
    """Bytes of a size such as `2_000_000_000`, `"512MB"`, `"2GB"` or `"1.5GiB"`, rounded down.

    Raises:
        KVzipError: if it is no size, or not above 0.
    """
    number, unit = size, ""
    if isinstance(size, str):
        written = re.fullmatch(r"\s*([0-9.]+(?:e\+?[0-9]+)?)\s*([a-z]*)\s*", size.lower())
        number, unit = written.groups() if written else ("", "")
    exact = _exact(number)
    if exact <= 0 or unit not in UNITS:
        raise KVzipError(f"bytes is a size, such as 512MB, 2GB or 1.5GiB: got {size}")
    return int(exact * UNITS[unit])


def _exact(number: Any) -> Fraction:
    """The decimal number that was written, 0 if it is none."""
    try:
        return Fraction(number if isinstance(number, int) else repr(float(number)))
    except (TypeError, ValueError, OverflowError):
        return Fraction(0)


def _score(name: str, number: Any) -> float:
    try:
        score = float(number)
    except (TypeError, ValueError, OverflowError):
        score = nan
    if not isfinite(score):
        raise KVzipError(f"{name} is the least score to keep, a finite number: got {number}")
    return score


def _count(name: str, number: Any) -> int:
    try:
        count = index(number)
    except TypeError:
        count = -1
    if count < 0:
        raise KVzipError(f"{name} is a number of pairs, 0 or more: got {number}")
    return count


def _span(span: Any) -> Span:
    try:
        start, end = map(index, span)
    except (TypeError, ValueError):
        start = end = 0
    if not 0 <= start < end:
        raise KVzipError(
            f"keep takes tokens as (start, end), 0 <= start < end: got {span!r}. "
            "model.spans(context, texts) finds the tokens of texts"
        )
    return start, end


def _is_given(name: str, part: Any) -> bool:
    """Whether a part of a budget says anything: a threshold of 0 does."""
    return part is not None if name in KINDS else bool(part)
