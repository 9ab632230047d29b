"""Linear layers of decoding steps, where a single token meets each weight.

Steps are recorded, so that it matters little how long the host takes to call something better.
Weights that torchao holds in 8 bits, a scale for each row, are read as they are. Activations stay
as they are, too, even where torchao quantises those of more tokens: it would gain nothing here.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from kvzip.kernels import operations
from kvzip.weights import INT8_PARTS, is_int8_by_row

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
            # a weight that was just computed, such as a copy in float32, may be read too early
            if isinstance(matrix, torch.nn.Parameter) and suits(vector, matrix):
                read, scales = _parts(matrix)
                return matvec(vector, [read], [] if bias is None else [bias], scales)
        return func(*args, **kwargs)


def suits(vector: Any, matrix: Any) -> bool:
    """Whether a linear layer is a plain matrix, or its codes, with a single token to multiply."""
    read = getattr(matrix, INT8_PARTS[0]) if is_int8_by_row(matrix) else matrix
    return (
        type(read) in PLAIN
        and matrix.dtype == vector.dtype
        and matrix.dtype in DTYPES
        and read.is_contiguous()
        and vector.is_contiguous()
        and vector.numel() == vector.shape[-1]
    )


@torch.library.custom_op("kvzip::matvec", mutates_args=())
def matvec(
    vector: Tensor, matrices: list[Tensor], biases: list[Tensor], scales: list[Tensor]
) -> Tensor:
    """`Operations.matvec` as an operation that compilers leave alone."""
    found = operations("auto", vector.device, vector.dtype)
    return found.matvec(vector, matrices, biases, scales)


@matvec.register_fake
def _(vector: Tensor, matrices: list[Tensor], biases: list[Tensor], scales: list[Tensor]) -> Tensor:
    return vector.new_empty((*vector.shape[:-1], sum(len(matrix) for matrix in matrices)))


@torch.library.custom_op("kvzip::gated_matvec", mutates_args=())
def gated_matvec(
    vector: Tensor, gate: Tensor, up: Tensor, activation: str, scales: list[Tensor]
) -> Tensor:
    """`Operations.gated_matvec` likewise."""
    found = operations("auto", vector.device, vector.dtype)
    return found.gated_matvec(vector, gate, up, activation, scales)


@gated_matvec.register_fake
def _(vector: Tensor, gate: Tensor, up: Tensor, activation: str, scales: list[Tensor]) -> Tensor:
    return vector.new_empty((*vector.shape[:-1], len(up)))


def _parts(matrix: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What is to be read of a weight that suits, and the scales of its rows, if it has any."""
    if not is_int8_by_row(matrix):
        return matrix, []
    codes, scales = (getattr(matrix, part) for part in INT8_PARTS)
    return codes, [scales.flatten()]


def arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    """The arguments of `linear`, however they are given."""
    return input, weight, bias
