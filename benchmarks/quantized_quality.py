"""What quantised pairs cost the bundled model, beside the same pairs as the model made them.

Documents of the `eval` split mix all nine families and have 2,000 to 4,000 tokens. Each is read and
scored once, pruned to one ratio after another, and quantised to one dtype after another. The same
questions are asked of all of these caches. Beside exact answers, logits behind every token of
question and true answer are compared with those over the same pairs as they were made: the norm of
the difference over the norm. Bytes are those of the context's pairs with their prefix, over those
of a full cache in bfloat16.

At ratio 0.3 two more are measured, which show what the format is made of: int4 with a prefix that
is not quantised, and int4 without centers and gains, as scales a row alone would have it.

    python benchmarks/quantized_quality.py [--documents 13] [--questions 20] [--shard 0/1]
        [--out FILE.jsonl]
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from kvzip import ContextCache, ModelKVzip
from kvzip.benchmarks.provenance import provenance
from kvzip.kernels.quantization import KV_DTYPES, Quantization, QuantizedRows, dequantize, encode
from kvzip.pairs import Pairs
from kvzip.synthetic import FAMILIES, Question, make_document

RATIOS = (1.0, 0.5, 0.3, 0.1, 0.05)
AS_MADE = "as made"
WITHOUT = "int4, no centers and gains"
PREFIX_AS_MADE = "int4, prefix as made"
MORE_AT = 0.3
MEASURED = (AS_MADE, *KV_DTYPES)
"""Ways that are what they are called; the others are their numbers in full precision."""
SHORTEST, LONGEST = 2000, 4000


def caches(kv: ContextCache, ratio: float) -> Iterator[tuple[str, ContextCache]]:
    """The kept pairs in every form, with its name; as they were made first."""
    plain = kv.fork().prune(ratio)
    yield AS_MADE, plain
    for kv_dtype in KV_DTYPES:
        yield kv_dtype, plain.fork().quantize(kv_dtype)
    if ratio == MORE_AT:
        yield PREFIX_AS_MADE, with_prefix_as_made(plain)
        yield WITHOUT, without_channels(plain)


def with_prefix_as_made(plain: ContextCache) -> ContextCache:
    """What int4 codes stand for, but for the first rows of every head."""
    fork, p = plain.fork(), plain.document.prefix_length
    for layer in fork.prunable:
        pairs = layer.context
        first = (pairs.indptr[:-1, None] + torch.arange(p)).flatten()
        codes = pairs.quantize(Quantization("int4"))
        keys, values = stand_for(codes.keys, pairs), stand_for(codes.values, pairs)
        keys[first], values[first] = pairs.keys[first], pairs.values[first]
        layer.context = Pairs(keys, values, pairs.kept)
    return fork


def without_channels(plain: ContextCache) -> ContextCache:
    """What int4 codes stand for that were made of the rows as they are."""
    fork, how = plain.fork(), Quantization("int4")
    for layer in fork.prunable:
        pairs = layer.context
        counts = pairs.counts.tolist()
        rows = []
        for part in (pairs.keys, pairs.values):
            center = part.new_zeros(len(counts), part.shape[1])
            rows.append(stand_for(encode(part, counts, how, center, center + 1), pairs))
        layer.context = Pairs(rows[0], rows[1], pairs.kept)
    return fork


def stand_for(rows: QuantizedRows, pairs: Pairs) -> Tensor:
    """Dequantised rows, `[rows, D]`."""
    return torch.cat([*dequantize(rows, pairs.counts.tolist())])


def measure(model: ModelKVzip, seed: int, documents: int, questions: int) -> dict[str, Any]:
    """Right answers and errors of logits on one document."""
    tokens = SHORTEST + (LONGEST - SHORTEST) * seed // max(1, documents - 1)
    document = make_document(
        list(FAMILIES),
        seed=f"quantized-{seed}",
        split="eval",
        tokens=tokens,
        count_tokens=lambda text: len(model.prompts.context_ids(text)),
    )
    chosen = Random(seed).sample(document.questions, questions)
    ids = model.prompts.context_ids(document.context)
    kv = model.prefill(ids)
    full = sum(2 * tensor.numel() for layer in kv.prunable for tensor in layer.context_tensors())
    cells = []
    for ratio in RATIOS:
        plain_logits: list[Tensor] = []
        for way, zipped in caches(kv, ratio):
            logits = [behind(model, zipped, question) for question in chosen]
            plain_logits = plain_logits or logits
            pairs = list(zip(logits, plain_logits, strict=True))
            errors = [((a - b).norm(dim=-1) / b.norm(dim=-1)).mean().item() for a, b in pairs]
            cells.append(
                {
                    "way": way,
                    "ratio": ratio,
                    "right": right(model, zipped, chosen),
                    "logits_error": errors,
                    "bytes": share_of_bytes(zipped, full) if way in MEASURED else None,
                }
            )
    return {
        "seed": seed,
        "context_tokens": len(ids),
        "questions": questions,
        "families": [question.family for question in chosen],
        "cells": cells,
    }


def share_of_bytes(kv: ContextCache, full: int) -> float:
    """Bytes of a context's pairs over `full`; what is float32 here would be bfloat16."""
    held = sum(t.nbytes for layer in kv.prunable for t in layer.context_tensors())
    return held / full if kv.kv_dtype else held / full / 2


def right(model: ModelKVzip, kv: ContextCache, questions: list[Question]) -> list[int]:
    """1 for each question that is answered exactly."""
    answers = model.ask(kv, [question.text for question in questions], max_new_tokens=64)
    return [int(a == question.answer) for a, question in zip(answers, questions, strict=True)]


@torch.no_grad()
def behind(model: ModelKVzip, kv: ContextCache, question: Question) -> Tensor:
    """`[t, V]`: logits behind each token of a question and of its true answer."""
    answer = model.tokenizer(question.answer, add_special_tokens=False, return_tensors="pt")
    ids = torch.cat([model.apply_template(question.text), answer.input_ids[0]])
    return model.hf_model(ids[None], past_key_values=kv.fork()).logits[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=13)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--shard", default="0/1", help="i/n: only documents i, i + n, ...")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="append a line for each document to this file")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = ModelKVzip(device="cpu")
    shard, shards = map(int, options.shard.split("/"))
    origin = provenance(model.hf_model.device)
    for seed in range(shard, options.documents, shards):
        line = {**origin, **measure(model, seed, options.documents, options.questions)}
        counts = {
            f"{c['way']} {c['ratio']}": f"{sum(c['right'])}/{len(c['right'])}"
            for c in line["cells"]
        }
        print(seed, counts, flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
