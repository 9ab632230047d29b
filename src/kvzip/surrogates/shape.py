"""What a surrogate must fit: a model's attention layers, their width and their KV heads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedModel

from kvzip.errors import KVzipError

Module = TypeVar("Module")


@dataclass(frozen=True)
class Shape:
    """The attention layers of a model, as a surrogate sees them.

    Attributes:
        model_id: name or folder of the model.
        layers: its attention layers, with and without full attention.
        scored: indices of those with full attention, whose pairs are scored.
        width: of the hidden states.
        kv_heads: of each layer.
        group: query heads of a KV head.
    """

    model_id: str
    layers: int
    scored: tuple[int, ...]
    width: int
    kv_heads: int
    group: int

    def __str__(self) -> str:
        scored = len(self.scored)
        full = "" if scored == self.layers else f" ({scored} with full attention)"
        return describe(f"{self.layers}{full}", self.width, self.kv_heads)

    @property
    def name(self) -> str:
        """The last part of the model's name, by which its surrogates are published."""
        return Path(self.model_id).name


def describe(layers: int | str, width: int, kv_heads: int) -> str:
    """A shape in words."""
    return f"{layers} layers, hidden states {width} wide and {kv_heads} KV heads"


def shape_of(model: PreTrainedModel, kv_heads: Mapping[int, int]) -> Shape:
    """The shape of a model.

    Args:
        model: the model.
        kv_heads: KV heads of each layer with full attention, by its index.

    Raises:
        KVzipError: if layers differ in KV heads.
    """
    config = model.config.get_text_config(decoder=True)
    if len(set(kv_heads.values())) != 1:
        raise KVzipError(
            f"the layers of {model.name_or_path} have {sorted(set(kv_heads.values()))} KV heads: "
            "surrogates are for models whose layers have equally many"
        )
    heads = next(iter(kv_heads.values()))
    return Shape(
        model_id=model.name_or_path or type(model).__name__,
        layers=config.num_hidden_layers,
        scored=tuple(kv_heads),
        width=config.hidden_size,
        kv_heads=heads,
        group=config.num_attention_heads // heads,
    )


def scored_modules(
    modules: Sequence[Module], shape: Shape, where: str, width: int, kv_heads: int
) -> list[Module]:
    """Those of a surrogate's modules that belong to the scored layers.

    Args:
        modules: one for each layer of a model, or for each with full attention.
        shape: of the model at hand.
        where: file or folder of the surrogate.
        width: of the hidden states that the modules take.
        kv_heads: that they score.

    Raises:
        KVzipError: if the surrogate was made for a model of another shape.
    """
    fits = len(modules) in (shape.layers, len(shape.scored))
    if not fits or (width, kv_heads) != (shape.width, shape.kv_heads):
        raise KVzipError(
            f"the surrogate {where} is for a model of {describe(len(modules), width, kv_heads)}, "
            f"{shape.model_id} has {shape}: choose a surrogate of this model"
        )
    if len(modules) == len(shape.scored):
        return list(modules)
    return [modules[index] for index in shape.scored]
