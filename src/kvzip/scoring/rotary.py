"""How a model's rotary embeddings turn queries: undone, and averaged over positions.

Angles come from the model's own `rotary_emb`, and what is done with them from the function
`apply_rotary_pos_emb` of its model type. Before either is trusted, a few tokens run through the
model at two positions, and what is computed here must be what arrives at its attention.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvzip.cache import ContextCache
from kvzip.errors import KVzipError
from kvzip.kernels.logits import Logits
from kvzip.layers import AnsweringLayer, ContextLayer, Layer
from kvzip.states import StateLayer

PROBE_TOKENS = 4
TOLERANCE = 0.05
"""Largest difference to the model's own queries, as a share of the largest one."""


class Rotary:
    """The rotation of one layer's queries.

    Args:
        angles: from positions `[t]` to cosines and sines, `[1, t, r]`, or None where positions do
            not change queries.
        apply: `apply_rotary_pos_emb` of the model type.
    """

    def __init__(
        self,
        angles: Callable[[Tensor], tuple[Tensor, Tensor]] | None,
        apply: Callable[..., tuple[Tensor, Tensor]],
    ) -> None:
        self._angles, self._apply = angles, apply

    def turn(self, queries: Tensor, positions: Tensor) -> Tensor:
        """Queries `[heads, t, D]`, float32, as they arrive at attention from positions `[t]`."""
        if self._angles is None:
            return queries
        return self._turn(queries, *self._angles(positions))

    def undo(self, queries: Tensor, positions: Tensor) -> Tensor:
        """The opposite of `turn`."""
        if self._angles is None:
            return queries
        cos, sin = self._angles(positions)
        squared = cos.square() + sin.square()  # not 1 where the model scales its angles (YaRN)
        return self._turn(queries, cos / squared, -sin / squared)

    def average(self, dim: int, positions: Tensor) -> Tensor:
        """`[D, D]`: a row vector times this is what positions `[t]` turn it into on average."""
        basis = torch.eye(dim, device=positions.device)
        if self._angles is None:
            return basis
        cos, sin = (part.mean(1, keepdim=True) for part in self._angles(positions))
        return self._turn(basis[:, None].to(cos.dtype), cos, sin)[:, 0]

    def _turn(self, queries: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, _ = self._apply(queries[None], queries[None], cos, sin)
        return turned[0]


def rotaries(model: PreTrainedModel, kv: ContextCache, max_positions: int) -> list[Rotary]:
    """The rotation of each layer that can be pruned.

    Raises:
        KVzipError: if positions enter the model's queries in another way.
    """
    decoder = model.get_decoder()
    embedding = getattr(decoder, "rotary_emb", None)
    apply = getattr(sys.modules[type(decoder).__module__], "apply_rotary_pos_emb", None)
    if embedding is None or apply is None:
        raise _unknown(model)
    indices = [i for i, layer in enumerate(kv.layers) if isinstance(layer, ContextLayer)]
    near, far = 0, min(17, max_positions - 1)
    queries_near = _probe(model, kv, near)
    queries_far = _probe(model, kv, far)
    found = []
    for index in indices:
        unturned, expected = queries_near[index], queries_far[index]
        allowed = TOLERANCE * expected.abs().max()
        rotary = Rotary(_angles(decoder.config, embedding, index), apply)
        at_near, at_far = (unturned.new_tensor([at], dtype=torch.long) for at in (near, far))
        turned = rotary.turn(rotary.undo(unturned, at_near), at_far)
        if (turned - expected).abs().max() > allowed:
            if (unturned - expected).abs().max() > allowed:
                raise _unknown(model)
            rotary = Rotary(None, apply)
        found.append(rotary)
    return found


def _angles(config: Any, embedding: Any, index: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    more = {}
    if "layer_type" in inspect.signature(embedding.forward).parameters:
        more["layer_type"] = config.layer_types[index]

    def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
        like = torch.zeros(1, device=positions.device)  # says where, and that float32 is wanted
        cos, sin = embedding(like, positions[None], **more)
        return cos.to(positions.device), sin.to(positions.device)  # it may run elsewhere

    return angles


@torch.no_grad()
def _probe(model: PreTrainedModel, kv: ContextCache, position: int) -> dict[int, Tensor]:
    """Queries `[Hq, t, D]` of each layer with pairs, float32; all tokens are at one position."""
    tokens = kv.document.token_ids[-PROBE_TOKENS:].to(model.device)
    cache = Cache(
        layers=[
            _QueryLayer() if isinstance(layer, AnsweringLayer) else StateLayer()
            for layer in kv.layers
        ]
    )
    model.base_model(
        input_ids=tokens[None],
        position_ids=torch.full_like(tokens, position)[None],
        past_key_values=cache,
        use_cache=True,
    )
    layers = enumerate(cache.layers)
    return {i: layer.query for i, layer in layers if isinstance(layer, _QueryLayer)}


class _QueryLayer(Layer):
    """Keeps the queries and attends to nothing, so that they depend on their position alone."""

    query: Tensor

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Hold nothing."""

    def attend(self, query: Tensor, logits: Logits, window: int | None) -> Tensor:
        """Keep the queries."""
        self.query = query[0].float()
        return torch.zeros_like(query)

    def get_seq_length(self) -> int:
        """Nothing was seen before."""
        return 0


def _unknown(model: PreTrainedModel) -> KVzipError:
    return KVzipError(
        f"expected attention needs rotary positions, and {type(model).__name__} has none that it "
        "knows: choose another scorer"
    )
