"""What scores from a surrogate cost the bundled model, beside the scores that it was trained on.

Documents of the `eval` split have 2,000 to 4,000 tokens and passages of one family each, so that
it shows what a threshold evicts of which kind of text. Each is

- read and scored by `reconstruction`, by `reconstruction+` (what surrogates predict), by both
  bundled surrogates and at random, and pruned to one ratio after another;
- scored by the surrogates and pruned by one threshold after another, the last 128 tokens aside;
- read in every way once with a clock: plainly, in two passes, in one pass with a surrogate, and
  compressed while reading by either.

The same questions are asked of all of these caches.

    python benchmarks/surrogate_quality.py [--documents 3] [--questions 12] [--shard 0/1]
        [--out FILE.jsonl]

`--documents` are those of a family; 3 with 12 questions each make about 300 questions in all.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from kvzip import ContextCache, ModelKVzip
from kvzip.benchmarks.provenance import provenance
from kvzip.synthetic import FAMILIES, Question, make_document

RATIOS = (0.7, 0.5, 0.3, 0.2, 0.1)
THRESHOLDS = (-5.0, -4.0, -3.0)
SURROGATES = ("kvzap:linear", "kvzap:mlp")
SCORERS = ("reconstruction", "reconstruction+", *SURROGATES, "random")
SHORTEST, LONGEST = 2000, 4000
TIMED_RATIO, TIMED_CHUNK = 0.3, 512


def caches(model: ModelKVzip, ids: Tensor) -> Iterator[tuple[str, str, float, ContextCache]]:
    """Every way to compress a context: its name, the kind of budget, and the budget."""
    yield "full", "ratio", 1.0, model.read(ids)
    for scorer in SCORERS:
        kv = model.prefill(ids, scorer=scorer)
        for ratio in RATIOS:
            yield scorer, "ratio", ratio, kv.prune(ratio)
    for scorer in SURROGATES:
        kv = model.prefill(ids, scorer=scorer)
        for threshold in THRESHOLDS:
            yield scorer, "threshold", threshold, kv.prune(threshold=threshold)


def seconds(model: ModelKVzip, ids: Tensor) -> dict[str, float]:
    """What it takes to read a context, and to compress it."""
    streaming = {"ratio": TIMED_RATIO, "streaming": True, "chunk_size": TIMED_CHUNK}
    ways: dict[str, Callable[[], object]] = {
        "plain": lambda: model.read(ids),
        "two passes": lambda: model.prefill(ids, ratio=TIMED_RATIO),
        **{
            scorer: lambda scorer=scorer: model.prefill(ids, ratio=TIMED_RATIO, scorer=scorer)
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


def measure(
    model: ModelKVzip, family: str, seed: int, documents: int, count: int
) -> dict[str, Any]:
    """Right answers, shares kept and times of one document."""
    tokens = SHORTEST + (LONGEST - SHORTEST) * seed // max(1, documents - 1)
    document = make_document(
        [family],
        seed=f"surrogate-quality-{seed}",
        split="eval",
        tokens=tokens,
        count_tokens=lambda text: len(model.prompts.context_ids(text)),
    )
    questions = Random(seed).sample(document.questions, min(count, len(document.questions)))
    ids = model.prompts.context_ids(document.context)
    cells = [
        {
            "way": name,
            kind: budget,
            "realised_ratio": kv.realised_ratio,
            "right": right(model, kv, questions),
        }
        for name, kind, budget, kv in caches(model, ids)
    ]
    return {
        "family": family,
        "seed": seed,
        "context_tokens": len(ids),
        "questions": len(questions),
        "cells": cells,
        "seconds": seconds(model, ids),
    }


def right(model: ModelKVzip, kv: ContextCache, questions: list[Question]) -> list[int]:
    """1 for each question that is answered exactly."""
    answers = model.ask(kv, [question.text for question in questions], max_new_tokens=64)
    return [int(a == question.answer) for a, question in zip(answers, questions, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=3, help="documents of each family")
    parser.add_argument("--questions", type=int, default=12, help="questions a document, at most")
    parser.add_argument("--shard", default="0/1", help="i/n: only documents i, i + n, ...")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="append a line for each document to this file")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = ModelKVzip(device="cpu")
    shard, shards = map(int, options.shard.split("/"))
    origin = provenance(model.hf_model.device)
    jobs = [(family, seed) for seed in range(options.documents) for family in FAMILIES]
    for family, seed in jobs[shard::shards]:
        measured = measure(model, family, seed, options.documents, options.questions)
        cells = {
            " ".join(str(c[k]) for k in ("way", "ratio", "threshold") if k in c): (
                f"{sum(c['right'])}/{len(c['right'])}"
            )
            for c in measured["cells"]
        }
        print(family, seed, cells, flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps({**origin, **measured}) + "\n")


if __name__ == "__main__":
    main()
