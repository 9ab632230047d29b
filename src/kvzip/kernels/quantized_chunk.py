"""Attention to a chunk of quantised rows, inside the kernel of `zipped_attention`.

Codes go into the matrix units as they are: all that is done to an element is to take its bits out
of a word and make a float16 of them, which holds every level (float32 for float32 queries). Scales
belong to rows. They are applied to the columns of the logits for keys, and to those of the
probabilities for values. Centers and gains of the channels are applied to the query before all
rows, and to the result behind them (see `quantization`). Float16 is no narrower than bfloat16 here:
a query is divided by its largest element, and probabilities times scales are at most 2 ** 15.
"""

import triton
import triton.language as tl

from kvzip.kernels.softcap import bounded


@triton.jit
def _shift(b_w, DIRECTION: tl.constexpr, BY: tl.constexpr, ASM: tl.constexpr):
    """Shift two words at once; bits of the one come into the other, and are to be masked."""
    if ASM:
        return tl.inline_asm_elementwise(
            DIRECTION + ".b32 $0, $1, " + BY + ";", "=r,r", [b_w],
            dtype=tl.int16, is_pure=True, pack=2,
        )  # fmt: skip
    return b_w >> int(BY) if DIRECTION == "shr" else b_w << int(BY)


@triton.jit
def _behind_1024(b_w, MASK: tl.constexpr, ASM: tl.constexpr):
    """1024 plus what some of the lowest ten bits say, as float16."""
    if ASM:  # one instruction for two words, which compilers do not find
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x00" + MASK + "00" + MASK + ", 0x64006400, 0xEA;", "=r,r", [b_w],
            dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    return ((b_w & int(MASK, 16)) | 0x6400).to(tl.float16, bitcast=True)


@triton.jit
def levels(b_w, SLICE: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """A slice of int16 words as numbers, exactly."""
    if KIND == "int4":
        b_b = b_w if SLICE < 2 else _shift(b_w, "shr", "8", ASM)
        if SLICE % 2 == 0:
            b_c = _behind_1024(b_b, "0F", ASM) - 1032.0
        else:
            b_c = _behind_1024(b_b, "F0", ASM) * 0.0625 - 72.0
    elif KIND == "int8":
        b_b = b_w if SLICE == 0 else _shift(b_w, "shr", "8", ASM)
        b_c = _behind_1024(b_b, "FF", ASM) - 1152.0
    else:  # exponent and mantissa move to where float16 has them, the exponent 8 too low
        b_b = _shift(b_w, "shl", "8", ASM) if SLICE == 0 else b_w
        bits = (b_b & -0x8000) | (_shift(b_b, "shr", "1", ASM) & 0x3F80)
        b_c = bits.to(tl.float16, bitcast=True) * 256.0
    return b_c.to(DTYPE)


@triton.jit
def _load_scales(p_scales, o_n, m_n, KIND: tl.constexpr, GROUPS: tl.constexpr):
    """Scales of the four quarters of a row, [BN] each: of int4 float16, of others one float32."""
    row = o_n.to(tl.int64)
    if KIND == "int4":  # two float16 in a word
        b_w = tl.load(p_scales + row * (GROUPS // 2), mask=m_n, other=0)
        s0 = b_w.to(tl.int16).to(tl.float16, bitcast=True)
        s1 = (b_w >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        if GROUPS == 4:
            b_w = tl.load(p_scales + row * 2 + 1, mask=m_n, other=0)
            s2 = b_w.to(tl.int16).to(tl.float16, bitcast=True)
            s3 = (b_w >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        else:
            s2, s3 = s1, s1
            s1 = s0
    else:
        s0 = tl.load(p_scales + row, mask=m_n, other=0.0)
        s1, s2, s3 = s0, s0, s0
    return s0, s1, s2, s3


@triton.jit
def _load_query(p_rows, m_m, o_w, bias, p_center, p_gain, factor,
                SLICE: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """Times the gains [BM, BW]; and what the centers add to every logit, [BM]."""
    m_w = o_w < W
    o_d = SLICE * W + o_w
    b_q = tl.load(p_rows[:, None] + o_d[None, :], mask=m_m[:, None] & m_w[None, :], other=0.0)
    b_q = b_q.to(tl.float32)
    b_center = tl.load(p_center + o_d, mask=m_w, other=0.0)
    b_gain = tl.load(p_gain + o_d, mask=m_w, other=0.0) * factor
    return b_q * b_gain[None, :], bias + tl.sum(b_q * b_center[None, :], 1)


@triton.jit
def _store_slice(p_rows, m_m, o_w, acc, total, p_center, p_gain, factor,
                 SLICE: tl.constexpr, W: tl.constexpr):  # fmt: skip
    m_w = o_w < W
    o_d = SLICE * W + o_w
    b_center = tl.load(p_center + o_d, mask=m_w, other=0.0)
    b_gain = tl.load(p_gain + o_d, mask=m_w, other=0.0) * factor
    b_o = acc / total[:, None] * b_gain[None, :] + b_center[None, :]
    tl.store(p_rows[:, None] + o_d[None, :], b_o, mask=m_m[:, None] & m_w[None, :])


@triton.jit
def quantized_chunk(
    p_rows, m_m, p_k, p_k_scales, p_k_center, p_k_gain, p_v, p_v_scales, p_v_center, p_v_gain,
    p_partial, p_lse, first, stop, end, position, scale, inner,
    KIND: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, ASM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Attend to rows `first` to `stop` of a head, and leave a partial result.

    p_rows [BM]: where the queries are; p_partial [BM], p_lse [BM]: where their results go.
    Centers and gains are those of the head. ASM: whether PTX may be used, which no interpreter
    knows; it computes the same.
    """
    SLICES: tl.constexpr = 4 if KIND == "int4" else 2
    W: tl.constexpr = D // SLICES
    BW: tl.constexpr = triton.next_power_of_2(W) if W > 16 else 16
    # levels of at most 1
    factor: tl.constexpr = 1 / 8 if KIND == "int4" else (1 / 127 if KIND == "int8" else 1 / 448)
    DTYPE: tl.constexpr = tl.float32 if p_rows.dtype.element_ty == tl.float32 else tl.float16
    o_w = tl.arange(0, BW)
    bias = tl.zeros([BM], tl.float32)
    b_q0, bias = _load_query(p_rows, m_m, o_w, bias, p_k_center, p_k_gain, factor, 0, W)
    b_q1, bias = _load_query(p_rows, m_m, o_w, bias, p_k_center, p_k_gain, factor, 1, W)
    reach = tl.maximum(tl.max(tl.abs(b_q0), 1), tl.max(tl.abs(b_q1), 1))
    acc0 = tl.zeros([BM, BW], tl.float32)
    acc1 = tl.zeros([BM, BW], tl.float32)
    if SLICES == 4:
        b_q2, bias = _load_query(p_rows, m_m, o_w, bias, p_k_center, p_k_gain, factor, 2, W)
        b_q3, bias = _load_query(p_rows, m_m, o_w, bias, p_k_center, p_k_gain, factor, 3, W)
        reach = tl.maximum(reach, tl.max(tl.abs(b_q2), 1))
        reach = tl.maximum(reach, tl.max(tl.abs(b_q3), 1))
        acc2 = tl.zeros([BM, BW], tl.float32)
        acc3 = tl.zeros([BM, BW], tl.float32)
    share = 1 / tl.where(reach > 0, reach, 1.0)[:, None]
    b_q0 = (b_q0 * share).to(DTYPE)
    b_q1 = (b_q1 * share).to(DTYPE)
    if SLICES == 4:
        b_q2 = (b_q2 * share).to(DTYPE)
        b_q3 = (b_q3 * share).to(DTYPE)
    peak = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for o_tile in tl.range(first, stop, BN):
        o_n = o_tile + tl.arange(0, BN)
        m_n = o_n < stop
        o_nw = o_n.to(tl.int64)[:, None] * W + o_w[None, :]
        m_nw = m_n[:, None] & (o_w < W)[None, :]
        b_w = tl.load(p_k + o_nw, mask=m_nw, other=0)  # [BN, BW]
        s0, s1, s2, s3 = _load_scales(p_k_scales, o_n, m_n, KIND, GROUPS)
        b_k = tl.trans(levels(b_w, 0, KIND, DTYPE, ASM))
        b_s = tl.dot(b_q0, b_k, input_precision=PRECISION)
        if GROUPS == 4:
            b_s *= s0[None, :]
            b_k = tl.trans(levels(b_w, 1, KIND, DTYPE, ASM))
            b_s += tl.dot(b_q1, b_k, input_precision=PRECISION) * s1[None, :]
            b_k = tl.trans(levels(b_w, 2, KIND, DTYPE, ASM))
            b_s += tl.dot(b_q2, b_k, input_precision=PRECISION) * s2[None, :]
            b_k = tl.trans(levels(b_w, 3, KIND, DTYPE, ASM))
            b_s += tl.dot(b_q3, b_k, input_precision=PRECISION) * s3[None, :]
        else:
            b_k = tl.trans(levels(b_w, 1, KIND, DTYPE, ASM))
            b_s = tl.dot(b_q1, b_k, b_s, input_precision=PRECISION) * s0[None, :]
            if GROUPS == 2:
                b_k = tl.trans(levels(b_w, 2, KIND, DTYPE, ASM))
                b_t = tl.dot(b_q2, b_k, input_precision=PRECISION)
                b_k = tl.trans(levels(b_w, 3, KIND, DTYPE, ASM))
                b_s += tl.dot(b_q3, b_k, b_t, input_precision=PRECISION) * s2[None, :]
        b_s = b_s * reach[:, None] + bias[:, None]
        if inner is not None:
            b_s = bounded(b_s, inner)
        m_s = m_n[None, :]
        if WINDOW > 0:
            m_s = m_s & (position[:, None] + (end - o_n)[None, :] < WINDOW)
        b_s = tl.where(m_s, b_s, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(b_s, 1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak * scale)
        shrink = tl.exp2(peak * scale - base)
        b_p = tl.exp2(b_s * scale - base[:, None])
        total = total * shrink + tl.sum(b_p, 1)
        b_p = b_p.to(DTYPE)
        peak = new_peak
        b_w = tl.load(p_v + o_nw, mask=m_nw, other=0)
        s0, s1, s2, s3 = _load_scales(p_v_scales, o_n, m_n, KIND, GROUPS)
        b_t = b_p * s0[None, :].to(DTYPE)
        b_v = levels(b_w, 0, KIND, DTYPE, ASM)
        acc0 = tl.dot(b_t, b_v, acc0 * shrink[:, None], input_precision=PRECISION)
        if GROUPS == 4:
            b_t = b_p * s1[None, :].to(DTYPE)
        b_v = levels(b_w, 1, KIND, DTYPE, ASM)
        acc1 = tl.dot(b_t, b_v, acc1 * shrink[:, None], input_precision=PRECISION)
        if SLICES == 4:
            b_t = b_p * s2[None, :].to(DTYPE)
            b_v = levels(b_w, 2, KIND, DTYPE, ASM)
            acc2 = tl.dot(b_t, b_v, acc2 * shrink[:, None], input_precision=PRECISION)
            if GROUPS == 4:
                b_t = b_p * s3[None, :].to(DTYPE)
            b_v = levels(b_w, 3, KIND, DTYPE, ASM)
            acc3 = tl.dot(b_t, b_v, acc3 * shrink[:, None], input_precision=PRECISION)
    safe = tl.where(total > 0, total, 1.0)
    _store_slice(p_partial, m_m, o_w, acc0, safe, p_v_center, p_v_gain, factor, 0, W)
    _store_slice(p_partial, m_m, o_w, acc1, safe, p_v_center, p_v_gain, factor, 1, W)
    if SLICES == 4:
        _store_slice(p_partial, m_m, o_w, acc2, safe, p_v_center, p_v_gain, factor, 2, W)
        _store_slice(p_partial, m_m, o_w, acc3, safe, p_v_center, p_v_gain, factor, 3, W)
    lse = tl.where(total > 0, peak * scale + tl.log2(safe), float("-inf"))
    tl.store(p_lse, lse, mask=m_m)
