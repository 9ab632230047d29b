"""Scores from reconstruction, weighted by what a pair adds to what attends to it (KVzip+).

NVIDIA's KVzap, arXiv 2601.07891, in its section on KVzip+. Attention adds A[g, t, i] · W_O,g v_i to
the hidden state of token t for each pair i and query head g. The score of a pair is its largest
share of a hidden state,

    max over g, t of A[g, t, i] · ‖W_O,g v_i‖ / ‖h_t‖,

with the probabilities A of the repeat input's queries as in `scoring.reconstruction`, W_O,g the
part of the output projection that reads query head g, v_i the pair's value, and h_t the attention
input of token t (see `hidden_states`). A bias of the projection, a gate in front of it and norms
behind it are left out, and so are tokens whose attention input is zero.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvzip.cache import ContextCache, Scores
from kvzip.hidden_states import attention_modules, observed_hidden_states, output_weight
from kvzip.layers import ContextLayer
from kvzip.prefill import Progress, silent
from kvzip.prompts import Prompts
from kvzip.scoring.observation import require_full
from kvzip.scoring.reconstruction import CHUNK_SIZE, score_chunks, scorer_name


@torch.no_grad()
def score(
    model: PreTrainedModel,
    prompts: Prompts,
    kv: ContextCache,
    *,
    max_positions: int,
    chunk_size: int = CHUNK_SIZE,
    reach: str = "context",
    progress: Progress = silent,
    products: Mapping[int, Tensor] | None = None,
) -> Scores:
    """Score every context pair of the layers with full attention.

    Args:
        model: the model that made the cache.
        prompts: its prompts.
        kv: a full cache; it is read, never changed.
        max_positions: positions that the model was made for.
        chunk_size: context tokens that one forward pass repeats; fewer where the positions behind
            the context leave room for fewer.
        reach: what a repeat attends to, `"context"` or `"chunk"`.
        progress: called with `("score", done, total)` after each chunk.
        products: see `projection_products`, made if None; who scores many contexts makes them once.

    Returns:
        Scores `[L, H, n]`, each the largest share of a hidden state that the pair adds to any
        query of its chunk's repeat input, not negative.

    Raises:
        KVzipError: if pairs are evicted already, the context leaves no room for a repeat, or the
            model's output projections are not found or quantised.
    """
    require_full(kv)
    if products is None:
        products = projection_products(model, kv)
    contributions = {index: Contribution(product) for index, product in products.items()}
    with observed_hidden_states(model, lambda index, hidden: _read(contributions, index, hidden)):
        values = score_chunks(
            model,
            prompts,
            kv,
            max_positions=max_positions,
            chunk_size=chunk_size,
            reach=reach,
            progress=progress,
            weigh=contributions,
        )
    return Scores(values, scorer_name(reach, "reconstruction+"))


def projection_products(model: PreTrainedModel, kv: ContextCache) -> dict[int, Tensor]:
    """WᵀW of each layer that is scored, by which ‖W v‖² = v · WᵀW v takes less than W v.

    Args:
        model: the model.
        kv: any full cache of it.

    Returns:
        By layer, `[Hq, D, D]`, float32 or wider: W is what reads a query head in the layer's
        output projection.

    Raises:
        KVzipError: if output projections are not found or quantised.
    """
    modules = attention_modules(model)
    return {
        index: _products(output_weight(modules[index]), layer.held.dense_values().shape[-1])
        for index, layer in enumerate(kv.layers)
        if isinstance(layer, ContextLayer)
    }


def _products(weight: Tensor, head_dim: int) -> Tensor:
    """`[Hq, D, D]` from `[hidden, Hq * D]`."""
    accumulate = torch.promote_types(weight.dtype, torch.float32)
    heads = weight.to(accumulate).unflatten(1, (-1, head_dim)).transpose(0, 1)
    return torch.matmul(heads.mT, heads)


class Contribution:
    """Norms of one layer's hidden states, and of what its values become behind the projection.

    Args:
        products: `[Hq, D, D]`, see `projection_products`.
    """

    inverse_norms: Tensor
    """`[t]`: `1 / ‖h‖` in the forward pass that is under way, 0 where h is."""

    def __init__(self, products: Tensor) -> None:
        self.products = products

    def read(self, hidden: Tensor) -> None:
        """Take note of the attention input, `[1, t, hidden]`."""
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        norms = torch.linalg.vector_norm(hidden[0], dim=-1, dtype=accumulate)
        self.inverse_norms = torch.where(norms > 0, 1 / norms, 0)

    def __call__(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """`1 / ‖h‖` for each query, `[Hq, t]`, and `‖W v‖` for each pair, `[Hq, m]`."""
        query_heads, kv_heads = len(self.products), len(values)
        by_query = self.inverse_norms.to(values.device).expand(query_heads, -1)
        products = self.products.to(values.device).unflatten(0, (kv_heads, -1))  # [H, G, D, D]
        rows = values.to(products.dtype)[:, None]  # [H, 1, m, D]
        squares = ((rows @ products) * rows).sum(-1)
        return by_query, squares.clamp_min(0).sqrt().flatten(0, 1)


def _read(contributions: Mapping[int, Contribution], index: int, hidden: Tensor) -> None:
    if index in contributions:
        contributions[index].read(hidden)
