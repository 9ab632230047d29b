"""Key-value stores: lists, assignments and JSON."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from kvzip.synthetic.document import Page, Passage, Question
from kvzip.synthetic.phrasing import vary
from kvzip.synthetic.words import COLORS, MONTHS, NOUNS, digits, pair

FAMILY = "key_values"

_TITLES = ("Registry", "Settings", "Stored values", "Lookup table", "Inventory codes", "Records")
_ASKS = (
    "What is the value of {key}?",
    "What is the value for the key {key}?",
    "Which value does {key} have?",
    "Look up {key}.",
    "Give the value of {key}.",
    "What is stored under {key}?",
)


_WORDS = tuple(dict.fromkeys(COLORS + NOUNS + MONTHS))


def _hexadecimal(rng: Random) -> str:
    return f"{rng.randrange(16**6, 16**7):07x}"


def _code(rng: Random) -> str:
    first, second = rng.choices("ABCDEFGHKLMNPRSTVXZ", k=2)
    return f"{first}{digits(rng, 2)}-{second}{digits(rng, 2)}"


_KEYS: tuple[Callable[[Random], str], ...] = (
    lambda rng: pair(rng, "-"),
    lambda rng: pair(rng, "-"),
    lambda rng: pair(rng, "_"),
    lambda rng: rng.choice(_WORDS),
)
_VALUES: tuple[Callable[[Random], str], ...] = (
    lambda rng: digits(rng, rng.randint(1, 4)),
    lambda rng: digits(rng, 5),
    lambda rng: digits(rng, 6),
    lambda rng: pair(rng, " "),
    _code,
    _hexadecimal,
)


def write(page: Page, size: int) -> Passage:
    """Write a store of `size` keys, all in one notation and with one kind of value."""
    rng = page.rng
    draw_value = rng.choice(_VALUES)
    draw_key = rng.choice(_KEYS)
    keys = [page.fresh(lambda: draw_key(rng)) for _ in range(size)]
    entries = [(key, draw_value(rng)) for key in keys]
    questions = tuple(
        Question(vary(rng, rng.choice(_ASKS).format(key=key)), value, FAMILY)
        for key, value in entries
    )
    return Passage(_NOTATIONS[rng.randrange(len(_NOTATIONS))](rng, entries), questions)


def _listing(rng: Random, entries: list[tuple[str, str]]) -> str:
    title = f"{rng.choice(_TITLES)}:\n" if rng.random() < 0.5 else ""
    bullet = rng.choice(("", "", "- ", "* "))
    return title + "\n".join(f"{bullet}{key}: {value}" for key, value in entries)


def _assignments(rng: Random, entries: list[tuple[str, str]]) -> str:
    joint = rng.choice((" = ", "=", " -> "))
    return "\n".join(f"{key}{joint}{value}" for key, value in entries)


def _json(rng: Random, entries: list[tuple[str, str]]) -> str:
    lines = ",\n".join(f'  "{key}": "{value}"' for key, value in entries)
    return f"{{\n{lines}\n}}"


def _sentences(rng: Random, entries: list[tuple[str, str]]) -> str:
    template = rng.choice(
        ("The value of {} is {}.", "Under {} we keep {}.", "{} has the value {}.")
    )
    return " ".join(template.format(key, value) for key, value in entries)


_NOTATIONS = (_listing, _assignments, _json, _sentences)
