"""Muon: momentum whose matrix updates are made orthogonal (Jordan et al., 2024).

Matrices of one shape are updated together, as one batch, which keeps the number of kernel launches
small for a model of many small matrices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Muon for weight matrices `[out, in]`, with decoupled weight decay.

    Updates are scaled by `0.2 * sqrt(max(out, in))`, which gives them the size of AdamW's, so the
    learning rate means the same for both (Liu et al., "Muon is scalable for LLM training", 2025).
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take one step; matrices without a gradient are left as they are."""
        for group in self.param_groups:
            by_shape: defaultdict[torch.Size, list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[matrix.shape].append(matrix)
            for shape, matrices in by_shape.items():
                gradients = [matrix.grad for matrix in matrices]
                velocities = [self._velocity(matrix) for matrix in matrices]
                torch._foreach_lerp_(velocities, gradients, 1 - group["momentum"])
                updates = orthogonal(
                    torch.stack(torch._foreach_lerp(gradients, velocities, group["momentum"]))
                )
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                scale = 0.2 * max(shape) ** 0.5 * group["lr"]
                torch._foreach_add_(matrices, list(updates.to(matrices[0].dtype)), alpha=-scale)

    def _velocity(self, matrix: Tensor) -> Tensor:
        state = self.state[matrix]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(matrix)
        velocity: Tensor = state["velocity"]
        return velocity


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return `[batch, out, in]` bfloat16 with every singular value near 1 (Newton-Schulz)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
