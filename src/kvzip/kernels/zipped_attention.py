"""Attention over a packed context and a causal tail: decoding, questions, batches of both.

Memory decides: each retained pair should be read once a step, at the speed of the memory. So heads
are cut into chunks of equal length, however long each head is, as many as the device runs side by
side; a program reads one chunk. The queries of all rows of a batch that share a KV head form one
tile, so that a context is read once for all of them.

    rows      | head 0            | head 1 | head 2                    |
    programs  |   0   |   1   | 2 |   3  |4|   5   |   6   |   7   | 8 |

The tail is read by programs of its own, a stretch of columns each. A second kernel adds the partial
results of a head up, weighted by their share of the softmax (split-KV attention, "flash decoding").

Nothing is planned on the host: the chunks follow from `indptr` and the number of rows (`tilings`),
and the length of the tail may be read on the device, so that a CUDA graph stays valid while a tail
grows. Of a long query, dense kernels take what they can first (`long_query`).
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvzip.kernels.dense import add_sinks, blend
from kvzip.kernels.launching import overlaps
from kvzip.kernels.logits import Logits
from kvzip.kernels.long_query import add_blocks, attend_to_tail, dense_kernel
from kvzip.kernels.quantization import BITS, QuantizedRows
from kvzip.kernels.quantized_chunk import quantized_chunk
from kvzip.kernels.softcap import bounded, exponents
from kvzip.kernels.tilings import (
    choose_quantized_tiling,
    choose_split,
    choose_tiling,
    multiprocessors,
)

MERGED_DIM = 32
"""Columns of the result that one program merges: little for each, so that it is done at once."""


@triton.jit
def _fold(
    acc, peak, total, b_q, p_k, p_v, o_n, stop, o_d, m_s, scale, inner,
    D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add rows `o_n` of `[rows, D]` up to `stop` to the running softmax of the queries.

    acc [BM, BD], peak [BM], total [BM]; m_s [BM, BN] or [1, BN] says who sees what.
    """
    o_kv = o_n.to(tl.int64)[:, None] * D + o_d[None, :]
    m_kv = (o_n < stop)[:, None] & (o_d < D)[None, :]
    b_k = tl.load(p_k + o_kv, mask=m_kv, other=0.0)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
    if inner is not None:
        b_s = bounded(b_s, inner)
    b_s = tl.where(m_s, b_s, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(b_s, 1))
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak * scale)  # rows that saw nothing yet
    shrink = tl.exp2(peak * scale - base)
    b_p = tl.exp2(b_s * scale - base[:, None])
    total = total * shrink + tl.sum(b_p, 1)
    b_v = tl.load(p_v + o_kv, mask=m_kv, other=0.0)
    acc = tl.dot(b_p.to(b_v.dtype), b_v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_peak, total


@triton.jit
def _store_partial(
    p_partial, p_lse, slot, o_m, m_m, o_d, acc, peak, total, scale, M, D: tl.constexpr
):  # fmt: skip
    """Leave a partial result, normalised, and its log-sum-exp to the base of 2."""
    row = slot.to(tl.int64) * M + o_m
    safe = tl.where(total > 0, total, 1.0)
    tl.store(p_partial + row[:, None] * D + o_d[None, :], acc / safe[:, None],
             mask=m_m[:, None] & (o_d < D)[None, :])  # fmt: skip
    lse = tl.where(total > 0, peak * scale + tl.log2(safe), float("-inf"))
    tl.store(p_lse + row, lse, mask=m_m)


# Numbers that vary from question to question: a 1 or a multiple of 16 must not compile anew.
_VARYING = ["tail_length", "chunk", "context_slots", "tail_columns", "splits", "B", "T"]


@triton.jit(do_not_specialize=[name for name in _VARYING if name != "splits"])
def _partial_kernel(
    p_q, p_k, p_k_scales, p_k_center, p_k_gain, p_v, p_v_scales, p_v_center, p_v_gain,
    p_indptr, p_tail_k, p_tail_v, p_tail_length, p_starts, p_partial, p_lse,
    scale, inner, tail_length, chunk, context_slots, tail_columns,
    stride_qb, stride_qh, stride_qt, stride_tb, stride_th, stride_vb, stride_vh,
    B, G, T,
    H: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr,
    LENGTH_ON_DEVICE: tl.constexpr, PADDED: tl.constexpr, EARLY: tl.constexpr,
    PRECISION: tl.constexpr, KIND: tl.constexpr, GROUPS: tl.constexpr, ASM: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Grid: [context slots + tail splits * B * H, tiles of query rows]. A program fills a slot.

    KIND: what the context is quantised to, or None; then there are no scales, centers and gains.
    """
    if EARLY and not LENGTH_ON_DEVICE:
        gdc_wait()  # a recorded step may look at the heads' lengths before, which are long there
    i_p, i_m = tl.program_id(0), tl.program_id(1)
    M = B * G * T
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    acc = tl.zeros([BM, BD], tl.float32)
    peak = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    if i_p < context_slots:
        o_h = tl.arange(0, BH)
        begins = tl.load(p_indptr + o_h, mask=o_h < H, other=0).to(tl.int32)
        ends = tl.load(p_indptr + 1 + o_h, mask=o_h < H, other=0).to(tl.int32)
        last_slots = tl.cumsum(tl.cdiv(ends - begins, chunk), 0)  # behind each head's chunks
        head = tl.sum((last_slots <= i_p).to(tl.int32), 0)
        if head < H:
            end = tl.max(tl.where(o_h == head, ends, 0), 0)
            begin = tl.max(tl.where(o_h == head, begins, 0), 0)
            slot = tl.max(tl.where(o_h < head, last_slots, 0), 0)  # of the head's first chunk
            first = begin + (i_p - slot) * chunk
            stop = tl.minimum(first + chunk, end)
            if EARLY:
                gdc_wait()  # for the queries, if not for all
                gdc_launch_dependents()  # the merge may take a place, and wait there
            # rows of a tile: (batch row, query head of the group, token)
            o_m = i_m * BM + tl.arange(0, BM)
            m_m = o_m < M
            o_b, o_g, o_t = o_m // (G * T), (o_m // T) % G, o_m % T
            o_q = o_b.to(tl.int64) * stride_qb + (head * G + o_g) * stride_qh + o_t * stride_qt
            position = o_t  # of the query, behind the context
            if WINDOW > 0:
                length = tail_length
                if LENGTH_ON_DEVICE:
                    length = tl.load(p_tail_length).to(tl.int32)
                position = length - T + o_t
                if PADDED:
                    start = tl.load(p_starts + o_b, mask=m_m, other=0).to(tl.int32)
                    position = tl.maximum(position - start, 0)
            if KIND is not None:
                row = i_p.to(tl.int64) * M + o_m
                channels = head * D
                quantized_chunk(
                    p_q + o_q, m_m, p_k, p_k_scales, p_k_center + channels, p_k_gain + channels,
                    p_v, p_v_scales, p_v_center + channels, p_v_gain + channels,
                    p_partial + row * D, p_lse + row, first, stop, end, position, scale, inner,
                    KIND, GROUPS, D, WINDOW, PRECISION, ASM, BM, BN,
                )  # fmt: skip
            else:
                b_q = tl.load(p_q + o_q[:, None] + o_d[None, :],
                              mask=m_m[:, None] & m_d[None, :], other=0.0)  # fmt: skip
                for o_tile in tl.range(first, stop, BN):
                    o_n = o_tile + tl.arange(0, BN)
                    m_s = (o_n < stop)[None, :]
                    if WINDOW > 0:
                        m_s = m_s & (position[:, None] + (end - o_n)[None, :] < WINDOW)
                    acc, peak, total = _fold(
                        acc, peak, total, b_q, p_k, p_v, o_n, stop, o_d, m_s, scale, inner,
                        D, PRECISION,
                    )  # fmt: skip
                _store_partial(p_partial, p_lse, i_p, o_m, m_m, o_d, acc, peak, total, scale, M, D)
    else:
        i_tail = i_p - context_slots
        i_split, i_b, i_h = i_tail // (B * H), (i_tail // H) % B, i_tail % H
        # rows of a tile: (query head of the group, token) of one batch row
        o_r = i_m * BM + tl.arange(0, BM)
        m_m = o_r < G * T
        if i_m * BM < G * T:
            if EARLY:
                gdc_wait()
                gdc_launch_dependents()
            length = tail_length
            if LENGTH_ON_DEVICE:
                length = tl.load(p_tail_length).to(tl.int32)
            o_g, o_t = o_r // T, o_r % T
            own = length - T + o_t
            start = 0
            if PADDED:
                start = tl.load(p_starts + i_b).to(tl.int32)
            o_q = i_b.to(tl.int64) * stride_qb + (i_h * G + o_g) * stride_qh + o_t * stride_qt
            b_q = tl.load(p_q + o_q[:, None] + o_d[None, :],
                          mask=m_m[:, None] & m_d[None, :], other=0.0)  # fmt: skip
            p_keys = p_tail_k + i_b.to(tl.int64) * stride_tb + i_h * stride_th
            p_values = p_tail_v + i_b.to(tl.int64) * stride_vb + i_h * stride_vh
            first = i_split * tail_columns
            # a tile of queries sees nothing behind the last of its tokens
            reach = tl.max(tl.where(m_m, own, 0), 0) + 1
            stop = tl.minimum(tl.minimum(first + tail_columns, length), reach)
            for o_tile in tl.range(first, stop, BT):
                o_n = o_tile + tl.arange(0, BT)
                m_s = (o_n < stop)[None, :] & (o_n[None, :] <= own[:, None])
                if PADDED:
                    m_s = m_s & ((o_n >= start)[None, :] | (o_n[None, :] == own[:, None]))
                if WINDOW > 0:
                    m_s = m_s & (own[:, None] - o_n[None, :] < WINDOW)
                acc, peak, total = _fold(
                    acc, peak, total, b_q, p_keys, p_values, o_n, stop, o_d, m_s, scale, inner,
                    D, PRECISION,
                )  # fmt: skip
            slot = context_slots + i_split * H + i_h
            o_m = i_b * G * T + o_r
            _store_partial(p_partial, p_lse, slot, o_m, m_m, o_d, acc, peak, total, scale, M, D)


@triton.jit(do_not_specialize=[name for name in _VARYING if name[:4] != "tail"])
def _merge_kernel(
    p_partial, p_lse, p_indptr, p_sinks, p_out, p_out_lse, chunk, context_slots, splits,
    stride_ob, stride_oh, stride_ot,
    B, G, T,
    H: tl.constexpr, D: tl.constexpr, EARLY: tl.constexpr,
    BR: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Grid: [tiles of query rows, H, tiles of D]. Adds up partials, BS slots at a time.

    p_sinks: None, or logits [Hq] of one more column, which adds nothing but its share.
    """
    i_r, i_h, i_d = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    M = B * G * T
    o_r = i_r * BR + tl.arange(0, BR)
    o_d = i_d * BD + tl.arange(0, BD)
    m_r, m_d = o_r < M, o_d < D
    o_h = tl.arange(0, BH)
    begins = tl.load(p_indptr + o_h, mask=o_h < H, other=0).to(tl.int32)
    ends = tl.load(p_indptr + 1 + o_h, mask=o_h < H, other=0).to(tl.int32)
    chunks = tl.cdiv(ends - begins, chunk)
    first = tl.sum(tl.where(o_h < i_h, chunks, 0), 0)
    count = tl.sum(tl.where(o_h == i_h, chunks, 0), 0)
    acc = tl.zeros([BR, BD], tl.float32)
    peak = tl.full([BR], float("-inf"), tl.float32)
    total = tl.zeros([BR], tl.float32)
    if EARLY:
        gdc_wait()  # for all partials; the lengths above were there before these
        gdc_launch_dependents()
    for o_slot in tl.range(0, count + splits, BS):
        o_n = o_slot + tl.arange(0, BS)
        slot = tl.where(o_n < count, first + o_n, context_slots + (o_n - count) * H + i_h)
        m_s = (o_n < count + splits)[:, None] & m_r[None, :]
        row = slot.to(tl.int64)[:, None] * M + o_r[None, :]  # [BS, BR]
        b_lse = tl.load(p_lse + row, mask=m_s, other=float("-inf"))
        b_part = tl.load(p_partial + row[:, :, None] * D + o_d[None, None, :],
                         mask=m_s[:, :, None] & m_d[None, None, :], other=0.0)  # fmt: skip
        new_peak = tl.maximum(peak, tl.max(b_lse, 0))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        shrink = tl.exp2(peak - base)
        weight = tl.exp2(b_lse - base[None, :])  # [BS, BR]
        total = total * shrink + tl.sum(weight, 0)
        acc = acc * shrink[:, None] + tl.sum(b_part * weight[:, :, None], 0)
        peak = new_peak
    o_b, o_g, o_t = o_r // (G * T), (o_r // T) % G, o_r % T
    if p_sinks is not None:
        sink = tl.load(p_sinks + i_h * G + o_g).to(tl.float32) * 1.4426950408889634
        new_peak = tl.maximum(peak, sink)
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.exp2(sink - new_peak)
        acc = acc * shrink[:, None]
        peak = new_peak
    p_rows = p_out + o_b.to(tl.int64) * stride_ob + (i_h * G + o_g) * stride_oh + o_t * stride_ot
    safe = tl.where(total > 0, total, 1.0)
    tl.store(p_rows[:, None] + o_d[None, :], (acc / safe[:, None]).to(p_out.dtype.element_ty),
             mask=m_r[:, None] & m_d[None, :])  # fmt: skip
    lse = tl.where(total > 0, (peak + tl.log2(safe)) * 0.6931471805599453, float("-inf"))
    tl.store(p_out_lse + ((o_b * H + i_h) * G + o_g).to(tl.int64) * T + o_t, lse, mask=m_r)


@dataclass(frozen=True)
class Context:
    """What of the arguments concerns the context.

    Attributes:
        keys: what the kernel takes for the keys: the rows, or codes, scales, center and gain.
        values: likewise.
        indptr: `[H + 1]`, int64.
        rows: rows of all heads, spare ones included.
        kind: what they are quantised to, or None.
        groups: scales of a row, 0 without.
    """

    keys: tuple[Tensor | None, ...]
    values: tuple[Tensor | None, ...]
    indptr: Tensor
    rows: int
    kind: str | None = None
    groups: int = 0

    @classmethod
    def plain(cls, keys: Tensor, values: Tensor, indptr: Tensor) -> "Context":
        """Keys and values, `[rows, D]`."""
        return cls((keys, None, None, None), (values, None, None, None), indptr, len(keys))

    @classmethod
    def quantized(cls, keys: QuantizedRows, values: QuantizedRows, indptr: Tensor) -> "Context":
        """Quantised keys and values; two scales in float16 are one word."""
        word = torch.int32 if keys.dtype == "int4" else torch.float32
        key_parts, value_parts = (
            (rows.codes, rows.scales.view(word), rows.center, rows.gain) for rows in (keys, values)
        )
        groups = keys.scales.shape[1]
        return cls(key_parts, value_parts, indptr, len(keys), keys.dtype, groups)


@dataclass(frozen=True)
class TailArguments:
    """What of the arguments concerns the tail (see `reference.zipped_attention`).

    Attributes:
        keys: `[B, H, s, D]`.
        values: `[B, H, s, D]`.
        length: `[1]`, int64, columns in use, or None for all.
        starts: `[B]`, int64, where each row's padding ends, or None.
        window: tokens that a query sees, or None for all.
    """

    keys: Tensor
    values: Tensor
    length: Tensor | None
    starts: Tensor | None
    window: int | None

    @property
    def plain(self) -> bool:
        """Whether its last columns are the queries' own, and each sees all in front of it."""
        return self.length is None and self.starts is None and self.window is None


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
    """See `reference.zipped_attention`; `indptr`, `tail_length` and `starts` on the device."""
    tail = TailArguments(tail_keys, tail_values, tail_length, starts, window)
    attend = dense_kernel(query, logits) if tail.plain else None
    if attend is None:
        return _split_kv(query, Context.plain(keys, values, indptr), tail, logits)[0]
    out, lse = attend_to_tail(query, tail_keys, tail_values, logits.scale, attend)
    out, left = add_blocks(
        out, lse, query, keys, values, indptr, logits.scale, attend, counts=counts
    )
    context = Context.plain(left.keys, left.values, left.indptr)
    return _add_context(out, left.lse, query, context, logits)


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
    """See `reference.quantized_attention`; `indptr`, `tail_length` and `starts` on the device."""
    tail = TailArguments(tail_keys, tail_values, tail_length, starts, window)
    context = Context.quantized(keys, values, indptr)
    attend = dense_kernel(query, logits) if tail.plain else None
    if attend is None:
        return _split_kv(query, context, tail, logits)[0]
    out, lse = attend_to_tail(query, tail_keys, tail_values, logits.scale, attend)
    return _add_context(out, lse, query, context, logits)


def _add_context(
    out: Tensor, lse: Tensor, query: Tensor, context: Context, logits: Logits
) -> Tensor:
    """A long query's result so far, with a context and the sinks added."""
    rest = _split_kv(query, context, None, replace(logits, sinks=None))
    return add_sinks(*blend(out, lse, *rest), logits.sinks).to(query.dtype)


def _split_kv(
    query: Tensor, context: Context, tail: TailArguments | None, logits: Logits
) -> tuple[Tensor, Tensor]:
    """Attention over a packed context and, if there is one, a tail: both kernels.

    Returns:
        `[B, Hq, t, D]` in the dtype of `query`, and the log-sum-exp `[B, Hq, t]`, float32.
    """
    batch, query_heads, t, head_dim = query.shape
    kv_heads = len(context.indptr) - 1
    group = query_heads // kv_heads
    m, columns = batch * group * t, tail.keys.shape[2] if tail else 0
    processors = multiprocessors(query.device)
    if context.kind is None:
        tiling = choose_tiling(m, head_dim, query.element_size())
    else:
        tiling = choose_quantized_tiling(m, head_dim, query.element_size(), BITS[context.kind])
    split = choose_split(
        tiling, processors,
        batch=batch, kv_heads=kv_heads, m=m, rows=context.rows, columns=columns,
    )  # fmt: skip
    slots = split.context_slots + split.tail_slots * kv_heads
    partial = query.new_empty((slots, m, head_dim), dtype=torch.float32)
    lse = query.new_empty((slots, m), dtype=torch.float32)
    # tokens before heads in memory, as the output projection wants them
    out = query.new_empty((batch, t, query_heads, head_dim)).transpose(1, 2)
    out_lse = query.new_empty((batch, query_heads, t), dtype=torch.float32)
    if query.stride(-1) != 1:
        query = query.contiguous()
    tail_keys, tail_values = (tail.keys, tail.values) if tail else (query, query)
    tail_length, starts = (tail.length, tail.starts) if tail else (None, None)
    block_d, block_h = max(16, triton.next_power_of_2(head_dim)), triton.next_power_of_2(kv_heads)
    early = overlaps(query.device)
    scale, inner = exponents(logits)
    _partial_kernel[split.context_slots + split.tail_slots * batch * kv_heads, split.tiles](
        query, *context.keys, *context.values, context.indptr, tail_keys, tail_values, tail_length,
        starts, partial, lse, scale, inner, columns, split.chunk, split.context_slots,
        split.tail_columns,
        *query.stride()[:3], *tail_keys.stride()[:2], *tail_values.stride()[:2],
        batch, group, t,
        H=kv_heads, D=head_dim, WINDOW=(tail and tail.window) or 0,
        LENGTH_ON_DEVICE=tail_length is not None, PADDED=starts is not None, EARLY=early,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        KIND=context.kind, GROUPS=context.groups, ASM=query.device.type == "cuda",
        BM=tiling.block_m, BN=tiling.block_n, BT=tiling.tail_n, BD=block_d, BH=block_h,
        num_warps=tiling.warps, num_stages=tiling.stages, launch_pdl=early,
    )  # fmt: skip
    dim_tiles = triton.cdiv(head_dim, MERGED_DIM)
    few = m * kv_heads * dim_tiles <= 32 * processors
    merged_rows, merged_slots = (1, 128) if few else (32, 2)
    _merge_kernel[triton.cdiv(m, merged_rows), kv_heads, dim_tiles](
        partial, lse, context.indptr, logits.sinks, out, out_lse, split.chunk, split.context_slots,
        split.tail_slots, *out.stride()[:3], batch, group, t,
        H=kv_heads, D=head_dim, EARLY=early,
        BR=merged_rows, BS=merged_slots, BD=MERGED_DIM, BH=block_h,
        launch_pdl=early,
    )  # fmt: skip
    return out, out_lse
