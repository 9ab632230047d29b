"""Long strings that are asked for by how they begin and how they end."""

from __future__ import annotations

from kvzip.synthetic.document import Page, Passage, Question
from kvzip.synthetic.phrasing import vary
from kvzip.synthetic.words import NOUNS, pair

FAMILY = "prefix_suffix"

_ASKS = (
    "Which string begins with {prefix} and ends with {suffix}?",
    "Find the string that starts with {prefix} and ends with {suffix}.",
    "Give the whole string with the prefix {prefix} and the suffix {suffix}.",
)


def write(page: Page, size: int) -> Passage:
    """Write `size` strings of four to seven words; the first two are unique in the document."""
    rng = page.rng
    joint = rng.choice("-/_.")
    bullet = rng.choice(("", "", "- "))
    lines: list[str] = []
    questions: list[Question] = []
    for _ in range(size):
        prefix = page.fresh(lambda: pair(rng)).replace("-", joint)
        words = [prefix, *rng.sample(NOUNS, rng.randint(2, 5))]
        string = joint.join(words)
        lines.append(bullet + string)
        asked = rng.choice(_ASKS).format(prefix=prefix, suffix=words[-1])
        questions.append(Question(vary(rng, asked), string, FAMILY))
    return Passage("\n".join(lines), tuple(questions))
