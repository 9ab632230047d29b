"""Single facts hidden in plain prose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from kvzip.synthetic.document import Page, Passage, Question
from kvzip.synthetic.phrasing import vary
from kvzip.synthetic.prose import paragraph
from kvzip.synthetic.words import (
    ADJECTIVES,
    CITIES,
    COLORS,
    CONTAINERS,
    MEN,
    NOUNS,
    WEEKDAYS,
    WOMEN,
    digits,
    invented,
    pair,
)

FAMILY = "needles"


@dataclass(frozen=True)
class _Needle:
    """A fact about one subject: `{s}` the subject, `{v}` the value."""

    says: tuple[str, ...]
    asks: tuple[str, ...]
    subject: Callable[[Random], str]
    value: Callable[[Random], str]


def _somebody(rng: Random) -> str:
    return invented(rng) if rng.random() < 0.3 else rng.choice(WOMEN + MEN)


def _place(rng: Random) -> str:
    return f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


_NEEDLES = (
    _Needle(
        ("The access code of {s} is {v}.", "To open {s}, type the access code {v}."),
        ("What is the access code of {s}?", "Which access code opens {s}?"),
        _place,
        lambda rng: digits(rng, rng.choice((4, 5, 6))),
    ),
    _Needle(
        (
            "One of the special magic numbers for {s} is: {v}.",
            "The special magic number for {s} is {v}.",
        ),
        (
            "What is the special magic number for {s}?",
            "What is the special magic number for {s} mentioned in the provided text?",
        ),
        pair,
        lambda rng: digits(rng, rng.choice((5, 7))),
    ),
    _Needle(
        ("The password for {s} is {v}.", "Whoever enters {s} must say the password {v}."),
        ("What is the password for {s}?", "Which password belongs to {s}?"),
        _place,
        lambda rng: rng.choice(NOUNS),
    ),
    _Needle(
        ("The meeting about {s} takes place on {v}.", "We will talk about {s} on {v}."),
        ("On which day is the meeting about {s}?", "When do we talk about {s}?"),
        _place,
        lambda rng: rng.choice(WEEKDAYS),
    ),
    _Needle(
        ("The key to {s} is hidden in the {v}.", "They keep the key to {s} in the {v}."),
        ("Where is the key to {s}?", "Where do they hide the key to {s}?"),
        _place,
        lambda rng: f"{rng.choice(COLORS)} {rng.choice(CONTAINERS)}",
    ),
    _Needle(
        ("The phone number of {s} is {v}.", "You reach {s} under the phone number {v}."),
        ("What is the phone number of {s}?", "Under which number do you reach {s}?"),
        _place,
        lambda rng: f"{digits(rng, 3)}-{digits(rng, 4)}",
    ),
)


_ATTRIBUTES: dict[str, Callable[[Random], str]] = {
    "secret code": lambda rng: digits(rng, rng.choice((4, 5, 6))),
    "serial number": lambda rng: digits(rng, 6),
    "price": lambda rng: f"{rng.randint(2, 999)} dollars",
    "height": lambda rng: f"{rng.randint(2, 400)} meters",
    "weight": lambda rng: f"{rng.randint(2, 900)} kilograms",
    "age": lambda rng: f"{rng.randint(2, 900)} years",
    "color": lambda rng: rng.choice(COLORS),
    "owner": _somebody,
    "architect": _somebody,
    "guardian": _somebody,
    "nickname": lambda rng: pair(rng, " "),
    "symbol": lambda rng: rng.choice(NOUNS),
}
_UNIQUE: dict[str, Callable[[Random], str]] = {
    "secret word": lambda rng: rng.choice(NOUNS),
    "launch code": lambda rng: digits(rng, 6),
    "winning number": lambda rng: digits(rng, 4),
    "winner": _somebody,
    "captain": _somebody,
    "final destination": lambda rng: rng.choice(CITIES),
    "day of departure": lambda rng: rng.choice(WEEKDAYS),
    "combination of the safe": lambda rng: digits(rng, 5),
    "name of the ship": lambda rng: pair(rng, " "),
    "project budget": lambda rng: f"{rng.randint(2, 999)} dollars",
}
_UNIQUE_SAYS = ("{s} is {v}.", "As everyone knows, {s} is {v}.", "Remember that {s} is {v}.")


def _what(value: Callable[[Random], str]) -> str:
    return "Who" if value is _somebody else "What"


def _draw(page: Page) -> tuple[_Needle, str]:
    """Return a needle and its subject, which the document has not used before."""
    rng = page.rng
    dice = rng.random()
    if dice < 0.15:
        subject = rng.choice(tuple(_UNIQUE))
        if page.claim(subject):
            asks = (f"{_what(_UNIQUE[subject])} is {{s}}?", "Tell me {s}.")
            return _Needle(_UNIQUE_SAYS, asks, _place, _UNIQUE[subject]), f"the {subject}"
    if dice < 0.5:
        name = rng.choice(tuple(_ATTRIBUTES))
        says = (f"The {name} of {{s}} is {{v}}.",)
        value = _ATTRIBUTES[name]
        asks = (f"{_what(value)} is the {name} of {{s}}?", f"Tell me the {name} of {{s}}.")
        needle = _Needle(says, asks, _place, value)
    else:
        needle = rng.choice(_NEEDLES)
    return needle, page.fresh(lambda: needle.subject(rng))


def write(page: Page, size: int) -> Passage:
    """Hide one fact about a new subject in about `size` sentences of prose."""
    rng = page.rng
    needle, subject = _draw(page)
    value = needle.value(rng)
    said = rng.choice(needle.says).format(s=subject, v=value)
    before = rng.randrange(size)
    sentences = [paragraph(rng, before), said[0].upper() + said[1:]]
    sentences.append(paragraph(rng, size - 1 - before))
    question = vary(rng, rng.choice(needle.asks).format(s=subject))
    return Passage(" ".join(filter(None, sentences)), (Question(question, value, FAMILY),))
