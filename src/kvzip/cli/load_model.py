"""Load a model without the noise that libraries make on a terminal."""

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from kvzip.errors import KVzipError

if TYPE_CHECKING:
    from kvzip import ContextCache, ModelKVzip


def check_device(device: str) -> None:
    """Raise KVzipError if a device is unknown or cannot be had."""
    import torch

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        cause = str(error).splitlines()[0]
        raise KVzipError(f"device {device!r} cannot be used: {cause}") from error


def silence() -> None:
    """Let transformers say nothing, and show no bars of its own, unless there is a terminal."""
    import transformers
    from huggingface_hub.utils.tqdm import disable_progress_bars

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not sys.stderr.isatty():
        disable_progress_bars()


def load_model(
    name: str | None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
) -> "ModelKVzip":
    """Load a model; only downloads show progress, and only on a terminal.

    Raises:
        KVzipError: if the model or the device is unknown or cannot be had.
    """
    from kvzip import ModelKVzip, loading

    loading.resolve(name)
    if device is not None:
        check_device(device)
    silence()
    return ModelKVzip(name, device=device, dtype=dtype, quantization=quantization)


def open_file(
    path: Path, model: str | None, *, device: str | None = None
) -> tuple["ModelKVzip", "ContextCache"]:
    """Load a .kvz file and the model that made it.

    Args:
        path: a .kvz file.
        model: where to find the model, None for what the file says.
        device: where to put both.

    Raises:
        KVzipError: if the file is damaged, or the model cannot be had, is another one, or its
            weights cannot be quantised here as those were that made the file.
    """
    from kvzip import loading, storage

    origin = storage.read_header(path).origin
    name = origin.model_id if model is None else model
    try:
        loading.resolve(name)
    except KVzipError as error:
        if model is not None:
            raise
        raise KVzipError(
            f"{path} was made with model {name!r}, which is not here: say where with --model"
        ) from error
    # what weights are quantised to depends on their dtype
    dtype = origin.dtype if origin.quantization else None
    if origin.quantization is not None:
        _check_weights(path, origin.quantization, origin.dtype, device)
    opened = load_model(name, device=device, dtype=dtype, quantization=origin.quantization)
    return opened, opened.load(path)


def _check_weights(path: Path, quantization: str, dtype: str, device: str | None) -> None:
    """Raise KVzipError where weights cannot be quantised as a file asks for."""
    import torch

    from kvzip import loading, quantized_weights

    if device is not None:
        check_device(device)
    where = torch.device(device or loading.default_device())
    try:
        quantized_weights.config(quantization, where, getattr(torch, dtype))
    except KVzipError as error:
        raise KVzipError(
            f"{path} opens with weights in {quantization} only, which cannot be had here: open it "
            f"where they can, or zip the document again with others ({error})"
        ) from error
