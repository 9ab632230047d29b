"""The promise on a real, if small, model: little is lost at 0.3, and the scores are the reason."""

import json
from importlib import resources
from random import Random

import pytest
import torch

from kvzip import ContextCache, ModelKVzip, Scores
from kvzip.synthetic import FAMILIES, Question, make_document

DOCUMENTS = 24
TOKENS = 1500
QUESTIONS = 15
FEW_DOCUMENTS = 8


@pytest.fixture(scope="module")
def model() -> ModelKVzip:
    return ModelKVzip(device="cpu")


def correct(model: ModelKVzip, kv: ContextCache, questions: list[Question]) -> int:
    answers = model.ask(kv, [question.text for question in questions], max_new_tokens=64)
    return sum(a == q.answer for a, q in zip(answers, questions, strict=True))


def ask_about(model: ModelKVzip, seed: int) -> tuple[str, list[Question]]:
    """A document of all families that training did not see, and some of its questions."""
    document = make_document(
        list(FAMILIES),
        seed=seed,
        split="eval",
        tokens=TOKENS,
        count_tokens=lambda text: len(model.prompts.context_ids(text)),
    )
    return document.context, Random(seed).sample(document.questions, QUESTIONS)


def test_zipped_answers_are_within_a_point_of_full_ones(model: ModelKVzip) -> None:
    full = zipped = 0
    families = set()
    for seed in range(DOCUMENTS):
        context, questions = ask_about(model, seed)
        families |= {question.family for question in questions}
        kv = model.prefill(context)
        full += correct(model, kv, questions)
        zipped += correct(model, kv.prune(0.3), questions)
    asked = DOCUMENTS * QUESTIONS
    assert families == set(FAMILIES)
    assert full / asked > 0.95
    assert zipped / asked >= full / asked - 0.01


def test_random_pairs_collapse(model: ModelKVzip) -> None:
    right = 0
    for seed in range(FEW_DOCUMENTS):
        context, questions = ask_about(model, seed)
        kv = model.read(context)
        shape = (*kv.kept.shape,)
        kv.scores = Scores(
            torch.rand(shape, generator=torch.Generator().manual_seed(seed)), "random"
        )
        right += correct(model, kv.prune(0.3), questions)
    # labels and yes-or-no questions are guessed right now and then
    assert right / (FEW_DOCUMENTS * QUESTIONS) < 0.6


@pytest.mark.parametrize("ratio", [1.0, 0.3])
@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is my name?", "Kim"),
        ("Do I live in Seoul?", "Yes"),
        ("Do I live in Busan?", "No"),
        ("What is my major?", "computer science"),
    ],
)
def test_the_quick_start_is_answered_rightly(
    model: ModelKVzip, question: str, answer: str, ratio: float
) -> None:
    kv = model.prefill("My name is Kim living in Seoul. My major is computer science.")
    if ratio < 1:
        kv.prune(ratio)
    assert model.generate(model.apply_template(question), kv=kv, update_cache=False) == answer


def test_every_question_of_the_demo_is_answered_rightly(model: ModelKVzip) -> None:
    demo = resources.files("kvzip") / "assets" / "demo"
    questions = json.loads((demo / "questions.json").read_text(encoding="utf-8"))
    kv = model.prefill((demo / "document.txt").read_text(encoding="utf-8"))
    texts, expected = zip(*((q["question"], q["answer"]) for q in questions), strict=True)
    assert tuple(model.ask(kv, texts, max_new_tokens=64)) == expected
    assert tuple(model.ask(kv.prune(0.3), texts, max_new_tokens=64)) == expected
