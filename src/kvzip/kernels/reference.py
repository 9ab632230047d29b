"""Every operation on key-value pairs, in plain PyTorch: the definition that others must equal.

Shape letters used throughout the package:

    B  batch rows           L  layers              t  query tokens of one forward pass
    H  KV heads             G  query heads per KV head (grouped-query attention; Hq = H * G)
    D  head dimension       n  context tokens      p  prefix tokens
    m  tokens of one chunk  s  key tokens

Packed pairs are `[rows, D]` with `indptr` `[H + 1]`: head `h` owns rows `indptr[h]:indptr[h + 1]`.

    rows  | prefix | kept pairs of head 0 | prefix | kept of head 1 | ...
          ^ indptr[0]                     ^ indptr[1]               ^ indptr[2]

Partial attention returns its output together with the log-sum-exp of its logits, so that parts over
different keys can be merged exactly (`merge`). Half-precision inputs are accumulated in float32.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

MAX_LOGITS = 2**25
"""Logits held at a time (128 MiB in float32); longer queries are worked off in blocks."""


def causal_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Dense attention, causal and aligned at the bottom right: the last query sees every key.

    Args:
        query: `[B, Hq, t, D]`.
        keys: `[B, H, s, D]` with `s >= t`.
        values: `[B, H, s, D]`.
        scale: factor on the logits.

    Returns:
        `[B, Hq, t, D]` in the dtype of `query`.
    """
    t, s = query.shape[-2], keys.shape[-2]
    mask = None if t in (1, s) else causal_lower_right(t, s)
    return F.scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=mask,
        is_causal=t == s and t > 1,
        scale=scale,
        enable_gqa=query.shape[1] != keys.shape[1],
    )


def sliding_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    window: int,
    scale: float,
) -> Tensor:
    """Attention in which a query at position `i` sees the keys at positions `i - window < j <= i`.

    Args:
        query: `[B, Hq, t, D]`.
        keys: `[B, H, s, D]`.
        values: `[B, H, s, D]`.
        query_positions: `[B or 1, t]`, int64.
        key_positions: `[B or 1, s]`, int64; a negative position hides the key.
        window: number of positions seen, the query's own included.
        scale: factor on the logits.

    Returns:
        `[B, Hq, t, D]` in the dtype of `query`.
    """
    behind = query_positions[:, :, None] - key_positions[:, None, :]  # [B or 1, t, s]
    visible = (behind >= 0) & (behind < window) & (key_positions[:, None, :] >= 0)
    return F.scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=visible[:, None],
        scale=scale,
        enable_gqa=query.shape[1] != keys.shape[1],
    )


def ragged_attention(
    query: Tensor, keys: Tensor, values: Tensor, indptr: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over packed pairs: every query row sees all the pairs of its KV head.

    Args:
        query: `[B, Hq, t, D]`.
        keys: `[rows, D]`, packed.
        values: `[rows, D]`, packed.
        indptr: `[H + 1]`, int64, on the CPU.
        scale: factor on the logits.

    Returns:
        Output `[B, Hq, t, D]` and log-sum-exp `[B, Hq, t]`, float32 or wider; a head without
        pairs gives zeros and `-inf`.
    """
    batch, query_heads, t, _ = query.shape
    group = query_heads // (len(indptr) - 1)
    accumulate = _accumulation_dtype(query)
    out = query.new_zeros((batch, query_heads, t, values.shape[-1]), dtype=accumulate)
    lse = query.new_full((batch, query_heads, t), -torch.inf, dtype=accumulate)
    for h, (start, end) in enumerate(pairwise(indptr.tolist())):
        if start == end:
            continue
        heads = slice(h * group, (h + 1) * group)
        head_keys = keys[start:end].to(accumulate)
        head_values = values[start:end].to(accumulate)
        for rows in _blocks(t, batch * group * (end - start)):
            logits = query[:, heads, rows].to(accumulate) @ head_keys.T * scale
            lse[:, heads, rows] = logits.logsumexp(-1)
            out[:, heads, rows] = logits.softmax(-1) @ head_values
    return out, lse


def tail_attention(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Causal attention over the tail, whose last `t` tokens are the queries themselves.

    Args:
        query: `[B, Hq, t, D]`.
        keys: `[B, H, s, D]` with `s >= t`.
        values: `[B, H, s, D]`.
        scale: factor on the logits.
        starts: `[B]`, int64: first valid column of each row (rows padded on the left), or None.

    Returns:
        Output `[B, Hq, t, D]` and log-sum-exp `[B, Hq, t]`, float32 or wider; a query that sees
        nothing (padding) gives zeros and `-inf`.
    """
    batch, query_heads, t, _ = query.shape
    kv_heads, s = keys.shape[1:3]
    accumulate = _accumulation_dtype(query)
    grouped = query.unflatten(1, (kv_heads, -1)).to(accumulate)  # [B, H, G, t, D]
    keys, values = keys[:, :, None].to(accumulate), values[:, :, None].to(accumulate)
    columns = torch.arange(s, device=query.device)
    out, lse = [], []
    for rows in _blocks(t, batch * query_heads * s):
        logits = grouped[..., rows, :] @ keys.mT * scale  # [B, H, G, block, s]
        hidden = columns > columns[s - t :][rows, None]  # [block, s]
        if starts is not None:
            hidden = hidden | (columns < starts[:, None, None, None, None])
        logits = logits.masked_fill(hidden, -torch.inf)
        lse.append(logits.logsumexp(-1))
        weights = torch.exp(logits - lse[-1].clamp_min(torch.finfo(accumulate).min)[..., None])
        out.append(weights @ values)
    return torch.cat(out, dim=-2).flatten(1, 2), torch.cat(lse, dim=-1).flatten(1, 2)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
    """Join attention over two disjoint sets of keys into attention over their union.

    Args:
        out_a: `[..., D]`, attention over the first set.
        lse_a: `[...]`, log-sum-exp of its logits; `-inf` where the set is empty.
        out_b: `[..., D]`, attention over the second set.
        lse_b: `[...]`.

    Returns:
        `[..., D]`; zeros where both sets are empty.
    """
    top = torch.maximum(lse_a, lse_b).clamp_min(torch.finfo(lse_a.dtype).min)
    weight_a, weight_b = torch.exp(lse_a - top), torch.exp(lse_b - top)
    total = (weight_a + weight_b).clamp_min(torch.finfo(lse_a.dtype).tiny)
    return (weight_a / total)[..., None] * out_a + (weight_b / total)[..., None] * out_b


def reconstruction_score(
    query: Tensor, prefix_keys: Tensor, chunk_keys: Tensor, repeat_keys: Tensor, scale: float
) -> Tensor:
    """Score a chunk's pairs by the attention they get while the model repeats the chunk.

    The softmax runs over the columns [prefix ; chunk ; repeat input (causal)]; a pair's score is
    its largest probability over all queries of the repeat input and all query heads of its KV
    head (Kim et al., "KVzip", arXiv 2505.23416, section 3).

    Args:
        query: `[Hq, t, D]`, queries of the repeat input.
        prefix_keys: `[H, p, D]`.
        chunk_keys: `[H, m, D]`.
        repeat_keys: `[H, t, D]`, keys of the repeat input itself.
        scale: factor on the logits.

    Returns:
        `[H, m]`, float32 (float64 for float64 inputs), between 0 and 1.
    """
    kv_heads, p, _ = prefix_keys.shape
    m, t = chunk_keys.shape[1], query.shape[1]
    accumulate = _accumulation_dtype(query)
    grouped = query.unflatten(0, (kv_heads, -1)).to(accumulate)  # [H, G, t, D]
    keys = torch.cat([prefix_keys, chunk_keys, repeat_keys], dim=1)[:, None].to(accumulate)
    columns = torch.arange(p + m + t, device=query.device)
    best: Tensor = grouped.new_full((kv_heads, m), -torch.inf)
    for rows in _blocks(t, query.shape[0] * (p + m + t)):
        visible = p + m + rows.stop
        logits = grouped[:, :, rows] @ keys[:, :, :visible].mT * scale  # [H, G, block, visible]
        hidden = columns[:visible] > columns[p + m :][rows, None]
        logits = logits.masked_fill_(hidden, -torch.inf)
        lse = logits.logsumexp(-1, keepdim=True)
        best = torch.maximum(best, (logits[..., p : p + m] - lse).amax(dim=(1, 2)))
    return best.exp()


def compact(keys: Tensor, values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Gather the rows to keep, in order, into new packed tensors.

    Args:
        keys: `[rows, D]`, packed.
        values: `[rows, D]`, packed.
        rows: `[rows]`, bool, True for the rows that stay.

    Returns:
        Keys and values, `[kept, D]` each.
    """
    index = rows.nonzero().squeeze(-1)
    return keys.index_select(0, index), values.index_select(0, index)


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _blocks(rows: int, logits_per_row: int) -> list[slice]:
    """Slices over `rows` so that no block holds more than `MAX_LOGITS` logits."""
    size = max(1, MAX_LOGITS // max(1, logits_per_row))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
