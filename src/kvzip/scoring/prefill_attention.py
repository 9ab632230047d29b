"""Scores from reading: the most attention a pair got while the context was read.

After the heavy hitters of Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative
Inference of Large Language Models", NeurIPS 2023, arXiv 2306.14048.

Where it departs from the paper: H2O adds up the attention that a pair gets, which favours pairs
that were there for longer; here the largest probability counts, as it does in reconstruction. H2O
evicts at every step and always holds recent tokens; here the context is read with every pair in
place and then scored, and no token is held for being recent. Query heads that share a KV head count
by their maximum.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvzip.cache import ContextCache, Scores
from kvzip.kernels.logits import Logits
from kvzip.prefill import Progress, silent
from kvzip.prompts import Prompts
from kvzip.scoring.observation import CHUNK_SIZE, causal_attention, observe, require_full


def score(
    model: PreTrainedModel,
    prompts: Prompts,
    kv: ContextCache,
    *,
    max_positions: int,
    chunk_size: int = CHUNK_SIZE,
    progress: Progress = silent,
) -> Scores:
    """Score every context pair of the layers with full attention.

    Args:
        model: the model that made the cache.
        prompts: not used.
        kv: a full cache; it is read, never changed.
        max_positions: not used.
        chunk_size: context tokens of one forward pass; it does not change the scores.
        progress: called with `("score", done, total)` after each chunk.

    Returns:
        Scores `[L, H, n]`, each the largest attention probability that the pair gets from any
        query of the context, its own included.

    Raises:
        KVzipError: if pairs are evicted already, or for a chunk size below 1.
    """
    require_full(kv)
    p, n = kv.document.prefix_length, kv.document.context_length
    observers = [LargestAttention(layer.held.dense_keys(), p) for layer in kv.prunable]
    observe(model, kv, slice(p, p + n), observers, chunk_size=chunk_size, progress=progress)
    best = torch.stack([observer.best.cpu() for observer in observers])
    return Scores(best.float(), "prefill-attention")


class LargestAttention:
    """The largest probability that each context pair of a layer got so far.

    Args:
        keys: `[H, p + n, D]`, of the layer.
        prefix_length: p, tokens in front of the context.

    Attributes:
        best: `[H, n]`, float32 (float64 for float64 keys).
    """

    def __init__(self, keys: Tensor, prefix_length: int) -> None:
        self.prefix_length = prefix_length
        accumulate = torch.promote_types(keys.dtype, torch.float32)
        self.best = keys.new_zeros(keys[:, prefix_length:, 0].shape, dtype=accumulate)

    def see(self, query: Tensor, keys: Tensor, logits: Logits) -> None:
        """Raise what the chunk's queries attend to more than those before them."""
        for weights in causal_attention(query, keys, logits):
            largest = weights[..., self.prefix_length :].amax(dim=(1, 2))
            so_far = self.best[:, : largest.shape[1]]
            torch.maximum(so_far, largest, out=so_far)
