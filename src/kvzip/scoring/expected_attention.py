"""Scores from a forecast: the attention that a pair can expect from future queries.

Devoto et al., "Expected Attention: KV Cache Compression by Estimating Attention from Future
Queries Distribution", arXiv 2510.00636, and its implementation in NVIDIA's kvpress. Queries before
their rotation are taken for normally distributed with mean μ and covariance Σ, and future positions
for their average rotation R. Then the expectation of exp(q·k·scale) over queries is

    exp(scale · k·Rμ + scale²/2 · k·RΣRᵀk),

which is normalised over the pairs of a head; the query heads that share a KV head are averaged, and
0.01 more than the average (what kvpress is evaluated with) times the norm of the pair's value is
the score.

Where it departs from the paper: μ and Σ are those of the context's own queries, and the
normalisation runs over the context's pairs. kvpress leaves out the first four tokens of the
sequence, the sinks, and keeps them; here they belong to the prefix, which is left out and always
stays. The norm of the value itself is taken, as in kvpress, and not of its output projection.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvzip.cache import ContextCache, Scores
from kvzip.kernels.logits import Logits
from kvzip.prefill import Progress, silent
from kvzip.prompts import Prompts
from kvzip.scoring.observation import CHUNK_SIZE, observe
from kvzip.scoring.rotary import Rotary, rotaries

FUTURE = 512
"""Positions behind the context over which the rotation is averaged."""

EPSILON = 0.01
"""Added to each expected probability, so that the value's norm counts where it is tiny."""


@torch.no_grad()
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
        max_positions: positions that the model was made for; future ones stay below.
        chunk_size: context tokens of one forward pass; it changes scores by rounding only.
        progress: called with `("score", done, total)` after each chunk.

    Returns:
        Scores `[L, H, n]`, each the expected attention times the norm of the pair's value.

    Raises:
        KVzipError: if pairs are evicted already, for a chunk size below 1, or if the model's
            positions are not rotary.
    """
    p, n = kv.document.prefix_length, kv.document.context_length
    end = p + n
    observers = [QueryMoments(rotary) for rotary in rotaries(model, kv, max_positions)]
    observe(model, kv, slice(p, end), observers, chunk_size=chunk_size, progress=progress)
    future = torch.arange(end, min(end + FUTURE, max_positions))
    scores = []
    for layer, observer in zip(kv.prunable, observers, strict=True):
        keys, values = layer.held.dense_keys()[:, p:], layer.held.dense_values()[:, p:]
        mean, covariance = observer.ahead(future)
        scores.append(expected(keys, values, mean, covariance, observer.scale).cpu())
    return Scores(torch.stack(scores).float(), "expected-attention")


def expected(
    keys: Tensor, values: Tensor, mean: Tensor, covariance: Tensor, scale: float
) -> Tensor:
    """Score pairs by the attention expected of normally distributed queries.

    Args:
        keys: `[H, n, D]`.
        values: `[H, n, D]`.
        mean: `[Hq, D]`, of the queries.
        covariance: `[Hq, D, D]`, of the queries.
        scale: factor on the logits.

    Returns:
        `[H, n]`, in the dtype of `mean`.
    """
    kv_heads = keys.shape[0]
    means = mean.unflatten(0, (kv_heads, -1))  # [H, G, D]
    covariances = covariance.unflatten(0, (kv_heads, -1))
    scores = []
    for h in range(kv_heads):
        head_keys = keys[h].to(mean.dtype)
        total = torch.zeros_like(head_keys[:, 0])
        for mu, sigma in zip(means[h], covariances[h], strict=True):
            spread = ((head_keys @ sigma) * head_keys).sum(-1)
            total += (scale * (head_keys @ mu) + scale**2 / 2 * spread).softmax(-1)
        attention = total / means.shape[1]
        scores.append((attention + EPSILON) * values[h].to(mean.dtype).norm(dim=-1))
    return torch.stack(scores)


class QueryMoments:
    """Mean and covariance of one layer's queries before their rotation.

    Args:
        rotary: the layer's rotation.
    """

    scale: float
    """Factor on the layer's logits, there after the first chunk."""

    def __init__(self, rotary: Rotary) -> None:
        self.rotary = rotary
        self.count = 0

    def see(self, query: Tensor, keys: Tensor, logits: Logits) -> None:
        """Add a chunk's queries: means and centred products of both parts are combined."""
        self.scale = logits.scale
        t, end = query.shape[1], keys.shape[1]
        positions = torch.arange(end - t, end, device=query.device)
        accumulate = torch.promote_types(query.dtype, torch.float32)
        queries = self.rotary.undo(query.to(accumulate), positions)  # [Hq, t, D]
        mean = queries.mean(1)
        centred = queries - mean[:, None]
        products = centred.mT @ centred  # [Hq, D, D]
        if not self.count:
            self.mean, self.products = torch.zeros_like(mean), torch.zeros_like(products)
        before, self.count = self.count, self.count + t
        apart = mean - self.mean
        self.mean = self.mean + apart * (t / self.count)
        between = apart[:, :, None] * apart[:, None, :]
        self.products = self.products + products + between * (before * t / self.count)

    def ahead(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Mean `[Hq, D]` and covariance `[Hq, D, D]` under the average rotation of positions."""
        rotation = self.rotary.average(self.mean.shape[-1], positions.to(self.mean.device))
        rotation = rotation.to(self.mean.dtype)
        covariance = self.products / self.count
        return self.mean @ rotation, rotation.mT @ covariance @ rotation
