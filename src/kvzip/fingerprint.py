"""Digests that tell whether a saved cache belongs to the model at hand."""

import hashlib
import json

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    checkpoint converts to.
    """
    digest = hashlib.sha256()
    config = model.config.get_text_config(decoder=True)
    settings = {name: getattr(config, name, None) for name in _SETTINGS}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.is_floating_point() or parameter.is_meta:
            continue
        flat = parameter.detach().flatten()
        stride = max(1, flat.numel() // SAMPLES_PER_TENSOR)
        sample = flat[::stride][:SAMPLES_PER_TENSOR].to("cpu", torch.bfloat16).contiguous()
        digest.update(name.encode() + sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of a tokenizer's vocabulary and chat template, 32 hexadecimal digits."""
    state = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template]
    return hashlib.sha256(json.dumps(state, default=str).encode()).hexdigest()[:32]
