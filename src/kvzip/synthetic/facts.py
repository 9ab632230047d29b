"""Facts about a person, in the third and in the first person.

In the templates `{S}` is the subject (a name or a pronoun), `{P}` its possessive, `{n}` the name as
a question gives it, `{v}` the value and `{a}` the value after its article.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from kvzip.synthetic import words
from kvzip.synthetic.words import digits, invented


@dataclass(frozen=True)
class Voice:
    """How one grammatical person states a fact, asks for it and asks whether it holds."""

    says: tuple[str, ...]
    asks: tuple[str, ...]
    checks: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """A kind of fact, the values it takes, and both its voices."""

    kind: str
    draw: Callable[[Random], str]
    third: Voice
    first: Voice


def _one_of(pool: tuple[str, ...], made_up: float = 0.0) -> Callable[[Random], str]:
    """Return a function that draws from the pool, or, that often, a name made up on the spot."""

    def draw(rng: Random) -> str:
        return invented(rng) if made_up and rng.random() < made_up else rng.choice(pool)

    return draw


def _favorite(what: str, pool: tuple[str, ...]) -> Fact:
    """Return the fact that somebody likes one thing of a kind best."""
    return Fact(
        f"favorite {what}",
        _one_of(pool),
        Voice(
            (f"{{P}} favorite {what} is {{v}}.",),
            (f"What is {{n}}'s favorite {what}?", f"Which {what} does {{n}} like best?"),
            (f"Is {{n}}'s favorite {what} {{v}}?",),
        ),
        Voice(
            (f"My favorite {what} is {{v}}.", f"My favourite {what} is {{v}}."),
            (f"What is my favorite {what}?", f"Which {what} do I like best?"),
            (f"Is my favorite {what} {{v}}?",),
        ),
    )


def _relation(who: str, names: tuple[str, ...]) -> Fact:
    """Return the fact that somebody's relative, friend or colleague has a name."""
    return Fact(
        who,
        _one_of(names, made_up=0.2),
        Voice(
            (f"{{P}} {who} is called {{v}}.", f"{{P}} {who} is {{v}}."),
            (f"What is the name of {{n}}'s {who}?", f"Who is {{n}}'s {who}?"),
            (f"Is {{n}}'s {who} called {{v}}?", f"Is {{v}} {{n}}'s {who}?"),
        ),
        Voice(
            (
                f"My {who} is called {{v}}.",
                f"My {who} is {{v}}.",
                f"The name of my {who} is {{v}}.",
            ),
            (f"What is the name of my {who}?", f"Who is my {who}?", f"What is my {who} called?"),
            (f"Is my {who} called {{v}}?", f"Is {{v}} my {who}?"),
        ),
    )


_LISTED = (
    Fact(
        "city",
        _one_of(words.CITIES, made_up=0.1),
        Voice(
            ("{S} lives in {v}.", "{P} home is in {v}.", "{S} has lived in {v} for years."),
            ("Where does {n} live?", "Which city does {n} live in?", "What city does {n} live in?"),
            ("Does {n} live in {v}?", "Is {v} where {n} lives?"),
        ),
        Voice(
            (
                "I live in {v}.",
                "My home is in {v}.",
                "I am living in {v}.",
                "I have lived in {v} for years.",
            ),
            (
                "Where do I live?",
                "Which city do I live in?",
                "What city do I live in?",
                "Where am I living?",
            ),
            ("Do I live in {v}?", "Am I living in {v}?", "Is {v} where I live?"),
        ),
    ),
    Fact(
        "hometown",
        _one_of(words.CITIES, made_up=0.1),
        Voice(
            ("{S} grew up in {v}.", "{S} was born in {v}.", "{S} comes from {v}."),
            ("Where is {n} from?", "Where was {n} born?", "Where did {n} grow up?"),
            ("Is {n} from {v}?", "Was {n} born in {v}?", "Did {n} grow up in {v}?"),
        ),
        Voice(
            ("I grew up in {v}.", "I was born in {v}.", "I come from {v}."),
            ("Where am I from?", "Where was I born?", "Where did I grow up?"),
            ("Am I from {v}?", "Was I born in {v}?", "Did I grow up in {v}?"),
        ),
    ),
    Fact(
        "major",
        _one_of(words.MAJORS),
        Voice(
            ("{S} studies {v}.", "{P} major is {v}.", "{S} is majoring in {v}."),
            ("What does {n} study?", "What is {n}'s major?", "Which subject does {n} study?"),
            ("Does {n} study {v}?", "Is {n}'s major {v}?", "Is {n} majoring in {v}?"),
        ),
        Voice(
            ("I study {v}.", "My major is {v}.", "I am majoring in {v}."),
            (
                "What is my major?",
                "What do I study?",
                "Which subject do I study?",
                "What am I majoring in?",
            ),
            ("Do I study {v}?", "Is my major {v}?", "Am I majoring in {v}?"),
        ),
    ),
    Fact(
        "job",
        _one_of(words.JOBS),
        Voice(
            ("{S} works as {a}.", "{S} is {a}.", "{S} earns a living as {a}."),
            ("What is {n}'s job?", "What does {n} do for a living?", "What does {n} work as?"),
            ("Is {n} {a}?", "Does {n} work as {a}?"),
        ),
        Voice(
            ("I work as {a}.", "I am {a}.", "I earn my living as {a}."),
            ("What is my job?", "What do I do for a living?", "What do I work as?"),
            ("Am I {a}?", "Do I work as {a}?"),
        ),
    ),
    Fact(
        "employer",
        _one_of(words.COMPANIES),
        Voice(
            ("{S} is employed by {v}.", "{P} employer is {v}."),
            ("Who employs {n}?", "What is {n}'s employer?", "Which company employs {n}?"),
            ("Does {v} employ {n}?", "Is {n} employed by {v}?"),
        ),
        Voice(
            ("I am employed by {v}.", "My employer is {v}."),
            ("Who employs me?", "What is my employer?", "Which company employs me?"),
            ("Does {v} employ me?", "Am I employed by {v}?"),
        ),
    ),
    Fact(
        "age",
        lambda rng: str(rng.randint(18, 89)),
        Voice(
            ("{S} is {v} years old.", "{P} age is {v}.", "{S} has just turned {v}."),
            ("How old is {n}?", "What is {n}'s age?"),
            ("Is {n} {v} years old?", "Is {n} {v}?"),
        ),
        Voice(
            ("I am {v} years old.", "My age is {v}.", "I have just turned {v}."),
            ("How old am I?", "What is my age?"),
            ("Am I {v} years old?", "Am I {v}?"),
        ),
    ),
    Fact(
        "color",
        _one_of(words.COLORS),
        Voice(
            ("{P} favorite color is {v}.", "{S} likes the color {v} best."),
            (
                "What is {n}'s favorite color?",
                "Which color does {n} like best?",
                "What is {n}'s favourite colour?",
            ),
            ("Is {n}'s favorite color {v}?", "Does {n} like the color {v} best?"),
        ),
        Voice(
            ("My favorite color is {v}.", "I like the color {v} best."),
            (
                "What is my favorite color?",
                "Which color do I like best?",
                "What is my favourite colour?",
            ),
            ("Is my favorite color {v}?", "Do I like the color {v} best?"),
        ),
    ),
    Fact(
        "food",
        _one_of(words.FOODS),
        Voice(
            ("{P} favorite food is {v}.", "{S} loves to eat {v}."),
            (
                "What is {n}'s favorite food?",
                "What does {n} love to eat?",
                "What food does {n} like?",
            ),
            ("Is {n}'s favorite food {v}?", "Does {n} love to eat {v}?"),
        ),
        Voice(
            ("My favorite food is {v}.", "I love to eat {v}."),
            ("What is my favorite food?", "What do I love to eat?", "What food do I like?"),
            ("Is my favorite food {v}?", "Do I love to eat {v}?"),
        ),
    ),
    Fact(
        "hobby",
        _one_of(words.HOBBIES),
        Voice(
            (
                "{P} hobby is {v}.",
                "{S} enjoys {v} at the weekend.",
                "{S} spends every free hour on {v}.",
            ),
            ("What is {n}'s hobby?", "What hobby does {n} have?", "What does {n} do for fun?"),
            ("Is {n}'s hobby {v}?", "Does {n} enjoy {v}?"),
        ),
        Voice(
            ("My hobby is {v}.", "I enjoy {v} at the weekend.", "I spend every free hour on {v}."),
            ("What is my hobby?", "What hobby do I have?", "What do I do for fun?"),
            ("Is my hobby {v}?", "Do I enjoy {v}?"),
        ),
    ),
    Fact(
        "instrument",
        _one_of(words.INSTRUMENTS),
        Voice(
            ("{S} plays the {v}.", "{S} has played the {v} since childhood."),
            ("Which instrument does {n} play?", "What instrument does {n} play?"),
            ("Does {n} play the {v}?",),
        ),
        Voice(
            ("I play the {v}.", "I have played the {v} since childhood."),
            ("Which instrument do I play?", "What instrument do I play?"),
            ("Do I play the {v}?",),
        ),
    ),
    Fact(
        "language",
        _one_of(words.LANGUAGES),
        Voice(
            ("{S} speaks {v}.", "{P} first language is {v}."),
            ("Which language does {n} speak?", "What language does {n} speak?"),
            ("Does {n} speak {v}?",),
        ),
        Voice(
            ("I speak {v}.", "My first language is {v}."),
            ("Which language do I speak?", "What language do I speak?"),
            ("Do I speak {v}?",),
        ),
    ),
    Fact(
        "month",
        _one_of(words.MONTHS),
        Voice(
            ("{P} birthday is in {v}.", "{S} celebrates a birthday in {v}."),
            ("When is {n}'s birthday?", "In which month is {n}'s birthday?"),
            ("Is {n}'s birthday in {v}?",),
        ),
        Voice(
            ("My birthday is in {v}.", "I celebrate my birthday in {v}."),
            ("When is my birthday?", "In which month is my birthday?"),
            ("Is my birthday in {v}?",),
        ),
    ),
    Fact(
        "pet",
        _one_of(words.PETS),
        Voice(
            ("{S} has {a}.", "{S} keeps {a} as a pet."),
            ("What pet does {n} have?", "Which animal does {n} keep?"),
            ("Does {n} have {a}?",),
        ),
        Voice(
            ("I have {a}.", "I keep {a} as a pet."),
            ("What pet do I have?", "Which animal do I keep?"),
            ("Do I have {a}?",),
        ),
    ),
    Fact(
        "pet name",
        _one_of(words.PET_NAMES),
        Voice(
            ("{P} pet is called {v}.", "{P} pet answers to the name {v}."),
            ("What is the name of {n}'s pet?", "What is {n}'s pet called?"),
            ("Is {n}'s pet called {v}?",),
        ),
        Voice(
            ("My pet is called {v}.", "My pet answers to the name {v}."),
            ("What is the name of my pet?", "What is my pet called?"),
            ("Is my pet called {v}?",),
        ),
    ),
    Fact(
        "office",
        lambda rng: digits(rng, 3),
        Voice(
            ("{P} office is room {v}.", "{S} sits in room {v}."),
            ("What is the number of {n}'s room?", "Which room is {n}'s office?"),
            ("Is {n}'s office room {v}?",),
        ),
        Voice(
            ("My office is room {v}.", "I sit in room {v}."),
            ("What is the number of my room?", "Which room is my office?"),
            ("Is my office room {v}?",),
        ),
    ),
)

FACTS = (
    *_LISTED,
    *(_favorite(what, pool) for what, pool in words.FAVORITES.items()),
    *(_relation(who, names) for who, names in words.RELATIONS.items()),
)
"""Every kind of fact; no two of them can be asked for with the same words."""

COMMON_FACTS = _LISTED
"""The facts that a basic profile gives, which come up more often."""
