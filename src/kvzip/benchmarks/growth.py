"""How the time of reading grows with the context, as far as memory reaches.

One context is compressed while it is read, and read whole as far as its full cache fits; the time
is taken on the way, at lengths that double. On an H200 this takes more than six minutes: it is run
only when it is asked for by name.

The error of outputs is that of `stream`, and as there a model of one layer goes first, as far as
the shortest length.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from kvzip.benchmarks.read_context import Watch
from kvzip.benchmarks.records import Record, Result, Subject, compare, single
from kvzip.benchmarks.stream import (
    CACHE_PEAK,
    FULL_CACHE,
    PEAK,
    PLAIN,
    STREAMED,
    check,
    free_bytes,
    full_bytes,
    gauge,
)
from kvzip.benchmarks.timing import Spread, settle
from kvzip.benchmarks.workbench import MODEL_CONTEXT, Case, Workbench

NAME = "growth"
CASE = "a token, from the first one on"
GROWTH = "time a token over that of the shortest"
CHUNKS = 8
"""Chunks that the shortest length takes."""
SHORTEST, LONGEST = 64_000, 1_024_000
FILLED = 0.8
"""Share of the free memory that a full cache may take."""


def cases(bench: Workbench) -> Iterator[Case]:
    """One growing context for each model."""
    longest = max(bench.plan.contexts or (LONGEST,))
    for subject in bench.model_subjects(NAME):
        if subject.context == (bench.plan.contexts or (MODEL_CONTEXT,))[0]:
            subject = replace(subject, context=longest)
            yield Case(subject, partial(_measure, bench, subject))


@dataclass
class Pace:
    """Notes how long it took to get so far.

    Attributes:
        watch: takes the time.
        seconds: what it took from the start, by tokens read.
    """

    watch: Watch
    seconds: dict[int, float] = field(default_factory=dict)
    total: float = 0.0

    def note(self, stage: str, done: int, total: int) -> None:
        """A progress callback."""
        self.total += self.watch.lap()
        self.seconds[done] = self.total


def _measure(bench: Workbench, subject: Subject) -> Iterator[Record]:
    assert subject.context is not None
    assert subject.ratio is not None
    model = bench.model(subject.geometry)
    ids = bench.tokens(subject.context)
    shortest = min(SHORTEST, subject.context)
    lengths = [shortest << i for i in range(32) if shortest << i <= subject.context]
    chunk = max(1, shortest // CHUNKS)
    error, tolerance = check(bench, model, ids)
    rehearsing = bench.rehearsing_model(subject.geometry)
    first = ids[:shortest]
    rehearsing.prefill(first, ratio=subject.ratio, streaming=True, chunk_size=chunk)
    rehearsing.read(first, chunk_size=2 * chunk)

    streamed = Pace(Watch(bench))
    with gauge() as held:
        kv = model.prefill(
            ids, ratio=subject.ratio, streaming=True, chunk_size=chunk, progress=streamed.note
        )
    peak, full = streamed.watch.peak(), full_bytes(kv)
    del kv
    settle(bench.device)
    peaks = {CACHE_PEAK: max(held), **({PEAK: peak} if bench.on_gpu else {})}
    for what, peak_bytes in peaks.items():
        yield replace(
            single(subject, f"{STREAMED}, {what}", peak_bytes, "B"),
            compared_with=FULL_CACHE,
            ratio_to=peak_bytes / full,
        )
    seconds = {STREAMED: streamed.seconds}
    yield from _lines(subject, lengths, seconds, error, tolerance)

    room = FILLED * free_bytes(bench) if bench.on_gpu else full
    fitting = [length for length in lengths if length / subject.context * full <= room]
    # the prefix is read before the context: it takes the place of the last few tokens
    whole = ids[: max(fitting) - len(model.prompts.prefix_ids())]
    plain = Pace(Watch(bench))
    model.read(whole, chunk_size=2 * chunk, progress=plain.note)
    settle(bench.device)
    seconds = {PLAIN: plain.seconds, STREAMED: streamed.seconds}
    yield from _lines(subject, lengths, seconds, error, tolerance)
    last = max(fitting)
    for name, taken in seconds.items():
        ratio = taken[last] / last / (taken[shortest] / shortest)
        yield single(replace(subject, context=last), f"{name}, {GROWTH}", ratio, "share")


def _lines(
    subject: Subject,
    lengths: Sequence[int],
    seconds: Mapping[str, Mapping[int, float]],
    error: float,
    tolerance: float,
) -> Iterator[Record]:
    """The time of each length that was reached, over its tokens."""
    for length in lengths:
        results = [
            Result(
                name,
                Spread.of([taken[length] / length], f"the first {length} tokens, once"),
                *((error, tolerance) if name == STREAMED else ()),
            )
            for name, taken in seconds.items()
            if length in taken
        ]
        yield from compare(replace(subject, context=length, case=CASE), results)
