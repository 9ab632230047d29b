"""Attention, scoring and compaction on key-value pairs.

`reference` defines every operation in plain PyTorch; it runs everywhere and is what the others are
compared with. The other files hold one operation each, for CUDA devices, or what several share: a
Triton kernel, or a kernel that PyTorch brings along where that is faster.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from importlib.util import find_spec
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from kvzip.errors import KVzipError
from kvzip.kernels import reference

P = ParamSpec("P")
T = TypeVar("T")

BACKENDS = ("auto", "triton", "reference")

CAPABILITY = (8, 0)
"""CUDA devices older than this lack what the kernels are written for (bf16 matrix units)."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Operations:
    """One implementation of every operation; signatures as in `reference`.

    Attributes:
        name: the backend.
    """

    name: str
    chunk_attention: Callable[..., Tensor]
    sliding_attention: Callable[..., Tensor]
    zipped_attention: Callable[..., Tensor]
    quantized_attention: Callable[..., Tensor]
    reconstruction_score: Callable[..., Tensor]
    repeat_attention: Callable[..., tuple[Tensor, Tensor]]
    compact: Callable[..., tuple[Tensor, Tensor]]
    append: Callable[..., None]
    matvec: Callable[..., Tensor]
    gated_matvec: Callable[..., Tensor]


REFERENCE = Operations(
    name="reference",
    chunk_attention=reference.chunk_attention,
    sliding_attention=reference.sliding_attention,
    zipped_attention=reference.zipped_attention,
    quantized_attention=reference.quantized_attention,
    reconstruction_score=reference.reconstruction_score,
    repeat_attention=reference.repeat_attention,
    compact=reference.compact,
    append=reference.append,
    matvec=reference.matvec,
    gated_matvec=reference.gated_matvec,
)


def operations(backend: str, device: torch.device, dtype: torch.dtype) -> Operations:
    """The implementation to use for a model.

    Args:
        backend: `"triton"`, `"reference"`, or `"auto"`: Triton where it can run.
        device: where the model is.
        dtype: dtype of its keys and values.

    Raises:
        KVzipError: for an unknown backend, or for `"triton"` where Triton cannot run.
    """
    if backend not in BACKENDS:
        raise KVzipError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "reference":
        return REFERENCE
    obstacle = _obstacle(device, dtype)
    if obstacle is None:
        return _triton()
    if backend == "triton":
        raise KVzipError(f"backend 'triton' cannot run here: {obstacle}. Use 'auto' or 'reference'")
    return REFERENCE


def _obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps Triton from running, or None."""
    if device.type != "cuda" or torch.version.hip:
        return f"the model is on {device.type}, Triton kernels need an NVIDIA device"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]}, 8.0 is needed"
    if dtype not in DTYPES:
        return f"there are no kernels for {str(dtype).removeprefix('torch.')}"
    return None


@cache
def _triton() -> Operations:
    from kvzip.kernels import (
        append,
        chunk_attention,
        compact,
        matvec,
        reconstruction_score,
        repeat_attention,
        zipped_attention,
    )

    return Operations(
        name="triton",
        chunk_attention=_there(chunk_attention.chunk_attention),
        sliding_attention=reference.sliding_attention,
        zipped_attention=_there(zipped_attention.zipped_attention),
        quantized_attention=_there(zipped_attention.quantized_attention),
        reconstruction_score=_there(reconstruction_score.reconstruction_score),
        repeat_attention=_there(repeat_attention.repeat_attention),
        compact=_there(compact.compact),
        append=_there(append.append),
        matvec=_there(matvec.matvec),
        gated_matvec=_there(matvec.gated_matvec),
    )


def _there(operation: Callable[P, T]) -> Callable[P, T]:
    """An operation that runs where its first tensor is: Triton launches on the current device."""

    @wraps(operation)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.cuda.device_of(args[0]):
            return operation(*args, **kwargs)

    return run
