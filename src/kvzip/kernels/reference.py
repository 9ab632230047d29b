"""Every operation on key-value pairs, in plain PyTorch: the definition that others must equal.

Shape letters used throughout the package:

    B  batch rows           L  layers              t  query tokens of one forward pass
    H  KV heads             G  query heads per KV head (grouped-query attention; Hq = H * G)
    D  head dimension       n  context tokens      p  prefix tokens
    m  tokens of one chunk  s  key tokens

Packed pairs are `[rows, D]` with `indptr` `[H + 1]`: head `h` owns rows `indptr[h]:indptr[h + 1]`.

    rows  | prefix | kept pairs of head 0 | prefix | kept of head 1 | ...
          ^ indptr[0]                     ^ indptr[1]               ^ indptr[2]

Half-precision inputs are accumulated in float32.
"""

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


def zipped_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    indptr: Tensor,
    tail_keys: Tensor,
    tail_values: Tensor,
    scale: float,
    starts: Tensor | None = None,
) -> Tensor:
    """Attention over a packed context, which every query sees, and a causal tail behind it.

    The last `t` tokens of the tail are the queries themselves.

    Args:
        query: `[B, Hq, t, D]`.
        keys: `[rows, D]`, packed.
        values: `[rows, D]`, packed.
        indptr: `[H + 1]`, int64, on the CPU.
        tail_keys: `[B, H, s, D]` with `s >= t`.
        tail_values: `[B, H, s, D]`.
        scale: factor on the logits.
        starts: `[B]`, int64: first column of the tail that is no padding (rows padded on the left),
            or None. Padding is seen by nothing but itself.

    Returns:
        `[B, Hq, t, D]` in the dtype of `query`.
    """
    batch, query_heads, t, head_dim = query.shape
    kv_heads, s = tail_keys.shape[1:3]
    lengths = indptr.diff().tolist()
    blocks = _blocks(t, batch * query_heads * (max(lengths) + s))
    if len(blocks) > 1:  # a block of queries sees the tail up to its own last token
        parts = []
        for rows in blocks:
            tail = slice(0, s - t + rows.stop)
            tails = tail_keys[:, :, tail], tail_values[:, :, tail]
            part = query[:, :, rows]
            parts.append(zipped_attention(part, keys, values, indptr, *tails, scale, starts))
        return torch.cat(parts, dim=2)

    accumulate = _accumulation_dtype(query)
    rows = sum(lengths)
    tail_keys = tail_keys.to(accumulate).flatten(0, 1)  # [B * H, s, D]
    tail_values = tail_values.to(accumulate).flatten(0, 1)
    queries = (query.to(accumulate) * scale).reshape(batch * kv_heads, -1, head_dim)
    on_tail = torch.bmm(queries, tail_keys.mT)  # [B * H, G * t, s]
    hidden = _hidden_in_tail(t, s, starts, query.device)
    if hidden is not None:
        by_token = on_tail.view(batch, query_heads, t, s)
        on_tail = by_token.masked_fill(hidden, -torch.inf).view(on_tail.shape)
    from_context, weights_on_tail = [], []
    for length, head_keys, head_values, head_queries, head_on_tail in zip(
        lengths,
        keys[:rows].split(lengths),
        values[:rows].split(lengths),
        _by_head(queries, batch).unbind(0),  # [B * G * t, D] of each head
        _by_head(on_tail, batch).unbind(0),
        strict=True,
    ):
        on_context = head_queries @ head_keys.to(accumulate).T
        weights = torch.cat([on_context, head_on_tail], dim=-1).softmax(-1)
        from_context.append(weights[:, :length] @ head_values.to(accumulate))
        weights_on_tail.append(weights[:, length:])
    from_tail = torch.bmm(_by_row(torch.stack(weights_on_tail), batch), tail_values)
    out = _by_row(torch.stack(from_context), batch) + from_tail  # [B * H, G * t, D]
    return out.view(batch, query_heads, t, -1).to(query.dtype)


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


def _by_head(tensor: Tensor, batch: int) -> Tensor:
    """`[B * H, r, x]` -> `[H, B * r, x]`."""
    rows, r, width = tensor.shape
    return tensor.view(batch, -1, r, width).transpose(0, 1).reshape(rows // batch, -1, width)


def _by_row(tensor: Tensor, batch: int) -> Tensor:
    """`[H, B * r, x]` -> `[B * H, r, x]`."""
    heads, rows, width = tensor.shape
    by_row = tensor.view(heads, batch, -1, width).transpose(0, 1)
    return by_row.reshape(batch * heads, rows // batch, width)


def _hidden_in_tail(t: int, s: int, starts: Tensor | None, device: torch.device) -> Tensor | None:
    """`[B or 1, 1, t, s]`, bool: tail columns that each query must not see, or None."""
    if t == 1 and starts is None:
        return None
    columns = torch.arange(s, device=device)
    own = columns[s - t :, None]
    hidden = (columns > own)[None, None]  # [1, 1, t, s]
    if starts is None:
        return hidden
    starts = starts.to(device)
    return hidden | ((columns < starts[:, None, None, None]) & (columns != own))


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _blocks(rows: int, logits_per_row: int) -> list[slice]:
    """Slices over `rows` so that no block holds more than `MAX_LOGITS` logits."""
    size = max(1, MAX_LOGITS // max(1, logits_per_row))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
