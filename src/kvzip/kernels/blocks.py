"""Attention of a long query to packed heads, by dense kernels on blocks of rows.

Dense kernels are half as fast again as one that takes heads of any length, but cuDNN makes a plan
for every new shape, which takes longer than attending. So heads are cut into blocks of a few fixed
lengths; what is left of each is less than the shortest of them.

    head 0 | 16384 | 16384 | 4096 | left |
    head 1 | 4096 | left |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from kvzip.kernels.dense import Attend, blend

BLOCKS = (16384, 4096)
"""Rows of a block, in descending order."""


@dataclass(frozen=True)
class Left:
    """What no block holds of the packed heads, packed again.

    Attributes:
        keys: `[rows, D]`.
        values: `[rows, D]`.
        indptr: `[H + 1]`, int64, on their device.
        lse: `[1, Hq, t]`, float32: log-sum-exp of the logits of everything attended to so far.
    """

    keys: Tensor
    values: Tensor
    indptr: Tensor
    lse: Tensor


def attend_to_blocks(
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Sequence[int],
    scale: float,
    attend: Attend,
    blocks: Sequence[int] = BLOCKS,
) -> Left:
    """Add a packed context to attention over something else, as far as blocks reach.

    Args:
        out: `[1, Hq, t, D]`, float32, attention so far, written in place; every query has seen
            something.
        lse: `[1, Hq, t]`, float32: log-sum-exp of its logits.
        query: `[1, Hq, t, D]`.
        keys: `[rows, D]`, packed.
        values: `[rows, D]`, packed.
        lengths: rows of each head.
        scale: factor on the products of queries and keys.
        attend: a dense kernel.
        blocks: rows of a block, in descending order.
    """
    group = query.shape[1] // len(lengths)
    rests, all_lse = [], []
    for head, (start, end) in enumerate(pairwise(accumulate(lengths, initial=0))):
        heads = slice(head * group, (head + 1) * group)
        head_out, head_lse, head_query = out[:, heads], lse[:, heads], query[:, heads]
        for size in blocks:
            for _ in range((end - start) // size):
                block = slice(start, start + size)
                pairs = keys[block][None, None], values[block][None, None]
                part = attend(head_query, *pairs, scale, False)
                head_out, head_lse = blend(head_out, head_lse, *part)
                start += size
        rests.append(slice(start, end))
        all_lse.append(head_lse)
    ends = torch.tensor([*accumulate((rest.stop - rest.start for rest in rests), initial=0)])
    return Left(
        torch.cat([keys[rest] for rest in rests]),
        torch.cat([values[rest] for rest in rests]),
        ends.to(keys.device, non_blocking=True),
        torch.cat(all_lse, dim=1),
    )
