"""The figures to reach on one NVIDIA H200, beside what was measured."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kvzip.benchmarks import (
    decode_step,
    quantized_attention,
    read_context,
    reconstruction_score,
    shared_batch,
    stream,
    surrogate,
    zipped_attention,
)
from kvzip.benchmarks.records import OURS, Record
from kvzip.benchmarks.workbench import MODEL_CONTEXT, MODEL_GEOMETRY, MODEL_RATIO

MEBIBYTE, GIGABYTE = 2**20, 1e9


@dataclass(frozen=True)
class Target:
    """A figure to reach.

    Attributes:
        what: is measured.
        goal: the value to reach.
        at_least: whether more is better.
        unit: `x` (times as fast), `share`, `s` or `B`.
        benchmark: the section that measures it.
        contender: whose figure it is.
        compared_with: the contender that it is compared with, or None to take the figure itself.
        case: of the subject; any if None.
        context: of the subject.
        combine: from `ratio_to` or the median to the value.
    """

    what: str
    goal: float
    at_least: bool
    unit: str
    benchmark: str
    contender: str
    compared_with: str | None = None
    case: str | None = None
    context: int | None = MODEL_CONTEXT
    combine: Callable[[float], float] = float

    def value(self, records: Iterable[Record]) -> float | None:
        """What was measured last, or None."""
        found = None
        for record in records:
            subject = record.subject
            if (
                subject.benchmark == self.benchmark
                and subject.geometry == MODEL_GEOMETRY
                and subject.context == self.context
                and subject.ratio in (MODEL_RATIO, None)
                and self.case in (subject.case, None)
                and (record.contender, record.compared_with) == (self.contender, self.compared_with)
            ):
                found = record.median if self.compared_with is None else record.ratio_to
        return None if found is None else self.combine(found)

    def reached(self, value: float) -> bool:
        """Whether a value is as good as the goal, or better."""
        return value >= self.goal if self.at_least else value <= self.goal


DECODE = zipped_attention.decode_case()


def _attention(what: str, goal: float, unit: str, other: str, context: int) -> Target:
    return Target(what, goal, True, unit, zipped_attention.NAME, OURS, other, DECODE, context)


def _quantized(
    what: str, goal: float, at_least: bool, unit: str, contender: str, other: str | None, dtype: str
) -> Target:
    case = quantized_attention.decode_case(dtype)
    return Target(what, goal, at_least, unit, quantized_attention.NAME, contender, other, case)


TARGETS: Sequence[Target] = (
    _attention("decode attention, 128k at 0.3: share of the read bandwidth",
               0.85, "share", zipped_attention.CEILING, MODEL_CONTEXT),
    _attention("... faster than the published attention",
               2.2, "x", zipped_attention.PUBLISHED, MODEL_CONTEXT),
    _attention("... faster than dense FlashAttention-2 on the full cache",
               2.7, "x", zipped_attention.DENSE, MODEL_CONTEXT),
    _attention("decode attention, 32k at 0.3: faster than the published attention",
               2.2, "x", zipped_attention.PUBLISHED, 32_768),
    _quantized("decode attention over int8, 128k at 0.3: faster than not quantised",
               1.6, True, "x", OURS, quantized_attention.AS_MADE, "int8"),
    _quantized("... over int4: faster than not quantised",
               2.4, True, "x", OURS, quantized_attention.AS_MADE, "int4"),
    _quantized("... over int4: bytes of the pairs over the full cache",
               0.09, False, "share", quantized_attention.BYTES, None, "int4"),
    Target("decode step, compiled, 128k at 0.3: share of the ceiling (all weights)",
           0.80, True, "share", decode_step.NAME, decode_step.COMPILED, decode_step.CEILING_ALL),
    Target("... without the input embeddings, which a step does not read",
           0.80, True, "share", decode_step.NAME, decode_step.COMPILED, decode_step.CEILING),
    Target("... not compiled: share of the ceiling (all weights)",
           0.80, True, "share", decode_step.NAME, OURS, decode_step.CEILING_ALL),
    Target("... compiled: faster than transformers with DynamicCache",
           8.0, True, "x", decode_step.NAME, decode_step.COMPILED, decode_step.DYNAMIC),
    Target("... not compiled: faster than transformers with StaticCache, compiled",
           1.0, True, "x", decode_step.NAME, OURS, decode_step.STATIC),
    Target("16 questions on one 128k context: tokens a second over those of one",
           10.0, True, "x", shared_batch.NAME, shared_batch.BATCH, shared_batch.SINGLE),
    Target("score operation: faster than materialised",
           7.0, True, "x", reconstruction_score.NAME, OURS, reconstruction_score.MATERIALISED,
           context=None),
    Target("... peak extra memory of a layer",
           64 * MEBIBYTE, False, "B", reconstruction_score.NAME,
           OURS + reconstruction_score.PEAK, context=None),
    Target("scoring, 128k: on top of the repeat passes",
           0.03, False, "share", read_context.NAME, read_context.SCORING_SHARE),
    Target("prefill and scoring, 128k: time over the published approach",
           0.6, False, "share", read_context.NAME, OURS, read_context.PUBLISHED,
           read_context.BOTH, combine=lambda faster: 1 / faster),
    Target("memory after prune, 128k at 0.3: fall over the context's cache",
           0.69, True, "share", read_context.NAME, read_context.FREED,
           "the context's full cache"),
    Target("... peak over prefill and scoring beyond the full cache",
           3 * GIGABYTE, False, "B", read_context.NAME, f"{OURS}, {read_context.PEAK}"),
    Target("first answer after the prune, 128k",
           0.5, False, "s", read_context.NAME, read_context.FIRST_ANSWER),
    Target("scoring with reach chunk, 128k: time over plain prefill",
           0.45, False, "share", stream.NAME, stream.SCORED, stream.PLAIN, stream.SCORING,
           combine=lambda faster: 1 / faster),
    Target("streaming, 128k: time over plain prefill",
           1.0, False, "share", stream.NAME, stream.STREAMED, stream.PLAIN, stream.TOTAL,
           combine=lambda faster: 1 / faster),
    Target("... over the published prefill and scoring",
           0.3, False, "share", stream.NAME, stream.STREAMED, read_context.PUBLISHED,
           stream.TOTAL, combine=lambda faster: 1 / faster),
    Target("streaming, 256k: time over plain prefill",
           0.75, False, "share", stream.NAME, stream.STREAMED, stream.PLAIN, stream.TOTAL,
           context=2 * MODEL_CONTEXT, combine=lambda faster: 1 / faster),
    Target("streaming, 128k: peak bytes of the cache over the full one",
           0.4, False, "share", stream.NAME, f"{stream.STREAMED}, {stream.CACHE_PEAK}",
           stream.FULL_CACHE),
    Target("prefill scored by a linear KVzap, 128k: time over plain prefill",
           1.02, False, "share", surrogate.NAME, surrogate.LINEAR, surrogate.PLAIN,
           surrogate.SCORED, combine=lambda faster: 1 / faster),
    Target("... by an MLP KVzap",
           1.02, False, "share", surrogate.NAME, surrogate.MLP, surrogate.PLAIN,
           surrogate.SCORED, combine=lambda faster: 1 / faster),
)  # fmt: skip
