"""Scores of one chunk in one layer.

Compared with the published approach, which holds the matrix of probabilities, and with the
ceiling: one product of queries and keys at the rate of matrix products.

The error of outputs is the norm of the difference over the norm, against the reference in float32.
The published approach rounds logits to the model's dtype and is allowed more.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from kvzip.benchmarks import geometries, published
from kvzip.benchmarks.records import OURS, Record, Result, Subject, compare, single
from kvzip.benchmarks.timing import Contender, cold, input_sets, peak_extra_bytes, settle
from kvzip.benchmarks.workbench import PREFIX, Case, Workbench
from kvzip.kernels import reference
from kvzip.kernels.logits import Logits
from kvzip.scoring.reconstruction import CHUNK_SIZE

NAME = "reconstruction_score"
MATERIALISED, CEILING = "materialised", "ceiling"
PEAK = ", peak extra memory"
REQUEST = 40
"""Tokens of the request in front of the repeated chunk."""
TOLERANCES = {OURS: 1e-2, MATERIALISED: 5e-2}


def cases(bench: Workbench) -> Iterator[Case]:
    """A chunk of the usual size."""
    chunk = CHUNK_SIZE if bench.on_gpu else 24
    for subject in bench.context_subjects(NAME):
        named = replace(subject, context=None, case=f"chunk of {chunk}")
        yield Case(named, partial(_measure, bench, named, chunk))


def random_inputs(
    bench: Workbench, shape: geometries.Geometry, chunk: int, request: int = REQUEST
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, and keys of prefix, chunk and repeat input."""
    sizes = [
        (shape.query_heads, request + chunk),
        (shape.kv_heads, PREFIX),
        (shape.kv_heads, chunk),
        (shape.kv_heads, request + chunk),
    ]
    query, prefix, keys, repeat = (
        torch.empty((*size, shape.head_dim), dtype=bench.dtype, device=bench.device).normal_()
        for size in sizes
    )
    return query, prefix, keys, repeat


def _measure(bench: Workbench, subject: Subject, chunk: int) -> Iterator[Record]:
    shape = geometries.find(subject.geometry)
    logits = Logits(shape.head_dim**-0.5)
    first = random_inputs(bench, shape, chunk)
    set_bytes = sum(part.numel() * part.element_size() for part in first)
    more = range(1, input_sets(set_bytes, bench.device))
    sets = [first, *(random_inputs(bench, shape, chunk) for _ in more)]
    ways = {
        MATERIALISED: published.materialised_score,
        OURS: bench.ours.reconstruction_score,
    }
    query, prefix, keys, repeat = (part.float() for part in first)
    expected = reference.reconstruction_score(query, prefix, keys, repeat, logits)
    del query, prefix, keys, repeat
    errors = {
        name: float((way(*first, logits).float() - expected).norm() / expected.norm())
        for name, way in ways.items()
    }
    contenders = [
        Contender(name, [partial(way, *inputs, logits) for inputs in sets])
        for name, way in ways.items()
    ]
    seconds = cold(contenders, bench.device, bench.rounds)
    t = chunk + REQUEST
    products = shape.query_heads * (t * (PREFIX + chunk) + t * (t + 1) / 2)
    ceiling = bench.ceilings.seconds(operations=2 * shape.head_dim * products)
    results = [Result(name, seconds[name], errors[name], TOLERANCES[name]) for name in ways]
    yield from compare(subject, [Result(CEILING, ceiling), *results])
    del contenders
    if bench.on_gpu:
        for name, way in ways.items():
            peak = peak_extra_bytes(partial(way, *first, logits), bench.device)
            yield single(subject, name + PEAK, peak, "B")
    del sets
    settle(bench.device)
