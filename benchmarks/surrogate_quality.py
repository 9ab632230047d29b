"""What a threshold on the bundled surrogates evicts of which kind of text, and what that costs.

Documents of the `eval` split have 1,000 to 2,000 tokens and passages of one family each. Each is
scored while it is read, by either surrogate, and pruned to one threshold after another, the last
128 tokens aside; the same questions are asked of all of these caches and of the full one. Documents
of the longest size are also read with a clock: plainly, in two passes, in one pass with a
surrogate, and compressed while reading, by a repeat and by the surrogates.

The thresholds were chosen by the quantiles of the scores of one document of the `train` split
(1,498 tokens of all nine families, seed "surrogate-thresholds"), where those of both surrogates
agree within 0.04 from the second decile to the eighth: -5.5, -5 and -4 evict 32, 47 and 74 % of its
pairs. Ratios are what `kvzip eval` measures.

    python benchmarks/surrogate_quality.py [--questions 200] [--shard 0/1] [--out FILE.jsonl]
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from kvzip import ContextCache, ModelKVzip
from kvzip.benchmarks.provenance import provenance
from kvzip.synthetic import FAMILIES, Question, make_document

SURROGATES = ("kvzap:linear", "kvzap:mlp")
THRESHOLDS = (-5.5, -5.0, -4.0)
SIZES = (1000, 1250, 1500, 1750, 2000)
"""Tokens of a family's documents, in turns."""
A_DOCUMENT = 20
"""Questions about one document, at most."""
TIMED_RATIO, TIMED_CHUNK = 0.3, 512


@dataclass(frozen=True)
class Job:
    """A document, and what is asked about it."""

    family: str
    seed: int
    size: int
    context: str
    questions: list[Question]


def jobs(model: ModelKVzip, asked: int) -> Iterator[Job]:
    """Documents of every family until there are so many questions about each."""
    for family in FAMILIES:
        seed, left = 0, asked
        while left:
            size = SIZES[seed % len(SIZES)]
            document = make_document(
                [family],
                seed=f"surrogate-quality-{seed}",
                split="eval",
                tokens=size,
                count_tokens=lambda text: len(model.prompts.context_ids(text)),
            )
            count = min(A_DOCUMENT, left, len(document.questions))
            questions = Random(seed).sample(document.questions, count)
            yield Job(family, seed, size, document.context, questions)
            seed, left = seed + 1, left - count


def cells(model: ModelKVzip, ids: Tensor, questions: list[Question]) -> Iterator[dict[str, Any]]:
    """Shares evicted and right answers by surrogate and threshold."""
    for scorer in SURROGATES:
        kv = model.prefill(ids, scorer=scorer)
        for threshold in THRESHOLDS:
            kv.prune(threshold=threshold)
            yield {
                "scorer": scorer,
                "threshold": threshold,
                "evicted": 1 - kv.realised_ratio,
                "right": right(model, kv, questions),
            }


def right(model: ModelKVzip, kv: ContextCache, questions: list[Question]) -> list[int]:
    """1 for each question that is answered exactly."""
    answers = model.ask(kv, [question.text for question in questions], max_new_tokens=64)
    return [int(a == question.answer) for a, question in zip(answers, questions, strict=True)]


def seconds(model: ModelKVzip, ids: Tensor) -> dict[str, float]:
    """What it takes to read a context, and to compress it."""
    streaming = {"ratio": TIMED_RATIO, "streaming": True, "chunk_size": TIMED_CHUNK}
    ways: dict[str, Callable[[], object]] = {
        "plain prefill": lambda: model.read(ids),
        "two passes": lambda: model.prefill(ids, ratio=TIMED_RATIO),
        **{
            f"one pass, {scorer}": lambda scorer=scorer: model.prefill(
                ids, ratio=TIMED_RATIO, scorer=scorer
            )
            for scorer in SURROGATES
        },
        "streaming": lambda: model.prefill(ids, **streaming),
        **{
            f"streaming, {scorer}": lambda scorer=scorer: model.prefill(
                ids, scorer=scorer, **streaming
            )
            for scorer in SURROGATES
        },
    }
    return {name: _timed(way) for name, way in ways.items()}


def _timed(way: Callable[[], object]) -> float:
    start = perf_counter()
    way()
    return perf_counter() - start


def measure(model: ModelKVzip, job: Job) -> dict[str, Any]:
    """Right answers and shares evicted of one document, and times if it is one of the longest."""
    ids = model.prompts.context_ids(job.context)
    return {
        "family": job.family,
        "seed": job.seed,
        "context_tokens": len(ids),
        "questions": len(job.questions),
        "full": right(model, model.read(ids), job.questions),
        "cells": [*cells(model, ids, job.questions)],
        "seconds": seconds(model, ids) if job.size == max(SIZES) else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=200, help="questions of each family")
    parser.add_argument("--shard", default="0/1", help="i/n: only documents i, i + n, ...")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="append a line for each document to this file")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = ModelKVzip(device="cpu")
    shard, shards = map(int, options.shard.split("/"))
    origin = provenance(model.hf_model.device)
    chosen = [*jobs(model, options.questions)][shard::shards]
    seconds(model, model.prompts.context_ids(chosen[0].context))  # surrogates are loaded now
    for job in chosen:
        measured = measure(model, job)
        counts = {f"{c['scorer']}, {c['threshold']}": sum(c["right"]) for c in measured["cells"]}
        print(job.family, job.seed, f"of {len(job.questions)}:", counts, flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps({**origin, **measured}) + "\n")


if __name__ == "__main__":
    main()
