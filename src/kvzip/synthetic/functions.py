"""Small Python functions, and questions that ask for their parts word by word."""

from __future__ import annotations

from random import Random

from kvzip.synthetic.document import Page, Passage, Question
from kvzip.synthetic.phrasing import vary
from kvzip.synthetic.words import NOUNS, pair

FAMILY = "functions"

_VERBS = tuple(
    """add apply build check clean collect count cut draw fetch fill find fix grow join keep
    lift load make mark measure merge mix move pack paint pick plan pull push rank read scale
    send shift sort split store sum swap take test trim turn weigh wrap""".split()
)
_PARAMETERS = "a b c d i j k m n p q t u v w x y z".split()
_LOCALS = tuple("total result count limit offset score value step rest level".split())
_RETURN_ASKS = (
    "What does the function {name} return?",
    "What does {name} return?",
    "Which expression does {name} return?",
)
_PARAMETER_ASKS = (
    "What are the parameters of {name}?",
    "Which parameters does the function {name} take?",
)
_DOCSTRING_ASKS = ("What is the docstring of {name}?", "What does the docstring of {name} say?")
_SOURCE_ASKS = (
    "Repeat the function {name}.",
    "Write out the source of {name}.",
    "Show the code of the function {name}.",
)


def write(page: Page, size: int) -> Passage:
    """Write up to four functions, by `size`."""
    written = [_function(page) for _ in range(1 + min(3, size // 4))]
    text = "\n\n".join(passage.text for passage in written)
    return Passage(text, tuple(question for passage in written for question in passage.questions))


def _function(page: Page) -> Passage:
    """Write one function with a new name, up to two assignments and a returned expression."""
    rng = page.rng
    verb = rng.choice(_VERBS)
    name = page.fresh(lambda: verb + _ending(rng))
    names = rng.sample(_PARAMETERS, rng.randint(1, 3))
    parameters = ", ".join(names)
    lines = [f"def {name}({parameters}):"]
    questions: list[tuple[tuple[str, ...], str]] = [(_PARAMETER_ASKS, parameters)]
    if rng.random() < 0.4:
        docstring = f"{verb.capitalize()} the {pair(rng, ' ')}."
        lines.append(f'    """{docstring}"""')
        questions.append((_DOCSTRING_ASKS, docstring))
    for local in rng.sample(_LOCALS, rng.randrange(3)):
        lines.append(f"    {local} = {_expression(rng, names)}")
        names = [*names, local]
    returned = _expression(rng, names)
    lines.append(f"    return {returned}")
    source = "\n".join(lines)
    questions += [(_RETURN_ASKS, returned), (_RETURN_ASKS, returned), (_SOURCE_ASKS, source)]
    return Passage(
        source,
        tuple(
            Question(vary(rng, text.format(name=name)), answer, FAMILY)
            for text, answer in ((rng.choice(asks), answer) for asks, answer in questions)
        ),
    )


def _ending(rng: Random) -> str:
    """Return what follows the verb of a function's name: often a noun, seldom nothing."""
    return rng.choice(("", f"_{rng.choice(NOUNS)}", f"_{rng.choice(NOUNS)}", f"_{pair(rng, '_')}"))


def _expression(rng: Random, names: list[str]) -> str:
    """Return arithmetic over the newest name, a number, and at times an older name."""
    first, last = rng.choice(names), names[-1]
    number, other = rng.randint(2, 99), rng.randint(2, 99)
    return rng.choice(
        (
            f"{first} * {number} + {last}",
            f"{last} - {number}",
            f"{number} * {last}",
            f"({first} + {number}) * {last}",
            f"max({first}, {number}) - {last}",
            f"{last} // {number} + {other}",
            f"min({last}, {number})",
            f"{first} + {last} + {number}",
            f"{first} + {last}",
        )
    )
