"""Scores at random: what eviction costs without any notion of importance.

Not taken from a paper. Every pair gets a number of its own, so that heads lose different tokens.
"""

import torch
from transformers import PreTrainedModel

from kvzip.cache import ContextCache, Scores
from kvzip.prefill import Progress, silent
from kvzip.prompts import Prompts
from kvzip.scoring.observation import CHUNK_SIZE, require_full


def score(
    model: PreTrainedModel,
    prompts: Prompts,
    kv: ContextCache,
    *,
    max_positions: int,
    chunk_size: int = CHUNK_SIZE,
    progress: Progress = silent,
    seed: int = 0,
) -> Scores:
    """Score every context pair of the layers with full attention, without a forward pass.

    Args:
        model: not used.
        prompts: not used.
        kv: a full cache; it is read, never changed.
        max_positions: not used.
        chunk_size: not used.
        progress: called with `("score", n, n)`.
        seed: of the generator; PyTorch's own one is left alone.

    Returns:
        Scores `[L, H, n]`, uniform in [0, 1).

    Raises:
        KVzipError: if pairs are evicted already.
    """
    require_full(kv)
    generator = torch.Generator().manual_seed(seed)
    layers, heads, n = kv.held.shape
    progress("score", n, n)
    values = torch.rand((layers, heads * kv.division.size, n), generator=generator)
    return Scores(kv.division.own(values), "random")
