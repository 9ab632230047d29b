"""Linear layers of decoding steps, where a single token meets each weight.

Steps are recorded, so that it matters little how long the host takes to call something better.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from kvzip.kernels import operations

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)


class SingleTokenLinear(TorchFunctionMode):
    """Linear layers of one token go to `matvec` for as long as the `with` statement lasts."""

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Called by torch in the place of its functions."""
        kwargs = kwargs or {}
        if func is F.linear:
            vector, matrix, bias = arguments(*args, **kwargs)
            if suits(vector, matrix):
                return matvec(vector, [matrix], [] if bias is None else [bias])
        return func(*args, **kwargs)


def suits(vector: Any, matrix: Any) -> bool:
    """Whether a linear layer is a plain matrix with a single token to multiply."""
    return (
        type(matrix) in PLAIN
        and matrix.dtype == vector.dtype
        and matrix.dtype in DTYPES
        and matrix.is_contiguous()
        and vector.is_contiguous()
        and vector.numel() == vector.shape[-1]
    )


@torch.library.custom_op("kvzip::matvec", mutates_args=())
def matvec(vector: Tensor, matrices: list[Tensor], biases: list[Tensor]) -> Tensor:
    """`Operations.matvec` as an operation that compilers leave alone."""
    found = operations("auto", vector.device, vector.dtype)
    return found.matvec(vector, matrices, biases)


@matvec.register_fake
def _(vector: Tensor, matrices: list[Tensor], biases: list[Tensor]) -> Tensor:
    return vector.new_empty((*vector.shape[:-1], sum(len(matrix) for matrix in matrices)))


@torch.library.custom_op("kvzip::gated_matvec", mutates_args=())
def gated_matvec(vector: Tensor, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`Operations.gated_matvec` likewise."""
    found = operations("auto", vector.device, vector.dtype)
    return found.gated_matvec(vector, gate, up, activation)


@gated_matvec.register_fake
def _(vector: Tensor, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return vector.new_empty((*vector.shape[:-1], len(up)))


def arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    """The arguments of `linear`, however they are given."""
    return input, weight, bias
