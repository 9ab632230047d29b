"""Matrices times one vector: a decoding step's linear layers, which read each weight once.

Libraries reach three quarters of the memory's speed at this. Here a program takes a row, or a few
if they are short, and many programs wait for memory at a time. Several matrices of one vector are
read in one launch. On devices that can, the first weights are on their way before the kernel that
makes the vector has finished.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
def _times(p_w, tile, rows, p_x, EARLY: tl.constexpr,
           K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Products of a tile of rows with the vector, [R, BK], to be summed up; and its rows."""
    o_r = tile * R + tl.arange(0, R)
    m_r = o_r < rows
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    p_rows = p_w + o_r.to(tl.int64)[:, None] * K + o_k[None, :]
    m_w = m_r[:, None] & m_k[None, :]
    b_w = tl.load(p_rows, mask=m_w, other=0.0, eviction_policy="evict_first")
    if EARLY:
        gdc_wait()  # for the vector
        gdc_launch_dependents()
    b_x = tl.load(p_x + o_k, mask=m_k, other=0.0)
    acc = b_w.to(tl.float32) * b_x.to(tl.float32)[None, :]
    for k in tl.static_range(BK, K, BK):
        m_k = k + o_k < K
        m_w = m_r[:, None] & m_k[None, :]
        b_w = tl.load(p_rows + k, mask=m_w, other=0.0, eviction_policy="evict_first")
        b_x = tl.load(p_x + k + o_k, mask=m_k, other=0.0)
        acc += b_w.to(tl.float32) * b_x.to(tl.float32)[None, :]
    return acc, o_r, m_r


@triton.jit
def _matvec_kernel(
    p_x, p_w0, p_w1, p_w2, p_b0, p_b1, p_b2, p_out, N0, N1, N2,
    EARLY: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid: [tiles of rows of all matrices]. p_b*: None, or what is added to each row."""
    tile = tl.program_id(0)
    tiles0, tiles1 = tl.cdiv(N0, R), tl.cdiv(N1, R)
    p_w, p_b, first, rows = p_w0, p_b0, 0, N0
    if tile >= tiles0 + tiles1:
        p_w, p_b, first, rows = p_w2, p_b2, N0 + N1, N2
        tile -= tiles0 + tiles1
    elif tile >= tiles0:
        p_w, p_b, first, rows = p_w1, p_b1, N0, N1
        tile -= tiles0
    acc, o_r, m_r = _times(p_w, tile, rows, p_x, EARLY, K, R, BK)
    b_out = tl.sum(acc, 1)
    if p_b is not None:
        b_out += tl.load(p_b + o_r, mask=m_r, other=0.0).to(tl.float32)
    tl.store(p_out + first + o_r, b_out.to(p_out.dtype.element_ty), mask=m_r)


@triton.jit
def _gated_matvec_kernel(
    p_x, p_gate, p_up, p_out, N, ACTIVATION: tl.constexpr,
    EARLY: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid: [tiles of rows]."""
    tile = tl.program_id(0)
    gate, o_r, m_r = _times(p_gate, tile, N, p_x, EARLY, K, R, BK)
    up, o_r, m_r = _times(p_up, tile, N, p_x, False, K, R, BK)
    b_gate, b_up = tl.sum(gate, 1), tl.sum(up, 1)  # behind all loads
    if ACTIVATION == "silu":
        b_gate = b_gate * tl.sigmoid(b_gate)
    else:  # the approximation by tanh, which is a sigmoid of twice as much
        inner = 0.7978845608028654 * (b_gate + 0.044715 * b_gate * b_gate * b_gate)
        b_gate = b_gate * tl.sigmoid(2 * inner)
    tl.store(p_out + o_r, (b_gate * b_up).to(p_out.dtype.element_ty), mask=m_r)


def matvec(vector: Tensor, matrices: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """See `reference.matvec`."""
    out = vector.new_empty((*vector.shape[:-1], sum(map(len, matrices))))
    tiling = choose_tiling(vector.shape[-1])
    early = overlaps(vector.device)
    added: list[Tensor | None] = [*biases] or [None] * len(matrices)
    first = 0
    for at in range(0, len(matrices), AT_ONCE):
        some, some_added = [*matrices[at : at + AT_ONCE]], added[at : at + AT_ONCE]
        spare = AT_ONCE - len(some)
        rows = [len(matrix) for matrix in some]
        _matvec_kernel[(sum(triton.cdiv(n, tiling.rows) for n in rows),)](
            vector, *some, *some[:1] * spare, *some_added, *some_added[:1] * spare,
            out[..., first:], *rows, *[0] * spare,
            EARLY=early, K=vector.shape[-1], R=tiling.rows, BK=tiling.columns,
            num_warps=tiling.warps, launch_pdl=early,
        )  # fmt: skip
        first += sum(rows)
    return out


def gated_matvec(vector: Tensor, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """See `reference.gated_matvec`."""
    out = vector.new_empty((*vector.shape[:-1], len(up)))
    tiling = choose_gated_tiling(vector.shape[-1])
    early = overlaps(vector.device)
    _gated_matvec_kernel[(triton.cdiv(len(up), tiling.rows),)](
        vector, gate, up, out, len(up), ACTIVATION=activation,
        EARLY=early, K=vector.shape[-1], R=tiling.rows, BK=tiling.columns,
        num_warps=tiling.warps, launch_pdl=early,
    )  # fmt: skip
    return out


def choose_tiling(columns: int) -> Tiling:
    """Tiles for rows of so many columns; measured on an H200."""
    wide = max(16, triton.next_power_of_2(columns))
    if columns > 16384:
        return Tiling(1, 2048, warps=2)
    return Tiling(max(2, 4096 // wide), min(wide, 2048), warps=4)


def choose_gated_tiling(columns: int) -> Tiling:
    """The same for two matrices at once: half as many rows of each."""
    tiling = choose_tiling(columns)
    return replace(tiling, rows=max(1, tiling.rows // 2))
