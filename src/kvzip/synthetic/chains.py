"""Variables that take their value from other variables, a few hops long.

The answer spells the path, so that every step is one look-up: for `let a = 17` and `let b = a` the
value of `b` is "b = a = 17".
"""

from __future__ import annotations

from functools import partial
from random import Random

from kvzip.synthetic.document import Page, Passage, Question
from kvzip.synthetic.phrasing import vary
from kvzip.synthetic.prose import sentence
from kvzip.synthetic.words import NOUNS, digits

FAMILY = "chains"

_KEYWORDS = ("let", "VAR", "set", "let")
_ASKS = (
    "What is the value of the variable {name}?",
    "What is the value of {name}?",
    "Follow the variable {name} to its value.",
    "Which value does the variable {name} have in the end?",
    "Resolve {name}.",
)


def write(page: Page, size: int) -> Passage:
    """Write one to three chains of one to four hops, mixed with each other and some prose."""
    rng = page.rng
    keyword = rng.choice(_KEYWORDS)
    chains: list[list[str]] = []
    for _ in range(rng.randint(1, 1 + min(2, size // 3))):
        hops = rng.randint(1, min(4, 1 + size // 2))
        draw = _short_name if rng.random() < 0.2 else _noun
        names = [page.fresh(partial(draw, rng)) for _ in range(hops)]
        chains.append([digits(rng, rng.randint(1, 4)), *names])

    lines: list[str] = []
    questions: list[Question] = []
    progress = [0] * len(chains)
    while any(step + 1 < len(chain) for step, chain in zip(progress, chains, strict=True)):
        index = rng.randrange(len(chains))
        step, chain = progress[index], chains[index]
        if step + 1 == len(chain):
            continue
        lines.append(f"{keyword} {chain[step + 1]} = {chain[step]}")
        progress[index] = step + 1
        path = " = ".join(reversed(chain[: step + 2]))
        asked = rng.choice(_ASKS).format(name=chain[step + 1])
        questions.append(Question(vary(rng, asked), path, FAMILY))
        if rng.random() < 0.1:
            lines.append(sentence(rng))
    return Passage("\n".join(lines), tuple(questions))


def _noun(rng: Random) -> str:
    return rng.choice(NOUNS)


def _short_name(rng: Random) -> str:
    """Return a letter, or a letter and a digit."""
    return f"{rng.choice('abcdefghjkmnpqrstuvwxyz')}{rng.choice(('', *'0123456789'))}"
