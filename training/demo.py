"""Make the document and the questions of `kvzip demo`.

    python training/demo.py     # writes src/kvzip/assets/demo/document.txt and questions.json

The document is one of the `eval` split with all families in it. The first seed is taken for which
the bundled model answers every question exactly with the full cache: a demo of what eviction does
to right answers has to start from right answers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from corpus import FIRST_QUESTION, Encoder
from evaluate import predictions, read
from kvzip.synthetic import FAMILIES, Document, Question, make_document

ASSETS = Path(__file__).parents[1] / "src" / "kvzip" / "assets"
TOKENS = 3000
TWICE = ("profiles", "first_person", "needles")
LONGEST_ANSWER = 48
LEAST_ABOUT_ME = 12


def candidates(encoder: Encoder) -> Iterator[tuple[Document, list[Question]]]:
    """Yield documents, each with one or two neatly typed questions of every family."""
    seed = 0
    while True:
        document = make_document(
            [*FAMILIES, *TWICE],
            seed=f"demo {seed}",
            tokens=TOKENS,
            count_tokens=encoder.count,
            split="eval",
        )
        rng = Random(seed)
        seed += 1
        picked: list[Question] = []
        for family in FAMILIES:
            neat = [
                question
                for question in document.questions
                if question.family == family
                and question.text[0].isupper()
                and question.text[-1] in "?."
                and ":" not in question.text
                and len(question.answer) <= LONGEST_ANSWER
                and "\n" not in question.answer
            ]
            open_ones = [question for question in neat if question.answer not in ("Yes", "No")]
            checks = [question for question in neat if question.answer in ("Yes", "No")]
            if len(open_ones) > 1:
                first, *others = rng.sample(open_ones, len(open_ones))
                picked.append(first)
                if family in TWICE:
                    picked.append(rng.choice(checks or others))
        about_me = [q for q in document.questions if q.family == "first_person"]
        complete = {question.family for question in picked} == set(FAMILIES)
        if complete and len(about_me) >= LEAST_ABOUT_ME:
            yield document, picked


@torch.inference_mode()
def all_right(
    model: PreTrainedModel, encoder: Encoder, document: Document, questions: list[Question]
) -> bool:
    """Return whether every answer is exact with the full cache."""
    cache = read(model, encoder.prefix + encoder.encode(document.context))
    queries = [encoder.encode(FIRST_QUESTION + q.text) + encoder.suffix for q in questions]
    answers = [[*encoder.encode(q.answer), encoder.end] for q in questions]
    inputs = [query + answer for query, answer in zip(queries, answers, strict=True)]
    said = predictions(model, cache, inputs)
    return all(
        best[len(query) - 1 : -1] == answer
        for best, query, answer in zip(said, queries, answers, strict=True)
    )


def main() -> None:
    """Write the first document whose questions are all answered rightly."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ASSETS / "demo")
    out = parser.parse_args().out
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny", dtype=torch.float32)
    encoder = Encoder(Tokenizer.from_file(str(ASSETS / "tiny" / "tokenizer.json")))
    document, questions = next(
        (document, questions)
        for document, questions in candidates(encoder)
        if all_right(model, encoder, document, questions)
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "document.txt").write_text(document.context, encoding="utf-8")
    listed = [
        {"question": question.text, "answer": question.answer, "family": question.family}
        for question in questions
    ]
    (out / "questions.json").write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
