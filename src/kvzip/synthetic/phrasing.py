"""The ways in which people type the same question."""

from __future__ import annotations

from random import Random

_OPENINGS = ("Please tell me: ", "Can you tell me: ", "Question: ", "From the text: ")


def vary(rng: Random, question: str) -> str:
    """Return the question, four times in five untouched, else as a hurried user might type it."""
    dice = rng.random()
    if dice < 0.78:
        return question
    if dice < 0.84:
        return question.rstrip("?.")
    if dice < 0.88:
        return question[0].lower() + question[1:]
    if dice < 0.92:
        return (question[0].lower() + question[1:]).rstrip("?.").replace(" I ", " i ")
    if dice < 0.96:
        return question.lower()
    return rng.choice(_OPENINGS) + question[0].lower() + question[1:]
