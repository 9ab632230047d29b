"""Weights that are quantised while a model is loaded, by torchao through transformers.

    int8    8-bit weights, a scale for each row
    w8a8    the same, and activations in 8 bits with a scale for each token
    fp8     weights and activations in 8-bit floating point (e4m3), scaled likewise
    int4    4-bit weights in groups of 128

The last two run on NVIDIA devices in bfloat16.

Decoding steps that are recorded, of a single token, read the weights of int8 and w8a8 alike
(`single_token.py`): there, w8a8 does not quantise activations, which would gain nothing. It does in
all other passes. Steps of several questions are torchao's: its products of 8-bit integers are made
for more than 16 rows, and those of fewer cannot be recorded after `ModelKVzip(compile=True)`.

Embeddings and the output layer stay as they are. So do keys and values: `kv.prune(kv_dtype=...)`
quantises those.
"""

from importlib.util import find_spec
from typing import Any

import torch

from kvzip.errors import KVzipError

QUANTIZATIONS = ("int8", "w8a8", "fp8", "int4")

CAPABILITIES = {"fp8": (8, 9), "int4": (8, 0)}
"""Compute capability of the NVIDIA devices that run those which need one."""

PACKAGES = ("torchao", "accelerate")


def check(quantization: str) -> None:
    """Raise KVzipError for a quantisation that is unknown, or whose packages are missing."""
    if quantization not in QUANTIZATIONS:
        raise KVzipError(
            f"unknown quantization {quantization!r}: choose one of {', '.join(QUANTIZATIONS)}"
        )
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise KVzipError(
            f"quantization {quantization!r} needs {' and '.join(missing)}: pip install "
            "'kvzip[quantization]'"
        )


def config(quantization: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The `quantization_config` that transformers loads a model with.

    Args:
        quantization: one of `QUANTIZATIONS`.
        device: where the model will be.
        dtype: dtype of its other weights and its activations.

    Returns:
        A `TorchAoConfig`. It leaves the settings of torch's compiler alone.

    Raises:
        KVzipError: as `check`, and where there are no kernels for it.
    """
    check(quantization)
    if quantization in CAPABILITIES:
        _check_device(quantization, device, dtype)
    from torchao import quantization as torchao
    from transformers import TorchAoConfig

    leave: dict[str, Any] = {"set_inductor_config": False}
    if quantization == "int8":
        return TorchAoConfig(torchao.Int8WeightOnlyConfig(**leave))
    if quantization == "w8a8":
        return TorchAoConfig(torchao.Int8DynamicActivationInt8WeightConfig(**leave))
    if quantization == "fp8":
        by_row = torchao.PerRow()
        return TorchAoConfig(
            torchao.Float8DynamicActivationFloat8WeightConfig(granularity=by_row, **leave)
        )
    return TorchAoConfig(
        torchao.Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d", **leave)
    )


def _check_device(quantization: str, device: torch.device, dtype: torch.dtype) -> None:
    needed = CAPABILITIES[quantization]
    found = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if found is None or found < needed or dtype != torch.bfloat16:
        where = f"{device}" if found is None else f"{device} ({found[0]}.{found[1]})"
        raise KVzipError(
            f"quantization {quantization!r} runs on an NVIDIA device of compute capability "
            f"{needed[0]}.{needed[1]} or later in bfloat16, not on {where} in "
            f"{str(dtype).removeprefix('torch.')}: use 'int8'"
        )
