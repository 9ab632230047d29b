"""Options of `kvzip ask` and `kvzip chat`: eviction while they answer."""

from typing import TYPE_CHECKING, Annotated

import typer

from kvzip.budget import Budget
from kvzip.errors import KVzipError

if TYPE_CHECKING:
    from kvzip import Shrinking

Shrink = Annotated[
    float | None,
    typer.Option(
        metavar="RATIO",
        help="Evict of long questions and answers, too: the share of their pairs to keep.",
        show_default="nothing of them is evicted",
    ),
]
ShrinkThreshold = Annotated[
    float | None,
    typer.Option(
        metavar="SCORE", help="Instead of that share: the least score to keep.", show_default=False
    ),
]
ShrinkScorer = Annotated[
    str | None,
    typer.Option(
        metavar="SURROGATE",
        help="What scores them: kvzap:linear, kvzap:mlp, fastkvzip, or kvzap:PATH.",
        show_default="as FILE.kvz, or kvzap:linear",
    ),
]


def shrinking(
    ratio: float | None, threshold: float | None, scorer: str | None
) -> "Shrinking | None":
    """How to shrink, None for not at all.

    Raises:
        KVzipError: for numbers that make no sense, a scorer that is no surrogate, or one without
            the others.
    """
    if ratio is None and threshold is None:
        if scorer is not None:
            raise KVzipError(
                "--shrink-scorer belongs to --shrink or --shrink-threshold: say how much to keep"
            )
        return None
    amount = Budget(ratio, threshold=threshold)
    from kvzip import Shrinking

    return Shrinking(amount, scorer)
