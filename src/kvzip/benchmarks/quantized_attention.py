"""Decode attention over quantised pairs: one layer, one token, beside the same pairs as made.

All contenders of a figure take turns in one process. A ceiling is the time that reading codes and
scales once takes. The error of outputs is against the reference in float32 over what the codes
stand for: it is the kernel's, not that of quantising (`benchmarks/quantized_quality.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from kvzip.benchmarks import geometries, zipped_attention
from kvzip.benchmarks.lengths import head_lengths
from kvzip.benchmarks.records import OURS, Record, Result, Subject, compare, single
from kvzip.benchmarks.timing import Contender, cold, input_sets, settle
from kvzip.benchmarks.workbench import Case, Workbench
from kvzip.benchmarks.zipped_attention import TAIL, TOLERANCE, Inputs, random_inputs, relative
from kvzip.kernels import reference
from kvzip.kernels.quantization import KV_DTYPES, Quantization
from kvzip.pairs import QuantizedPairs

NAME = "quantized_attention"
AS_MADE = "kernel on the same pairs, not quantised"
CEILING = "ceiling"
BYTES = "bytes of the pairs over those of the full cache, not quantised"


def decode_case(kv_dtype: str) -> str:
    """How a case is called in the results."""
    return f"{kv_dtype}, {zipped_attention.decode_case()}"


@dataclass(frozen=True)
class Codes:
    """One set of inputs whose pairs are quantised."""

    inputs: Inputs
    pairs: QuantizedPairs

    @classmethod
    def of(cls, inputs: Inputs, kv_dtype: str) -> "Codes":
        """Quantised here; the inputs keep their pairs."""
        return cls(inputs, inputs.pairs.quantize(Quantization(kv_dtype)))

    def attend(self, bench: Workbench) -> Tensor:
        """The operation under test."""
        inputs, pairs = self.inputs, self.pairs
        return bench.ours.quantized_attention(
            inputs.query,
            pairs.keys,
            pairs.values,
            pairs.indptr,
            inputs.tail_keys,
            inputs.tail_values,
            inputs.logits,
            tail_length=inputs.tail_length,
        )

    def expected(self) -> Tensor:
        """What the definition says, in float32."""
        inputs, pairs = self.inputs, self.pairs
        query, tail_keys, tail_values = (part.float() for part in (inputs.query, *inputs.tails))
        return reference.quantized_attention(
            query, pairs.keys, pairs.values, pairs.indptr, tail_keys, tail_values, inputs.logits
        )

    @property
    def nbytes(self) -> int:
        """What is read: codes, scales and channels, and the tail in use."""
        pairs = self.pairs.keys.nbytes + self.pairs.values.nbytes
        return pairs + sum(part.nbytes for part in self.inputs.tails)


def cases(bench: Workbench) -> Iterator[Case]:
    """The whole matrix, every dtype together."""
    for subject in bench.operation_subjects(NAME):
        yield Case(subject, partial(_measure, bench, subject))


def _measure(bench: Workbench, subject: Subject) -> Iterator[Record]:
    assert subject.context is not None
    assert subject.ratio is not None
    shape = geometries.find(subject.geometry)
    lengths = head_lengths(subject.context, shape.kv_heads, subject.ratio)
    made = partial(random_inputs, bench, shape, subject.context, 1, 1, TAIL, lengths)
    smallest = Codes.of(made(0), "int4").nbytes
    sets = [made(seed) for seed in range(input_sets(smallest, bench.device))]
    codes = {kv_dtype: [Codes.of(inputs, kv_dtype) for inputs in sets] for kv_dtype in KV_DTYPES}

    contenders = [Contender(AS_MADE, [partial(zipped_attention.attend, bench, x) for x in sets])]
    expected = zipped_attention.definition(sets[0])
    errors = {AS_MADE: relative(zipped_attention.attend(bench, sets[0]), expected)}
    for kv_dtype, parts in codes.items():
        name = decode_case(kv_dtype)
        contenders.append(Contender(name, [partial(part.attend, bench) for part in parts]))
        expected = parts[0].expected()
        # memory that was used before holds NaN: what is not written shows
        poison = torch.full((16, *expected.shape), torch.nan, device=bench.device)
        del poison
        errors[name] = relative(parts[0].attend(bench), expected)
    seconds = cold(contenders, bench.device, bench.rounds)

    full = 2 * shape.kv_heads * subject.context * shape.head_dim * torch.bfloat16.itemsize
    as_made = Result(AS_MADE, seconds[AS_MADE], errors[AS_MADE], TOLERANCE)
    for kv_dtype, parts in codes.items():
        name = decode_case(kv_dtype)
        pairs = parts[0].pairs
        met = shape.query_heads * (sum(lengths) / shape.kv_heads + TAIL)
        ceiling = bench.ceilings.seconds(parts[0].nbytes, 4 * shape.head_dim * met)
        ours = Result(OURS, seconds[name], errors[name], TOLERANCE)
        named = replace(subject, case=name)
        yield from compare(named, [Result(CEILING, ceiling), as_made, ours])
        yield single(named, BYTES, (pairs.keys.nbytes + pairs.values.nbytes) / full, "share")
    del contenders, sets, codes
    settle(bench.device)
