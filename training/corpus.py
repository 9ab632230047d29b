"""Turn generated documents into token sequences with a loss weight for every token.

Every segment is tokenised on its own, in the form in which the library asks:

    prefix | context | "\\n\\n" question | suffix | answer <|im_end|>
    prefix | context | "\\n\\n" repeat request | suffix | a chunk of the context
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from kvzip.synthetic import FAMILIES, Document, make_document
from kvzip.synthetic.document import Question

PREFIX = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "Given the context, answer to the following question or request without explanation.\n\n"
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
NEXT_TURN = "\n<|im_start|>user\n"
FIRST_QUESTION = "\n\n"
REPEAT_FIRST = "\n\nRepeat the previous context exactly."
REPEAT_NEXT = "\n\nRepeat the part of the previous context exactly, starting with "
OVERLAP = 8

PROMPT_WEIGHT, REPEAT_WEIGHT, ANSWER_WEIGHT = 0.03, 0.25, 1.0
LONGEST_CHUNK = 2000
MOST_QUESTIONS = 60

# The families that need more than one look-up are learnt last, so they come up more often.
MIXTURE = {
    "profiles": 2,
    "first_person": 2,
    "key_values": 1,
    "needles": 1,
    "functions": 1,
    "chains": 2,
    "sums": 3,
    "many_shot": 2,
    "prefix_suffix": 2,
}


@dataclass(frozen=True)
class Sample:
    """Token ids `[n]`, uint16, and the loss weight `[n]`, float32, of predicting each of them."""

    ids: NDArray[np.uint16]
    weights: NDArray[np.float32]


class Encoder:
    """The tokenizer, with the fixed pieces of the chat form encoded once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.end = tokenizer.token_to_id("<|im_end|>")
        self.pad = tokenizer.token_to_id("<|endoftext|>")
        self.vocabulary = tokenizer.get_vocab_size()
        self.prefix = self.encode(PREFIX)
        self.suffix = self.encode(SUFFIX)
        self.next_turn = self.encode(NEXT_TURN)
        self.repeat_first = self.encode(REPEAT_FIRST)
        self.repeat_next = self.encode(REPEAT_NEXT)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of one segment."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of several segments, each tokenised on its own."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some tokens, special ones included."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def count(self, text: str) -> int:
        """Return the length of a text in tokens."""
        return len(self.encode(text))


def samples(encoder: Encoder, rng: Random, longest: int) -> Iterator[Sample]:
    """Yield training sequences without end, over contexts of 20 to `longest` tokens."""
    while True:
        if rng.random() < 0.04:
            length = rng.randint(30, max(60, longest // 2))
            noise = [rng.randrange(3, encoder.vocabulary) for _ in range(length)]
            yield repeated(encoder, rng, noise)
            continue
        document = _document(encoder, rng, longest)
        context = encoder.encode(document.context)
        if rng.random() < 0.9:
            yield asked(encoder, rng, context, document.questions)
        if rng.random() < 0.4:
            yield repeated(encoder, rng, context)


def asked(
    encoder: Encoder, rng: Random, context: list[int], questions: Sequence[Question]
) -> Sample:
    """Return a context with some of its questions.

    All are asked as if each were the first, or as the turns of one conversation.
    """
    questions = rng.sample(questions, min(len(questions), rng.randint(8, MOST_QUESTIONS)))
    as_turns = rng.random() < 0.35
    queries = encoder.encode_all(
        [
            question.text if as_turns and turn else FIRST_QUESTION + question.text
            for turn, question in enumerate(questions)
        ]
    )
    answers = encoder.encode_all([question.answer for question in questions])
    segments = [(encoder.prefix + context, PROMPT_WEIGHT)]
    for turn, (query, answer) in enumerate(zip(queries, answers, strict=True)):
        opening = encoder.next_turn if as_turns and turn else []
        segments.append((opening + query + encoder.suffix, 0.0))
        segments.append(([*answer, encoder.end], ANSWER_WEIGHT))
    return _joined(segments)


def repeated(encoder: Encoder, rng: Random, context: list[int]) -> Sample:
    """Return a context with requests to say chunks of it again, as importance scoring asks.

    The chunk length is random, of 64 to 2,000 tokens; short chunks are asked for several at a time.
    """
    most = min(len(context), LONGEST_CHUNK)
    chunk = (
        most
        if rng.random() < 0.3
        else int(math.exp(rng.uniform(math.log(min(64, most)), math.log(most))))
    )
    starts = list(range(0, len(context), chunk))
    rng.shuffle(starts)
    segments = [(encoder.prefix + context, PROMPT_WEIGHT)]
    for start in starts[: max(1, LONGEST_CHUNK // (chunk + 24))]:
        segments.append((repeat_request(encoder, context, start), 0.0))
        said = context[start : start + chunk]
        ended = start + chunk >= len(context)
        segments.append((said + [encoder.end] * ended, REPEAT_WEIGHT))
    return _joined(segments)


def repeat_request(encoder: Encoder, context: list[int], start: int) -> list[int]:
    """Return the tokens that ask for the chunk of the context which begins at `start`."""
    if start == 0:
        return encoder.repeat_first + encoder.suffix
    return encoder.repeat_next + context[max(0, start - OVERLAP) : start] + encoder.suffix


def _document(encoder: Encoder, rng: Random, longest: int) -> Document:
    """Return a document of one, a few or all families, short ones often."""
    names, weights = list(MIXTURE), list(MIXTURE.values())
    dice = rng.random()
    if dice < 0.4:
        families = rng.choices(names, weights)
    elif dice < 0.7:
        families = rng.choices(names, weights, k=rng.randint(2, 4))
    else:
        families = list(FAMILIES)
    tokens = rng.randint(20, 120) if rng.random() < 0.2 else rng.randint(60, longest)
    while True:
        try:
            return make_document(
                families, seed=rng.getrandbits(64), tokens=tokens, count_tokens=encoder.count
            )
        except ValueError:  # too short for any passage of these families
            tokens += 20


def _joined(segments: Sequence[tuple[list[int], float]]) -> Sample:
    lengths = [len(ids) for ids, _ in segments]
    return Sample(
        np.concatenate([np.asarray(ids, dtype=np.uint16) for ids, _ in segments]),
        np.repeat(np.asarray([weight for _, weight in segments], dtype=np.float32), lengths),
    )
