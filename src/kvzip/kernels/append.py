"""Append one token to a tail at a column that is known on the device only."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvzip.kernels.launching import overlaps


@triton.jit
def _append_kernel(
    p_keys, p_values, p_tail_keys, p_tail_values, p_column,
    stride_kb, stride_kh, stride_vb, stride_vh, stride_tb, stride_th, stride_ub, stride_uh,
    H, D: tl.constexpr, EARLY: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid: [B * H]."""
    if EARLY:
        gdc_wait()  # for key and value
        gdc_launch_dependents()
    i_b, i_h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0) % H
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    o_tail = tl.load(p_column) * D + o_d
    b_k = tl.load(p_keys + i_b * stride_kb + i_h * stride_kh + o_d, mask=m_d)
    b_v = tl.load(p_values + i_b * stride_vb + i_h * stride_vh + o_d, mask=m_d)
    tl.store(p_tail_keys + i_b * stride_tb + i_h * stride_th + o_tail, b_k, mask=m_d)
    tl.store(p_tail_values + i_b * stride_ub + i_h * stride_uh + o_tail, b_v, mask=m_d)


def append(
    tail_keys: Tensor, tail_values: Tensor, keys: Tensor, values: Tensor, column: Tensor
) -> None:
    """See `reference.append`."""
    batch, kv_heads, _, head_dim = keys.shape
    early = overlaps(keys.device)
    _append_kernel[(batch * kv_heads,)](
        keys, values, tail_keys, tail_values, column,
        *keys.stride()[:2], *values.stride()[:2],
        *tail_keys.stride()[:2], *tail_values.stride()[:2],
        kv_heads, D=head_dim, EARLY=early, BD=triton.next_power_of_2(head_dim),
        num_warps=1, launch_pdl=early,
    )  # fmt: skip
