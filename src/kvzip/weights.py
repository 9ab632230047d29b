"""The weights of a model: where they are, and what they are, however they are held.

They may be spread over devices or offloaded (transformers' `device_map`), divided among processes
(`tp_plan`) or quantised. Layers on several devices hand hidden states on by themselves, and the
layers of a cache follow: their pairs are where the model's layer made them.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvzip.errors import KVzipError

INT8_PARTS = ("qdata", "scale")
"""Attributes of torchao's `Int8Tensor`: codes `[N, K]`, int8; scales, of its rows `[N, 1]`."""


def devices(model: PreTrainedModel) -> list[torch.device]:
    """Where weights are, in their order; the first is `model.device`. Offloaded ones are "meta"."""
    return list(dict.fromkeys(parameter.device for parameter in model.parameters()))


def on_one_device(model: PreTrainedModel) -> bool:
    """Whether all weights are whole, and in the memory of one device."""
    whole = not any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    return whole and len(devices(model)) == 1


def refuse_offloaded_input(model: PreTrainedModel) -> None:
    """Raise KVzipError if a model's first weights are not in memory: nothing says where it runs."""
    if model.device.type == "meta":
        raise KVzipError(
            f"the first weights of {type(model).__name__} are offloaded: leave the embeddings on a "
            "device (device_map), and offload later layers"
        )


def plain_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Every weight as plain tensors, and their names, in order of names, one in memory at a time.

    What is offloaded is fetched; what is divided among processes is gathered, so that all of them
    must do this together; what is quantised comes in parts: codes, scales, ...
    """
    codes = ((name, buffer) for name, buffer in model.named_buffers() if _is_codes(buffer))
    for name in sorted(name for name, _ in chain(model.named_parameters(), codes)):
        owner, _, short = name.rpartition(".")
        weight = getattr(module := model.get_submodule(owner), short)
        yield from _parts(name, _fetch(module, short) if weight.is_meta else weight.detach())


def is_int8_by_row(weight: Any) -> bool:
    """Whether torchao holds a matrix in 8 bits, and codes times scales of rows are all it is.

    Zero points are beside them: torchao makes weights without, and its linear layers add none.
    """
    return (
        type(weight).__name__ == "Int8Tensor"
        and weight.ndim == 2
        and weight.scale.shape == (len(weight), 1)
        and weight.act_pre_scale is None
    )


def _is_codes(buffer: Tensor) -> bool:
    """Whether a buffer holds a quantised matrix, as some checkpoints have it."""
    return buffer.ndim == 2 and not buffer.is_floating_point() and buffer.dtype != torch.bool


def _fetch(module: nn.Module, name: str) -> Tensor:
    """A parameter that is offloaded, from where accelerate has it."""
    from accelerate.utils import align_module_device

    with align_module_device(module, "cpu"):
        return module.get_parameter(name).detach()


def _parts(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    if hasattr(weight, "full_tensor"):
        weight = weight.full_tensor()
    if not hasattr(weight, "__tensor_flatten__"):
        yield name, weight
        return
    for part in weight.__tensor_flatten__()[0]:
        yield from _parts(f"{name}.{part}", getattr(weight, part))
