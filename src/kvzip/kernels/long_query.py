"""A long query by dense kernels, as far as they reach.

The query is a chunk of a context that is being read: it attends to itself, to what of the tail is
in front of it and, if it is longer still, to `blocks` of the context, by the fastest dense kernel
(`dense`). What is left of the context is attended to by `zipped_attention`.

    context                              | tail                    |
    | block | block | left | block | left | in front |  the query   |
"""

from torch import Tensor

from kvzip.kernels.blocks import Left, attend_to_blocks
from kvzip.kernels.dense import Attend, blend, fastest
from kvzip.kernels.logits import Logits

LONG_QUERY = 512
"""Tokens from which on a query attends to its own chunk by a dense kernel."""
BLOCK_QUERY = 4096
"""Tokens from which on it does so to blocks of the context, too."""


def dense_kernel(query: Tensor, logits: Logits) -> Attend | None:
    """The dense kernel that serves a long query, None if the query is short or none does.

    Args:
        query: `[B, Hq, t, D]`.
        logits: of its layer; no dense kernel caps them.
    """
    if query.shape[2] < LONG_QUERY or logits.softcap is not None:
        return None
    return fastest(query.device, query.dtype, query.shape[3])


def attend_to_tail(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, attend: Attend
) -> tuple[Tensor, Tensor]:
    """A query's result on its own chunk and on what of the tail is in front of it.

    Args:
        query: `[B, Hq, t, D]`.
        keys: `[B, H, s, D]`, the tail; the last `t` columns are the query's own.
        values: likewise.
        scale: factor on the products of queries and keys.
        attend: a dense kernel.

    Returns:
        `[B, Hq, t, D]` in the dtype of `query`, and the log-sum-exp `[B, Hq, t]`, float32.
    """
    t, s = query.shape[2], keys.shape[2]
    own, before = slice(s - t, s), slice(s - t)
    out, lse = attend(query, keys[:, :, own], values[:, :, own], scale, True)
    if s == t:
        return out, lse
    return blend(out, lse, *attend(query, keys[:, :, before], values[:, :, before], scale, False))


def add_blocks(
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    indptr: Tensor,
    scale: float,
    attend: Attend,
    counts: Tensor | None = None,
) -> tuple[Tensor, Left]:
    """Add to a result what dense kernels serve of a packed context: blocks of it, or nothing.

    Args:
        out: `[B, Hq, t, D]`, attention to the tail.
        lse: `[B, Hq, t]`, float32: log-sum-exp of its logits.
        query: `[B, Hq, t, D]`.
        keys: `[rows, D]`, packed.
        values: `[rows, D]`, packed.
        indptr: `[H + 1]`, int64: where each head begins.
        scale: factor on the products of queries and keys.
        attend: a dense kernel.
        counts: `[H]`, int64, rows of each head, on the CPU; read from `indptr` if None.

    Returns:
        Attention so far, in float32 where blocks were added, and what is left of the context.
    """
    if query.shape[2] < BLOCK_QUERY or len(query) > 1:
        return out, Left(keys, values, indptr, lse)
    out = out.float()  # it is rounded once, not at every block
    lengths = (indptr.diff() if counts is None else counts).tolist()
    return out, attend_to_blocks(out, lse, query, keys, values, lengths, scale, attend)
