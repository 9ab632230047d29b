"""Linear layers of one token: each weight of a layer of a model once.

Compared with `torch.nn.functional.linear`, one call a weight and activations of their own, and with
the ceiling: the weights read once. The error of outputs is against float64.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kvzip.benchmarks import geometries
from kvzip.benchmarks.geometries import STD, Geometry
from kvzip.benchmarks.records import OURS, Record, Result, Subject, compare
from kvzip.benchmarks.timing import Contender, cold, input_sets, settle
from kvzip.benchmarks.workbench import Case, Workbench
from kvzip.benchmarks.zipped_attention import relative
from kvzip.kernels import Operations

NAME = "matvec"
LINEAR, CEILING = "torch linear", "ceiling"
TOLERANCE = 0.01
GATED = "gated MLP"


@dataclass(frozen=True)
class Layers:
    """Linear layers of the same token.

    Attributes:
        case: how they are called in the results.
        columns: elements of the token.
        rows: of each weight.
    """

    case: str
    columns: int
    rows: tuple[int, ...]

    def made(self, bench: Workbench, seed: int) -> tuple[Tensor, ...]:
        """A token, and weights in the size of a model's."""
        generator = torch.Generator(bench.device).manual_seed(seed)
        shapes = [(1, 1, self.columns), *((n, self.columns) for n in self.rows)]
        parts = [
            torch.empty(s, device=bench.device).normal_(0, STD, generator=generator) for s in shapes
        ]
        token, *weights = (part.to(bench.dtype) for part in parts)
        return token / STD, *weights

    def ours(self, operations: Operations, token: Tensor, *weights: Tensor) -> list[Tensor]:
        """The operation under test."""
        if self.case == GATED:
            return [operations.gated_matvec(token, *weights, "silu")]
        return [operations.matvec(token, weights, [])]

    def stock(self, token: Tensor, *weights: Tensor) -> list[Tensor]:
        """What it is compared with."""
        results = [F.linear(token, weight) for weight in weights]
        if self.case == GATED:
            gate, up = results
            return [F.silu(gate) * up]
        return results


def layers(shape: Geometry) -> tuple[Layers, ...]:
    """Those of one layer of a model."""
    queries, pairs = shape.query_heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return (
        Layers("queries, keys and values", shape.hidden, (queries, pairs, pairs)),
        Layers("attention output", queries, (shape.hidden,)),
        Layers(GATED, shape.hidden, (shape.intermediate, shape.intermediate)),
        Layers("MLP output", shape.intermediate, (shape.hidden,)),
    )


def cases(bench: Workbench) -> Iterator[Case]:
    """The layers of each model, whatever the context."""
    for subject in bench.context_subjects(NAME):
        for one in layers(geometries.find(subject.geometry)):
            named = replace(subject, context=None, case=one.case)
            yield Case(named, partial(_measure, bench, named, one))


def _measure(bench: Workbench, subject: Subject, one: Layers) -> Iterator[Record]:
    nbytes = sum(one.rows) * one.columns * torch.finfo(bench.dtype).bits // 8
    sets = [one.made(bench, seed) for seed in range(input_sets(nbytes, bench.device))]
    ways: dict[str, Callable[..., list[Tensor]]] = {
        LINEAR: one.stock,
        OURS: partial(one.ours, bench.ours),
    }
    expected = torch.cat(one.stock(*(part.double() for part in sets[0])), dim=-1)
    errors = {}
    for name, way in ways.items():
        poison = torch.full((16, *expected.shape), torch.nan, device=bench.device)
        del poison  # what is not written shows
        errors[name] = relative(torch.cat(way(*sets[0]), dim=-1), expected)
    contenders = [
        Contender(name, [partial(way, *parts) for parts in sets]) for name, way in ways.items()
    ]
    seconds = cold(contenders, bench.device, bench.rounds)
    results = [Result(name, seconds[name], errors[name], TOLERANCE) for name in ways]
    ceiling = bench.ceilings.seconds(nbytes, 2 * nbytes // sets[0][0].element_size())
    yield from compare(subject, [Result(CEILING, ceiling), *results])
    del contenders, sets
    settle(bench.device)
