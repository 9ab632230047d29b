"""Scores by reconstruction without the [queries x keys] matrix.

Two passes over the keys. The first finds each query's log-sum-exp over all columns that it sees,
[prefix ; chunk ; repeat input]. The second computes the chunk's logits again, a tile of keys
against all queries of its KV head, and keeps the largest logit minus log-sum-exp of each key.
Sums are float32; a few hundred kilobytes are allocated.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvzip.kernels.logits import Logits
from kvzip.kernels.softcap import LOG2_E, bounded, exponents


@triton.jit
def _add_tile(
    peak, total, b_q, p_keys, o_n, end, o_t, o_d, scale, inner,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys to the running log-sum-exp: peak [BT], total [BT].

    MASKED: keys from `end` on, and those behind the query's own token `o_t`, are left out.
    """
    p_rows = p_keys + o_n[:, None].to(tl.int64) * D + o_d[None, :]
    if MASKED:
        b_k = tl.load(p_rows, mask=(o_n < end)[:, None] & (o_d < D)[None, :], other=0.0)
    elif D == BD:
        b_k = tl.load(p_rows)
    else:
        b_k = tl.load(p_rows, mask=(o_d < D)[None, :], other=0.0)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BT, BN]
    if inner is not None:
        b_s = bounded(b_s, inner)
    if MASKED:
        m_s = (o_n < end)[None, :] & (o_n[None, :] <= o_t[:, None])
        b_s = tl.where(m_s, b_s, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(b_s, 1))
    base = new_peak * scale
    if MASKED:
        base = tl.where(new_peak == float("-inf"), 0.0, base)  # rows that saw nothing yet
    total = total * tl.exp2(peak * scale - base) + tl.sum(tl.exp2(b_s * scale - base[:, None]), 1)
    return new_peak, total


@triton.jit
def _add_columns(
    peak, total, b_q, p_keys, full, end, o_t, o_d, scale, inner,
    PRECISION: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Add keys 0 to `end`, the first `full` of them in tiles that every query sees whole."""
    for o_tile in tl.range(0, full, BN):
        peak, total = _add_tile(peak, total, b_q, p_keys, o_tile + tl.arange(0, BN), end,
                                o_t, o_d, scale, inner, False, PRECISION, D, BD)  # fmt: skip
    for o_tile in tl.range(full, end, BN):
        peak, total = _add_tile(peak, total, b_q, p_keys, o_tile + tl.arange(0, BN), end,
                                o_t, o_d, scale, inner, True, PRECISION, D, BD)  # fmt: skip
    return peak, total


@triton.jit(do_not_specialize=["P", "M", "T"])
def _lse_kernel(
    p_q, p_prefix, p_chunk, p_repeat, p_lse, scale, inner,
    stride_qh, stride_qt, stride_ph, stride_ch, stride_rh,
    P, M, T, G,
    D: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid: [tiles of queries, Hq]. Log-sum-exp of each query, to the base of 2."""
    # the last tiles see the most columns: start them first
    i_t, i_q = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    i_h = (i_q // G).to(tl.int64)
    o_t = i_t * BT + tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    m_t = o_t < T
    b_q = tl.load(p_q + i_q.to(tl.int64) * stride_qh + o_t[:, None] * stride_qt + o_d[None, :],
                  mask=m_t[:, None] & (o_d < D)[None, :], other=0.0)  # fmt: skip
    peak = tl.full([BT], float("-inf"), tl.float32)
    total = tl.zeros([BT], tl.float32)
    o_all = tl.full([BT], 2147483647, tl.int32)  # prefix and chunk are seen whole
    peak, total = _add_columns(peak, total, b_q, p_chunk + i_h * stride_ch, M // BN * BN, M,
                               o_all, o_d, scale, inner, PRECISION, D, BN, BD)  # fmt: skip
    peak, total = _add_columns(peak, total, b_q, p_repeat + i_h * stride_rh,
                               i_t * BT, tl.minimum(T, i_t * BT + BT),
                               o_t, o_d, scale, inner, PRECISION, D, BN, BD)  # fmt: skip
    peak, total = _add_columns(peak, total, b_q, p_prefix + i_h * stride_ph, P // BN * BN, P,
                               o_all, o_d, scale, inner, PRECISION, D, BN, BD)  # fmt: skip
    tl.store(p_lse + i_q * T + o_t, peak * scale + tl.log2(total), mask=m_t)


@triton.jit(do_not_specialize=["M", "T", "tiles_per_split"])
def _max_kernel(
    p_q, p_chunk, p_lse, p_weights, p_best, scale, inner,
    stride_qh, stride_qt, stride_ch,
    M, T, G, H, tiles_per_split,
    D: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid: [tiles of keys, H, splits of the queries]. Largest log-probability of each key.

    p_weights: None, or weights [Hq, M] of the keys, as logarithms to the base of 2.
    """
    i_n, i_h, i_s = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    o_n = i_n * BN + tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    m_n, m_d = o_n < M, o_d < D
    b_k = tl.load(p_chunk + i_h * stride_ch + o_n[:, None].to(tl.int64) * D + o_d[None, :],
                  mask=m_n[:, None] & m_d[None, :], other=0.0)  # fmt: skip
    tiles = tl.cdiv(T, BT)
    best = tl.full([BN, BT], float("-inf"), tl.float32)
    first = i_s * tiles_per_split
    for i_tile in tl.range(first, tl.minimum(first + tiles_per_split, tiles * G)):
        i_q = i_h * G + i_tile // tiles
        o_t = (i_tile % tiles) * BT + tl.arange(0, BT)
        m_t = o_t < T
        b_q = tl.load(p_q + i_q * stride_qh + o_t[:, None] * stride_qt + o_d[None, :],
                      mask=m_t[:, None] & m_d[None, :], other=0.0)  # fmt: skip
        lse = tl.load(p_lse + i_q * T + o_t, mask=m_t, other=float("inf"))
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BN, BT]
        if inner is not None:
            b_s = bounded(b_s, inner)
        b_s = b_s * scale - lse[None, :]
        if p_weights is not None:
            b_s += tl.load(p_weights + i_q * M + o_n, mask=m_n, other=0.0)[:, None]
        best = tl.maximum(best, b_s)
    tl.store(p_best + (i_s * H + i_h) * M + o_n, tl.max(best, 1), mask=m_n)


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
    """See `reference.reconstruction_score`."""
    query_heads, t, head_dim = query.shape
    kv_heads, p, _ = prefix_keys.shape
    m, group = chunk_keys.shape[1], query_heads // kv_heads
    block_d = max(16, triton.next_power_of_2(head_dim))
    row = block_d * query.element_size()  # bytes
    block_t, warps, stages = (64, 4, 2) if row <= 512 else (32, 4, 2)
    scale, inner = exponents(logits)
    lse = query.new_empty((query_heads, t), dtype=torch.float32)
    _lse_kernel[triton.cdiv(t, block_t), query_heads](
        query, prefix_keys, chunk_keys, repeat_keys, lse, scale, inner,
        *query.stride()[:2], prefix_keys.stride(0), chunk_keys.stride(0), repeat_keys.stride(0),
        p, m, t, group,
        D=head_dim, PRECISION=_precision(query), BT=block_t, BN=block_t, BD=block_d,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if logits.sinks is not None:
        lse = torch.logaddexp2(lse, logits.sinks.float()[:, None] * LOG2_E)
    return largest_probabilities(
        query, chunk_keys, lse, logits, query_weights=query_weights, key_weights=key_weights
    )


def largest_probabilities(
    query: Tensor,
    keys: Tensor,
    lse: Tensor,
    logits: Logits,
    *,
    query_weights: Tensor | None = None,
    key_weights: Tensor | None = None,
) -> Tensor:
    """The largest probability that each key gets from any query of its KV head.

    Args:
        query: `[Hq, t, D]`.
        keys: `[H, m, D]`; every query sees them all.
        lse: `[Hq, t]`, float32: log-sum-exp, to the base of 2, of all logits of a query; written to
            if there are weights.
        logits: what to make of the products of queries and keys.
        query_weights: as in `reference.reconstruction_score`.
        key_weights: likewise.

    Returns:
        `[H, m]`, float32, times weights.
    """
    query_heads, t, head_dim = query.shape
    kv_heads, m, _ = keys.shape
    group = query_heads // kv_heads
    block_d = max(16, triton.next_power_of_2(head_dim))
    row = block_d * query.element_size()  # bytes
    scale, inner = exponents(logits)
    if query_weights is not None:  # p·w = 2 ** (logit - (lse - log2 w))
        lse -= query_weights.float().log2()
    log_weights = None if key_weights is None else key_weights.float().log2().contiguous()
    block_n, block_t, warps, stages = (128, 64, 4, 3) if row <= 256 else (64, 32, 4, 2)
    key_tiles, query_tiles = triton.cdiv(m, block_n), group * triton.cdiv(t, block_t)
    splits = max(1, min(query_tiles, 2 * _programs(query.device) // (key_tiles * kv_heads)))
    best = query.new_empty((splits, kv_heads, m), dtype=torch.float32)
    _max_kernel[key_tiles, kv_heads, splits](
        query, keys, lse, log_weights, best, scale, inner,
        *query.stride()[:2], keys.stride(0),
        m, t, group, kv_heads, triton.cdiv(query_tiles, splits),
        D=head_dim, PRECISION=_precision(query), BN=block_n, BT=block_t, BD=block_d,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return best.amax(0).exp2_()


def _precision(query: Tensor) -> str:
    return "ieee" if query.dtype == torch.float32 else "tf32"


def _programs(device: torch.device) -> int:
    """Programs that fill the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 64  # Triton's interpreter
