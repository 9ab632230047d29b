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
        return AutoConfig.for_model(self.model_type, **self.settings(positions))

    def settings(self, positions: int) -> dict[str, Any]:
        """What the config says."""
        return {
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.query_heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": positions,
            "rope_parameters": copy.deepcopy(self.rope),  # configs write into it
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": self.end_token,
            "pad_token_id": None,
            "initializer_range": STD,
        }


@dataclass(frozen=True)
class SlidingGeometry(Geometry):
    """The shape of a Gemma 3 model: every sixth layer has full attention, the others slide.

    Input and output embeddings are one. Logits are scaled by `head_dim ** -0.5`.

    Attributes:
        window: tokens that a query of a sliding layer sees, its own included.
    """

    window: int

    def settings(self, positions: int) -> dict[str, Any]:
        """What the config says."""
        full, sliding = "full_attention", "sliding_attention"
        return {
            **super().settings(positions),
            "sliding_window": self.window,
            "layer_types": [sliding if (i + 1) % 6 else full for i in range(self.layers)],
            "query_pre_attn_scalar": self.head_dim,
            "tie_word_embeddings": True,
        }


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}

TINY, TINY_GEMMA3 = "tiny", "tiny-gemma3"
ON_CPU = (TINY, TINY_GEMMA3)
"""Shapes that show on a CPU that everything runs."""

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
    "gemma3-4b": SlidingGeometry(
        "gemma3_text", 34, 2560, 10240, 8, 4, 256, 262_208, GEMMA3_ROPE, end_token=1, window=1024
    ),
    "gemma3-12b": SlidingGeometry(
        "gemma3_text", 48, 3840, 15360, 16, 8, 256, 262_208, GEMMA3_ROPE, end_token=1, window=1024
    ),
    TINY_GEMMA3: SlidingGeometry(
        "gemma3_text", 7, 64, 96, 4, 2, 16, 2048, GEMMA3_ROPE, end_token=1, window=32
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


def slides(name: str) -> bool:
    """Whether most layers of a geometry see a window only.

    Raises:
        KVzipError: for an unknown name.
    """
    return isinstance(find(name), SlidingGeometry)


MEASURED, SLIDING = (
    tuple(name for name in GEOMETRIES if name not in ON_CPU and slides(name) == sliding)
    for sliding in (False, True)
)
"""What sections measure unless told otherwise, and what `sliding_layers` does."""


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
