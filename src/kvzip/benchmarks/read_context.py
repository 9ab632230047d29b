"""Reading and scoring a context, pruning it, and the first answer after that.

Compared with the published approach on the same weights and tokens: prefill by FlashAttention-2,
scores from the materialised matrix, in repeat passes of the same chunks. What scoring adds to the
repeat passes is measured by running them with and without the scoring operation.

The error of outputs is the norm of the difference between the scores of both over the norm of the
published ones. Both round activations to the model's dtype in other places, layer after layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvzip import ContextCache, ModelKVzip
from kvzip.benchmarks import geometries, published
from kvzip.benchmarks.records import OURS, Record, Result, Subject, compare, single
from kvzip.benchmarks.timing import Spread, settle
from kvzip.benchmarks.tokens import answer
from kvzip.benchmarks.workbench import Case, Workbench
from kvzip.layers import ContextLayer
from kvzip.model import PREFILL_CHUNK
from kvzip.scoring.reconstruction import CHUNK_SIZE

NAME = "read_context"
PUBLISHED = "published"
BOTH, PREFILL, SCORING = "prefill and scoring", "prefill", "scoring"
SCORING_SHARE = "scoring operations over repeat passes"
PEAK = "peak memory beyond weights and full cache"
FREED = "device memory freed by prune"
PRUNE, FIRST_ANSWER, SECOND_ANSWER = "prune", "first answer after prune", "second answer"

TOLERANCE = 0.2
WARM_UP = 4096
"""Tokens of a context that is read first, so that no kernel is compiled while time is taken."""
ANSWER = 16
"""Tokens of an answer."""


@dataclass(frozen=True)
class Reading:
    """A context that was read and scored.

    Attributes:
        scores: `[L, H, n]`, on the CPU.
        prefill: seconds.
        scoring: seconds.
        peak: bytes held at most, beyond what was held before.
    """

    scores: Tensor
    prefill: float
    scoring: float
    peak: int


def cases(bench: Workbench) -> Iterator[Case]:
    """Each model."""
    for subject in bench.model_subjects(NAME):
        yield Case(subject, partial(_measure, bench, subject))


def _measure(bench: Workbench, subject: Subject) -> Iterator[Record]:
    assert subject.context is not None
    assert subject.ratio is not None
    model = bench.model(subject.geometry)
    ids = bench.tokens(subject.context)
    query = bench.tokens(ANSWER, seed=1)
    warm_up = ids[: min(WARM_UP, len(ids) // 2)]

    warm = _read(bench, model, warm_up)[0]
    answer(model, warm.prune(subject.ratio), query, ANSWER)
    del warm
    settle(bench.device)

    kv, ours = _read(bench, model, ids)
    passes = _repeat_passes(bench, model, kv)
    yield single(replace(subject, case=SCORING), "repeat passes, not scored", passes, "s")
    yield single(subject, SCORING_SHARE, ours.scoring / passes - 1, "share")
    if bench.on_gpu:
        dense = _context_bytes(kv, prefix=True)
        yield single(subject, f"{OURS}, {PEAK}", ours.peak - dense, "B")
    yield from _prune_and_ask(bench, subject, model, kv, query)
    prefix = kv.document.prefix_length
    token_ids = kv.document.token_ids
    del kv
    settle(bench.device)

    published.register()
    stock = geometries.twin(bench.hf_model(subject.geometry), published.IMPLEMENTATION)
    read = partial(read_published, bench, stock, model)
    read(token_ids[: prefix + len(warm_up)], prefix)
    theirs = read(token_ids, prefix)
    if bench.on_gpu:
        yield single(subject, f"{PUBLISHED}, {PEAK}", theirs.peak - dense, "B")
    error = float((ours.scores - theirs.scores).norm() / theirs.scores.norm())
    stages = {
        BOTH: (theirs.prefill + theirs.scoring, ours.prefill + ours.scoring),
        PREFILL: (theirs.prefill, ours.prefill),
        SCORING: (theirs.scoring, ours.scoring),
    }
    for stage, (their_seconds, our_seconds) in stages.items():
        results = [
            Result(PUBLISHED, Spread.of([their_seconds], "once")),
            Result(OURS, Spread.of([our_seconds], "once"), error, TOLERANCE),
        ]
        yield from compare(replace(subject, case=stage), results)


def _read(bench: Workbench, model: ModelKVzip, ids: Tensor) -> tuple[ContextCache, Reading]:
    watch = Watch(bench)
    kv = model.read(ids)
    prefill = watch.lap()
    model.score(kv)
    scoring = watch.lap()
    assert kv.scores is not None
    return kv, Reading(kv.scores.values, prefill, scoring, watch.peak())


def read_published(
    bench: Workbench,
    stock: PreTrainedModel,
    model: ModelKVzip,
    token_ids: Tensor,
    prefix_length: int,
) -> Reading:
    """Read and score a context, prefix included, in the published way."""
    watch = Watch(bench)
    cache = published.read(stock, token_ids, PREFILL_CHUNK)
    prefill = watch.lap()
    scores = published.score(stock, model.prompts, cache, token_ids, prefix_length, CHUNK_SIZE)
    return Reading(scores, prefill, watch.lap(), watch.peak())


def _repeat_passes(bench: Workbench, model: ModelKVzip, kv: ContextCache) -> float:
    """Seconds of the repeat passes without the scoring operation."""
    calls = 0

    def no_score(
        query: Tensor, prefix: Tensor, chunk: Tensor, *rest: object, **weights: object
    ) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.zeros(chunk.shape[:2], dtype=torch.float32, device=chunk.device)

    bare = kv.fork()
    for layer in bare.layers:
        layer.operations = replace(layer.operations, reconstruction_score=no_score)
    watch = Watch(bench)
    model.score(bare)
    seconds = watch.lap()
    if calls < len(bare.layers):
        raise RuntimeError("the scoring operation was not replaced: no time of bare repeat passes")
    return seconds


def _prune_and_ask(
    bench: Workbench, subject: Subject, model: ModelKVzip, kv: ContextCache, query: Tensor
) -> Iterator[Record]:
    assert subject.ratio is not None
    context_bytes = _context_bytes(kv, prefix=False)
    settle(bench.device)
    before = torch.cuda.memory_allocated(bench.device) if bench.on_gpu else 0
    watch = Watch(bench)
    kv.prune(subject.ratio)
    yield single(subject, PRUNE, watch.lap(), "s", note="once")
    for name in (FIRST_ANSWER, SECOND_ANSWER):
        answer(model, kv, query, ANSWER)
        yield single(subject, name, watch.lap(), "s", note=f"{ANSWER} tokens, once")
    if bench.on_gpu:
        kv.room = None  # what answers took, not what the context takes
        settle(bench.device)
        freed = before - torch.cuda.memory_allocated(bench.device)
        yield replace(
            single(subject, FREED, freed, "B"),
            compared_with="the context's full cache",
            ratio_to=freed / context_bytes,
        )


def _context_bytes(kv: ContextCache, *, prefix: bool) -> int:
    """Bytes of all pairs that the layers with full attention hold, with those of the prefix."""
    total = 0
    for layer in kv.layers:
        assert isinstance(layer, ContextLayer)
        total += sum(tensor.nbytes for tensor in layer.context.tensors().values())
    tokens = len(kv.document.token_ids)
    return total if prefix else total * kv.document.context_length // tokens


class Watch:
    """Takes the time of stages, and the memory that they take at most, from when it is made."""

    def __init__(self, bench: Workbench) -> None:
        self._device = bench.device
        self._on_gpu = bench.on_gpu
        settle(self._device)
        if self._on_gpu:
            self._held = torch.cuda.memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        self._last = perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
        now = perf_counter()
        seconds, self._last = now - self._last, now
        return seconds

    def peak(self) -> int:
        """Bytes held at most, beyond what was held when this was made; 0 on a CPU."""
        if not self._on_gpu:
            return 0
        return torch.cuda.max_memory_allocated(self._device) - self._held
