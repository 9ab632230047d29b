"""Models whose layers mostly slide: memory that eviction frees, and one token of an answer.

In the shapes of Gemma 3, a random model reads a context, and heads of the layers with full
attention are pruned to lengths that `lengths` makes up; sliding layers keep their window. Then the
same question is answered from the zipped cache and, beside it, in the same process and on the same
weights and pairs, from the full cache by kvzip and by stock transformers with its `DynamicCache`,
whose sliding layers keep their window, too. The ceiling is weights and held pairs read once.

The error of outputs is that of an answer's logits (see `tokens`): each contender is compared with
the reference operations over the same pairs. kvzip's is at least that of a short context read in
chunks, beside stock transformers reading it whole. Rounding to bfloat16 costs a few hundredths;
the pairs of another context, about one.
"""

import copy
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import ceil

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LogitsProcessorList, PreTrainedModel

from kvzip import ContextCache, ModelKVzip
from kvzip.benchmarks import geometries
from kvzip.benchmarks.decode_step import weight_bytes
from kvzip.benchmarks.lengths import head_lengths
from kvzip.benchmarks.read_context import Watch
from kvzip.benchmarks.records import OURS, Record, Result, Subject, compare, failure, single
from kvzip.benchmarks.timing import Spread, settle
from kvzip.benchmarks.tokens import (
    LogitsRecorder,
    TokenRecorder,
    answer,
    logits_error,
    logits_of_answer,
    stock_answer,
)
from kvzip.benchmarks.workbench import Case, Workbench
from kvzip.cache import Scores
from kvzip.kernels import REFERENCE
from kvzip.layers import AnsweringLayer

NAME = "sliding_layers"
STEP, MEMORY = "decoding step", "memory"
READ = "prefill of the context"
CEILING_FULL, CEILING_ZIPPED = "ceiling, full cache", "ceiling, zipped cache"
DYNAMIC, FULL = "full cache, transformers' DynamicCache", "full cache, kvzip"
ZIPPED = f"{OURS}, zipped cache"
WEIGHTS = "weights read by a step"
FULL_BYTES, ZIPPED_BYTES = "full cache", "zipped cache"
FULL_PRUNABLE, ZIPPED_PRUNABLE = (
    f"{cache}, layers with full attention" for cache in (FULL_BYTES, ZIPPED_BYTES)
)
BEFORE, AFTER = "device memory before prune", "device memory after prune"
FREED = "device memory freed by prune"

TOLERANCE = 0.1
CHECKED = 4096
"""Tokens of the context that reading is compared on: several windows."""
CHECKED_CHUNKS = 3
QUESTION = 16
"""Tokens of the question."""


@dataclass(frozen=True)
class Way:
    """One way to answer.

    Attributes:
        decode: gives an answer of so many tokens, with settings for generation, and leaves things
            as they were.
        judge: the logits `[tokens, V]` that the reference operations find for an answer's tokens.
        reading: error of the way that its context is read.
    """

    decode: Callable[..., TokenRecorder]
    judge: Callable[[list[int]], Tensor]
    reading: float = 0.0

    def error(self, model: PreTrainedModel, tokens: int) -> float:
        """How far the logits of an answer of so many tokens are from the judge's, or reading is."""
        recorder = LogitsRecorder()
        answered = self.decode(tokens, logits_processor=LogitsProcessorList([recorder])).tokens
        error = logits_error(model, recorder.logits, self.judge(answered))
        return float(torch.tensor([self.reading, error]).amax())  # NaN if either is


def cases(bench: Workbench) -> Iterator[Case]:
    """Each model with sliding layers."""
    for subject in bench.model_subjects(NAME, geometries.SLIDING):
        yield Case(subject, partial(_measure, bench, subject))


def _measure(bench: Workbench, subject: Subject) -> Iterator[Record]:
    assert subject.context is not None
    assert subject.ratio is not None
    model, ids = bench.model(subject.geometry), bench.tokens(subject.context)
    stock = geometries.twin(bench.hf_model(subject.geometry), "sdpa")
    reading = reading_error(bench, model, stock, ids[:CHECKED])
    watch = Watch(bench)
    kv = model.read(ids)
    yield single(subject, READ, watch.lap(), "s", note="once, plans for new shapes included")
    kv.scores = spread_scores(bench, kv, subject.ratio)
    zipped = kv.fork().prune(subject.ratio)

    step = replace(subject, case=STEP)
    query = bench.tokens(QUESTION, seed=1)
    makers = {
        DYNAMIC: partial(_dynamic, stock, model, kv, query),
        FULL: partial(_kvzip, model, kv, query, reading),
        ZIPPED: partial(_kvzip, model, zipped, query, reading),
    }
    results = yield from _in_turns(bench, step, model.hf_model, makers)
    weights, _ = weight_bytes(model.hf_model)
    full_ceiling, ceiling = (
        bench.ceilings.seconds(weights + cache.nbytes) for cache in (kv, zipped)
    )
    yield single(step, CEILING_FULL, full_ceiling.median, "s", note=full_ceiling.how)
    yield from compare(step, [Result(CEILING_ZIPPED, ceiling), *results])
    yield single(step, WEIGHTS, weights, "B")

    memory = replace(subject, case=MEMORY)
    whole, those = "the full cache", "those of the full cache"
    yield single(memory, FULL_BYTES, kv.nbytes, "B")
    yield _share(memory, FULL_PRUNABLE, _prunable(kv), whole, kv.nbytes)
    yield _share(memory, ZIPPED_BYTES, zipped.nbytes, whole, kv.nbytes)
    yield _share(memory, ZIPPED_PRUNABLE, _prunable(zipped), those, _prunable(kv))
    del makers, zipped
    if bench.on_gpu:
        yield from _prune(bench, memory, kv)


def _in_turns(
    bench: Workbench,
    subject: Subject,
    model: PreTrainedModel,
    makers: Mapping[str, Callable[[], Way]],
) -> Generator[Record, None, list[Result]]:
    """What a step takes each way; yields a line for each that fails."""
    tokens = 32 if bench.on_gpu else 4
    rounds = (3 if bench.plan.quick else 5) if bench.on_gpu else 1
    ways: dict[str, Way] = {}
    errors: dict[str, float] = {}
    for name, make in makers.items():
        try:  # one that fails leaves the others to compare
            way = make()
            way.decode(tokens)
            errors[name] = way.error(model, tokens)
            ways[name] = way
        except Exception as error:
            yield failure(subject, name, error)
        settle(bench.device)
    steps: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            steps[name] += way.decode(tokens).steps
    counted = f"{rounds} answers of {tokens} tokens"
    return [Result(name, Spread.of(steps[name], counted), errors[name], TOLERANCE) for name in ways]


def _prune(bench: Workbench, subject: Subject, kv: ContextCache) -> Iterator[Record]:
    """What the device's allocator holds before and after."""
    assert subject.ratio is not None
    context = _prunable(kv) * kv.document.context_length // len(kv.document.token_ids)
    settle(bench.device)
    before = torch.cuda.memory_allocated(bench.device)
    kv.prune(subject.ratio)
    settle(bench.device)
    after = torch.cuda.memory_allocated(bench.device)
    yield single(subject, BEFORE, before, "B", note="weights included")
    yield single(subject, AFTER, after, "B", note="weights included")
    whole = "the context's pairs in layers with full attention"
    yield _share(subject, FREED, before - after, whole, context)


def _prunable(kv: ContextCache) -> int:
    """Bytes of all pairs that the layers with full attention hold, prefix included."""
    return sum(part.nbytes for layer in kv.prunable for part in layer.context.tensors().values())


def _share(subject: Subject, contender: str, held: int, whole: str, whole_bytes: int) -> Record:
    """Bytes beside others."""
    record = single(subject, contender, held, "B")
    return replace(record, compared_with=whole, ratio_to=held / whole_bytes)


def spread_scores(bench: Workbench, kv: ContextCache, ratio: float) -> Scores:
    """Random scores by which a ratio leaves heads as many pairs as `head_lengths` says.

    Of the few pairs that are left over when lengths are rounded down, each goes to any head.

    Args:
        bench: the workbench.
        kv: a full cache.
        ratio: share to keep.
    """
    heads, n = kv.held.shape[1:]
    generator = torch.Generator(bench.device).manual_seed(0)
    values = []
    for layer in range(len(kv.prunable)):
        draws = torch.rand(heads, n, generator=generator, device=bench.device)
        lengths = torch.tensor(head_lengths(n, heads, ratio, seed=layer), device=bench.device)
        first = draws.argsort(1).argsort(1) < lengths[:, None]
        values.append((draws + first).cpu())
    return Scores(torch.stack(values), "random, spread")


def reading_error(
    bench: Workbench, model: ModelKVzip, stock: PreTrainedModel, ids: Tensor
) -> float:
    """How far logits behind a short context are from those of stock transformers.

    Args:
        bench: the workbench.
        model: reads it in chunks.
        stock: the same as transformers ships it; reads it whole.
        ids: `[n]`, the context.
    """
    query, answered = bench.tokens(QUESTION, seed=1), bench.tokens(QUESTION, seed=2).tolist()
    kv = model.read(ids, chunk_size=ceil(len(ids) / CHECKED_CHUNKS))
    got = logits_of_answer(model.hf_model, kv, query, answered)
    whole = torch.cat([kv.document.token_ids, query])
    cache = DynamicCache(config=stock.config)
    return logits_error(stock, got, logits_of_answer(stock, cache, whole, answered))


def _kvzip(model: ModelKVzip, kv: ContextCache, query: Tensor, reading: float) -> Way:
    own = kv.fork()  # keeps the room that its answers take
    judge = partial(_reference_logits, model, kv, query)
    return Way(partial(answer, model, own, query), judge, reading)


def _reference_logits(
    model: ModelKVzip, kv: ContextCache, query: Tensor, answered: list[int]
) -> Tensor:
    fork = kv.fork()
    for layer in fork.attending:
        layer.operations = REFERENCE
    return logits_of_answer(model.hf_model, fork, query, answered)


def _dynamic(stock: PreTrainedModel, model: ModelKVzip, kv: ContextCache, query: Tensor) -> Way:
    cache = dynamic_cache(stock, kv)
    sequence = torch.cat([kv.document.token_ids, query])

    def decode(tokens: int, **settings: LogitsProcessorList) -> TokenRecorder:
        return stock_answer(stock, _fork(cache), sequence, tokens, **settings)

    return Way(decode, partial(_reference_logits, model, kv, query))


def dynamic_cache(model: PreTrainedModel, kv: ContextCache) -> DynamicCache:
    """A cache of transformers that holds a copy of the same pairs.

    Args:
        model: whose cache it shall be.
        kv: a full cache without a tail.
    """
    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(kv.layers):
        assert isinstance(layer, AnsweringLayer)
        held = layer.context.dense_keys()[None], layer.context.dense_values()[None]
        if gone := layer.seen - held[0].shape[2]:  # a sliding layer counts what it has forgotten
            nothing = held[0].new_zeros(()).expand(*held[0].shape[:2], gone, held[0].shape[3])
            cache.update(nothing, nothing, index)
        cache.update(*held, index)
    return cache


def _fork(cache: DynamicCache) -> Cache:
    """A cache that starts with the same tensors, which its layers replace and never write to."""
    held = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    return copy.deepcopy(cache, memo={id(part): part for part in held})
