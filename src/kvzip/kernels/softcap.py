"""Logits to the base of 2 inside Triton kernels, soft-capped or not.

A kernel takes two numbers, `scale` and `inner`, from `exponents`. Its logits are `scale` times the
products of queries and keys, or `scale` times `bounded(products, inner)` where `inner` is not None.
"""

import triton
import triton.language as tl

from kvzip.kernels.logits import Logits

LOG2_E = 1.4426950408889634


def exponents(logits: Logits) -> tuple[float, float | None]:
    """Factor on what is exponentiated to the base of 2, and what `bounded` takes, None without."""
    if logits.softcap is None:
        return logits.scale * LOG2_E, None
    return logits.softcap * LOG2_E, 2 * LOG2_E * logits.scale / logits.softcap


@triton.jit
def bounded(b_s, inner):
    """Hyperbolic tangent of `b_s * inner / (2 log2 e)`, between -1 and 1."""
    return 1.0 - 2.0 / (tl.exp2(b_s * inner) + 1.0)
