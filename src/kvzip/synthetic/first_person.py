"""One speaker who tells about themselves: "My name is Kim living in Seoul." """

from __future__ import annotations

from kvzip.synthetic.document import ExhaustedError, Page, Passage, Question
from kvzip.synthetic.facts import COMMON_FACTS, FACTS, Fact, Voice
from kvzip.synthetic.profiles import questions_about
from kvzip.synthetic.words import CITIES, MEN, WOMEN, invented, with_article

FAMILY = "first_person"

_NAME = Fact(
    "name",
    lambda rng: invented(rng) if rng.random() < 0.2 else rng.choice(WOMEN + MEN),
    Voice((), (), ()),
    Voice(
        (
            "My name is {v}.",
            "I am {v}.",
            "Hello, I am {v}.",
            "Hi, my name is {v}.",
            "They call me {v}.",
        ),
        (
            "What is my name?",
            "What's my name?",
            "Who am I?",
            "What am I called?",
            "Tell me my name.",
        ),
        ("Is my name {v}?", "Am I {v}?", "Am I called {v}?"),
    ),
)
_CITY = next(fact for fact in COMMON_FACTS if fact.kind == "city")
_OPENINGS = (
    "This is my basic profile.",
    "Here is my profile.",
    "Let me introduce myself.",
    "A few words about me.",
    "About me:",
)
_NAME_AND_CITY = (
    "My name is {name} living in {city}.",
    "My name is {name} and I live in {city}.",
    "I am {name} from my flat in {city}.",
    "I'm {name}, and my home is in {city}.",
)


def write(page: Page, size: int) -> Passage:
    """Write up to `size` more facts about the speaker; the first passage gives the name.

    Raises:
        ExhaustedError: the document has told every kind of fact already.
    """
    rng = page.rng
    told = page.said[FAMILY]
    sentences: list[str] = []
    questions: list[Question] = []

    def note(fact: Fact, value: str) -> None:
        told.append(fact.kind)
        questions.extend(questions_about(page, fact, fact.first, value, "", FAMILY))

    if not told:
        name = _draw_name(page)
        if rng.random() < 0.35:
            sentences.append(rng.choice(_OPENINGS))
        if size > 1 and rng.random() < 0.5:
            city = _CITY.draw(rng) if rng.random() < 0.3 else rng.choice(CITIES)
            sentences.append(rng.choice(_NAME_AND_CITY).format(name=name, city=city))
            note(_CITY, city)
        else:
            sentences.append(rng.choice(_NAME.first.says).format(v=name))
        note(_NAME, name)
        size -= len(questions) // 2
    untold = [fact for fact in COMMON_FACTS if fact.kind not in told]
    if not untold or rng.random() < 0.4:
        untold = [fact for fact in FACTS if fact.kind not in told]
    if not untold and not sentences:
        raise ExhaustedError
    for fact in rng.sample(untold, min(size, 6, len(untold))):
        value = fact.draw(rng)
        sentences.append(rng.choice(fact.first.says).format(v=value, a=with_article(value)))
        note(fact, value)
    return Passage(" ".join(sentences), tuple(questions))


def _draw_name(page: Page) -> str:
    """Return a name for the speaker that nobody else in the document has."""
    return page.fresh(lambda: _NAME.draw(page.rng))
