"""KVzap: a linear map or a small MLP for each layer, from its attention input to log-scores.

Jegou and Jeblick, "KVzap: Fast, Adaptive, and Faithful KV Cache Pruning", arXiv 2601.07891. The
module of a layer takes the normalised hidden state of a token and gives, for each KV head, the
natural logarithm of the token's KVzip+ score (scorer `"reconstruction+"`). Pairs below a threshold
are evicted, -4 for instance, but for those of the last 128 tokens.

A checkpoint is a folder in transformers' form:

    config.json         model_type "kvzap", input_dim, output_dim, n_modules, and hidden_dim, which
                        is null for linear modules
    model.safetensors   layers.{i}.weight, layers.{i}.bias            linear
                        layers.{i}.0.weight, .0.bias, .2.weight, ...  linear, GELU, linear
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvzip.errors import KVzipError
from kvzip.surrogates.shape import Shape, scored_modules

NAME = "kvzap"
MODEL_TYPE = "kvzap"
WINDOW = 128
"""Last tokens that a threshold leaves alone."""

CONFIG, WEIGHTS = "config.json", "model.safetensors"
SIZES = ("input_dim", "output_dim", "n_modules")
PARTS = {
    "linear": ("weight", "bias"),
    "mlp": ("2.weight", "2.bias", "0.weight", "0.bias"),
}
"""Names of a module's tensors in a checkpoint, in the order of `Module`."""


@dataclass(frozen=True)
class Module:
    """The module of one layer: `weight @ x + bias`, after `gelu(inner_weight @ x + inner_bias)`.

    Attributes:
        weight: `[H, d]`, or `[H, hidden_dim]` behind an inner map.
        bias: `[H]`.
        inner_weight: `[hidden_dim, d]`, None for a linear module.
        inner_bias: `[hidden_dim]`, None for a linear module.
    """

    weight: Tensor
    bias: Tensor
    inner_weight: Tensor | None = None
    inner_bias: Tensor | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """`[t, d]` to `[t, H]`; the last map is not rounded below float32."""
        if self.inner_weight is not None:
            hidden = F.gelu(F.linear(hidden, self.inner_weight, self.inner_bias))
        return F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)

    @property
    def kind(self) -> str:
        """`"linear"` or `"mlp"`."""
        return "linear" if self.inner_weight is None else "mlp"

    @property
    def width(self) -> int:
        """d, of the hidden states."""
        return (self.weight if self.inner_weight is None else self.inner_weight).shape[1]

    def tensors(self) -> list[Tensor]:
        """Those that it has, in the order above."""
        parts = (self.weight, self.bias, self.inner_weight, self.inner_bias)
        return [part for part in parts if part is not None]

    def to(self, device: torch.device, dtype: torch.dtype) -> "Module":
        """The module for hidden states of a dtype; what is there already is not copied."""
        last = torch.promote_types(dtype, torch.float32)
        inner = (self.inner_weight, self.inner_bias)
        return Module(
            self.weight.to(device, last),
            self.bias.to(device, last),
            *(None if part is None else part.to(device, dtype) for part in inner),
        )


@dataclass(frozen=True)
class KVzap:
    """A surrogate in KVzap's form.

    Attributes:
        scorer: what scores by it are called.
        modules: one for each layer that is scored.
        fingerprint: of the model that it was trained on, None if the files do not say.
        window: last tokens that a threshold leaves alone, and other budgets favour.
    """

    scorer: str
    modules: Sequence[Module]
    fingerprint: str | None = None
    window: int = WINDOW

    def predict(self, layer: int, hidden: Tensor) -> Tensor:
        """Log-scores `[H, t]`, float32, of tokens with attention inputs `[t, d]`."""
        return self.modules[layer].to(hidden.device, hidden.dtype)(hidden).T

    def complete(self, scores: Tensor) -> Tensor:
        """The scores `[L, H, n]` of tokens that were all read: as they are."""
        return scores


def load(where: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> KVzap:
    """The surrogate of a model.

    Args:
        where: `"linear"` or `"mlp"` for the one in the model's local folder, or else the published
            one; a folder; or a Hugging Face name.
        shape: of the model.
        device: where to hold it; hidden states on others find copies there.
        dtype: of hidden states.

    Raises:
        KVzipError: if there is none, it is damaged, or it was made for a model of another shape.
    """
    folder = _folder(where, shape)
    modules = read(folder)
    first = modules[0]
    fitting = scored_modules(modules, shape, str(folder), first.width, len(first.bias))
    return KVzap(
        f"{NAME}:{where}", [module.to(device, dtype) for module in fitting], trained_on(folder)
    )


def trained_on(folder: Path) -> str | None:
    """The fingerprint of the model that a surrogate was trained on here, None of published ones."""
    notes = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("kvzip")
    found = notes.get("fingerprint") if isinstance(notes, dict) else None
    return found if isinstance(found, str) else None


def read(folder: Path) -> list[Module]:
    """The modules in a folder, in order.

    Raises:
        KVzipError: if it holds no surrogate in this form, or not all of one.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, SafetensorError) as error:
        raise KVzipError(
            f"{folder} holds no KVzap surrogate: {error}. Name a folder with {CONFIG} and {WEIGHTS}"
        ) from error
    if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
        found = config.get("model_type") if isinstance(config, dict) else None
        raise KVzipError(
            f"{folder} holds no KVzap surrogate: its model_type is {found!r}, not {MODEL_TYPE!r}"
        )
    sizes: dict[str, Any] = {name: config.get(name) for name in SIZES}
    hidden_dim = config.get("hidden_dim")
    if not all(map(_is_size, sizes.values())) or not (hidden_dim is None or _is_size(hidden_dim)):
        given = {**sizes, "hidden_dim": hidden_dim}
        raise KVzipError(f"{folder / CONFIG} gives no sizes of a KVzap surrogate: {given}")
    width, heads, count = sizes.values()
    for name, size in _tensor_shapes(width, heads, count, hidden_dim).items():
        found = tensors.get(name)
        if found is None or tuple(found.shape) != size or not found.is_floating_point():
            seen = "is missing" if found is None else f"is {found.dtype} {[*found.shape]}"
            raise KVzipError(
                f"{folder / WEIGHTS} is damaged, or not that of {CONFIG}: {name} {seen}, "
                f"{[*size]} are expected"
            )
        if not found.isfinite().all():
            raise KVzipError(
                f"{folder / WEIGHTS} is damaged: {name} holds numbers that are not finite"
            )
    parts = PARTS["linear" if hidden_dim is None else "mlp"]
    return [Module(*(tensors[f"layers.{i}.{part}"] for part in parts)) for i in range(count)]


def save(modules: Sequence[Module], folder: Path, notes: Mapping[str, Any]) -> None:
    """Write a surrogate; the folder is there as a whole or not at all.

    Args:
        modules: one for each layer that is scored.
        folder: a new folder, or an empty one.
        notes: what else is to stand in the config.

    Raises:
        KVzipError: if the folder is not new or empty, or cannot be written.
    """
    check_output(folder)
    first = modules[0]
    inner = first.inner_weight
    config = {
        "architectures": ["KVzapModel"],
        "model_type": MODEL_TYPE,
        "input_dim": first.width,
        "output_dim": len(first.bias),
        "hidden_dim": None if inner is None else len(inner),
        "n_modules": len(modules),
        "dtype": str(first.weight.dtype).removeprefix("torch."),
        **notes,
    }
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir()
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(_tensors(modules), partial / WEIGHTS, {"format": "pt"})
        mode = (partial / CONFIG).stat().st_mode
        (partial / WEIGHTS).chmod(mode)  # what a new file gets here; safetensors makes private ones
        partial.replace(folder)
    except (OSError, SafetensorError) as error:
        raise KVzipError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_output(folder: Path) -> None:
    """Raise KVzipError unless a surrogate can be written there; called before long work, too."""
    if folder.exists() and not folder.is_dir():
        raise KVzipError(f"{folder} is a file: name a folder to write")
    if folder.is_dir() and any(folder.iterdir()):
        raise KVzipError(f"the folder {folder} is not empty: name a new one")
    if not folder.parent.is_dir():
        raise KVzipError(f"the folder {folder.parent} does not exist: create it first")
    if not os.access(folder.parent, os.W_OK):
        raise KVzipError(f"the folder {folder.parent} is not writable: choose another one")


def _folder(where: str, shape: Shape) -> Path:
    """A local folder with a surrogate's files, downloaded if need be."""
    if where in PARTS:
        beside = Path(shape.model_id) / f"{NAME}-{where}"
        return beside if beside.is_dir() else _download(f"nvidia/KVzap-{where}-{shape.name}")
    if where and Path(where).is_dir():
        return Path(where)
    if where.count("/") != 1 or where.startswith((".", "/", "~")):
        raise KVzipError(
            f"there is no KVzap surrogate {where!r}: name {NAME}:linear, {NAME}:mlp, a folder "
            f"({NAME}:PATH) or a Hugging Face name ({NAME}:owner/name)"
        )
    return _download(where)


def _download(repository: str) -> Path:
    try:
        paths = [hf_hub_download(repository, name) for name in (CONFIG, WEIGHTS)]
    except (OSError, ValueError) as error:  # what the hub's client raises derives from these
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise KVzipError(
            f"the KVzap surrogate {repository} cannot be had: {cause} (train one with `kvzip "
            "train-surrogate`, or name a folder)"
        ) from error
    return Path(paths[0]).parent


def _tensor_shapes(
    width: int, heads: int, count: int, hidden_dim: int | None
) -> dict[str, tuple[int, ...]]:
    sizes: tuple[tuple[int, ...], ...]
    if hidden_dim is None:
        kind, sizes = "linear", ((heads, width), (heads,))
    else:
        kind, sizes = "mlp", ((heads, hidden_dim), (heads,), (hidden_dim, width), (hidden_dim,))
    parts = dict(zip(PARTS[kind], sizes, strict=True))
    return {f"layers.{i}.{part}": size for i in range(count) for part, size in parts.items()}


def _tensors(modules: Sequence[Module]) -> dict[str, Tensor]:
    return {
        f"layers.{i}.{part}": tensor.contiguous()
        for i, module in enumerate(modules)
        for part, tensor in zip(PARTS[module.kind], module.tensors(), strict=True)
    }


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
