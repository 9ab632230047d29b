"""Scores from the end: how much attention a pair gets from the last tokens of the context.

Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", NeurIPS 2024, arXiv
2404.14469: the attention of the last 32 tokens, averaged over them (added up in the paper, which
orders pairs in the same way), max-pooled over 7 neighbouring positions; the window itself stays.

Where it departs from the paper: there the window is the end of the prompt, which is the question;
here no question is known and the window is the end of the context. The paper chooses for each
query head; here the pooled values of the query heads that share a KV head are averaged, as is done
for models with grouped queries since. Pooling does not look into the prefix, which is
not up for eviction. A window's pair scores from 1 to 2, above all others, later tokens higher: it
stays whole wherever the ratio leaves room for it, and its latest tokens stay where it does not.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from kvzip.cache import ContextCache, Scores
from kvzip.errors import KVzipError
from kvzip.kernels.logits import Logits
from kvzip.prefill import Progress, silent
from kvzip.prompts import Prompts
from kvzip.scoring.observation import CHUNK_SIZE, causal_attention, observe

WINDOW = 32
"""Tokens at the end of the context whose attention counts."""

KERNEL = 7
"""Neighbouring positions, its own in the middle, from which a pair takes the maximum."""


def score(
    model: PreTrainedModel,
    prompts: Prompts,
    kv: ContextCache,
    *,
    max_positions: int,
    chunk_size: int = CHUNK_SIZE,
    progress: Progress = silent,
    window: int = WINDOW,
) -> Scores:
    """Score every context pair of the layers with full attention.

    Args:
        model: the model that made the cache.
        prompts: not used.
        kv: a full cache; it is read, never changed.
        max_positions: not used.
        chunk_size: context tokens of one forward pass; it does not change the scores.
        progress: called with `("score", done, total)` after each chunk.
        window: tokens at the end of the context whose attention counts; all of a shorter context.

    Returns:
        Scores `[L, H, n]`: averaged probabilities between 0 and 1 before the window, more than 1
        within it.

    Raises:
        KVzipError: if pairs are evicted already, or for a chunk size or window below 1.
    """
    if window < 1:
        raise KVzipError(f"window is {window}: look at one token at least")
    p, n = kv.document.prefix_length, kv.document.context_length
    window = min(window, n)
    end = p + n
    observers = [AttentionSum(slice(p, end - window)) for _ in kv.prunable]
    observe(
        model, kv, slice(end - window, end), observers, chunk_size=chunk_size, progress=progress
    )
    pooled = torch.stack([pool(observer.total / window).mean(1).cpu() for observer in observers])
    within = 1 + torch.arange(1, window + 1) / window
    last = within.expand(*pooled.shape[:2], window)
    return Scores(torch.cat([pooled.float(), last], dim=-1), "last-window")


def pool(attention: Tensor) -> Tensor:
    """The maximum over `KERNEL` neighbouring columns, fewer at the ends; same shape back."""
    if not attention.shape[-1]:
        return attention
    return F.max_pool1d(attention, KERNEL, stride=1, padding=KERNEL // 2)


class AttentionSum:
    """The attention that some columns of a layer got so far, added up over queries.

    Args:
        columns: which of the keys.

    Attributes:
        total: `[H, G, columns]`, float32 (float64 for float64 queries).
    """

    def __init__(self, columns: slice) -> None:
        self.columns = columns
        self.total = torch.zeros(())

    def see(self, query: Tensor, keys: Tensor, logits: Logits) -> None:
        """Add what the chunk's queries attend to."""
        for weights in causal_attention(query, keys, logits):
            self.total = self.total + weights[..., self.columns].sum(2)
