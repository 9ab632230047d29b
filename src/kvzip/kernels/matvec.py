"""Matrices times one vector: a decoding step's linear layers, which read each weight once.

Libraries reach three quarters of the memory's speed at this. Here a program takes a row, or a few
if they are short, and many programs wait for memory at a time. Several matrices of one vector are
read in one launch. On devices that can, the first weights are on their way before the kernel that
makes the vector has finished. Matrices may be codes of 8 bits, whose rows have scales: these belong
behind the sums.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvzip.kernels.launching import overlaps

AT_ONCE = 3
"""Matrices of one launch."""


@dataclass(frozen=True)
class Tiling:
    """How a matrix is cut up: rows and columns of a tile, and warps that read it."""

    rows: int
    columns: int
    warps: int


@triton.jit
def _numbers(b_w, ASM: tl.constexpr):
    """Weights or codes in float32, exactly.

    ASM: whether PTX may be used, which no interpreter knows; it computes the same.
    """
    if b_w.dtype == tl.int8 and ASM:  # bits of 2 ** 23 + 128 + code: devices convert slowly
        return tl.inline_asm_elementwise(
            """{.reg .b32 u; xor.b32 u, $4, 0x80808080;
            prmt.b32 $0, u, 0x4B000000, 0x7650; prmt.b32 $1, u, 0x4B000000, 0x7651;
            prmt.b32 $2, u, 0x4B000000, 0x7652; prmt.b32 $3, u, 0x4B000000, 0x7653;}""",
            "=r,=r,=r,=r,r", [b_w], dtype=tl.float32, is_pure=True, pack=4,
        ) - 8388736.0  # fmt: skip
    return b_w.to(tl.float32)


@triton.jit
def _times(p_w, tile, rows, p_x, EARLY: tl.constexpr, ASM: tl.constexpr,
           K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Products of a tile of rows with the vector, [R, BK], to be summed up; and its rows."""
    o_r = tile * R + tl.arange(0, R)
    m_r = o_r < rows
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    o_w = o_k
    if p_w.dtype.element_ty == tl.int8:  # a thread is to read the columns of its part of the vector
        o_w = tl.max_contiguous(o_k, 8)
    p_rows = p_w + o_r.to(tl.int64)[:, None] * K + o_w[None, :]
    m_w = m_r[:, None] & m_k[None, :]
    b_w = tl.load(p_rows, mask=m_w, other=0.0, eviction_policy="evict_first")
    if EARLY:
        gdc_wait()  # for the vector
        gdc_launch_dependents()
    b_x = tl.load(p_x + o_k, mask=m_k, other=0.0)
    acc = _numbers(b_w, ASM) * b_x.to(tl.float32)[None, :]
    for k in tl.static_range(BK, K, BK):
        m_k = k + o_k < K
        m_w = m_r[:, None] & m_k[None, :]
        b_w = tl.load(p_rows + k, mask=m_w, other=0.0, eviction_policy="evict_first")
        b_x = tl.load(p_x + k + o_k, mask=m_k, other=0.0)
        acc += _numbers(b_w, ASM) * b_x.to(tl.float32)[None, :]
    return acc, o_r, m_r


@triton.jit
def _matvec_kernel(
    p_x, p_w0, p_w1, p_w2, p_s0, p_s1, p_s2, p_b0, p_b1, p_b2, p_out, N0, N1, N2,
    EARLY: tl.constexpr, ASM: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid: [tiles of rows of all matrices]. p_s*, p_b*: None, or what scales, is added to rows."""
    tile = tl.program_id(0)
    tiles0, tiles1 = tl.cdiv(N0, R), tl.cdiv(N1, R)
    p_w, p_s, p_b, first, rows = p_w0, p_s0, p_b0, 0, N0
    if tile >= tiles0 + tiles1:
        p_w, p_s, p_b, first, rows = p_w2, p_s2, p_b2, N0 + N1, N2
        tile -= tiles0 + tiles1
    elif tile >= tiles0:
        p_w, p_s, p_b, first, rows = p_w1, p_s1, p_b1, N0, N1
        tile -= tiles0
    acc, o_r, m_r = _times(p_w, tile, rows, p_x, EARLY, ASM, K, R, BK)
    b_out = tl.sum(acc, 1)
    if p_s is not None:
        b_out *= tl.load(p_s + o_r, mask=m_r, other=0.0).to(tl.float32)
    if p_b is not None:
        b_out += tl.load(p_b + o_r, mask=m_r, other=0.0).to(tl.float32)
    tl.store(p_out + first + o_r, b_out.to(p_out.dtype.element_ty), mask=m_r)


@triton.jit
def _gated_matvec_kernel(
    p_x, p_gate, p_up, p_s_gate, p_s_up, p_out, N, ACTIVATION: tl.constexpr,
    EARLY: tl.constexpr, ASM: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid: [tiles of rows]. p_s_*: None, or what scales rows."""
    tile = tl.program_id(0)
    gate, o_r, m_r = _times(p_gate, tile, N, p_x, EARLY, ASM, K, R, BK)
    up, o_r, m_r = _times(p_up, tile, N, p_x, False, ASM, K, R, BK)
    b_gate, b_up = tl.sum(gate, 1), tl.sum(up, 1)  # behind all loads
    if p_s_gate is not None:
        b_gate *= tl.load(p_s_gate + o_r, mask=m_r, other=0.0).to(tl.float32)
        b_up *= tl.load(p_s_up + o_r, mask=m_r, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        b_gate = b_gate * tl.sigmoid(b_gate)
    else:  # the approximation by tanh, which is a sigmoid of twice as much
        inner = 0.7978845608028654 * (b_gate + 0.044715 * b_gate * b_gate * b_gate)
        b_gate = b_gate * tl.sigmoid(2 * inner)
    tl.store(p_out + o_r, (b_gate * b_up).to(p_out.dtype.element_ty), mask=m_r)


def matvec(
    vector: Tensor,
    matrices: Sequence[Tensor],
    biases: Sequence[Tensor],
    scales: Sequence[Tensor] = (),
) -> Tensor:
    """See `reference.matvec`."""
    out = vector.new_empty((*vector.shape[:-1], sum(map(len, matrices))))
    tiling = choose_tiling(vector.shape[-1], matrices[0].dtype)
    early = overlaps(vector.device)
    first = 0
    for at in range(0, len(matrices), AT_ONCE):
        some = matrices[at : at + AT_ONCE]
        rows = [len(matrix) for matrix in some]
        _matvec_kernel[(sum(triton.cdiv(n, tiling.rows) for n in rows),)](
            vector, *_filled(some), *_filled(scales[at : at + AT_ONCE]),
            *_filled(biases[at : at + AT_ONCE]), out[..., first:],
            *rows, *[0] * (AT_ONCE - len(rows)),
            EARLY=early, ASM=vector.is_cuda, K=vector.shape[-1], R=tiling.rows,
            BK=tiling.columns, num_warps=tiling.warps, launch_pdl=early,
        )  # fmt: skip
        first += sum(rows)
    return out


def _filled(some: Sequence[Tensor]) -> list[Tensor | None]:
    """As many as a launch takes: the first once more where there are fewer, or None if none."""
    return [*some, *[some[0] if some else None] * (AT_ONCE - len(some))]


def gated_matvec(
    vector: Tensor, gate: Tensor, up: Tensor, activation: str, scales: Sequence[Tensor] = ()
) -> Tensor:
    """See `reference.gated_matvec`."""
    out = vector.new_empty((*vector.shape[:-1], len(up)))
    tiling = choose_gated_tiling(vector.shape[-1], gate.dtype)
    early = overlaps(vector.device)
    _gated_matvec_kernel[(triton.cdiv(len(up), tiling.rows),)](
        vector, gate, up, *(scales or (None, None)), out, len(up), ACTIVATION=activation,
        EARLY=early, ASM=vector.is_cuda, K=vector.shape[-1], R=tiling.rows,
        BK=tiling.columns, num_warps=tiling.warps, launch_pdl=early,
    )  # fmt: skip
    return out


def choose_tiling(columns: int, dtype: torch.dtype) -> Tiling:
    """Tiles for rows of so many columns of weights.

    Measured on an H200 with weights of 16 bits. Those of 8 bits come in tiles of as many bytes.
    """
    wide = max(16, triton.next_power_of_2(columns))
    if columns > 16384:
        tiling = Tiling(1, 2048, warps=2)
    else:
        tiling = Tiling(max(2, 4096 // wide), min(wide, 2048), warps=4)
    return replace(tiling, rows=2 * tiling.rows) if dtype == torch.int8 else tiling


def choose_gated_tiling(columns: int, dtype: torch.dtype) -> Tiling:
    """The same for two matrices at once: half as many rows of each."""
    tiling = choose_tiling(columns, dtype)
    return replace(tiling, rows=max(1, tiling.rows // 2))
