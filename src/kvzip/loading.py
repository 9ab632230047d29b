"""From a name to a model and its tokenizer."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DistributedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kvzip import quantized_weights
from kvzip.attention import IMPLEMENTATION
from kvzip.errors import KVzipError
from kvzip.geometry import refuse_layer_types
from kvzip.parallel import check_processes

# Arguments of `from_pretrained` that say where and how files are found.
HUB_ARGUMENTS = frozenset(
    {"cache_dir", "local_files_only", "revision", "subfolder", "token", "trust_remote_code"}
)

PLACING = ("device_map", "tp_plan", "distributed_config")
"""Arguments of `from_pretrained` that say where a model goes."""

EXCLUSIVE = (
    ("device", *PLACING),
    ("quantization", "quantization_config", "tp_plan", "distributed_config"),
)
"""Groups of arguments of which one at most may be given."""

BUNDLED = "bundled"
"""Name of the small model that comes with this package."""


@dataclass(frozen=True)
class Published:
    """A model on the Hugging Face hub, with settings that differ from its own config."""

    repository: str
    config: dict[str, Any] = field(default_factory=dict)


# Qwen3 is published for 32,768 positions, with this setting for longer contexts.
_QWEN3_LONG = {
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    },
}

SHORT_NAMES = {
    "llama3.1-8b": Published("meta-llama/Llama-3.1-8B-Instruct"),
    "llama3.0-8b": Published("meta-llama/Meta-Llama-3-8B-Instruct"),
    "llama3.2-1b": Published("meta-llama/Llama-3.2-1B-Instruct"),
    "llama3.2-3b": Published("meta-llama/Llama-3.2-3B-Instruct"),
    "duo": Published("gradientai/Llama-3-8B-Instruct-Gradient-1048k"),
    "qwen2.5-7b": Published("Qwen/Qwen2.5-7B-Instruct-1M"),
    "qwen2.5-14b": Published("Qwen/Qwen2.5-14B-Instruct-1M"),
    **{
        f"qwen3-{size}b": Published(f"Qwen/Qwen3-{size}B", _QWEN3_LONG)
        for size in ("0.6", "1.7", "4", "8", "14", "32")
    },
    **{
        f"gemma3-{size}b": Published(f"google/gemma-3-{size}b-it")
        for size in ("1", "4", "12", "27")
    },
}


def resolve(name: str | None) -> Published:
    """Where a model is found: the bundled one for None, a short name, a folder or a hub name.

    Raises:
        KVzipError: for a name that is none of these.
    """
    if name is None or name == BUNDLED:
        return Published(str(resources.files("kvzip") / "assets" / "tiny"))
    if name.lower() in SHORT_NAMES:
        return SHORT_NAMES[name.lower()]
    if name and Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise KVzipError(f"{name} is no model folder: it has no config.json")
        return Published(name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        close = difflib.get_close_matches(name.lower(), [*SHORT_NAMES, BUNDLED], n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise KVzipError(
            f"unknown model {name!r}: {hint}Give a folder, a Hugging Face name (owner/model) or "
            f"one of {', '.join([BUNDLED, *SHORT_NAMES])}"
        )
    return Published(name)


def load(
    name: str | None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    quantization: str | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model for inference, and its tokenizer.

    Args:
        name: see `resolve`.
        dtype: dtype of the weights; the checkpoint's on a GPU and float32 on a CPU if None.
        device: where to put it, the first GPU or else the CPU if None.
        quantization: what to quantise its weights to (see `quantized_weights`), or None.
        kwargs: passed on to transformers' `from_pretrained` (`revision`, `token`, ...).

    Raises:
        KVzipError: if the model is unknown or cannot be had.
    """
    published = resolve(name)
    _refuse_clashes({**kwargs, "device": device, "quantization": quantization})
    if quantization is not None:
        quantized_weights.check(quantization)
    if plan := kwargs.pop("tp_plan", None):
        if isinstance(plan, str) and plan != "auto":
            raise KVzipError(f"unknown tp_plan {plan!r}: 'auto' is the model's own")
        kwargs["distributed_config"] = DistributedConfig(tp_plan=plan)
    if kwargs.get("distributed_config") is not None:
        check_processes()
    device = _device(default_device() if device is None else device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else "auto"
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS & kwargs.keys()}
    try:
        config = _config(published, hub)
        refuse_layer_types(config.get_text_config(decoder=True))
        quantized = getattr(config, "quantization_config", None) is not None
        if quantization is not None:
            if quantized:
                raise KVzipError(
                    f"the weights of {name} are quantised already: leave out quantization"
                )
            kwargs["quantization_config"] = quantized_weights.config(
                quantization, device, _dtype(dtype, config)
            )
        placed = any(kwargs.get(argument) is not None for argument in PLACING)
        if not placed and (quantized or "quantization_config" in kwargs):
            kwargs["device_map"] = {"": str(device)}  # such weights are made where they stay
            placed = True
        model = AutoModelForCausalLM.from_pretrained(
            published.repository,
            config=config,
            dtype=dtype,
            attn_implementation=IMPLEMENTATION,
            **kwargs,
        )
        tokenizer = AutoTokenizer.from_pretrained(published.repository, **hub)
        if not placed:
            model = model.to(device)
    except KVzipError:
        raise
    except (AssertionError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise KVzipError(f"model {name or BUNDLED!r} cannot be loaded: {cause}") from error
    return model.eval(), tokenizer


def _device(name: torch.device | str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise KVzipError(
            f"unknown device {name!r}: 'cpu', 'cuda' or a certain one such as 'cuda:1'"
        ) from error


def default_device() -> str:
    """Where a model goes if nothing is said."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _refuse_clashes(given: Mapping[str, Any]) -> None:
    """Raise KVzipError for arguments of which two say the same, or that do not work together."""
    for group in EXCLUSIVE:
        clash = [name for name in group if given.get(name) is not None]
        if len(clash) > 1:
            raise KVzipError(f"{' and '.join(clash)} do not go together: leave out one")


def _dtype(dtype: torch.dtype | str, config: Any) -> torch.dtype:
    """What `from_pretrained` makes of a dtype."""
    if isinstance(dtype, torch.dtype):
        return dtype
    found = config.get_text_config(decoder=True).dtype if dtype == "auto" else dtype
    return found if isinstance(found, torch.dtype) else getattr(torch, found or "float32")


def _config(published: Published, hub: dict[str, Any]) -> Any:
    """The model's config with the settings of `published` on top."""
    config = AutoConfig.from_pretrained(published.repository, **hub)
    for key, value in published.config.items():
        if key == "rope_parameters":
            value = {**(getattr(config, key, None) or {}), **value}
        setattr(config, key, value)
    return config
