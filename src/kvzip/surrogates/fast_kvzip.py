"""Fast KVzip: a gate for each layer, attention of a token's key to learnt keys and to itself.

Kim et al., "Fast KVzip: Efficient and Accurate LLM Inference with Gated KV Eviction",
arXiv 2601.17668. A gate projects a token's attention input x to G queries and one key for each KV
head, of dimension D = 16, and normalises them. With S learnt keys k_base, and a learnt offset b,

    score = mean over g of 1 / (1 + sum over s of exp(k_base[s] . q[g] / 4 - (k . q[g] / 4 + b[g])))

with 4 the root of D. The first tokens and a local window are always kept: the first tokens here are
the prefix, and the window is the last tokens of what is read in one go.

A file is a pickled dictionary whose `module` is a list with the tensors of each layer:
`q_proj.weight [H * G * D, d]`, `q_proj.bias`, `k_proj.weight [H * D, d]`, `q_norm.weight [D]`,
`k_norm.weight [D]`, `k_base [H, 1, S, D]`, `b [H, 1, G]`. It is read with pickle held to tensors.
"""

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from torch import Tensor

from kvzip.errors import KVzipError
from kvzip.surrogates.shape import Shape, scored_modules

NAME = "fastkvzip"
REPOSITORY = "Jang-Hyun/Fast-KVzip"
EPSILON = 1e-6
"""Of the normalisation."""

WINDOW, WINDOW_SHARE, SHORT = 4096, 0.02, 16_000
"""Last tokens to keep: 4,096, or 2 % of a context of fewer than 16,000."""


@dataclass(frozen=True)
class Gate:
    """The gate of one layer.

    Attributes:
        query_weight: `[H * G * D, d]`.
        query_bias: `[H * G * D]`.
        key_weight: `[H * D, d]`.
        query_gain: `[D]`, of the queries' normalisation.
        key_gain: `[D]`.
        base_keys: `[H, S, D]`.
        offset: `[H, G]`.
    """

    query_weight: Tensor
    query_bias: Tensor
    key_weight: Tensor
    query_gain: Tensor
    key_gain: Tensor
    base_keys: Tensor
    offset: Tensor

    def __call__(self, hidden: Tensor) -> Tensor:
        """Scores `[H, t]` in (0, 1), at least float32, of attention inputs `[t, d]`."""
        heads, group = self.offset.shape
        dim = len(self.query_gain)
        queries = F.linear(hidden, self.query_weight, self.query_bias)
        keys = F.linear(hidden, self.key_weight)
        queries = _normalised(queries.unflatten(1, (heads, group, dim)), self.query_gain)
        keys = _normalised(keys.unflatten(1, (heads, dim)), self.key_gain)
        own = torch.einsum("thgd,thd->htg", queries, keys) * dim**-0.5 + self.offset[:, None]
        base = torch.einsum("thgd,hsd->htgs", queries, self.base_keys) * dim**-0.5
        return torch.sigmoid(own - base.logsumexp(-1)).mean(-1)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Gate":
        """The gate for hidden states of a dtype; behind the projections it is not rounded.

        What is there already is not copied.
        """
        accumulate = torch.promote_types(dtype, torch.float32)
        projections = {"query_weight", "query_bias", "key_weight"}
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return Gate(
            **{
                name: part.to(device, dtype if name in projections else accumulate)
                for name, part in parts.items()
            }
        )


def _normalised(vectors: Tensor, gain: Tensor) -> Tensor:
    """Vectors over the root of their mean square, times a gain (RMSNorm)."""
    return F.rms_norm(vectors.to(gain.dtype), gain.shape, gain, EPSILON)


@dataclass(frozen=True)
class FastKVzip:
    """A surrogate in Fast KVzip's form.

    Attributes:
        scorer: what scores by it are called.
        gates: one for each layer that is scored.
        window: last tokens that a threshold leaves alone: none beyond those that `complete` marks.
        fingerprint: files of this form do not tell of a model.
    """

    scorer: str
    gates: Sequence[Gate]
    window: int = 0
    fingerprint: None = None

    def predict(self, layer: int, hidden: Tensor) -> Tensor:
        """Scores `[H, t]` in (0, 1) of tokens with attention inputs `[t, d]`."""
        return self.gates[layer].to(hidden.device, hidden.dtype)(hidden)

    def complete(self, scores: Tensor) -> Tensor:
        """The scores `[L, H, n]` of tokens that were all read, the window's above all others."""
        n = scores.shape[-1]
        window = int(WINDOW_SHARE * n) if n < SHORT else WINDOW
        if not window:
            return scores
        within = 1 + torch.arange(1, window + 1, device=scores.device) / window
        marked = within.to(scores).expand(*scores.shape[:2], window)
        return torch.cat([scores[..., :-window], marked], dim=-1)


def load(where: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> FastKVzip:
    """The gates of a model.

    Args:
        where: a file; the name of a model that gates are published for, such as `"qwen3-8b"`; or
            nothing, for the model at hand.
        shape: of the model.
        device: where to hold them; hidden states on others find copies there.
        dtype: of hidden states.

    Raises:
        KVzipError: if there are none, the file holds more than tensors or is damaged, or it was
            made for a model of another shape.
    """
    path = _file(where, shape)
    gates = read(path)
    first = gates[0]
    heads, group = first.offset.shape
    fitting = scored_modules(gates, shape, str(path), first.key_weight.shape[1], heads)
    if group != shape.group:
        raise KVzipError(
            f"the surrogate {path} is for a model with {group} query heads for each KV head, "
            f"{shape.model_id} has {shape.group}: choose a surrogate of this model"
        )
    scorer = f"{NAME}:{where or shape.name.lower()}"
    return FastKVzip(scorer, [gate.to(device, dtype) for gate in fitting])


def read(path: Path) -> list[Gate]:
    """The gates in a file, in order of the layers.

    Raises:
        KVzipError: if the file holds more than tensors, is damaged, or holds no gates.
    """
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise KVzipError(
            f"{path} is damaged, or holds more than tensors, which could run code: it is not opened"
        ) from error
    except (EOFError, KeyError, OSError, RuntimeError, ValueError) as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise KVzipError(f"{path} is damaged, or holds no gates: {cause}") from error
    layers = held.get("module") if isinstance(held, Mapping) else None
    if not isinstance(layers, (list, tuple)) or not layers:
        raise KVzipError(f"{path} holds no gates: there is no list under 'module'")
    gates = [_gate(path, i, tensors) for i, tensors in enumerate(layers)]
    sizes = {tuple(getattr(gate, field.name).shape for field in fields(gate)) for gate in gates}
    if len(sizes) > 1:
        raise KVzipError(f"{path} is damaged: its gates have different shapes")
    return gates


def _gate(path: Path, layer: int, tensors: Any) -> Gate:
    """The gate of one layer, checked."""
    names = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "q_norm.weight", "k_norm.weight",
             "k_base", "b")  # fmt: skip
    found = tensors if isinstance(tensors, Mapping) else {}
    missing = [name for name in names if not isinstance(found.get(name), Tensor)]
    if missing:
        raise KVzipError(f"{path} holds no gates: layer {layer} lacks {', '.join(missing)}")
    parts = {name: found[name].detach() for name in names}
    shapes = {name: tuple(part.shape) for name, part in parts.items()}
    if not _agree(shapes):
        raise KVzipError(f"{path} is damaged: the shapes of layer {layer} do not agree: {shapes}")
    return Gate(
        query_weight=parts["q_proj.weight"],
        query_bias=parts["q_proj.bias"],
        key_weight=parts["k_proj.weight"],
        query_gain=parts["q_norm.weight"],
        key_gain=parts["k_norm.weight"],
        base_keys=parts["k_base"][:, 0],
        offset=parts["b"][:, 0],
    )


def _agree(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether shapes are those of one gate."""
    if [len(shapes[name]) for name in ("k_base", "b", "q_proj.weight")] != [4, 3, 2]:
        return False
    heads, _, sinks, dim = shapes["k_base"]
    group, width = shapes["b"][2], shapes["q_proj.weight"][1]
    return shapes == {
        "q_proj.weight": (heads * group * dim, width),
        "q_proj.bias": (heads * group * dim,),
        "k_proj.weight": (heads * dim, width),
        "q_norm.weight": (dim,),
        "k_norm.weight": (dim,),
        "k_base": (heads, 1, sinks, dim),
        "b": (heads, 1, group),
    }


def _file(where: str, shape: Shape) -> Path:
    """A local file, downloaded if need be."""
    if Path(where).is_file():
        return Path(where)
    if where and (where.endswith(".pt") or Path(where).name != where):
        raise KVzipError(f"there is no file {where} with gates of Fast KVzip")
    name = f"{(where or shape.name).lower()}/q{shape.group}_dim16_sink16.pt"
    try:
        return Path(hf_hub_download(REPOSITORY, name))
    except (OSError, ValueError) as error:  # what the hub's client raises derives from these
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise KVzipError(
            f"the gates {name} of {REPOSITORY} cannot be had: {cause} (name a file: {NAME}:PATH)"
        ) from error
