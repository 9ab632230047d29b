"""The .kvz file: a zipped context on disk, as one safetensors file.

    token_ids            [p + n]      int64
    layers.{i}.keys      [rows, D]    packed; [H, w, D] in a sliding layer
    layers.{i}.values    [rows, D]    likewise
    layers.{i}.indptr    [H + 1]      int64    (not in sliding layers, as the rest)
    layers.{i}.positions [rows]       int32    original position of each row
    layers.{i}.scores    [rows]       float32  score of each row, infinity for the prefix

If the pairs are quantised, `keys` and `values` are four tensors each (see `kernels.quantization`;
not in sliding layers either):

    layers.{i}.keys.codes   [rows, words]   int16
    layers.{i}.keys.scales  [rows, groups]  float16 or float32
    layers.{i}.keys.center  [H, D]          float32
    layers.{i}.keys.gain    [H, D]          float32

A layer of linear attention holds its state behind the context, and no pairs:

    layers.{i}.conv         [1, C, k]             (see `states.State`)
    layers.{i}.recurrent    [1, heads, D_k, D_v]

Metadata, under "kvzip": the CRC-32 of a JSON object, a blank, and that object (`Header`).
Nothing is pickled. A file is written whole or not at all.
"""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvzip import head_parts
from kvzip.cache import ContextCache, Document, Origin, Scores
from kvzip.errors import KVzipError
from kvzip.kernels import Operations
from kvzip.kernels.quantization import KV_DTYPES, QuantizedRows
from kvzip.layers import AnsweringLayer, ContextLayer, SlidingLayer, Tail
from kvzip.pairs import Pairs, QuantizedPairs
from kvzip.parallel import WHOLE, Division
from kvzip.states import State, StateLayer

FORMAT_VERSION = 2
READ_VERSIONS = (1, 2)
"""In version 1 pairs are never quantised and scores have no window; the header has neither."""
METADATA_KEY = "kvzip"


@dataclass(frozen=True)
class Header:
    """What a .kvz file says about itself.

    Attributes:
        version: version of the file format.
        origin: the model that the cache belongs to.
        prefix_length: p, tokens in front of the context.
        context_tokens: n.
        ratio: the keep ratio that was asked for.
        realised_ratio: share of the context's pairs in the file.
        scorer: name of the scorer, None if the pairs were not scored.
        score_window: last tokens that a threshold on these scores leaves alone, and other budgets
            favour.
        kv_dtype: what pairs are quantised to, None if they are as the model made them.
        windows: window of each layer in tokens, None for a layer that does not slide.
        checksums: CRC-32 of each tensor's dtype, shape and bytes.
    """

    version: int
    origin: Origin
    prefix_length: int
    context_tokens: int
    ratio: float
    realised_ratio: float
    scorer: str | None
    score_window: int
    kv_dtype: str | None
    windows: list[int | None]
    checksums: dict[str, int]

    @property
    def prunable(self) -> tuple[int, ...]:
        """Indices of the layers with full attention: those that tell their heads' rows."""
        layers = range(len(self.windows))
        return tuple(i for i in layers if f"layers.{i}.indptr" in self.checksums)


def save(kv: ContextCache, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write the context of a cache, without its tail, to a file.

    Args:
        kv: the cache.
        path: where to write.
        overwrite: whether a file that is there already may be replaced.

    Raises:
        KVzipError: if the file exists and `overwrite` is False, or cannot be written.
    """
    path = Path(path)
    if not kv.document.context_length:
        raise KVzipError("the cache holds no context yet: read one with kv.extend before saving it")
    check_output(path, overwrite=overwrite)
    tensors = {}
    for name, tensor in _tensors(kv).items():
        if parts := kv.division.collect(tensor):
            tensors[name] = head_parts.merge(name, parts)
    kv.division.first(lambda: _write(path, kv, tensors))
    return path


def _write(path: Path, kv: ContextCache, tensors: dict[str, Tensor]) -> None:
    """Write a file of all heads."""
    header = Header(
        version=FORMAT_VERSION,
        origin=kv.origin,
        prefix_length=kv.document.prefix_length,
        context_tokens=kv.document.context_length,
        ratio=kv.ratio,
        realised_ratio=_realised_ratio(kv, tensors),
        scorer=kv.scores.scorer if kv.scores else None,
        score_window=kv.scores.window if kv.scores else 0,
        kv_dtype=kv.kv_dtype,
        windows=[getattr(layer, "window", None) for layer in kv.layers],
        checksums={name: _checksum(tensor) for name, tensor in tensors.items()},
    )
    write_tensors(path, tensors, {METADATA_KEY: _pack_header(header)})


def _realised_ratio(kv: ContextCache, tensors: Mapping[str, Tensor]) -> float:
    """Share of the context's pairs of all heads that is among a file's tensors."""
    indptrs = [tensor for name, tensor in tensors.items() if name.endswith(".indptr")]
    heads, rows = sum(len(one) - 1 for one in indptrs), sum(int(one[-1]) for one in indptrs)
    p, n = kv.document.prefix_length, kv.document.context_length
    return (rows - heads * p) / (heads * n)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        KVzipError: if it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        save_file(tensors, partial, metadata)
        partial.chmod(mode)  # what a new file gets here; safetensors makes private ones
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise KVzipError(f"cannot write {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raise KVzipError unless a file can be made at `path`; called before long work, too."""
    if path.is_dir():
        raise KVzipError(f"{path} is a folder: name a file to write")
    if not path.parent.is_dir():
        raise KVzipError(f"the folder {path.parent} does not exist: create it first")
    if not os.access(path.parent, os.W_OK):
        raise KVzipError(f"the folder {path.parent} is not writable: choose another one")
    if path.exists() and not overwrite:
        raise KVzipError(
            f"{path} exists: choose another name, or overwrite it (overwrite=True, --force)"
        )


def read_header(path: str | Path) -> Header:
    """Read what a file says about itself, without its tensors.

    Raises:
        KVzipError: if the file is missing, truncated, damaged, not a .kvz file, or of another
            format version.
    """
    path = Path(path)
    if path.is_dir():
        raise KVzipError(f"{path} is a folder: name a .kvz file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError as error:
        raise KVzipError(f"there is no file {path}") from error
    except (OSError, SafetensorError) as error:
        raise KVzipError(f"{path} is no .kvz file, or is truncated: {error}") from error
    return _parse_header(path, metadata)


def read_lengths(path: str | Path) -> Tensor:
    """Rows that each KV head of each prunable layer holds, `[L, H]`, prefix included."""
    header = read_header(path)
    names = [f"layers.{i}.indptr" for i in header.prunable]
    tensors = _read_tensors(Path(path), header, names)
    return torch.stack([tensors[name].diff() for name in names])


def load(
    path: str | Path,
    origin: Origin,
    *,
    operations: Operations,
    devices: Sequence[torch.device],
    dtype: torch.dtype,
    retain: bool = False,
    division: Division = WHOLE,
) -> ContextCache:
    """Read a cache that was saved from the same model.

    Args:
        path: a .kvz file.
        origin: the model at hand.
        operations: how to attend to it and compact it.
        devices: where to put keys and values, for each layer of the model.
        dtype: the model's dtype; keys and values are converted to it.
        retain: keep what the file holds beside what is pruned of it later.
        division: how heads are divided among processes; each reads the file and takes its part.

    Raises:
        KVzipError: as `read_header`; also if a tensor is damaged or missing, or the file belongs to
            another model or tokenizer.
    """
    path = Path(path)
    header = read_header(path)
    if header.kv_dtype not in (None, *KV_DTYPES):
        raise KVzipError(
            f"{path} holds {header.kv_dtype} codes, this kvzip knows {', '.join(KV_DTYPES)}: zip "
            "the document again"
        )
    unlike = header.origin.fingerprint != origin.fingerprint
    if unlike and header.origin.quantization != origin.quantization:
        made, here = (one.quantization or "not quantised" for one in (header.origin, origin))
        raise KVzipError(
            f"{path} was made with weights that were {made}, the model's are {here}: load "
            f"it with quantization={header.origin.quantization!r}, or zip the document again"
        )
    if unlike:
        made_with, at_hand = header.origin, origin
        raise KVzipError(
            f"{path} was made with model {made_with.model_id} "
            f"(fingerprint {made_with.fingerprint}), not with {at_hand.model_id} "
            f"({at_hand.fingerprint}): load it with that model, or zip the document again"
        )
    if header.origin.tokenizer_hash != origin.tokenizer_hash:
        raise KVzipError(
            f"{path} was made with another tokenizer or chat template of {header.origin.model_id}: "
            "zip the document again"
        )
    try:
        tensors = _read_tensors(path, header)
        if division.size > 1:
            tensors = head_parts.part_of(tensors, header.windows, division.rank, division.size)
        layers, scores = _assemble(header, tensors, operations, devices, dtype, retain)
    except KVzipError:
        raise
    except (RuntimeError, LookupError, TypeError, ValueError) as error:
        raise KVzipError(f"{path} is damaged: {error}") from error
    return ContextCache(
        layers,
        Document(tensors["token_ids"], header.prefix_length),
        origin,
        scores=scores,
        ratio=header.ratio,
        division=division,
    )


def _tensors(kv: ContextCache) -> dict[str, Tensor]:
    """Every tensor of a file, by name, on the CPU."""
    tensors = {"token_ids": kv.document.token_ids}
    scores = iter(kv.scores.values if kv.scores else ())
    for i, layer in enumerate(kv.layers):
        context = layer.context
        if isinstance(layer, StateLayer):
            parts = context.tensors()
        elif isinstance(layer, SlidingLayer):
            parts = {"keys": context.dense_keys(), "values": context.dense_values()}
        else:
            parts = {
                **context.tensors(),
                "indptr": context.indptr,
                "positions": context.kept.nonzero()[:, 1].int(),
            }
            if kv.scores:
                layer_scores = next(scores)
                prefix = layer_scores.new_full(
                    (len(layer_scores), kv.document.prefix_length), torch.inf
                )
                parts["scores"] = torch.cat([prefix, layer_scores], dim=1)[context.kept]
        for name, part in parts.items():
            tensors[f"layers.{i}.{name}"] = part.cpu().contiguous()
    return tensors


def _assemble(
    header: Header,
    tensors: Mapping[str, Tensor],
    operations: Operations,
    devices: Sequence[torch.device],
    dtype: torch.dtype,
    retain: bool,
) -> tuple[list[AnsweringLayer | StateLayer], Scores | None]:
    """Layers and scores from the tensors of a file."""
    seen = header.prefix_length + header.context_tokens
    layers: list[AnsweringLayer | StateLayer] = []
    scores = []
    for i, (window, device) in enumerate(zip(header.windows, devices, strict=True)):
        if f"layers.{i}.recurrent" in tensors:
            conv = tensors[f"layers.{i}.conv"].to(device, dtype)
            state = State(conv, tensors[f"layers.{i}.recurrent"].to(device))
            layers.append(StateLayer(state))
            continue
        if window is not None:
            dense = Pairs.dense(*_as_made(tensors, i, device, dtype))
            layers.append(SlidingLayer(seen, dense, Tail(), operations, window))
            continue
        indptr = tensors[f"layers.{i}.indptr"]
        positions = tensors[f"layers.{i}.positions"].long()
        heads = torch.repeat_interleave(torch.arange(len(indptr) - 1), indptr.diff())
        kept = torch.zeros(len(indptr) - 1, seen, dtype=torch.bool)
        kept[heads, positions] = True
        pairs: Pairs | QuantizedPairs
        if header.kv_dtype is None:
            pairs = Pairs(*_as_made(tensors, i, device, dtype), kept)
        else:
            pairs = QuantizedPairs(*_quantized(tensors, i, device, header.kv_dtype), kept)
        layers.append(ContextLayer(seen, pairs, Tail(), operations, pairs if retain else None))
        if header.scorer is not None:
            layer_scores = torch.zeros(kept.shape)
            layer_scores[heads, positions] = tensors[f"layers.{i}.scores"]
            scores.append(layer_scores[:, header.prefix_length :])
    if header.scorer is None:
        return layers, None
    return layers, Scores(torch.stack(scores), header.scorer, header.score_window)


def _as_made(
    tensors: Mapping[str, Tensor], layer: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer."""
    keys, values = (tensors[f"layers.{layer}.{name}"] for name in ("keys", "values"))
    return keys.to(device, dtype), values.to(device, dtype)


def _quantized(
    tensors: Mapping[str, Tensor], layer: int, device: torch.device, kv_dtype: str
) -> tuple[QuantizedRows, QuantizedRows]:
    """Keys and values of a layer, quantised."""
    keys, values = (
        QuantizedRows(
            kv_dtype,
            *(tensors[f"layers.{layer}.{name}.{part}"].to(device) for part in QuantizedRows.PARTS),
        )
        for name in ("keys", "values")
    )
    return keys, values


def _pack_header(header: Header) -> str:
    text = json.dumps(asdict(header))
    return f"{_text_checksum(text)} {text}"


def _text_checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _parse_header(path: Path, metadata: Mapping[str, str]) -> Header:
    if METADATA_KEY not in metadata:
        raise KVzipError(f"{path} is a safetensors file, but no .kvz file")
    checksum, _, text = metadata[METADATA_KEY].partition(" ")
    if checksum != _text_checksum(text):
        raise KVzipError(f"{path} is damaged: the checksum of its header is wrong")
    try:
        fields: dict[str, Any] = json.loads(text)
        version = fields["version"]
        if version in READ_VERSIONS:
            missing = {"kv_dtype": None, "score_window": 0}
            fields = {**missing, **fields, "origin": Origin(**fields["origin"])}
            return Header(**fields)
    except (LookupError, TypeError, ValueError) as error:
        raise KVzipError(f"{path} is damaged: {error}") from error
    raise KVzipError(
        f"{path} has format version {version}, this kvzip reads versions "
        f"{' and '.join(map(str, READ_VERSIONS))}: zip the document again"
    )


def _read_tensors(path: Path, header: Header, names: list[str] | None = None) -> dict[str, Tensor]:
    """Read tensors (all that the header lists, if `names` is None) and verify their checksums."""
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            there = set(file.keys())
            for name in header.checksums if names is None else names:
                if name not in there:
                    raise KVzipError(f"{path} is damaged: tensor {name} is missing")
                tensors[name] = file.get_tensor(name)
                if _checksum(tensors[name]) != header.checksums[name]:
                    raise KVzipError(f"{path} is damaged: the checksum of {name} is wrong")
    except (OSError, SafetensorError) as error:
        raise KVzipError(f"{path} cannot be read: {error}") from error
    return tensors


def _checksum(tensor: Tensor) -> int:
    form = zlib.crc32(f"{tensor.dtype} {[*tensor.shape]}".encode())
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data, form)
