"""Matrices times one vector, against a float64 oracle."""

import pytest
import torch

from kernels import BOUNDS, DEVICE, DTYPES, MARKS, random
from kvzip.kernels import matvec, reference

pytestmark = MARKS

OPERATIONS = {"triton": matvec.matvec, "reference": reference.matvec}
COLUMNS = [1, 16, 37, 64, 1000, 1024, 2048, 3584, 4096, 4097, 5000]
ROWS = {
    "one": [5],
    "one-row": [1],
    "two": [7, 3],
    "three": [33, 1, 16],
    "more-than-a-launch": [2, 9, 4, 17, 1],
    "one-empty": [0, 5],
}


def check(operation, rows, columns, dtype=torch.float32, bias=False, shape=(1, 1)):
    vector = random(*shape, columns, seed=1, dtype=dtype)
    matrices = [random(n, columns, seed=2 + place, dtype=dtype) for place, n in enumerate(rows)]
    biases = [random(n, seed=20 + place, dtype=dtype) for place, n in enumerate(rows)] * bias
    parts = [matrix.double() @ vector.double().flatten() for matrix in matrices]
    if bias:
        parts = [part + b.double() for part, b in zip(parts, biases, strict=True)]
    expected = torch.cat(parts)
    poison = torch.full((16, *shape, sum(rows)), torch.nan, device=DEVICE, dtype=dtype)
    del poison  # what is not written shows
    out = operation(vector, matrices, biases)
    assert out.shape == (*shape, sum(rows))
    assert out.dtype == dtype
    assert (out.double().flatten() - expected).norm() <= BOUNDS[dtype] * expected.norm()


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_matrices(rows, bias, dtype, operation):
    check(operation, rows, 100, dtype, bias)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_columns(columns, operation):
    check(operation, [9, 3], columns, bias=True)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_a_vector_without_batch(operation):
    check(operation, [9, 3], 64, shape=())


GATED = {"triton": matvec.gated_matvec, "reference": reference.gated_matvec}


@pytest.mark.parametrize("operation", GATED.values(), ids=GATED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [16, 100, 4097])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_gated_matrices(activation, columns, dtype, operation):
    """Logits of all sizes, so that both ends of an activation show."""
    vector = random(1, 1, columns, seed=1, dtype=dtype)
    gate, up = (random(37, columns, seed=seed, dtype=dtype) for seed in (2, 3))
    inner = gate.double() @ vector.double().flatten()
    if activation == "silu":
        opened = inner / (1 + (-inner).exp())
    else:
        opened = inner / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
    expected = opened * (up.double() @ vector.double().flatten())
    poison = torch.full((16, 1, 1, 37), torch.nan, device=DEVICE, dtype=dtype)
    del poison
    out = operation(vector, gate, up, activation)
    assert out.shape == (1, 1, 37)
    assert (out.double().flatten() - expected).norm() <= BOUNDS[dtype] * expected.norm()
