"""Scores of whole heads, fixed for a model: no scoring pass, a file instead.

Kim et al., "KVzip", arXiv 2505.23416, section 4.3: the largest reconstruction score of each head
over calibration texts says whether the head looks at the context at all.

The file is a safetensors file with one tensor, `head_scores` `[L, H]`, over the layers with full
attention.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvzip.cache import Scores
from kvzip.errors import KVzipError
from kvzip.geometry import Geometry

FILE_NAME = "head_scores.safetensors"


def reduce(calibration: list[Scores]) -> Tensor:
    """Head scores `[L, H]`: the maximum over the tokens of all calibration texts."""
    return torch.stack([scores.values.amax(-1) for scores in calibration]).amax(0)


def save(head_scores: Tensor, path: Path) -> None:
    """Write head scores `[L, H]` to a file."""
    save_file({"head_scores": head_scores.float().contiguous()}, path)


def load(path: Path, geometry: Geometry, context_length: int) -> Scores:
    """Read head scores and give every pair of a context the score of its head.

    Returns:
        Scores `[L, H, n]`; prune by them with `level="head"`.

    Raises:
        KVzipError: if the file is missing, is no head score file, or fits another model.
    """
    try:
        head_scores = load_file(path)["head_scores"]
    except FileNotFoundError as error:
        raise KVzipError(
            f"there are no head scores at {path}: pass load_score=PATH, or load_score=False to "
            "score the context itself"
        ) from error
    except (OSError, SafetensorError, KeyError) as error:
        raise KVzipError(f"{path} is no head score file: {error}") from error
    layers = [geometry.layers[i] for i in geometry.prunable]
    expected = (len(layers), layers[0].kv_heads)
    if head_scores.shape != expected:
        raise KVzipError(
            f"{path} holds scores for {[*head_scores.shape]} layers x KV heads, this model has "
            f"{[*expected]}"
        )
    values = head_scores.float()[:, :, None].expand(-1, -1, context_length)
    return Scores(values, "heads")
