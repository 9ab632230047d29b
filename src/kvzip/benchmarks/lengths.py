"""How many of a context's pairs each head of a layer keeps, where a figure needs no real scores.

Pairs compete over all heads, and some heads keep far more than others. The lengths here follow a
geometric sequence: the longest head of a layer keeps 14 times as many pairs as the shortest, and
the heads between them are evenly spaced on a logarithmic scale, in an order that the seed decides.
No head can keep more than the whole context: what is cut off goes to the others in proportion, so
that the spread narrows as the ratio rises, down to equal lengths at ratio 1.
"""

from math import floor
from random import Random

from kvzip.budget import check_ratio

SPREAD = 14.0
"""Pairs of the longest head over those of the shortest."""


def head_lengths(context: int, heads: int, ratio: float, seed: int = 0) -> list[int]:
    """Pairs that each head keeps: floor(ratio * heads * context) in all, none above `context`.

    Args:
        context: context tokens, n.
        heads: KV heads of the layer, H.
        ratio: share of the layer's pairs to keep, in (0, 1].
        seed: decides which head is how long.
    """
    total = floor(check_ratio(ratio) * heads * context)
    weights = [SPREAD ** (i / max(1, heads - 1)) for i in range(heads)]
    Random(seed).shuffle(weights)
    lengths = [0] * heads
    open_heads = sorted(range(heads), key=weights.__getitem__, reverse=True)
    while open_heads:  # the longest first, so that what it cannot hold goes to the others
        head, *rest = open_heads
        left = total - sum(lengths)
        share = left * weights[head] / sum(weights[i] for i in open_heads)
        lengths[head] = min(context, round(share)) if rest else left
        open_heads = rest
    return lengths
