"""What a model's attention layers look like, found by running them, not by reading configs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionLayer

from kvzip.errors import KVzipError
from kvzip.kernels import REFERENCE
from kvzip.kernels.logits import Logits
from kvzip.layers import Layer
from kvzip.states import LAYER_TYPE, StateLayer

SUPPORTED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", LAYER_TYPE})
PROBE_TOKENS = 2
STATE_TOKENS = 18
STATE_TOLERANCE = 0.05
"""Difference between states, as a share of the largest number: rounding, and no lost tokens."""

CPU = torch.device("cpu")


@dataclass(frozen=True)
class LayerGeometry:
    """One layer.

    Attributes:
        kv_heads: number of KV heads, 0 in a layer of linear attention.
        window: tokens that a query sees, None for all.
        linear: whether it is a layer of linear attention, which holds a state and no pairs.
        device: where it runs, and its pairs are.
    """

    kv_heads: int
    window: int | None
    linear: bool = False
    device: torch.device = CPU


@dataclass(frozen=True)
class Geometry:
    """All attention layers of a model, and the positions that it was made for."""

    layers: tuple[LayerGeometry, ...]
    max_positions: int

    @property
    def prunable(self) -> tuple[int, ...]:
        """Indices of the layers whose context pairs can be evicted: those with full attention."""
        return tuple(
            i for i, layer in enumerate(self.layers) if layer.window is None and not layer.linear
        )

    @property
    def stateful(self) -> bool:
        """Whether there are layers of linear attention."""
        return any(layer.linear for layer in self.layers)

    @property
    def devices(self) -> list[torch.device]:
        """Where each layer runs, in order."""
        return [layer.device for layer in self.layers]


def probe(model: PreTrainedModel) -> Geometry:
    """Run two tokens through a model and note what reaches its attention layers.

    Raises:
        KVzipError: if the model cannot work with a kvzip cache: layers of an unsupported type,
            arguments to attention that are not implemented, or layers without pairs of their own.
    """
    config = model.config.get_text_config(decoder=True)
    refuse_layer_types(config)
    cache = ProbeCache(getattr(config, "layer_types", None) or ())
    tokens = torch.zeros((1, PROBE_TOKENS), dtype=torch.long, device=model.device)
    try:
        with torch.no_grad():
            model.base_model(input_ids=tokens, past_key_values=cache, use_cache=True)
    except KVzipError:
        raise
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise KVzipError(
            f"{type(model).__name__} cannot work with a kvzip cache, it does not hand the pairs of "
            f"its cache, untouched, to transformers' attention interface: {error}"
        ) from error
    storing, total = len(cache.layers), config.num_hidden_layers
    if storing != total:
        raise KVzipError(
            f"{type(model).__name__} has {total} layers, but {storing} of them store keys and "
            "values: models whose layers share pairs are not supported"
        )
    found: list[LayerGeometry | None] = [layer.geometry for layer in cache.layers]
    missing = [i for i, layer in enumerate(found) if layer is None]
    if missing:
        raise KVzipError(
            f"{type(model).__name__}: layers {missing} do not use transformers' attention interface"
        )
    max_positions = positions(config)
    layers = tuple(_without_idle_window(layer, max_positions) for layer in found if layer)
    geometry = Geometry(layers, max_positions)
    if geometry.stateful:
        _refuse_forgetful(model, config)
    if not geometry.prunable:
        raise KVzipError(
            f"every layer of {type(model).__name__} slides (window {layers[0].window} tokens): "
            "there is nothing to evict"
        )
    return geometry


@torch.no_grad()
def _refuse_forgetful(model: PreTrainedModel, config: Any) -> None:
    """Raise KVzipError unless layers of linear attention go on from a state by several tokens.

    Some of transformers' models do so token by token only, and begin anew with a longer input.
    """
    tokens = torch.arange(STATE_TOKENS, device=model.device)[None]
    states = []
    for stretches in ([tokens], [tokens[:, :-2], tokens[:, -2:]]):
        cache = DynamicCache(config=config)
        for stretch in stretches:
            model.base_model(input_ids=stretch, past_key_values=cache, use_cache=True)
        first = next(layer for layer in cache.layers if isinstance(layer, LinearAttentionLayer))
        states.append(first.recurrent_states[0].float())
    at_once, in_parts = states
    if (at_once - in_parts).abs().max() > STATE_TOLERANCE * at_once.abs().max():
        raise KVzipError(
            f"the linear-attention layers of {type(model).__name__} begin anew when a question of "
            "several tokens follows a context: such models are not supported"
        )


def positions(config: Any) -> int:
    """Positions that a text config allows for keys that are computed once and kept.

    Rotary embeddings of types `dynamic` and `longrope` rotate all keys differently once a sequence
    outgrows the original length, so that cached keys are right only up to it.
    """
    limit: int = config.max_position_embeddings
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        original = getattr(config, "original_max_position_embeddings", None)
        limit = min(limit, rope.get("original_max_position_embeddings") or original or limit)
    return limit


def _without_idle_window(layer: LayerGeometry, max_positions: int) -> LayerGeometry:
    """A window that no context can outgrow is full attention."""
    idle = layer.window is not None and layer.window >= max_positions
    return replace(layer, window=None) if idle else layer


def refuse_layer_types(config: Any) -> None:
    """Raise KVzipError if a config names layers that a kvzip cache cannot hold."""
    unsupported = set(getattr(config, "layer_types", None) or ()) - SUPPORTED_LAYER_TYPES
    if getattr(config, "attention_chunk_size", None):
        unsupported.add("chunked_attention")
    if unsupported:
        raise KVzipError(
            f"model type {config.model_type} has layers of type {', '.join(sorted(unsupported))}; "
            f"a kvzip cache holds {' and '.join(sorted(SUPPORTED_LAYER_TYPES))} only"
        )


class ProbeLayer(Layer):
    """Notes the shapes that one layer works with, and answers with plain attention."""

    pairs: tuple[Tensor, Tensor]
    geometry: LayerGeometry | None = None

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Hold the only pairs there will be."""
        self.pairs = keys, values

    def attend(self, query: Tensor, logits: Logits, window: int | None) -> Tensor:
        """Note the geometry and attend."""
        dims = [part.shape[-1] for part in self.pairs]
        if dims[0] != dims[1]:
            raise KVzipError(
                f"keys have {dims[0]} dimensions and values {dims[1]}: a kvzip cache holds pairs "
                "of equal size only"
            )
        keys, _ = self.pairs
        self.geometry = LayerGeometry(keys.shape[1], window, device=keys.device)
        nothing = (part[:, :, :0] for part in self.pairs)
        return REFERENCE.chunk_attention(query, *nothing, *self.pairs, logits)

    def get_seq_length(self) -> int:
        """Nothing was seen before."""
        return 0


class ProbeStateLayer(StateLayer):
    """A layer of linear attention."""

    @property
    def geometry(self) -> LayerGeometry:
        """There once the layer has left a state."""
        device = self.state.recurrent.device  # raises if there is none
        return LayerGeometry(0, None, linear=True, device=device)


class ProbeCache(Cache):
    """Makes a `ProbeLayer` for every layer that stores pairs.

    Args:
        layer_types: of the model's config, empty if it names none.
    """

    def __init__(self, layer_types: Sequence[str]) -> None:
        super().__init__(layer_class_to_replicate=ProbeLayer)
        if LAYER_TYPE in layer_types:
            self.layers = [
                ProbeStateLayer() if name == LAYER_TYPE else ProbeLayer() for name in layer_types
            ]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """No columns: see `attention.mask`."""
        return 0, 0
