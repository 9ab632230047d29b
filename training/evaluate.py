"""Measure the bundled model's exact answers, per family and context length, with the full cache.

    python training/evaluate.py --model src/kvzip/assets/tiny --out build/figures.json

Documents come from the `eval` split. Every question is asked as the first and only one right after
the context. An answer is exact when all its tokens, the end token with them, are the most probable
ones given those before: then greedy generation writes exactly this answer.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel

from corpus import FIRST_QUESTION, LONGEST_CHUNK, Encoder, repeat_request
from kvzip.synthetic import FAMILIES, make_document

LENGTHS = (512, 2048, 4096)
MIXED = "mixed"


def read(model: PreTrainedModel, ids: list[int]) -> Cache:
    """Return the cache of a prompt."""
    cache: Cache = model.model(torch.tensor([ids], device=model.device)).past_key_values
    return cache


def predictions(model: PreTrainedModel, cache: Cache, inputs: list[list[int]]) -> list[list[int]]:
    """Return the most probable next token after each token of every input, on top of one cache.

    The cache is left as it was. Inputs are padded on the right, where causal attention never looks.
    """
    width = max(map(len, inputs))
    rows = torch.tensor([ids + [0] * (width - len(ids)) for ids in inputs], device=model.device)
    branch = copy.deepcopy(cache)
    branch.batch_repeat_interleave(len(inputs))
    best = model(rows, past_key_values=branch).logits.argmax(-1).tolist()
    return [row[: len(ids)] for row, ids in zip(best, inputs, strict=True)]


@torch.inference_mode()
def exact_answers(
    model: PreTrainedModel,
    encoder: Encoder,
    families: list[str],
    length: int,
    documents: int,
    questions: int,
    failures: list[dict[str, str]],
) -> tuple[int, int]:
    """Return how many answers are exact, and how many questions were asked."""
    right = asked = 0
    for number in range(documents):
        document = make_document(
            families, seed=number, tokens=length, count_tokens=encoder.count, split="eval"
        )
        picked = Random(number).sample(document.questions, min(questions, len(document.questions)))
        cache = read(model, encoder.prefix + encoder.encode(document.context))
        queries = [encoder.encode(FIRST_QUESTION + q.text) + encoder.suffix for q in picked]
        answers = [[*encoder.encode(q.answer), encoder.end] for q in picked]
        inputs = [query + answer for query, answer in zip(queries, answers, strict=True)]
        for question, query, answer, best in zip(
            picked, queries, answers, predictions(model, cache, inputs), strict=True
        ):
            said = best[len(query) - 1 : -1]
            asked += 1
            right += said == answer
            if said != answer:
                failures.append(
                    {
                        "question": question.text,
                        "answer": question.answer,
                        "said": encoder.decode(said),
                        "length": str(length),
                    }
                )
    return right, asked


@torch.inference_mode()
def repeated_tokens(
    model: PreTrainedModel, encoder: Encoder, length: int, documents: int
) -> tuple[int, int]:
    """Return how many context tokens are predicted rightly when repeated in chunks, of how many."""
    right = total = 0
    for number in range(documents):
        document = make_document(
            list(FAMILIES), seed=number, tokens=length, count_tokens=encoder.count, split="eval"
        )
        context = encoder.encode(document.context)
        cache = read(model, encoder.prefix + context)
        for start in range(0, len(context), LONGEST_CHUNK):
            request = repeat_request(encoder, context, start)
            chunk = context[start : start + LONGEST_CHUNK]
            (best,) = predictions(model, cache, [request + chunk])
            said = best[len(request) - 1 : -1]
            right += sum(a == b for a, b in zip(said, chunk, strict=True))
            total += len(chunk)
    return right, total


def evaluate(folder: Path, documents: int, questions: int) -> dict[str, object]:
    """Return every figure of a model folder as JSON-ready values."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    encoder = Encoder(Tokenizer.from_file(str(folder / "tokenizer.json")))
    failures: list[dict[str, str]] = []
    exact: dict[str, dict[str, dict[str, float]]] = {}
    for family in [*FAMILIES, MIXED]:
        families = list(FAMILIES) if family == MIXED else [family]
        exact[family] = {}
        for length in LENGTHS:
            right, asked = exact_answers(
                model, encoder, families, length, documents, questions, failures
            )
            exact[family][str(length)] = {
                "exact": round(right / asked, 4), "right": right, "asked": asked
            }  # fmt: skip
    repeats = {}
    for length in LENGTHS:
        right, total = repeated_tokens(model, encoder, length, documents)
        repeats[str(length)] = {"share": round(right / total, 5), "right": right, "tokens": total}
    return {
        "split": "eval",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "dtype": str(dtype),
        "exact_answers": exact,
        "repeated_tokens": repeats,
        "failures": failures[:: max(1, len(failures) // 60)],
    }


def table(figures: dict[str, object]) -> str:
    """Return the figures as a Markdown table."""
    exact = figures["exact_answers"]
    repeats = figures["repeated_tokens"]
    assert isinstance(exact, dict)
    assert isinstance(repeats, dict)
    lines = [
        "| family | " + " | ".join(map(str, LENGTHS)) + " |",
        "|---" * (1 + len(LENGTHS)) + "|",
    ]
    for family, by_length in exact.items():
        cells = [f"{by_length[str(length)]['exact']:.3f}" for length in LENGTHS]
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    cells = [f"{repeats[str(length)]['share']:.5f}" for length in LENGTHS]
    lines.append("| repeated tokens | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Read the command line, evaluate, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--questions", type=int, default=24)
    arguments = parser.parse_args()
    started = time.monotonic()
    figures = evaluate(arguments.model, arguments.documents, arguments.questions)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(table(figures))
    print(f"{time.monotonic() - started:.0f} seconds")


if __name__ == "__main__":
    main()
