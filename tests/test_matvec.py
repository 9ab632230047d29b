"""Matrices times one vector, against a float64 oracle."""

import pytest
import torch

from kernels import BOUNDS, DEVICE, DTYPES, MARKS, random
from kvzip.kernels import matvec, reference

pytestmark = MARKS

OPERATIONS = {"triton": matvec.matvec, "reference": reference.matvec}
SCALES = {"float32": torch.float32, "same": None}
COLUMNS = [1, 16, 37, 64, 1000, 1024, 2048, 3584, 4096, 4097, 5000]
ROWS = {
    "one": [5],
    "one-row": [1],
    "two": [7, 3],
    "three": [33, 1, 16],
    "more-than-a-launch": [2, 9, 4, 17, 1],
    "one-empty": [0, 5],
}


def codes(rows, columns, seed):
    """Every code, the outermost included, in any order."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
    return made.to(DEVICE)


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


def check_codes(operation, rows, columns, dtype=torch.float32, scale_dtype=None, bias=False):
    vector = random(1, 1, columns, seed=1, dtype=dtype)
    matrices = [codes(n, columns, seed=2 + place) for place, n in enumerate(rows)]
    scales = [
        random(n, seed=40 + place, dtype=scale_dtype or dtype) for place, n in enumerate(rows)
    ]
    biases = [random(n, seed=20 + place, dtype=dtype) for place, n in enumerate(rows)] * bias
    plain = [
        scale.double()[:, None] * matrix.double()
        for matrix, scale in zip(matrices, scales, strict=True)
    ]
    expected = torch.cat([matrix @ vector.double().flatten() for matrix in plain])
    if bias:
        expected = expected + torch.cat(biases).double()
    poison = torch.full((16, 1, 1, sum(rows)), torch.nan, device=DEVICE, dtype=dtype)
    del poison
    out = operation(vector, matrices, biases, scales)
    assert out.shape == (1, 1, sum(rows))
    assert out.dtype == dtype
    assert (out.double().flatten() - expected).norm() <= BOUNDS[dtype] * expected.norm()


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_dtype", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_codes(rows, bias, scale_dtype, dtype, operation):
    check_codes(operation, rows, 100, dtype, scale_dtype, bias)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("columns", [*COLUMNS, 17_000])
def test_columns_of_codes(columns, operation):
    check_codes(operation, [9, 3], columns, bias=True)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_is_exact(dtype, operation):
    """One of each, times one."""
    vector = torch.eye(16, dtype=dtype, device=DEVICE)[:1]
    matrix = torch.zeros(256, 16, dtype=torch.int8, device=DEVICE)
    matrix[:, 0] = torch.arange(-128, 128)
    out = operation(vector, [matrix], [], [torch.ones(256, device=DEVICE)])
    assert out[0].tolist() == list(range(-128, 128))


GATED = {"triton": matvec.gated_matvec, "reference": reference.gated_matvec}


def check_gated(operation, activation, vector, plain, parts):
    """`plain`: gate and up in float64; `parts`: what the operation gets in their place."""
    inner, passed = (matrix @ vector.double().flatten() for matrix in plain)
    if activation == "silu":
        opened = inner / (1 + (-inner).exp())
    else:
        opened = inner / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
    expected = opened * passed
    poison = torch.full((16, *vector.shape[:-1], 37), torch.nan, device=DEVICE, dtype=vector.dtype)
    del poison
    (gate, up), *scales = parts
    out = operation(vector, gate, up, activation, *scales)
    assert out.shape == (1, 1, 37)
    assert out.dtype == vector.dtype
    assert (out.double().flatten() - expected).norm() <= BOUNDS[vector.dtype] * expected.norm()


@pytest.mark.parametrize("operation", GATED.values(), ids=GATED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [16, 100, 4097])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_gated_matrices(activation, columns, dtype, operation):
    """Logits of all sizes, so that both ends of an activation show."""
    vector = random(1, 1, columns, seed=1, dtype=dtype)
    matrices = [random(37, columns, seed=seed, dtype=dtype) for seed in (2, 3)]
    plain = [matrix.double() for matrix in matrices]
    check_gated(operation, activation, vector, plain, [matrices])


@pytest.mark.parametrize("operation", GATED.values(), ids=GATED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_dtype", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("columns", [16, 100, 4097])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_gated_codes(activation, columns, scale_dtype, dtype, operation):
    vector = random(1, 1, columns, seed=1, dtype=dtype)
    matrices = [codes(37, columns, seed=seed) for seed in (2, 3)]
    scales = [random(37, seed=seed, dtype=scale_dtype or dtype) / 74 for seed in (4, 5)]
    plain = [m.double() * s.double()[:, None] for m, s in zip(matrices, scales, strict=True)]
    check_gated(operation, activation, vector, plain, [matrices, scales])
