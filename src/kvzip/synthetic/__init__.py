"""Generated documents with questions whose answers are certain.

They train the bundled model, test it, and make the demo. Only the standard library is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Literal

from kvzip.synthetic import (
    chains,
    first_person,
    functions,
    key_values,
    many_shot,
    needles,
    prefix_suffix,
    profiles,
    sums,
)
from kvzip.synthetic.document import (
    Document,
    ExhaustedError,
    Generator,
    Page,
    Passage,
    Question,
)
from kvzip.synthetic.prose import paragraph

__all__ = ["FAMILIES", "Document", "Question", "Split", "make_document"]

FAMILIES: dict[str, Generator] = {
    "profiles": profiles.write,
    "first_person": first_person.write,
    "key_values": key_values.write,
    "needles": needles.write,
    "functions": functions.write,
    "chains": chains.write,
    "sums": sums.write,
    "many_shot": many_shot.write,
    "prefix_suffix": prefix_suffix.write,
}
"""Every family of passages, by name."""

Split = Literal["train", "eval"]


def make_document(
    families: Sequence[str],
    *,
    seed: int | str,
    tokens: int,
    count_tokens: Callable[[str], int],
    split: Split = "train",
) -> Document:
    """Write a document of about `tokens` tokens, never more, that mixes passages of some families.

    The split is part of the seed, so no document of one split can come up in the other: training
    draws from `train` only, whatever its seeds. When the families run out of unused names, plain
    prose fills the rest.

    Args:
        families: names in `FAMILIES`; a name given twice comes up twice as often.
        seed: the same seed, split, families and tokens give the same document.
        tokens: the most that `count_tokens` may say of the context.
        count_tokens: the length of a text in tokens.
        split: `train` or `eval`.

    Raises:
        ValueError: an unknown family or split, or no passage fits.
    """
    if unknown := sorted(set(families) - set(FAMILIES)):
        raise ValueError(f"unknown families {unknown}; known are {sorted(FAMILIES)}")
    if split not in ("train", "eval"):
        raise ValueError(f"split is 'train' or 'eval', not {split!r}")
    rng = Random(f"{split}:{seed}")
    page = Page(rng)
    joint = "\n" if rng.random() < 0.15 else "\n\n"
    passages = _fill(page, list(families), tokens, lambda text: count_tokens(text + joint))
    while passages and count_tokens(joint.join(passage.text for passage in passages)) > tokens:
        passages.pop()
    questions = tuple(question for passage in passages for question in passage.questions)
    if not questions:
        raise ValueError(f"no passage of {sorted(set(families))} fits into {tokens} tokens")
    return Document(joint.join(passage.text for passage in passages), questions)


def _fill(
    page: Page, families: list[str], tokens: int, count_tokens: Callable[[str], int]
) -> list[Passage]:
    """Write passages until six in a row are too long; prose once no family has names left."""
    rng = page.rng
    passages: list[Passage] = []
    room, misses = tokens, 0
    while misses < 6 and room > 0:
        size = 1 if misses > 1 else rng.randint(1, min(12, 1 + room // 16))
        if families:
            family = rng.choice(families)
            try:
                passage = FAMILIES[family](page, size)
            except ExhaustedError:
                families = [name for name in families if name != family]
                continue
        else:
            passage = Passage(paragraph(rng, size))
        if (cost := count_tokens(passage.text)) > room:
            misses += 1
            continue
        if passage.questions:
            passages.append(passage)
        else:
            passages.insert(rng.randrange(len(passages) + 1), passage)
        room -= cost
        misses = 0
    return passages
