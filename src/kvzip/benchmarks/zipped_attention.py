"""Attention over a zipped context: one layer, a decoding step, a question, a batch.

Compared with, in the same process: the published approach (FlashAttention-2 with heads as
sequences, with and without copying the cache for the new token), dense FlashAttention-2 on the
full cache, and the ceiling: the retained pairs read once, or the operations at the rate of matrix
products, whichever takes longer.

The error of outputs is the norm of the difference over the norm, against the reference in float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from kvzip.benchmarks import geometries, published
from kvzip.benchmarks.lengths import head_lengths
from kvzip.benchmarks.records import OURS, Record, Result, Subject, compare
from kvzip.benchmarks.timing import Contender, cold, input_sets, settle
from kvzip.benchmarks.workbench import Case, Workbench
from kvzip.kernels import reference
from kvzip.kernels.logits import Logits
from kvzip.pairs import Pairs

NAME = "zipped_attention"
PUBLISHED, PUBLISHED_COPYING = "published", "published, with the copy of the cache"
DENSE = "dense FlashAttention-2, full cache"
CEILING = "ceiling"

TAIL, ROOM = 48, 256
"""Tokens in the tail when a step is decoded (a question and the start of an answer), and columns
that the tail has room for."""

QUESTIONS = (32, 128, 512, 2048)
BATCHES = (4, 16)
SHARPNESS = 2.0
"""Standard deviation of the logits: some pairs matter more than others."""
TOLERANCE = 2e-2


def decode_case(tokens: int = 1, batch: int = 1) -> str:
    """How a case is called in the results."""
    rows = f", batch of {batch}" if batch > 1 else ""
    return f"{tokens} query token{'s' if tokens > 1 else ''}{rows}"


@dataclass(frozen=True)
class Inputs:
    """One set of inputs.

    Attributes:
        query: `[B, Hq, t, D]`.
        pairs: the packed context.
        tail_keys: `[B, H, columns, D]`.
        tail_values: `[B, H, columns, D]`.
        tail_length: `[1]`, int64, columns in use when a step is decoded; None for all of them.
    """

    query: Tensor
    pairs: Pairs
    tail_keys: Tensor
    tail_values: Tensor
    tail_length: Tensor | None

    @property
    def tails(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the tail that are in use."""
        if self.tail_length is None:
            return self.tail_keys, self.tail_values
        return self.tail_keys[:, :, :TAIL], self.tail_values[:, :, :TAIL]

    @property
    def logits(self) -> Logits:
        """Scaled products, and nothing else."""
        return Logits(float(self.query.shape[-1] ** -0.5))


def cases(bench: Workbench) -> Iterator[Case]:
    """Decoding over the whole matrix; questions and batches at the longest context."""
    for subject in bench.operation_subjects(NAME):
        yield _case(bench, subject, 1, 1)
    for subject in bench.model_subjects(NAME):
        questions = QUESTIONS if bench.on_gpu else QUESTIONS[:1]
        batches = BATCHES if bench.on_gpu else BATCHES[:1]
        for tokens in questions:
            yield _case(bench, subject, tokens, 1)
        for batch in batches:
            yield _case(bench, subject, 1, batch)


def _case(bench: Workbench, subject: Subject, tokens: int, batch: int) -> Case:
    named = replace(subject, case=decode_case(tokens, batch))
    return Case(named, partial(_measure, bench, named, tokens, batch))


def _measure(bench: Workbench, subject: Subject, tokens: int, batch: int) -> Iterator[Record]:
    assert subject.context is not None
    assert subject.ratio is not None
    shape = geometries.find(subject.geometry)
    context, tail = subject.context, max(TAIL, tokens)
    lengths = head_lengths(context, shape.kv_heads, subject.ratio)
    random = partial(random_inputs, bench, shape, context, tokens, batch, tail)
    zipped_rows = sum(lengths) + batch * shape.kv_heads * tail
    pair_bytes = 2 * shape.head_dim * torch.finfo(bench.dtype).bits // 8

    sets = [random(lengths, seed) for seed in range(_sets(bench, zipped_rows * pair_bytes))]
    contenders = [Contender(OURS, [partial(attend, bench, inputs) for inputs in sets])]
    expected = definition(sets[0])
    # memory that was used before holds NaN: what is not written shows
    poison = torch.full((16, *expected.shape), torch.nan, device=bench.device)
    del poison
    errors = {OURS: relative(attend(bench, sets[0]), expected)}

    flat_rows = batch * (sum(lengths) + shape.kv_heads * tail)
    flat_sets = [_Flat.of(inputs) for inputs in sets[: _sets(bench, flat_rows * pair_bytes)]]
    contenders.append(Contender(PUBLISHED, [flat.attend for flat in flat_sets]))
    errors[PUBLISHED] = relative(flat_sets[0].attend(), expected)
    if tokens == 1:
        contenders.append(
            Contender(PUBLISHED_COPYING, [flat.copy_and_attend for flat in flat_sets])
        )
        errors[PUBLISHED_COPYING] = errors[PUBLISHED]  # the same attention, one pair longer

    full = [context] * shape.kv_heads
    dense_rows = batch * shape.kv_heads * (context + tail)
    dense_sets = [
        _Dense.of(random(full, seed)) for seed in range(_sets(bench, dense_rows * pair_bytes))
    ]
    contenders.append(Contender(DENSE, [dense.attend for dense in dense_sets]))
    errors[DENSE] = relative(dense_sets[0].attend(), definition(random(full, 0)))

    seconds = cold(contenders, bench.device, bench.rounds)
    pairs_met = batch * shape.query_heads * tokens * (sum(lengths) / shape.kv_heads + tail)
    ceiling = bench.ceilings.seconds(zipped_rows * pair_bytes, 4 * shape.head_dim * pairs_met)
    results = [Result(name, spread, errors[name], TOLERANCE) for name, spread in seconds.items()]
    yield from compare(subject, [Result(CEILING, ceiling), *reversed(results)])
    del contenders, sets, flat_sets, dense_sets
    settle(bench.device)


def _sets(bench: Workbench, set_bytes: int) -> int:
    return input_sets(set_bytes, bench.device)


def random_inputs(
    bench: Workbench,
    shape: geometries.Geometry,
    context: int,
    tokens: int,
    batch: int,
    tail: int,
    lengths: list[int],
    seed: int,
) -> Inputs:
    """Inputs of one call: so many tokens of so many rows, and heads of these lengths."""
    generator = torch.Generator(bench.device).manual_seed(seed)

    def random(*size: int) -> Tensor:
        empty = torch.empty(size, dtype=bench.dtype, device=bench.device)
        return empty.normal_(generator=generator)

    query = SHARPNESS * random(batch, shape.query_heads, tokens, shape.head_dim)
    columns = ROOM if tokens == 1 else tail
    tails = [random(batch, shape.kv_heads, columns, shape.head_dim) for _ in range(2)]
    length = torch.tensor([TAIL], device=bench.device) if tokens == 1 else None
    packed = [random(sum(lengths), shape.head_dim) for _ in range(2)]
    kept = torch.arange(context) < torch.tensor(lengths)[:, None]
    return Inputs(query, Pairs(packed[0], packed[1], kept), tails[0], tails[1], length)


def attend(bench: Workbench, inputs: Inputs) -> Tensor:
    """The operation under test."""
    pairs = inputs.pairs
    return bench.ours.zipped_attention(
        inputs.query,
        pairs.keys,
        pairs.values,
        pairs.indptr,
        inputs.tail_keys,
        inputs.tail_values,
        inputs.logits,
        tail_length=inputs.tail_length,
    )


def definition(inputs: Inputs) -> Tensor:
    """What the definition says, in float32."""
    pairs = inputs.pairs
    query, keys, values = (x.float() for x in (inputs.query, pairs.keys, pairs.values))
    tail_keys, tail_values = (x.float() for x in inputs.tails)
    return reference.zipped_attention(
        query, keys, values, pairs.indptr, tail_keys, tail_values, inputs.logits
    )


def relative(got: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm."""
    return float((got.float() - expected).norm() / expected.norm())


@dataclass(frozen=True)
class _Flat:
    """A set of inputs in the published layout."""

    query: Tensor
    flattened: published.Flattened
    longer: published.Flattened
    query_ends: Tensor
    new: tuple[list[Tensor], list[Tensor]]
    logits: Logits

    @classmethod
    def of(cls, inputs: Inputs) -> "_Flat":
        pairs, tails = inputs.pairs, inputs.tails
        flattened = published.Flattened.of(pairs.keys, pairs.values, pairs.indptr, *tails)
        sequences = len(flattened.lengths)
        tokens = inputs.query.shape[2]
        ends = torch.arange(sequences + 1, dtype=torch.int32, device=inputs.query.device) * tokens
        lengths = tuple(length + 1 for length in flattened.lengths)
        steps = torch.arange(sequences + 1, dtype=torch.int32, device=ends.device)
        longer = replace(flattened, ends=flattened.ends + steps, lengths=lengths)
        new = [list(tail[:, :, -1:].reshape(-1, 1, 1, tail.shape[-1])) for tail in tails]
        return cls(inputs.query, flattened, longer, ends, (new[0], new[1]), inputs.logits)

    def attend(self) -> Tensor:
        return published.varlen_attention(self.query, self.flattened, self.query_ends, self.logits)

    def copy_and_attend(self) -> Tensor:
        keys, values = published.insert(self.flattened, *self.new)
        grown = replace(self.longer, keys=keys, values=values)
        return published.varlen_attention(self.query, grown, self.query_ends, self.logits)


@dataclass(frozen=True)
class _Dense:
    """A set of inputs as transformers keeps it: all pairs of each batch row in one tensor."""

    query: Tensor
    keys: Tensor
    values: Tensor
    logits: Logits

    @classmethod
    def of(cls, inputs: Inputs) -> "_Dense":
        batch = len(inputs.query)
        keys, values = (
            torch.cat([context.expand(batch, -1, -1, -1), tail], dim=2)
            for context, tail in (
                (inputs.pairs.dense_keys(), inputs.tails[0]),
                (inputs.pairs.dense_values(), inputs.tails[1]),
            )
        )
        return cls(inputs.query, keys, values, inputs.logits)

    def attend(self) -> Tensor:
        return published.flash_attention(self.query, self.keys, self.values, self.logits)
