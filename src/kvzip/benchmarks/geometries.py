"""Random models in published shapes, made on the device; nothing is downloaded.

Weights are normal with a standard deviation of 0.02, as at the start of training, and never zero:
the time of a matrix product depends on the data. The tokenizer is that of the bundled model,
whose ids every vocabulary here contains.
"""

import copy
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kvzip.errors import KVzipError
from kvzip.loading import resolve

STD = 0.02

ROOM = 8192
"""Positions behind the context: for questions, answers, and the repetition of a chunk."""


@dataclass(frozen=True)
class Geometry:
    """The shape of a model, as its published config gives it."""

    model_type: str
    layers: int
    hidden: int
    intermediate: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    rope: dict[str, Any]
    end_token: int

    def config(self, positions: int) -> PreTrainedConfig:
        """A transformers config for contexts of so many positions."""
        return AutoConfig.for_model(
            self.model_type,
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.query_heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocabulary,
            max_position_embeddings=positions,
            rope_parameters=dict(self.rope),
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=self.end_token,
            pad_token_id=None,
            initializer_range=STD,
        )


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

TINY = "tiny"

GEOMETRIES = {
    "llama3.1-8b": Geometry(
        "llama", 32, 4096, 14336, 32, 8, 128, 128_256, LLAMA3_ROPE, end_token=128_009
    ),
    "qwen2.5-7b": Geometry(
        "qwen2", 28, 3584, 18944, 28, 4, 128, 152_064,
        {"rope_type": "default", "rope_theta": 10_000_000.0}, end_token=151_645,
    ),
    "qwen3-8b": Geometry(
        "qwen3", 36, 4096, 12288, 32, 8, 128, 151_936,
        {"rope_type": "default", "rope_theta": 1_000_000.0}, end_token=151_645,
    ),
    TINY: Geometry(
        "llama", 2, 64, 96, 4, 2, 16, 2048,
        {"rope_type": "default", "rope_theta": 10_000.0}, end_token=1,
    ),
}  # fmt: skip


def find(name: str) -> Geometry:
    """A geometry by its name.

    Raises:
        KVzipError: for an unknown name.
    """
    if name not in GEOMETRIES:
        raise KVzipError(f"unknown geometry {name!r}: choose among {', '.join(GEOMETRIES)}")
    return GEOMETRIES[name]


@torch.no_grad()
def random_model(
    name: str, positions: int, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """A model of a geometry with random weights.

    Args:
        name: of the geometry.
        positions: that it shall be made for.
        device: where its weights are drawn.
        dtype: of its weights.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            find(name).config(positions), dtype=dtype, attn_implementation="sdpa"
        )
    for parameter_name, parameter in model.named_parameters():
        if "norm" not in parameter_name:
            parameter.normal_(0.0, STD)
    model.eval().requires_grad_(False)
    return model


def twin(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    """A model of its own on the same weights, so that one contender changes nothing for others.

    Args:
        model: whose tensors are shared.
        attention: name of the attention implementation.
    """
    shared = {id(t): t for t in chain(model.parameters(), model.buffers())}
    other: PreTrainedModel = copy.deepcopy(model, memo=shared)
    other.set_attn_implementation(attention)
    return other


def first_layer(model: PreTrainedModel) -> PreTrainedModel:
    """A twin that ends behind its first layer: what it reads makes kernels and plans for the whole.

    Args:
        model: whose tensors are shared.
    """
    other = twin(model, "sdpa")
    other.base_model.layers = other.base_model.layers[:1]
    other.config.num_hidden_layers = 1
    return other


def tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of the bundled model."""
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(resolve(None).repository)
    return loaded
