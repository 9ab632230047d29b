"""The generated documents: certain answers, the same on every run, never too long."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from random import Random

import pytest

from kvzip.synthetic import FAMILIES, Document, make_document
from kvzip.synthetic.document import ExhaustedError, Page
from kvzip.synthetic.words import CITIES, KINDS, LABELS, MEN, NOUNS, WOMEN

MIXED = sorted(FAMILIES)
SELECTIONS = [[name] for name in MIXED] + [MIXED]


def words(text: str) -> int:
    """Count words, as a stand-in for tokens."""
    return len(text.split())


def document(
    families: list[str], seed: int = 0, tokens: int = 400, split: str = "train"
) -> Document:
    return make_document(families, seed=seed, tokens=tokens, count_tokens=words, split=split)  # type: ignore[arg-type]


@pytest.mark.parametrize("families", SELECTIONS, ids="+".join)
def test_same_seed_gives_the_same_document(families: list[str]) -> None:
    assert document(families, seed=5) == document(families, seed=5)
    assert document(families, seed=5) != document(families, seed=6)


@pytest.mark.parametrize("families", SELECTIONS, ids="+".join)
def test_splits_share_no_document(families: list[str]) -> None:
    train = {document(families, seed=seed, split="train").context for seed in range(20)}
    held_out = {document(families, seed=seed, split="eval").context for seed in range(20)}
    assert len(train) == len(held_out) == 20
    assert not train & held_out


@pytest.mark.parametrize("families", SELECTIONS, ids="+".join)
@pytest.mark.parametrize("tokens", [40, 173, 1500])
def test_budget_is_kept_and_used(families: list[str], tokens: int) -> None:
    for seed in range(5):
        length = words(document(families, seed=seed, tokens=tokens).context)
        assert length <= tokens
        assert length >= tokens * 0.4


@pytest.mark.parametrize("families", SELECTIONS, ids="+".join)
def test_no_question_has_two_answers(families: list[str]) -> None:
    for seed in range(20):
        answers: defaultdict[str, set[str]] = defaultdict(set)
        for question in document(families, seed=seed, tokens=1500).questions:
            answers[question.text.rstrip("?.").lower()].add(question.answer)
        assert all(len(found) == 1 for found in answers.values())


@pytest.mark.parametrize("family", MIXED)
def test_answers_follow_from_the_context(family: str) -> None:
    for seed in range(10):
        made = document([family], seed=seed)
        assert {question.family for question in made.questions} == {family}
        for question in made.questions:
            if family == "chains":
                assignments = question.answer.split(" = ")
                for name, value in pairwise(assignments):
                    assert f" {name} = {value}\n" in made.context + "\n"
            elif family == "sums" and " + " in question.answer:
                first, second, total = question.answer.replace("+", "=").split(" = ")
                assert int(first) + int(second) == int(total)
                assert first in made.context
                assert second in made.context
            elif question.answer not in ("Yes", "No"):
                assert question.answer in made.context


@pytest.mark.parametrize("family", ["profiles", "first_person"])
def test_yes_and_no_are_both_common(family: str) -> None:
    answers = [q.answer for seed in range(40) for q in document([family], seed=seed).questions]
    yes, no = answers.count("Yes"), answers.count("No")
    assert 0.4 < yes / (yes + no) < 0.6


def test_no_questions_often_name_a_value_that_the_document_holds() -> None:
    refused = present = 0
    for seed in range(20):
        made = document(["profiles"], seed=seed, tokens=1500)
        for question in made.questions:
            if question.answer == "No" and "live in" in question.text:
                refused += 1
                present += any(city in question.text and city in made.context for city in CITIES)
    assert refused > 50
    assert present > refused // 3


def test_one_kind_has_one_label() -> None:
    kind_of = {item: kind for kind, items in KINDS.items() for item in items}
    for seed in range(20):
        labels: defaultdict[str, set[str]] = defaultdict(set)
        for question in document(["many_shot"], seed=seed, tokens=1500).questions:
            for word in question.text.lower().replace(",", " ").replace("?", " ").split():
                if word.rstrip(".") in kind_of and question.answer in LABELS:
                    labels[kind_of[word.rstrip(".")]].add(question.answer)
        assert labels
        assert all(len(found) == 1 for found in labels.values())


def test_word_pools_are_distinct() -> None:
    for pool in (WOMEN, MEN, CITIES, NOUNS, LABELS, *KINDS.values()):
        assert len(set(pool)) == len(pool)
    assert not set(WOMEN) & set(MEN)
    items = [item for items in KINDS.values() for item in items]
    assert len(set(items)) == len(items)


def test_a_page_never_gives_a_name_twice() -> None:
    page = Page(Random(0))
    assert page.fresh(lambda: "River") == "River"
    with pytest.raises(ExhaustedError):
        page.fresh(lambda: "river")


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown families"):
        document(["profile"])
    with pytest.raises(ValueError, match="split"):
        document(["sums"], split="test")
    with pytest.raises(ValueError, match="fits into 2 tokens"):
        document(["sums"], tokens=2)
