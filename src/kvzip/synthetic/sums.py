"""Counts of things in containers, and what two containers hold together.

The answer spells the sum, so that both counts are looked up before they are added: "31 + 24 = 55".
"""

from __future__ import annotations

from kvzip.synthetic.document import Page, Passage, Question
from kvzip.synthetic.phrasing import vary
from kvzip.synthetic.words import ADJECTIVES, COLORS, CONTAINERS, GOODS

FAMILY = "sums"

_SAYS = (
    "The {container} holds {count} {goods}.",
    "There are {count} {goods} in the {container}.",
    "In the {container} lie {count} {goods}.",
    "{container}: {count} {goods}",
)
_COUNT_ASKS = (
    "How many {goods} are in the {first}?",
    "How many {goods} does the {first} hold?",
)
_SUM_ASKS = (
    "How many {goods} do the {first} and the {second} hold together?",
    "How many {goods} are in the {first} and the {second} together?",
    "What is the sum of the {goods} in the {first} and the {second}?",
)
_SHADES = tuple(dict.fromkeys(COLORS + ADJECTIVES))


def write(page: Page, size: int) -> Passage:
    """Write `size` new containers, at least two, full of one kind of things."""
    rng = page.rng
    goods = rng.choice(GOODS)
    template = rng.choice(_SAYS)
    counts: dict[str, int] = {}
    for _ in range(max(2, size)):
        container = page.fresh(lambda: f"{rng.choice(_SHADES)} {rng.choice(CONTAINERS)}")
        counts[container] = rng.randint(2, 99)
    statements = [
        template.format(container=container, count=count, goods=goods)
        for container, count in counts.items()
    ]
    questions = [
        _question(page, _COUNT_ASKS, str(count), goods, container, container)
        for container, count in counts.items()
        if rng.random() < 0.3
    ]
    containers = list(counts)
    for first in containers:
        second = rng.choice([other for other in containers if other != first])
        total = f"{counts[first]} + {counts[second]} = {counts[first] + counts[second]}"
        questions.append(_question(page, _SUM_ASKS, total, goods, first, second))
    joint = "\n" if template is _SAYS[-1] else " "
    return Passage(joint.join(statements), tuple(questions))


def _question(
    page: Page, asks: tuple[str, ...], answer: str, goods: str, first: str, second: str
) -> Question:
    text = page.rng.choice(asks).format(goods=goods, first=first, second=second)
    return Question(vary(page.rng, text), answer, FAMILY)
