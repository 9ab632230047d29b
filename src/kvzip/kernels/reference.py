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

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from kvzip.kernels.logits import Logits, softmax
from kvzip.kernels.quantization import QuantizedRows, dequantize

MAX_LOGITS = 2**25
"""Logits held at a time (128 MiB in float32); longer queries are worked off in blocks."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
"""Of gated MLPs."""


def chunk_attention(
    query: Tensor,
    context_keys: Tensor,
    context_values: Tensor,
    keys: Tensor,
    values: Tensor,
    logits: Logits,
) -> Tensor:
    """Dense attention from a chunk of tokens to all of a context and, causally, to the chunk.

    Args:
        query: `[B, Hq, t, D]`.
        context_keys: `[B, H, s, D]`, seen by every query; s may be 0.
        context_values: `[B, H, s, D]`.
        keys: `[B, H, t, D]`, the chunk's own.
        values: `[B, H, t, D]`.
        logits: what to make of the products of queries and keys.

    Returns:
        `[B, Hq, t, D]` in the dtype of `query`.
    """
    t, s = query.shape[-2], context_keys.shape[-2]
    if s:
        keys = torch.cat([context_keys, keys], dim=2)
        values = torch.cat([context_values, values], dim=2)
    if not logits.plain:
        ends = torch.arange(s, s + t, device=query.device)
        columns = torch.arange(s + t, device=query.device)
        return _attend(query, keys, values, lambda rows: columns > ends[rows, None], logits)
    return F.scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=causal_lower_right(t, s + t) if s and t > 1 else None,
        is_causal=s == 0 and t > 1,
        scale=logits.scale,
        enable_gqa=query.shape[1] != keys.shape[1],
    )


def sliding_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    window: int,
    logits: Logits,
) -> Tensor:
    """Attention in which a query at position `i` sees the keys at positions `i - window < j <= i`.

    Args:
        query: `[B, Hq, t, D]`.
        keys: `[B, H, s, D]`.
        values: `[B, H, s, D]`.
        query_positions: `[B or 1, t]`, int64.
        key_positions: `[B or 1, s]`, int64; a negative position hides the key.
        window: number of positions seen, the query's own included.
        logits: what to make of the products of queries and keys.

    Returns:
        `[B, Hq, t, D]` in the dtype of `query`.
    """
    behind = query_positions[:, :, None] - key_positions[:, None, :]  # [B or 1, t, s]
    visible = (behind >= 0) & (behind < window) & (key_positions[:, None, :] >= 0)
    if not logits.plain:
        hidden = ~visible[:, None, None]  # [B or 1, 1, 1, t, s]
        return _attend(query, keys, values, lambda rows: hidden[..., rows, :], logits)
    return F.scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=visible[:, None],
        scale=logits.scale,
        enable_gqa=query.shape[1] != keys.shape[1],
    )


def zipped_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    indptr: Tensor,
    tail_keys: Tensor,
    tail_values: Tensor,
    logits: Logits,
    *,
    tail_length: Tensor | None = None,
    starts: Tensor | None = None,
    window: int | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Attention over a packed context, which every query sees, and a causal tail behind it.

    The last `t` tokens of the tail are the queries themselves.

    Args:
        query: `[B, Hq, t, D]`.
        keys: `[rows, D]`, packed.
        values: `[rows, D]`, packed.
        indptr: `[H + 1]`, int64.
        tail_keys: `[B, H, s, D]` with `s >= t`.
        tail_values: `[B, H, s, D]`.
        logits: what to make of the products of queries and keys.
        tail_length: `[1]`, int64: columns of the tail in use, all of them if None. A tensor, so
            that it may change between two runs of one CUDA graph.
        starts: `[B]`, int64: first column of the tail that is no padding (rows padded on the left),
            or None. Padding is seen by nothing but itself.
        window: tokens that a query sees, its own included, or None for all. With a window, the rows
            of each head are the context's last tokens, none left out.
        counts: `[H]`, int64, on the CPU: rows of each head as `indptr` says them, where the caller
            knows them; saves waiting for the device.

    Returns:
        `[B, Hq, t, D]` in the dtype of `query`.
    """
    lengths = (indptr.diff() if counts is None else counts).tolist()
    rows = sum(lengths)

    def heads() -> Iterator[tuple[Tensor, Tensor]]:
        return zip(keys[:rows].split(lengths), values[:rows].split(lengths), strict=True)

    return _over_heads(
        query, lengths, heads, tail_keys, tail_values, logits,
        tail_length=tail_length, starts=starts, window=window,
    )  # fmt: skip


def quantized_attention(
    query: Tensor,
    keys: QuantizedRows,
    values: QuantizedRows,
    indptr: Tensor,
    tail_keys: Tensor,
    tail_values: Tensor,
    logits: Logits,
    *,
    tail_length: Tensor | None = None,
    starts: Tensor | None = None,
    window: int | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """`zipped_attention` over what quantised keys and values stand for (see `quantization`).

    Args:
        query: `[B, Hq, t, D]`.
        keys: packed, `[rows, D]` when dequantised.
        values: likewise.
        indptr: as the others in `zipped_attention`, and so is what is returned.
        tail_keys: see there.
        tail_values: see there.
        logits: see there.
        tail_length: see there.
        starts: see there.
        window: see there.
        counts: see there.
    """
    lengths = (indptr.diff() if counts is None else counts).tolist()
    accumulate = _accumulation_dtype(query)

    def heads() -> Iterator[tuple[Tensor, Tensor]]:
        return zip(
            dequantize(keys, lengths, accumulate),
            dequantize(values, lengths, accumulate),
            strict=True,
        )

    return _over_heads(
        query, lengths, heads, tail_keys, tail_values, logits,
        tail_length=tail_length, starts=starts, window=window,
    )  # fmt: skip


def reconstruction_score(
    query: Tensor,
    prefix_keys: Tensor,
    chunk_keys: Tensor,
    repeat_keys: Tensor,
    logits: Logits,
    *,
    query_weights: Tensor | None = None,
    key_weights: Tensor | None = None,
) -> Tensor:
    """Score a chunk's pairs by the attention they get while the model repeats the chunk.

    The softmax runs over the columns [prefix ; chunk ; repeat input (causal)]; a pair's score is
    its largest probability over all queries of the repeat input and all query heads of its KV
    head (Kim et al., "KVzip", arXiv 2505.23416, section 3). With weights it is the largest product
    of probability and weights.

    Args:
        query: `[Hq, t, D]`, queries of the repeat input.
        prefix_keys: `[H, p, D]`.
        chunk_keys: `[H, m, D]`.
        repeat_keys: `[H, t, D]`, keys of the repeat input itself.
        logits: what to make of the products of queries and keys.
        query_weights: `[Hq, t]`, not negative: factor on what a query gives, 1 if None.
        key_weights: `[Hq, m]`, not negative: factor on what a pair gets from each query head of
            its KV head, 1 if None.

    Returns:
        `[H, m]`, float32 (float64 for float64 inputs), between 0 and 1 without weights.
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
        found = logits.of(grouped[:, :, rows] @ keys[:, :, :visible].mT)  # [H, G, block, visible]
        hidden = columns[:visible] > columns[p + m :][rows, None]
        found = found.masked_fill_(hidden, -torch.inf)
        lse = found.logsumexp(-1, keepdim=True)
        if logits.sinks is not None:
            lse = torch.logaddexp(lse, logits.sinks.to(accumulate).view(kv_heads, -1, 1, 1))
        if query_weights is not None:
            weights = query_weights.to(accumulate).unflatten(0, (kv_heads, -1))
            lse = lse - weights[:, :, rows, None].log()
        largest = (found[..., p : p + m] - lse).amax(dim=2)  # [H, G, m]
        if key_weights is not None:
            largest += key_weights.to(accumulate).unflatten(0, (kv_heads, -1)).log()
        best = torch.maximum(best, largest.amax(dim=1))
    return best.exp()


def repeat_attention(
    query: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    chunk_keys: Tensor,
    chunk_values: Tensor,
    keys: Tensor,
    values: Tensor,
    logits: Logits,
    *,
    query_weights: Tensor | None = None,
    key_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a repeat input to prefix, chunk and, causally, itself; and the chunk's scores.

    Args:
        query: `[1, Hq, t, D]`.
        prefix_keys: `[H, p, D]`.
        prefix_values: `[H, p, D]`.
        chunk_keys: `[H, m, D]`.
        chunk_values: `[H, m, D]`.
        keys: `[1, H, t, D]`, of the repeat input itself.
        values: `[1, H, t, D]`.
        logits: what to make of the products of queries and keys.
        query_weights: as in `reconstruction_score`.
        key_weights: likewise.

    Returns:
        `[1, Hq, t, D]` in the dtype of `query`, and the scores `[H, m]` of `reconstruction_score`.
    """
    seen_keys = torch.cat([prefix_keys, chunk_keys], dim=1)[None]
    seen_values = torch.cat([prefix_values, chunk_values], dim=1)[None]
    scores = reconstruction_score(
        query[0],
        prefix_keys,
        chunk_keys,
        keys[0],
        logits,
        query_weights=query_weights,
        key_weights=key_weights,
    )
    return chunk_attention(query, seen_keys, seen_values, keys, values, logits), scores


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


def append(
    tail_keys: Tensor, tail_values: Tensor, keys: Tensor, values: Tensor, column: Tensor
) -> None:
    """Write one token's pairs into a tail, in place.

    Args:
        tail_keys: `[B, H, s, D]`.
        tail_values: `[B, H, s, D]`.
        keys: `[B, H, 1, D]`, contiguous in its last dimension.
        values: `[B, H, 1, D]`, contiguous in its last dimension.
        column: `[1]`, int64, on the device: where to write.
    """
    tail_keys.index_copy_(2, column, keys)
    tail_values.index_copy_(2, column, values)


def matvec(
    vector: Tensor,
    matrices: Sequence[Tensor],
    biases: Sequence[Tensor],
    scales: Sequence[Tensor] = (),
) -> Tensor:
    """Linear layers of one token.

    Args:
        vector: `[..., K]`, of a single row.
        matrices: `[N_i, K]`, contiguous, in the same dtype; or int8.
        biases: `[N_i]` for each of them, or none at all.
        scales: of the rows of int8 matrices, `[N_i]` for each, in float32 or the vector's dtype;
            none for others.

    Returns:
        `[..., N_1 + N_2 + ...]`, in the vector's dtype.
    """
    added: list[Tensor | None] = [*biases] or [None] * len(matrices)
    scaled: list[Tensor | None] = [*scales] or [None] * len(matrices)
    each = zip(matrices, added, scaled, strict=True)
    return torch.cat([_linear(vector, *parts) for parts in each], dim=-1)


def gated_matvec(
    vector: Tensor, gate: Tensor, up: Tensor, activation: str, scales: Sequence[Tensor] = ()
) -> Tensor:
    """The first two linear layers of a gated MLP and what is between them, of one token.

    Args:
        vector: `[..., K]`, of a single row.
        gate: `[N, K]`, contiguous, in the same dtype; or int8.
        up: likewise.
        activation: name of the gate's activation, one of `ACTIVATIONS`.
        scales: of the rows of both, as in `matvec`.

    Returns:
        `[..., N]`, in the vector's dtype.
    """
    gate_scales, up_scales = scales or (None, None)
    opened = ACTIVATIONS[activation](_linear(vector, gate, None, gate_scales))
    return opened * _linear(vector, up, None, up_scales)


def _linear(vector: Tensor, matrix: Tensor, bias: Tensor | None, scales: Tensor | None) -> Tensor:
    if scales is None:
        return F.linear(vector, matrix, bias)
    accumulate = _accumulation_dtype(vector)
    out = F.linear(vector.to(accumulate), matrix.to(accumulate)) * scales
    return (out if bias is None else out + bias).to(vector.dtype)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    hidden: Callable[[slice], Tensor],
    logits: Logits,
) -> Tensor:
    """Dense attention with whatever logits there are, a block of queries at a time.

    Args:
        query: `[B, Hq, t, D]`.
        keys: `[B, H, s, D]`.
        values: `[B, H, s, D]`.
        hidden: from a slice of the queries to what they do not see, bool, of any shape that spreads
            over `[B, H, G, block, s]`.
        logits: what to make of the products of queries and keys.
    """
    accumulate = _accumulation_dtype(query)
    batch, query_heads, t, _ = query.shape
    grouped = query.to(accumulate).unflatten(1, (keys.shape[1], -1))  # [B, H, G, t, D]
    across, weighed = keys[:, :, None].to(accumulate).mT, values[:, :, None].to(accumulate)
    sinks = None if logits.sinks is None else logits.sinks.view(keys.shape[1], -1, 1, 1)
    parts = []
    for rows in _blocks(t, batch * query_heads * keys.shape[2]):
        found = logits.of(grouped[:, :, :, rows] @ across).masked_fill(hidden(rows), -torch.inf)
        parts.append(softmax(found, sinks) @ weighed)
    return torch.cat(parts, dim=3).flatten(1, 2).to(query.dtype)


def _over_heads(
    query: Tensor,
    lengths: list[int],
    heads: Callable[[], Iterator[tuple[Tensor, Tensor]]],
    tail_keys: Tensor,
    tail_values: Tensor,
    logits: Logits,
    *,
    tail_length: Tensor | None,
    starts: Tensor | None,
    window: int | None,
) -> Tensor:
    """`zipped_attention` over a context whose heads come one after the other.

    Args:
        query: `[B, Hq, t, D]`.
        lengths: rows of each head.
        heads: gives keys and values of each head, `[rows of the head, D]`, from the first on.
        tail_keys: as the rest in `zipped_attention`.
        tail_values: see there.
        logits: see there.
        tail_length: see there.
        starts: see there.
        window: see there.
    """
    if tail_length is not None:
        end = int(tail_length)
        tail_keys, tail_values = tail_keys[:, :, :end], tail_values[:, :, :end]
    batch, query_heads, t, head_dim = query.shape
    kv_heads, s = tail_keys.shape[1:3]
    blocks = _blocks(t, batch * query_heads * (max(lengths) + s))
    if len(blocks) > 1:  # a block of queries sees the tail up to its own last token
        parts = []
        for block in blocks:
            tail = slice(0, s - t + block.stop)
            tails = tail_keys[:, :, tail], tail_values[:, :, tail]
            part = query[:, :, block]
            parts.append(
                _over_heads(
                    part,
                    lengths,
                    heads,
                    *tails,
                    logits,
                    tail_length=None,
                    starts=starts,
                    window=window,
                )
            )
        return torch.cat(parts, dim=2)

    accumulate = _accumulation_dtype(query)
    tail_keys = tail_keys.to(accumulate).flatten(0, 1)  # [B * H, s, D]
    tail_values = tail_values.to(accumulate).flatten(0, 1)
    queries = query.to(accumulate).reshape(batch * kv_heads, -1, head_dim)
    on_tail = logits.of(torch.bmm(queries, tail_keys.mT))  # [B * H, G * t, s]
    hidden = _hidden_in_tail(t, s, starts, window, query.device)
    if hidden is not None:
        by_token = on_tail.view(batch, query_heads, t, s)
        on_tail = by_token.masked_fill(hidden, -torch.inf).view(on_tail.shape)
    sinks = _sinks_by_head(logits.sinks, kv_heads, batch, t)
    from_context, weights_on_tail = [], []
    for length, (head_keys, head_values), head_queries, head_on_tail, head_sinks in zip(
        lengths,
        heads(),
        _by_head(queries, batch).unbind(0),  # [B * G * t, D] of each head
        _by_head(on_tail, batch).unbind(0),
        sinks,
        strict=True,
    ):
        on_context = logits.of(head_queries @ head_keys.to(accumulate).T)
        if window is not None:
            hidden = _hidden_in_context(t, s, length, starts, window, query.device)
            by_token = on_context.view(batch, query_heads // kv_heads, t, length)
            on_context = by_token.masked_fill(hidden, -torch.inf).view(on_context.shape)
        weights = softmax(torch.cat([on_context, head_on_tail], dim=-1), head_sinks)
        from_context.append(weights[:, :length] @ head_values.to(accumulate))
        weights_on_tail.append(weights[:, length:])
    from_tail = torch.bmm(_by_row(torch.stack(weights_on_tail), batch), tail_values)
    out = _by_row(torch.stack(from_context), batch) + from_tail  # [B * H, G * t, D]
    return out.view(batch, query_heads, t, -1).to(query.dtype)


def _sinks_by_head(
    sinks: Tensor | None, kv_heads: int, batch: int, t: int
) -> Sequence[Tensor | None]:
    """`[B * G * t, 1]` of each KV head, or None."""
    if sinks is None:
        return [None] * kv_heads
    grouped = sinks.view(kv_heads, 1, -1, 1).expand(-1, batch, -1, t)
    return grouped.reshape(kv_heads, -1, 1).unbind(0)


def _by_head(tensor: Tensor, batch: int) -> Tensor:
    """`[B * H, r, x]` -> `[H, B * r, x]`."""
    rows, r, width = tensor.shape
    return tensor.view(batch, -1, r, width).transpose(0, 1).reshape(rows // batch, -1, width)


def _by_row(tensor: Tensor, batch: int) -> Tensor:
    """`[H, B * r, x]` -> `[B * H, r, x]`."""
    heads, rows, width = tensor.shape
    by_row = tensor.view(heads, batch, -1, width).transpose(0, 1)
    return by_row.reshape(batch * heads, rows // batch, width)


def _hidden_in_tail(
    t: int, s: int, starts: Tensor | None, window: int | None, device: torch.device
) -> Tensor | None:
    """`[B or 1, 1, t, s]`, bool: tail columns that each query must not see, or None."""
    if t == 1 and starts is None and window is None:
        return None
    columns = torch.arange(s, device=device)
    own = columns[s - t :, None]
    hidden = (columns > own)[None, None]  # [1, 1, t, s]
    if window is not None:
        hidden = hidden | (own - columns >= window)
    if starts is not None:
        hidden = hidden | ((columns < starts[:, None, None, None]) & (columns != own))
    return hidden


def _hidden_in_context(
    t: int, s: int, length: int, starts: Tensor | None, window: int, device: torch.device
) -> Tensor:
    """`[B or 1, 1, t, length]`, bool: context rows that have left each query's window."""
    positions = torch.arange(s - t, s, device=device)  # behind the context
    if starts is not None:
        positions = (positions - starts[:, None]).clamp_min(0)
    context_positions = torch.arange(-length, 0, device=device)
    return (positions.view(-1, 1, t, 1) - context_positions) >= window


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _blocks(rows: int, logits_per_row: int) -> list[slice]:
    """Slices over `rows` so that no block holds more than `MAX_LOGITS` logits."""
    size = max(1, MAX_LOGITS // max(1, logits_per_row))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
