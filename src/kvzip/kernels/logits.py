"""From products of queries and keys to probabilities."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Logits:
    """What one attention layer makes of the products of its queries and keys.

    Attributes:
        scale: factor on the products, above 0.
        softcap: bound that logits approach and never reach, above 0, or None: they are
            `softcap * tanh(scale * product / softcap)` (Gemma 2, arXiv 2408.00118, section 2).
        sinks: `[Hq]`: logit of one more column for each query head, which takes its share of the
            softmax and adds nothing to the result (gpt-oss, arXiv 2508.10925, section 2), or None.
    """

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether scaling is all there is to it."""
        return self.softcap is None and self.sinks is None

    def of(self, products: Tensor) -> Tensor:
        """Logits of products of queries and keys, of any shape; without the sinks' column."""
        logits = products * self.scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


def softmax(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Probabilities over the last dimension; with sinks they add up to less than 1.

    Args:
        logits: `[..., s]`.
        sinks: logits of one more column, of any shape that spreads over `[..., 1]`, or None.
    """
    if sinks is None:
        return logits.softmax(-1)
    column = sinks.to(logits.dtype).expand(*logits.shape[:-1], 1)
    return torch.cat([logits, column], dim=-1).softmax(-1)[..., :-1]
