"""Digests that tell whether a saved cache belongs to the model at hand."""

import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kvzip.weights import plain_weights

SAMPLES_PER_TENSOR = 16

# Settings that shape keys and values and that weights do not show.
_SETTINGS = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_parameters",
    "sliding_window",
    "layer_types",
    "query_pre_attn_scalar",
    "attention_multiplier",
    "rms_norm_eps",
)


def model_fingerprint(model: PreTrainedModel) -> str:
    """Digest of a model's config and of a sample of its weights, 32 hexadecimal digits.

    Samples are rounded to bfloat16, so that a model has one fingerprint in every dtype that its
    checkpoint converts to. Of weights that are quantised, codes and scales are sampled: what
    quantising makes of them depends on the dtype, and so does the fingerprint.
    """
    digest = hashlib.sha256()
    config = model.config.get_text_config(decoder=True)
    settings = {name: _setting(config, name) for name in _SETTINGS}
    if (quantized := getattr(model.config, "quantization_config", None)) is not None:
        settings["quantization"] = _quantization(quantized)
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, weight in plain_weights(model):
        flat = weight.flatten()
        stride = max(1, flat.numel() // SAMPLES_PER_TENSOR)
        sample = flat[::stride][:SAMPLES_PER_TENSOR].cpu().contiguous()
        if sample.is_floating_point():
            sample = sample.bfloat16()
        digest.update(name.encode() + sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _setting(config: PreTrainedConfig, name: str) -> Any:
    """A setting, or those of all layers where layers differ."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # "may vary across layers"
        return [getattr(layer, name, None) for layer in config.per_layer_config]


def _quantization(config: Any) -> list[str]:
    """How weights, and perhaps activations, are quantised: method and type."""
    said = config if isinstance(config, dict) else vars(config)
    kind = said.get("quant_type")
    return [str(said.get("quant_method")), type(kind).__name__]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of a tokenizer's vocabulary and chat template, 32 hexadecimal digits."""
    state = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template]
    return hashlib.sha256(json.dumps(state, default=str).encode()).hexdigest()[:32]
