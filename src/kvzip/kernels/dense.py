"""Dense attention by the fastest kernel that PyTorch has for it, and sums of such results.

On Hopper and later that is cuDNN, before it FlashAttention-2. Both also say the log-sum-exp of the
logits, by which attention over two sets of keys is blended from attention over each.
"""

from collections.abc import Callable
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvzip.kernels import reference
from kvzip.kernels.logits import Logits

Attend = Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]
"""query `[B, Hq, t, D]`, keys, values `[B, H, s, D]`, scale, causal -> output, lse `[B, Hq, t]`."""


@triton.jit(do_not_specialize=["T"])
def _blend_kernel(
    p_one, p_other, p_one_lse, p_other_lse, p_lse,
    stride_ab, stride_ah, stride_at, stride_bb, stride_bh, stride_bt,
    HQ, T,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid: [tiles of tokens, B * Hq]. `one` becomes the sum, weighted by the softmax shares."""
    i_t, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // HQ, i_bh % HQ
    o_t = i_t * BT + tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    m_t = o_t < T
    m_td = m_t[:, None] & (o_d < D)[None, :]
    one_lse = tl.load(p_one_lse + i_bh * T + o_t, mask=m_t, other=0.0)
    other_lse = tl.load(p_other_lse + i_bh * T + o_t, mask=m_t, other=0.0)
    peak = tl.maximum(one_lse, other_lse)
    total = tl.exp(one_lse - peak) + tl.exp(other_lse - peak)
    share = (tl.exp(other_lse - peak) / total)[:, None]
    tl.store(p_lse + i_bh * T + o_t, peak + tl.log(total), mask=m_t)
    p_a = p_one + i_b * stride_ab + i_h * stride_ah + o_t[:, None] * stride_at + o_d[None, :]
    p_b = p_other + i_b * stride_bb + i_h * stride_bh + o_t[:, None] * stride_bt + o_d[None, :]
    b_a = tl.load(p_a, mask=m_td, other=0.0).to(tl.float32)
    b_b = tl.load(p_b, mask=m_td, other=0.0).to(tl.float32)
    tl.store(p_a, (b_a + (b_b - b_a) * share).to(p_one.dtype.element_ty), mask=m_td)


def blend(one: Tensor, one_lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from attention over each; the result is written to `one`.

    Args:
        one: `[B, Hq, t, D]`; every query has seen something.
        one_lse: `[B, Hq, t]`, float32: log-sum-exp of its logits.
        other: `[B, Hq, t, D]`.
        other_lse: `[B, Hq, t]`, float32; -inf where nothing was seen.

    Returns:
        `one`, and the log-sum-exp of both.
    """
    batch, heads, t, dim = one.shape
    one_lse = one_lse.contiguous()
    lse = torch.empty_like(one_lse)
    _blend_kernel[triton.cdiv(t, 32), batch * heads](
        one, other, one_lse, other_lse.contiguous(), lse,
        *one.stride()[:3], *other.stride()[:3], heads, t,
        D=dim, BT=32, BD=triton.next_power_of_2(dim),
    )  # fmt: skip
    return one, lse


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """Attention with one more column in the softmax that adds nothing; written to `out`.

    Args:
        out: `[B, Hq, t, D]`, attention without that column.
        lse: `[B, Hq, t]`, float32: log-sum-exp of its logits.
        sinks: `[Hq]`, logits of the column, or None: then nothing is done.
    """
    if sinks is None:
        return out
    return out.mul_((lse - sinks.float()[:, None]).sigmoid_()[..., None])


@cache
def fastest(device: torch.device, dtype: torch.dtype, head_dim: int) -> Attend | None:
    """The first of cuDNN and FlashAttention-2 that works here, or None; tried out once."""
    newer_than_ampere = torch.cuda.get_device_capability(device) >= (9, 0)
    return next(
        (
            attend
            for attend in ((_cudnn, _flash) if newer_than_ampere else (_flash,))
            if _works(attend, device, dtype, head_dim)
        ),
        None,
    )


def _works(attend: Attend, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether a small grouped and causal example comes out right."""
    query = torch.linspace(-2, 2, 4 * 16 * head_dim, device=device).view(1, 4, 16, head_dim)
    query = query.sin().to(dtype)
    keys, values = query[:, :2].cos(), query[:, 2:]
    try:
        got, lse = attend(query, keys, values, 0.5, True)
    except RuntimeError:
        return False
    expected = reference.chunk_attention(
        query.float(), keys[:, :, :0].float(), values[:, :, :0].float(),
        keys.float(), values.float(), Logits(0.5),
    )  # fmt: skip
    first_logit = (query[:, :, 0] * keys.repeat_interleave(2, 1)[:, :, 0]).float().sum(-1) * 0.5
    return bool(
        torch.allclose(got.float(), expected, atol=0.05)
        and torch.allclose(lse[:, :, 0], first_logit, atol=0.2)
    )


def _cudnn(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, keys, values, None, True, 0.0, causal, False, scale=scale
    )
    return out, lse.reshape(query.shape[:3])


def _flash(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, keys, values, 0.0, causal, False, scale=scale
    )
    return out, lse
