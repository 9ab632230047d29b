"""What a .kvz file kept: by layer and head, and by token. Needs no model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvzip.errors import KVzipError

if TYPE_CHECKING:
    from kvzip.storage import Header

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Kept:
    """What a zipped document kept.

    Attributes:
        path: the file.
        model_id: name of the model that read the document.
        fingerprint: of that model.
        tokenizer_hash: of its tokenizer.
        scorer: name of the scorer, None without scores.
        ratio: share of the pairs that was asked for.
        realised: share that is there.
        layers: number of each layer with full attention.
        heads: share of the tokens that each head kept, `[L, H]`.
        tokens: share of the heads, over all layers, that kept each token, `[n]`.
        token_ids: of the document, `[n]`.
    """

    path: Path
    model_id: str
    fingerprint: str
    tokenizer_hash: str
    scorer: str | None
    ratio: float
    realised: float
    layers: tuple[int, ...]
    heads: Floats
    tokens: Floats
    token_ids: tuple[int, ...]


def read_kept(path: Path) -> Kept:
    """Read what a .kvz file kept.

    Raises:
        KVzipError: if it is missing, damaged or no .kvz file, or holds no layer to prune.
    """
    from kvzip import storage

    header = storage.read_header(path)
    layers = header.prunable
    if not layers:
        raise KVzipError(f"{path} has no layer with full attention: there is nothing to show")
    lengths = storage.read_lengths(path)
    counts, token_ids = _read_positions(path, header, layers)
    heads = (lengths - header.prefix_length).double().numpy() / header.context_tokens
    return Kept(
        path=path,
        model_id=header.origin.model_id,
        fingerprint=header.origin.fingerprint,
        tokenizer_hash=header.origin.tokenizer_hash,
        scorer=header.scorer,
        ratio=header.ratio,
        realised=header.realised_ratio,
        layers=layers,
        heads=heads,
        tokens=counts / lengths.numel(),
        token_ids=token_ids,
    )


def _read_positions(
    path: Path, header: Header, layers: tuple[int, ...]
) -> tuple[Floats, tuple[int, ...]]:
    """How many heads kept each token of the document, and its tokens."""
    from safetensors import SafetensorError, safe_open

    seen = header.prefix_length + header.context_tokens
    counts = np.zeros(seen)
    try:
        with safe_open(path, framework="np") as file:
            tensors: dict[str, Any] = {
                name: file.get_tensor(name)
                for name in ("token_ids", *(f"layers.{i}.positions" for i in layers))
            }
    except (OSError, SafetensorError) as error:
        raise KVzipError(f"{path} is damaged: {error}") from error
    ids = tensors.pop("token_ids")
    for name, positions in tensors.items():
        if len(positions) and not 0 <= positions.min() <= positions.max() < seen:
            raise KVzipError(f"{path} is damaged: {name} is beyond the document")
        counts += np.bincount(positions, minlength=seen)
    if len(ids) != seen:
        raise KVzipError(f"{path} is damaged: it has {len(ids)} token ids, not {seen}")
    return counts[header.prefix_length :], tuple(map(int, ids[header.prefix_length :]))
