"""Compressing a context while reading it, beside reading it whole.

Compared with, on the same weights, tokens and attention kernels: plain prefill in chunks, prefill
and scoring in two passes with reach `"chunk"`, and (at the context that all sections share) the
published prefill and scoring. Contexts whose full cache does not fit are only streamed.

The error of outputs is the distance between the last layer's keys of a short context read in chunks
with everything kept and read whole, over the norm of the latter. It may be twice that of plain
prefill in the same chunks: how far rounding alone carries two exact ways of reading apart.

Everything is done by a model of one layer first: cuDNN makes a plan for each new shape, and Triton
compiles, so that a model of many layers would pay for it in the first.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import ceil
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from kvzip import ModelKVzip
from kvzip.benchmarks import geometries, published
from kvzip.benchmarks.read_context import PUBLISHED, Watch, read_published
from kvzip.benchmarks.records import OURS, Record, Result, Subject, compare, single
from kvzip.benchmarks.timing import Spread, settle
from kvzip.benchmarks.workbench import MODEL_CONTEXT, Case, Workbench
from kvzip.cache import ContextCache
from kvzip.layers import ContextLayer

NAME = "stream"
PLAIN = "plain prefill"
STREAMED = f"{OURS}, streaming"
SCORED = f"{OURS}, scoring with reach chunk"
TOTAL, SCORING = "in all", "scoring alone"
PEAK, CACHE_PEAK = "peak memory beyond weights", "peak bytes of the cache"
FULL_CACHE = "the full cache"
PER_TOKEN = "seconds a token"

CONTEXTS = (MODEL_CONTEXT, 2 * MODEL_CONTEXT)
CHECKED = 16_384
"""Tokens of the context that outputs are compared on: chunks of them are long enough for every
kernel that longer ones use."""
CHECKED_CHUNKS = 4
LENIENCE = 2.0
"""Error over that of plain prefill in the same chunks."""


def cases(bench: Workbench) -> Iterator[Case]:
    """Each context."""
    contexts = bench.plan.contexts or CONTEXTS
    for subject in bench.model_subjects(NAME):
        if subject.context == (bench.plan.contexts or (MODEL_CONTEXT,))[0]:
            for context in contexts:
                yield Case(
                    replace(subject, context=context),
                    partial(_measure, bench, replace(subject, context=context)),
                )


def _measure(bench: Workbench, subject: Subject) -> Iterator[Record]:
    assert subject.context is not None
    assert subject.ratio is not None
    model = bench.model(subject.geometry)
    ids = bench.tokens(subject.context)
    error, tolerance = check(bench, model, ids)
    rehearsing = bench.rehearsing_model(subject.geometry)
    rehearsing.prefill(ids, ratio=subject.ratio, streaming=True)
    rehearsing.score(rehearsing.read(ids), reach="chunk")
    watch = Watch(bench)
    with gauge() as held:
        kv = model.prefill(ids, ratio=subject.ratio, streaming=True)
    seconds, peak = watch.lap(), watch.peak()
    dense = full_bytes(kv)
    del kv
    settle(bench.device)
    streamed = Result(STREAMED, Spread.of([seconds], "once"), error, tolerance)
    yield single(subject, f"{STREAMED}, {PER_TOKEN}", seconds / subject.context, "s")
    peaks = {CACHE_PEAK: max(held), **({PEAK: peak} if bench.on_gpu else {})}
    for what, peak_bytes in peaks.items():
        yield replace(
            single(subject, f"{STREAMED}, {what}", peak_bytes, "B"),
            compared_with=FULL_CACHE,
            ratio_to=peak_bytes / dense,
        )
    if bench.on_gpu and dense > free_bytes(bench):
        yield from compare(replace(subject, case=TOTAL), [streamed])
        return

    watch = Watch(bench)
    kv = model.read(ids)
    plain = Result(PLAIN, Spread.of([watch.lap()], "once"))
    model.score(kv, reach="chunk")
    scored = Result(SCORED, Spread.of([watch.lap()], "once"), error, tolerance)
    prefix, token_ids = kv.document.prefix_length, kv.document.token_ids
    del kv
    settle(bench.device)
    yield single(subject, f"{PLAIN}, {PER_TOKEN}", plain.seconds.median / subject.context, "s")
    yield from compare(replace(subject, case=SCORING), [plain, scored])
    total = [plain, streamed]
    if subject.context == MODEL_CONTEXT or not bench.on_gpu:
        published.register()
        stock = geometries.twin(bench.hf_model(subject.geometry), published.IMPLEMENTATION)
        theirs = read_published(bench, stock, model, token_ids, prefix)
        both = theirs.prefill + theirs.scoring
        total.insert(1, Result(PUBLISHED, Spread.of([both], "prefill and scoring, once")))
    yield from compare(replace(subject, case=TOTAL), total)


@contextmanager
def gauge() -> Iterator[list[int]]:
    """Notes the bytes of a cache before each chunk is compacted, when it is at its largest."""
    held: list[int] = []
    absorb = ContextCache.absorb

    def gauged(kv: ContextCache, *args: Any) -> None:
        held.append(kv.nbytes)  # the chunk is still whole here
        absorb(kv, *args)

    with mock.patch.object(ContextCache, "absorb", gauged):
        yield held


def check(bench: Workbench, model: ModelKVzip, ids: Tensor) -> tuple[float, float]:
    """How far pairs that are read in chunks, all kept, are from those that are read whole.

    Returns:
        The error while streaming, and how far it may go.
    """
    ids = ids[:CHECKED]
    chunk = ceil(len(ids) / CHECKED_CHUNKS)
    whole = _last_keys(model.read(ids, chunk_size=len(ids)))
    streamed = model.prefill(ids, ratio=1.0, streaming=True, chunk_size=chunk)
    plain = model.read(ids, chunk_size=chunk)
    norm = whole.norm()
    error, noise = (float((_last_keys(kv) - whole).norm() / norm) for kv in (streamed, plain))
    del streamed, plain
    settle(bench.device)
    return error, LENIENCE * max(noise, torch.finfo(bench.dtype).eps)


def _last_keys(kv: ContextCache) -> Tensor:
    keys: Tensor = kv.layers[-1].context.dense_keys()
    return keys.float()


def full_bytes(kv: ContextCache) -> int:
    """Bytes that the cache would take if nothing were evicted."""
    held = [layer.context for layer in kv.layers if isinstance(layer, ContextLayer)]
    share = sum(len(pairs.keys) for pairs in held) / sum(pairs.kept.numel() for pairs in held)
    return int(kv.nbytes / share)


def free_bytes(bench: Workbench) -> int:
    """Bytes of device memory that nothing holds."""
    return torch.cuda.mem_get_info(bench.device)[0]
