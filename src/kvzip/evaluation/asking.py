"""What is done with one sample: check that it fits, score its context, ask, compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

from torch import Tensor

from kvzip import decoding
from kvzip.cache import ContextCache
from kvzip.errors import KVzipError
from kvzip.evaluation.likelihood import Likelihood, likelihoods
from kvzip.evaluation.samples import CountTokens, Question, Sample
from kvzip.model import ModelKVzip
from kvzip.prefill import Progress, silent
from kvzip.scoring.reconstruction import SHORTEST_CHUNK

QUESTIONS_AT_ONCE = 32
"""Rows of a batch at most."""


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        text: without special tokens.
        tokens: `[t]`, int64, on the CPU, the end token included.
        seconds: its share of the time that its batch took.
    """

    text: str
    tokens: Tensor
    seconds: float


class UnfitError(Exception):
    """A sample does not fit into the model's positions; the message says why."""


def token_counter(model: ModelKVzip) -> CountTokens:
    """Count tokens as contexts are tokenized."""
    encode = model.tokenizer.encode

    def count_tokens(text: str) -> int:
        return len(encode(text, add_special_tokens=False, split_special_tokens=True))

    return count_tokens


def check_fit(model: ModelKVzip, sample: Sample) -> None:
    """Raise UnfitError unless the positions are enough for context, question and answer."""
    positions = model.geometry.max_positions
    context = len(model.prompts.prefix_ids()) + len(model.prompts.context_ids(sample.context))
    behind = max(
        len(model.apply_template(question.text)) + question.max_new_tokens
        for question in sample.questions
    )
    if context + behind > positions:
        raise UnfitError(
            f"the context takes {context} positions with its prefix, a question with its answer "
            f"up to {behind}, the model has {positions}"
        )


def score_context(
    model: ModelKVzip, kv: ContextCache, scorer: str, *, progress: Progress = silent
) -> ContextCache:
    """Score a full cache by the scorer of a name.

    Raises:
        UnfitError: if the model has too few positions left to repeat the context in.
        KVzipError: if it cannot be scored for another reason.
    """
    try:
        return model.score(kv, scorer=scorer, progress=progress)
    except KVzipError as error:
        context = kv.document.token_ids[kv.document.prefix_length :]
        request = model.prompts.repeat_ids(context, context[:0])
        room = model.geometry.max_positions - kv.seen_tokens - len(request)
        if room >= min(len(context), SHORTEST_CHUNK):
            raise
        raise UnfitError(str(error)) from error


def packed_bytes(kv: ContextCache) -> int:
    """Bytes of what answers read of a context, without those of retained pairs."""
    parts = (layer.context.tensors().values() for layer in kv.layers)
    return sum(tensor.nbytes for tensors in parts for tensor in tensors)


def ask(model: ModelKVzip, kv: ContextCache, questions: Sequence[Question]) -> list[Answer]:
    """Answer greedily, in batches of questions whose answers may be equally long.

    This is `model.ask`, which keeps the answers' tokens to itself.
    """
    answers: dict[int, Answer] = {}
    for limit, rows in _batches(questions):
        start = perf_counter()
        batch = decoding.generate_batch(
            model.decoder,
            model.tokenizer,
            kv,
            [model.apply_template(questions[row].text) for row in rows],
            max_positions=model.geometry.max_positions,
            max_new_tokens=limit,
        )
        seconds = (perf_counter() - start) / len(rows)
        for row, tokens in zip(rows, batch, strict=True):
            answers[row] = Answer(model.prompts.decode(tokens), tokens, seconds)
    return [answers[row] for row in range(len(questions))]


def _batches(questions: Sequence[Question]) -> Iterator[tuple[int, list[int]]]:
    """Numbers of questions that are asked at once, and where their answers are cut off."""
    by_limit: dict[int, list[int]] = {}
    for row, question in enumerate(questions):
        by_limit.setdefault(question.max_new_tokens, []).append(row)
    for limit, rows in by_limit.items():
        for first in range(0, len(rows), QUESTIONS_AT_ONCE):
            yield limit, rows[first : first + QUESTIONS_AT_ONCE]


def compare(
    model: ModelKVzip, kv: ContextCache, questions: Sequence[Question], answers: Sequence[Answer]
) -> list[Likelihood]:
    """Likelihoods under `kv` of answers that were given with another cache."""
    queries = [model.apply_template(question.text) for question in questions]
    return likelihoods(model.hf_model, kv, queries, [answer.tokens for answer in answers])
