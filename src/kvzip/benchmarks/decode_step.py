"""One token of an answer with a whole model.

Compared with, in the same process and on the same weights: stock transformers with its
`DynamicCache` and with its `StaticCache` and compiled step, both on the full cache, and the
ceiling: weights and retained pairs read once. Caches are filled with random pairs.

The error of outputs is explained in `tokens`: kvzip is compared with its reference operations on
the same pairs, stock transformers with a single pass over its own cache.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from kvzip.benchmarks import geometries, published
from kvzip.benchmarks.records import OURS, Record, Result, Subject, compare, failure, single
from kvzip.benchmarks.timing import Spread, settle
from kvzip.benchmarks.tokens import TOLERANCE, TokenRecorder, answer, distance, stock_answer
from kvzip.benchmarks.workbench import (
    PREFIX,
    Case,
    Workbench,
    random_pairs,
    zipped_cache,
)
from kvzip.cache import ContextCache
from kvzip.model import ModelKVzip
from kvzip.pairs import Pairs

NAME = "decode_step"
COMPILED = "kvzip, compiled"
DYNAMIC = "transformers, DynamicCache"
STATIC = "transformers, StaticCache, compiled"
CEILING = "ceiling"
CEILING_ALL = "ceiling, input embeddings counted"

ALONE = "forward pass alone"
STEPS_ALONE = 20
QUESTION = 16
"""Tokens of the question."""


@dataclass(frozen=True)
class Decoder:
    """One way to decode.

    Attributes:
        decode: gives an answer of so many tokens and leaves things as they were.
        error: how far an answer is from the best.
        alone: seconds of the forward pass alone, without what chooses a token and stops an answer.
    """

    decode: Callable[[int], TokenRecorder]
    error: Callable[[list[int]], float]
    alone: Callable[[], Spread] | None = None


def cases(bench: Workbench) -> Iterator[Case]:
    """A step with each model."""
    for subject in bench.model_subjects(NAME):
        yield Case(subject, partial(_measure, bench, subject))


def _measure(bench: Workbench, subject: Subject) -> Iterator[Record]:
    assert subject.context is not None
    assert subject.ratio is not None
    tokens = 32 if bench.on_gpu else 4
    rounds = (3 if bench.plan.quick else 5) if bench.on_gpu else 1
    pairs = random_pairs(bench, subject.geometry, subject.context, subject.ratio)
    ids = bench.tokens(PREFIX + subject.context + QUESTION)
    makers: dict[str, Callable[[], Decoder]] = {
        DYNAMIC: partial(_dynamic, bench, subject, ids),
        STATIC: partial(_static, bench, subject, ids, tokens),
        OURS: partial(_kvzip, bench, subject, ids, pairs, False),
    }
    if bench.on_gpu:
        makers[COMPILED] = partial(_kvzip, bench, subject, ids, pairs, True)
    decoders: dict[str, Decoder] = {}
    errors: dict[str, float] = {}
    for name, make in makers.items():
        try:  # one that fails leaves the others to compare
            decoder = make()
            decoder.decode(tokens)
            errors[name] = decoder.error(decoder.decode(tokens).tokens)
            decoders[name] = decoder
        except Exception as error:
            yield failure(subject, name, error)
        settle(bench.device)
    steps: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(rounds):
        for name, decoder in decoders.items():
            steps[name] += decoder.decode(tokens).steps
    counted = f"{rounds} answers of {tokens} tokens"
    for name, decoder in decoders.items():
        if decoder.alone is not None and bench.on_gpu:
            spread = decoder.alone()
            figures = spread.median, spread.p10, spread.p90
            yield Record(subject, f"{name}, {ALONE}", *figures, "s", note=spread.how)
    results = [
        Result(name, Spread.of(steps[name], counted), errors[name], TOLERANCE) for name in decoders
    ]
    pair_bytes = sum(2 * part.keys.numel() * part.keys.element_size() for part in pairs)
    read, held = weight_bytes(bench.hf_model(subject.geometry))
    ceilings = [
        Result(CEILING, bench.ceilings.seconds(read + pair_bytes)),
        Result(CEILING_ALL, bench.ceilings.seconds(held + pair_bytes)),
    ]
    yield from compare(subject, [*ceilings, *results])
    yield single(subject, "retained pairs", pair_bytes, "B")
    yield single(subject, "weights read by a step", read, "B")
    del decoders
    settle(bench.device)


def weight_bytes(model: PreTrainedModel) -> tuple[int, int]:
    """Bytes of the weights that a step reads, and of all: input embeddings are looked up."""
    held = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    total = sum(held.values())
    inputs, outputs = (
        model.get_input_embeddings().weight,
        model.get_output_embeddings().weight,
    )
    return (total if inputs is outputs else total - held[id(inputs)]), total


def _kvzip(
    bench: Workbench, subject: Subject, ids: Tensor, pairs: list[Pairs], compile: bool
) -> Decoder:
    model = bench.model(subject.geometry, compile=compile)
    kv = zipped_cache(model, pairs, ids[:-QUESTION])
    query = ids[-QUESTION:]

    judge = reference_judge(bench, subject.geometry, pairs, ids[:-QUESTION])
    return Decoder(
        lambda tokens: answer(model, kv, query, tokens),
        partial(judge, query),
        partial(_step_alone, model, kv, query),
    )


@torch.no_grad()
def _step_alone(model: ModelKVzip, kv: ContextCache, query_ids: Tensor) -> Spread:
    """Steps one after the other, timed by the device."""
    device = model.hf_model.device
    room = model.decoder.room(kv, columns=len(query_ids) + STEPS_ALONE + 1)
    positions = torch.arange(kv.seen_tokens, kv.seen_tokens + len(query_ids), device=device)[None]
    room.read(query_ids[None].to(device), positions)
    token, position = query_ids[None, -1:].to(device), positions[:, -1:] + 1
    room.step(token, position)
    times = []
    for _ in range(STEPS_ALONE):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        room.step(token, position)
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) / 1e3)
    return Spread.of(times, f"events around {STEPS_ALONE} steps")


def reference_judge(
    bench: Workbench, geometry: str, pairs: list[Pairs], context_ids: Tensor
) -> Callable[[Tensor, list[int]], float]:
    """Says how far the answer to a query is from what the reference operations find best.

    Args:
        bench: the workbench.
        geometry: of the model.
        pairs: the zipped context.
        context_ids: its tokens.
    """
    model = bench.model(geometry, backend="reference")
    kv = zipped_cache(model, pairs, context_ids)
    return lambda query, answered: distance(model.hf_model, kv.fork(), query, answered)


def _dynamic(bench: Workbench, subject: Subject, ids: Tensor) -> Decoder:
    model = geometries.twin(bench.hf_model(subject.geometry), "sdpa")
    cache = DynamicCache(config=model.config)
    _fill(bench, subject, cache)
    length = len(ids) - QUESTION

    def decode(tokens: int) -> TokenRecorder:
        recorder = stock_answer(model, cache, ids, tokens)
        published.truncate(cache, length)
        return recorder

    def error(answered: list[int]) -> float:
        found = distance(model, cache, ids[-QUESTION:], answered)
        published.truncate(cache, length)
        return found

    return Decoder(decode, error)


def _static(bench: Workbench, subject: Subject, ids: Tensor, tokens: int) -> Decoder:
    model = geometries.twin(bench.hf_model(subject.geometry), "sdpa")
    cache = StaticCache(config=model.config, max_cache_len=len(ids) + tokens)
    _fill(bench, subject, cache)
    length = len(ids) - QUESTION

    def rewind() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(length)

    def decode(count: int) -> TokenRecorder:
        rewind()
        return stock_answer(model, cache, ids, count)

    def error(answered: list[int]) -> float:
        # the same pairs in the cache that needs no compiled step
        dynamic = DynamicCache(config=model.config)
        for i, layer in enumerate(cache.layers):
            dynamic.update(layer.keys[:, :, :length], layer.values[:, :, :length], i)
        return distance(model, dynamic, ids[-QUESTION:], answered)

    return Decoder(decode, error)


def _fill(bench: Workbench, subject: Subject, cache: Cache) -> None:
    """Put random pairs of the whole context into a cache of transformers."""
    shape = geometries.find(subject.geometry)
    assert subject.context is not None
    size = (1, shape.kv_heads, PREFIX + subject.context, shape.head_dim)
    generator = torch.Generator(bench.device).manual_seed(0)
    for layer in range(shape.layers):
        keys, values = (
            torch.empty(size, dtype=bench.dtype, device=bench.device).normal_(generator=generator)
            for _ in range(2)
        )
        cache.update(keys, values, layer)
