"""Many labelled examples: the label is asked of an item shown, or of a new one of the same kind."""

from __future__ import annotations

from kvzip.synthetic.document import Page, Passage, Question
from kvzip.synthetic.phrasing import vary
from kvzip.synthetic.words import KINDS, LABELS, URGENCIES, digits

FAMILY = "many_shot"

_NOTATIONS = (
    "{item} -> {label}",
    "{item}: {label}",
    "Item: {item}\nLabel: {label}",
    "{item} | {label}",
)
_SHOWN_ASKS = (
    "What is the label of {item}?",
    "Which label does {item} have?",
    "How is {item} labelled?",
)
_NEW_ASKS = (
    "Which label fits {item}, going by the examples?",
    "Following the examples, what is the label of {item}?",
    "Label {item} like the examples.",
)


def write(page: Page, size: int) -> Passage:
    """Write a block of labelled examples: tickets by number, or items labelled by their kind."""
    if page.rng.random() < 0.4 or len(page.said["kinds"]) == len(KINDS):
        return _tickets(page, size)
    return _kinds(page, size)


def _tickets(page: Page, size: int) -> Passage:
    """Write about three tickets per `size`, each with a label of its own."""
    rng = page.rng
    labels = rng.sample(URGENCIES, rng.randint(2, len(URGENCIES)))
    examples = [
        (page.fresh(lambda: f"ticket {digits(rng, 4)}"), rng.choice(labels))
        for _ in range(rng.randint(size, 3 * size))
    ]
    return _block(page, examples, [])


def _kinds(page: Page, size: int) -> Passage:
    """Write items of one to four unused kinds, and keep some of each back for questions."""
    rng = page.rng
    examples: list[tuple[str, str]] = []
    kept_back: list[tuple[str, str]] = []
    unused = [kind for kind in KINDS if kind not in page.said["kinds"]]
    count = rng.randint(1, 2) if size < 4 else rng.randint(2, 4)
    for kind in rng.sample(unused, min(count, len(unused))):
        page.said["kinds"].append(kind)
        label = page.fresh(lambda: rng.choice(LABELS))
        items = rng.sample(KINDS[kind], min(len(KINDS[kind]), 2 + size))
        shown = max(1, len(items) - rng.randint(1, 4))
        examples += [(item, label) for item in items[:shown]]
        kept_back += [(item, label) for item in items[shown:]]
    rng.shuffle(examples)
    return _block(page, examples, kept_back)


def _block(page: Page, shown: list[tuple[str, str]], kept_back: list[tuple[str, str]]) -> Passage:
    rng = page.rng
    notation = rng.choice(_NOTATIONS)
    text = "\n".join(notation.format(item=item, label=label) for item, label in shown)
    questions = [
        Question(vary(rng, rng.choice(asks).format(item=item)), label, FAMILY)
        for asks, pairs in ((_SHOWN_ASKS, shown), (_NEW_ASKS, kept_back))
        for item, label in pairs
    ]
    return Passage(text, tuple(questions))
