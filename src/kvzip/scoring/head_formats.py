"""Head scores in the forms in which others publish them.

- A pickled tensor, `.pt`, as KVzip's repository ships them: `[layers, KV heads]`, or with axes of
  length 1 besides. It is read without running any code that a pickle may hold.
- A pattern of DuoAttention (Xiao et al., "DuoAttention: Efficient Long-Context LLM Inference with
  Retrieval and Streaming Heads", arXiv 2410.10819): a folder with `full_attention_heads.tsv`, a
  line for each layer and a column for each KV head, and `config.json` with `sink_size` and
  `recent_size`, the tokens that a head without full attention still sees there.
- A file of this package (see `heads`).
"""

import json
import os
import pickle
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvzip.errors import KVzipError
from kvzip.scoring.heads import HeadScores, check_values, read

PATTERN, CONFIG = "full_attention_heads.tsv", "config.json"

SINK_SIZE, RECENT_SIZE = 128, 256
"""Tokens, in the patterns that DuoAttention publishes."""


@dataclass(frozen=True)
class Streaming:
    """What a head without full attention sees in DuoAttention: first and last tokens."""

    sink_size: int = SINK_SIZE
    recent_size: int = RECENT_SIZE


def import_scores(paths: Sequence[Path]) -> HeadScores:
    """The element-wise maximum of head scores in any of these forms.

    Returns:
        The scores; about them it is known what they were read from and, of a pattern, `sink_size`
        and `recent_size`. They belong to no model in particular.

    Raises:
        KVzipError: if a file is missing, damaged or of another form, or the shapes differ.
    """
    parts = [_read(path) for path in paths]
    first = parts[0].values.shape
    for path, part in zip(paths, parts, strict=True):
        if part.values.shape != first:
            raise KVzipError(
                f"{path} holds scores for {[*part.values.shape]} layers x KV heads, {paths[0]} for "
                f"{[*first]}: they belong to different models"
            )
    about: dict[str, Any] = {"imported": [path.resolve().name for path in paths]}
    for part in parts:
        about.update({name: part.about[name] for name in _SIZES if name in part.about})
    return HeadScores(torch.stack([part.values for part in parts]).amax(0), about)


def check_pattern_folder(folder: Path, *, overwrite: bool) -> None:
    """Raise KVzipError unless a pattern can be written to a folder; asked before long work."""
    if folder.exists() and not folder.is_dir():
        raise KVzipError(f"{folder} is no folder: name one for {PATTERN} and {CONFIG}")
    if not folder.parent.is_dir():
        raise KVzipError(f"the folder {folder.parent} does not exist: create it first")
    there = [folder / name for name in (PATTERN, CONFIG) if (folder / name).exists()]
    if there and not overwrite:
        raise KVzipError(f"{there[0]} exists: choose another folder, or overwrite it (--force)")
    if not os.access(folder if folder.exists() else folder.parent, os.W_OK):
        raise KVzipError(f"the folder {folder} is not writable: choose another one")


def export_pattern(head_scores: HeadScores, folder: Path, streaming: Streaming) -> None:
    """Write head scores as a pattern of DuoAttention.

    Args:
        head_scores: the scores; DuoAttention takes them for shares from 0 to 1.
        folder: made if it does not exist; a pattern in it is replaced.
        streaming: what heads without full attention see.

    Raises:
        KVzipError: if it cannot be written.
    """
    lines = ("\t".join(f"{score:.18e}" for score in layer) for layer in head_scores.values.tolist())
    config = {
        "sink_size": streaming.sink_size,
        "recent_size": streaming.recent_size,
        "kvzip": dict(head_scores.about),
    }
    texts = {
        PATTERN: "".join(f"{line}\n" for line in lines),
        CONFIG: json.dumps(config, indent=2, sort_keys=True) + "\n",
    }
    partial = {name: folder / f".{name}.{os.getpid()}.partial" for name in texts}
    try:
        folder.mkdir(exist_ok=True)
        for name, text in texts.items():
            partial[name].write_text(text, encoding="utf-8")
        for name, path in partial.items():
            path.replace(folder / name)
    except OSError as error:
        raise KVzipError(f"cannot write to {folder}: {error.strerror}") from error
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


_SIZES = ("sink_size", "recent_size")


def _read(path: Path) -> HeadScores:
    if not path.exists():
        raise KVzipError(f"there is no file {path}")
    if path.is_dir():
        return _read_pattern(path)
    if path.name == PATTERN:
        return _read_pattern(path.parent)
    if path.suffix == ".safetensors":
        return read(path)
    if path.suffix in (".pt", ".pth"):
        return HeadScores(_read_pickle(path))
    raise KVzipError(
        f"{path} is of no known form: give a tensor (.pt), a folder with {PATTERN}, or a file of "
        "kvzip head-scores (.safetensors)"
    )


def _read_pickle(path: Path) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what is refused anyway
            tensor = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise KVzipError(
            f"{path} holds more than tensors, or is damaged, and is not opened: save the one "
            "tensor [layers, KV heads] with torch.save"
        ) from error
    except OSError as error:
        raise KVzipError(f"{path} cannot be read: {error.strerror or error}") from error
    except (RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError) as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise KVzipError(f"{path} is damaged, or no file of torch.save: {cause}") from error
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        raise KVzipError(f"{path} holds a {type(tensor).__name__}, not one tensor")
    scores = _without_unit_axes(tensor.detach())
    check_values(scores, str(path))
    return scores.float()


def _without_unit_axes(scores: Tensor) -> Tensor:
    """`[L, H]` from a tensor with axes of length 1 besides, layers first."""
    if scores.ndim <= 2:
        return scores
    long = [size for size in scores.shape if size != 1]
    if prod(long) == 0 or len(long) > 2:
        return scores
    return scores.reshape([*long, 1, 1][:2])


def _read_pattern(folder: Path) -> HeadScores:
    table, config = folder / PATTERN, folder / CONFIG
    for path in (table, config):
        if not path.is_file():
            raise KVzipError(f"{folder} is no pattern of DuoAttention: it has no {path.name}")
    try:
        rows = [line.split("\t") for line in table.read_text("utf-8").rstrip("\n").split("\n")]
        sizes = json.loads(config.read_text("utf-8"))
    except OSError as error:
        raise KVzipError(f"{folder} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise KVzipError(f"{folder} holds a file that is not UTF-8 text: {error}") from error
    except json.JSONDecodeError as error:
        raise KVzipError(f"{config} is not JSON: {error}") from error
    values = torch.tensor([_row(table, number, row, rows) for number, row in enumerate(rows, 1)])
    check_values(values, str(table))
    if not isinstance(sizes, dict):
        raise KVzipError(f"{config} holds no JSON object: it must say sink_size and recent_size")
    for name in _SIZES:
        size = sizes.get(name)
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise KVzipError(f"{config}: {name} is {size!r}, it must be a number of tokens")
    return HeadScores(values, {name: sizes[name] for name in _SIZES})


def _row(table: Path, number: int, row: list[str], rows: list[list[str]]) -> list[float]:
    """Numbers of one line, as many as in the first."""
    if len(row) != len(rows[0]):
        raise KVzipError(
            f"{table}, line {number}: there are {len(row)} columns, and {len(rows[0])} in line 1: "
            "every layer needs a score for each KV head"
        )
    try:
        return [float(score) for score in row]
    except ValueError as error:
        raise KVzipError(f"{table}, line {number}: {error}") from error
