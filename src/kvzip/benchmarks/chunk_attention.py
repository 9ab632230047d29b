"""Dense attention from a chunk to its context and itself: prefill, and the passes of scoring.

Compared with FlashAttention-2 on one tensor of all keys, as the published approach runs it, and
with the ceiling: the operations that causal attention needs, at the rate of matrix products.

The error of outputs is the norm of the difference over the norm for three stretches of query rows,
against the reference in float32.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from kvzip.benchmarks import geometries, published
from kvzip.benchmarks.records import OURS, Record, Result, Subject, compare
from kvzip.benchmarks.timing import Contender, cold, input_sets, settle
from kvzip.benchmarks.workbench import Case, Workbench
from kvzip.kernels import reference
from kvzip.kernels.logits import Logits

NAME = "chunk_attention"
FLASH, CEILING = "FlashAttention-2", "ceiling"
PREFILL, REPEAT = 16_384, 2_048
STRETCH = 8
"""Query rows that are compared at the start, in the middle and at the end."""
TOLERANCE = 2e-2


def cases(bench: Workbench) -> Iterator[Case]:
    """First and last chunk of a prefill, and the repetition of a chunk behind the context."""
    for subject in bench.context_subjects(NAME):
        assert subject.context is not None
        context = subject.context
        chunk, repeat = min(PREFILL, context), min(REPEAT, context // 2)
        shapes = {
            f"first chunk of {chunk}": (chunk, 0),
            f"last chunk of {chunk}": (chunk, context - chunk),
            f"repeat of {repeat}": (repeat, context),
        }
        for name, (tokens, before) in shapes.items():
            named = replace(subject, case=name)
            yield Case(named, partial(_measure, bench, named, tokens, before))


def _measure(bench: Workbench, subject: Subject, tokens: int, before: int) -> Iterator[Record]:
    shape = geometries.find(subject.geometry)
    logits = Logits(shape.head_dim**-0.5)

    def random(heads: int, length: int) -> Tensor:
        size = (1, heads, length, shape.head_dim)
        return torch.empty(size, dtype=bench.dtype, device=bench.device).normal_()

    kv, total = shape.kv_heads, before + tokens
    item = torch.finfo(bench.dtype).bits // 8
    count = input_sets((2 * kv * total + shape.query_heads * tokens) * shape.head_dim * item,
                       bench.device)  # fmt: skip
    sets = [
        (random(shape.query_heads, tokens), random(kv, total), random(kv, total))
        for _ in range(count)
    ]

    def ours(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        context = keys[:, :, :before], values[:, :, :before]
        chunk = keys[:, :, before:], values[:, :, before:]
        return bench.ours.chunk_attention(query, *context, *chunk, logits)

    def flash(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return published.flash_attention(query, keys, values, logits)

    ways = {FLASH: flash, OURS: ours}
    errors = {name: _error(way(*sets[0]), *sets[0], logits) for name, way in ways.items()}
    contenders = [
        Contender(name, [partial(way, *inputs) for inputs in sets]) for name, way in ways.items()
    ]
    seconds = cold(contenders, bench.device, bench.rounds // 2)
    products = tokens * before + tokens * (tokens + 1) / 2
    ceiling = bench.ceilings.seconds(operations=4 * shape.query_heads * shape.head_dim * products)
    results = [Result(name, seconds[name], errors[name], TOLERANCE) for name in ways]
    yield from compare(subject, [Result(CEILING, ceiling), *results])
    del contenders, sets
    settle(bench.device)


def _error(got: Tensor, query: Tensor, keys: Tensor, values: Tensor, logits: Logits) -> float:
    tokens, total = query.shape[2], keys.shape[2]
    stretch = min(STRETCH, tokens)
    errors = []
    for first in {0, (tokens - stretch) // 2, tokens - stretch}:
        rows = slice(first, first + stretch)
        own = total - tokens + first
        context_keys, context_values, own_keys, own_values = (
            part.float()
            for whole in (slice(0, own), slice(own, own + stretch))
            for part in (keys[:, :, whole], values[:, :, whole])
        )
        expected = reference.chunk_attention(
            query[:, :, rows].float(), context_keys, context_values, own_keys, own_values, logits
        )
        errors.append(float((got[:, :, rows].float() - expected).norm() / expected.norm()))
    return max(errors) if all(error == error for error in errors) else float("nan")
