"""Scores of whole heads, fixed for a model: no scoring pass, a file instead.

Kim et al., "KVzip", arXiv 2505.23416, section 4.3: the largest reconstruction score of each head
over calibration texts says whether the head looks at the context at all.

The file is a safetensors file with one tensor, `head_scores` `[L, H]`, over the layers with full
attention, and JSON metadata under the key `kvzip`: what the scores were made from.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from kvzip.cache import ContextCache, Origin, Scores
from kvzip.errors import KVzipError
from kvzip.prefill import Progress, silent
from kvzip.prompts import Prompts
from kvzip.scoring.observation import CHUNK_SIZE
from kvzip.storage import METADATA_KEY, write_tensors

FILE_NAME = "head_scores.safetensors"
TENSOR = "head_scores"


@dataclass(frozen=True)
class HeadScores:
    """A score for each KV head.

    Attributes:
        values: `[L, H]`, float32, on the CPU, over the layers with full attention.
        about: what they were made from, as JSON holds it: `model_id` and `fingerprint` of the model
            if that is known, and whatever else.
    """

    values: Tensor
    about: Mapping[str, Any] = field(default_factory=dict)


def reduce(calibration: Iterable[Scores]) -> Tensor:
    """Head scores `[L, H]`: the maximum over the tokens of all calibration texts."""
    return torch.stack([scores.values.amax(-1) for scores in calibration]).amax(0)


def save(head_scores: Tensor, path: Path, about: Mapping[str, Any] | None = None) -> None:
    """Write head scores to a file, whole or not at all.

    Args:
        head_scores: `[L, H]`.
        path: where to write; a file that is there is replaced.
        about: see `HeadScores`.

    Raises:
        KVzipError: if the file cannot be written.
    """
    metadata = {METADATA_KEY: json.dumps(dict(about or {}), sort_keys=True)}
    write_tensors(path, {TENSOR: head_scores.float().contiguous()}, metadata)


def read(path: Path) -> HeadScores:
    """Read a file that `save` wrote.

    Raises:
        KVzipError: if the file is missing, damaged or no head score file.
    """
    if path.is_dir():
        raise KVzipError(f"{path} is a folder: name a head score file")
    try:
        with safe_open(path, framework="pt") as file:
            values = file.get_tensor(TENSOR)
            about = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    except FileNotFoundError as error:
        raise KVzipError(
            f"there are no head scores at {path}: make them with kvzip head-scores and pass "
            "load_score=PATH, or pass load_score=False to score the context itself"
        ) from error
    except (OSError, SafetensorError, ValueError) as error:
        raise KVzipError(f"{path} is no head score file: {error}") from error
    if not isinstance(about, dict):
        raise KVzipError(f"{path} is no head score file: its metadata are no JSON object")
    check_values(values, str(path))
    return HeadScores(values.float(), about)


def check_values(values: Tensor, place: str) -> None:
    """Raise KVzipError unless these are scores of one head or more, `[L, H]`."""
    if values.ndim != 2 or not values.numel() or not values.is_floating_point():
        raise KVzipError(
            f"{place} holds no scores [layers, KV heads]: its tensor is {values.dtype} with shape "
            f"{[*values.shape]}"
        )
    if not values.isfinite().all():
        raise KVzipError(f"{place} holds scores that are not finite: make them anew")


def check_model(
    head_scores: HeadScores, shape: tuple[int, int], origin: Origin, place: str
) -> None:
    """Raise KVzipError if head scores belong to a model of another shape, or to another model.

    Args:
        head_scores: the scores.
        shape: layers with full attention, and KV heads of each.
        origin: the model that they are wanted for.
        place: where they come from.
    """
    if head_scores.values.shape != shape:
        raise KVzipError(
            f"{place} holds scores for {[*head_scores.values.shape]} layers x KV heads, this model "
            f"has {[*shape]}"
        )
    made_with = head_scores.about.get("fingerprint")
    if made_with not in (None, origin.fingerprint):
        raise KVzipError(
            f"{place} was made with model {head_scores.about.get('model_id')} (fingerprint "
            f"{made_with}), not with {origin.model_id} ({origin.fingerprint}): make scores for "
            "this model, or take these over with kvzip head-scores --import"
        )


def load(path: Path, kv: ContextCache) -> Scores:
    """Read head scores and give every pair of a context the score of its head.

    Args:
        path: the file.
        kv: a cache of the context.

    Returns:
        Scores `[L, H, n]`; prune by them with `level="head"`.

    Raises:
        KVzipError: if the file is missing, is no head score file, or belongs to another model.
    """
    head_scores = read(path)
    layers, heads, n = kv.held.shape
    check_model(head_scores, (layers, heads * kv.division.size), kv.origin, str(path))
    return Scores(kv.division.own(head_scores.values)[:, :, None].expand(-1, -1, n), "heads")


def own_file(model: PreTrainedModel) -> Path:
    """Where the scores of a model's own folder are."""
    return Path(model.name_or_path) / FILE_NAME


def score(
    model: PreTrainedModel,
    prompts: Prompts,
    kv: ContextCache,
    *,
    max_positions: int,
    chunk_size: int = CHUNK_SIZE,
    progress: Progress = silent,
) -> Scores:
    """Score by the file in the model's own folder, without a forward pass.

    Args:
        model: says where its folder is.
        prompts: not used.
        kv: a cache; it is read, never changed.
        max_positions: not used.
        chunk_size: not used.
        progress: called with `("score", n, n)`.

    Raises:
        KVzipError: see `load`.
    """
    scores = load(own_file(model), kv)
    n = kv.document.context_length
    progress("score", n, n)
    return scores
