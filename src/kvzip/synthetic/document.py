"""Documents with questions whose answers are certain, the same on every run.

A document is built from passages of one or several families. A `Page` remembers every name that the
document has used, so a second passage can never give a name a second meaning.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random


@dataclass(frozen=True)
class Question:
    """A question about one context, and the only right answer to it."""

    text: str
    answer: str
    family: str


@dataclass(frozen=True)
class Passage:
    """A piece of a document, with questions that the piece alone answers."""

    text: str
    questions: tuple[Question, ...] = ()


@dataclass(frozen=True)
class Document:
    """A context and the questions that it answers."""

    context: str
    questions: tuple[Question, ...]


class ExhaustedError(Exception):
    """A family has no unused names left for this document."""


@dataclass
class Page:
    """The document under construction: its random numbers and what it has said so far."""

    rng: Random
    said: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    _taken: set[str] = field(default_factory=set)

    def fresh(self, draw: Callable[[], str]) -> str:
        """Return what `draw` gives, but never anything that this page has used before.

        Raises:
            ExhaustedError: forty draws in a row gave only used names.
        """
        for _ in range(40):
            name = draw()
            if self.claim(name):
                return name
        raise ExhaustedError

    def claim(self, name: str) -> bool:
        """Take a name, in whatever case it is written; say whether it was still free."""
        folded = name.lower()
        if folded in self._taken:
            return False
        self._taken.add(folded)
        return True


Generator = Callable[[Page, int], Passage]
"""Writes one passage of about `size` statements (1 or more) on a page."""
