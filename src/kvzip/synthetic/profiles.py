"""Profiles of people in the third person, with open and yes-or-no questions."""

from __future__ import annotations

from random import Random

from kvzip.synthetic.document import Page, Passage, Question
from kvzip.synthetic.facts import COMMON_FACTS, FACTS, Fact, Voice
from kvzip.synthetic.phrasing import vary
from kvzip.synthetic.words import MEN, WOMEN, invented, with_article

FAMILY = "profiles"


def write(page: Page, size: int) -> Passage:
    """Write the profile of one new person, or of two or three in one paragraph, of `size` facts."""
    if size < 3 or page.rng.random() < 0.7:
        return _profile(page, size)
    people = page.rng.randint(2, 3)
    profiles = [_profile(page, max(1, size // people), in_paragraph=True) for _ in range(people)]
    return Passage(
        " ".join(profile.text for profile in profiles),
        tuple(question for profile in profiles for question in profile.questions),
    )


def _profile(page: Page, size: int, in_paragraph: bool = False) -> Passage:
    """Write up to `size` facts, six at the most, about one new person."""
    rng = page.rng
    pronoun, pool = rng.choice((("She", WOMEN), ("He", MEN)))
    name = page.fresh(lambda: invented(rng) if rng.random() < 0.2 else rng.choice(pool))
    possessive = "Her" if pronoun == "She" else "His"
    sentences: list[str] = []
    questions: list[Question] = []
    facts = COMMON_FACTS if rng.random() < 0.6 else FACTS
    for fact in rng.sample(facts, min(size, 6)):
        value = fact.draw(rng)
        named = not sentences or rng.random() < 0.4
        subject, owner = (name, f"{name}'s") if named else (pronoun, possessive)
        template = rng.choice(fact.third.says)
        sentences.append(
            template.format_map({"S": subject, "P": owner, "v": value, "a": with_article(value)})
        )
        questions += questions_about(page, fact, fact.third, value, name, FAMILY)
    text = " ".join(_joined(rng, sentences, name, pronoun))
    if not in_paragraph and rng.random() < 0.15:
        text = f"Profile of {name}\n{text}"
    return Passage(text, tuple(questions))


def questions_about(
    page: Page, fact: Fact, voice: Voice, value: str, name: str, family: str
) -> list[Question]:
    """Return an open question about a fact, and one to be answered with Yes or No.

    The wrong values of the No questions are, half of the time, values that the document gives to
    somebody else: that a value occurs somewhere does not make the answer Yes.
    """
    rng = page.rng
    asked = rng.choice(voice.asks).format_map({"n": name})
    holds = rng.random() < 0.5
    said = page.said[fact.kind]
    claimed = value
    while not holds and claimed == value:
        claimed = rng.choice(said) if said and rng.random() < 0.5 else fact.draw(rng)
    said.append(value)
    check = rng.choice(voice.checks).format_map(
        {"n": name, "v": claimed, "a": with_article(claimed)}
    )
    return [
        Question(vary(rng, asked), value, family),
        Question(vary(rng, check), "Yes" if holds else "No", family),
    ]


def _joined(rng: Random, sentences: list[str], name: str, pronoun: str) -> list[str]:
    """Join some neighbours with `and`: "Anna lives in Oslo." and "She is 34." make one sentence."""
    joined = sentences[:1]
    for sentence in sentences[1:]:
        same_subject = joined[-1].startswith((f"{name} ", f"{pronoun} "))
        if same_subject and sentence.startswith(f"{pronoun} ") and rng.random() < 0.4:
            joined[-1] = f"{joined[-1][:-1]} and {sentence[len(pronoun) + 1 :]}"
        else:
            joined.append(sentence)
    return joined
