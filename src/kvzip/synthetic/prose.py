"""Plain sentences that carry no fact which any question asks for."""

from __future__ import annotations

from random import Random

from kvzip.synthetic.words import ADJECTIVES, NOUNS, WEEKDAYS

_SUBJECTS = tuple(
    entry.strip()
    for entry in """the old gardener, a group of children, the postman, the night train,
    a small boat, two travellers, the choir, nobody in the village, the morning fog,
    a stray dog, the baker's daughter, the river, everyone at the market, the last bus,
    a flock of birds, the caretaker, the new neighbours, a tired hiker, the wind,
    the evening light""".split(",")
)
_ACTIONS = (
    "moved slowly past the {adjective} {noun}",
    "waited for hours beside the {noun}",
    "came back from the {noun} without a word",
    "found a {adjective} {noun} and left it there",
    "always took the way around the {adjective} {noun}",
    "stopped for a moment near the {noun}",
    "could be heard as far as the {noun}",
    "had never seen such a {adjective} {noun}",
    "talked about the {adjective} {noun} all evening",
    "went home before the {noun} was closed",
    "turned left at the {adjective} {noun}",
    "remembered the {noun} from an earlier summer",
)
_TIMES = (
    "in the early hours",
    "after the rain",
    "on a {weekday} in spring",
    "long before sunset",
    "while the shops were closed",
    "as it did every year",
    "for no particular reason",
    "when the bells had stopped",
    "during the holidays",
    "with a smile",
)
_REMARKS = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
    "It was a {adjective} day, and the {noun} looked almost {other}.",
    "Nothing much happened for a while.",
    "The {noun} stood empty, the {second} did not.",
    "Some said that the {noun} was more {adjective} than {other}.",
    "There was a {noun} behind the {second}, {adjective} and {other}.",
    "By {weekday} the {noun} had been forgotten.",
)


def sentence(rng: Random) -> str:
    """Return one sentence of filler, capitalised and with its full stop."""
    words = {
        "adjective": rng.choice(ADJECTIVES),
        "other": rng.choice(ADJECTIVES),
        "noun": rng.choice(NOUNS),
        "second": rng.choice(NOUNS),
        "weekday": rng.choice(WEEKDAYS),
    }
    if rng.random() < 0.25:
        return rng.choice(_REMARKS).format_map(words)
    subject, action = rng.choice(_SUBJECTS), rng.choice(_ACTIONS).format_map(words)
    time = rng.choice(_TIMES).format_map(words)
    if rng.random() < 0.3:
        return f"{time[0].upper()}{time[1:]}, {subject} {action}."
    return f"{subject[0].upper()}{subject[1:]} {action} {time}."


def paragraph(rng: Random, sentences: int) -> str:
    """Return `sentences` sentences of filler in one line."""
    return " ".join(sentence(rng) for _ in range(sentences))
