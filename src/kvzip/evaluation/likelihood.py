"""How probable the full cache's answers are under another cache: teacher forcing, nothing drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvzip.cache import ContextCache
from kvzip.errors import KVzipError

LOGITS_AT_ONCE = 1 << 28
"""Logits of one forward pass at most, 1 GiB in float32, unless a single answer has more."""


@dataclass(frozen=True)
class Likelihood:
    """An answer that was given with one cache, read token by token with another.

    Logits are the model's own, before any processor of its generation settings.

    Attributes:
        tokens: of the answer, the end token included.
        log_probability: natural logarithm of a token's probability, mean over the tokens.
        margin: by how much a token's log-probability is above that of the best other token, mean
            over the tokens.
        smallest_margin: the least of these; negative if another token is more probable anywhere.
        flipped: tokens in whose place greedy decoding would take another.
    """

    tokens: int
    log_probability: float
    margin: float
    smallest_margin: float
    flipped: int


@torch.no_grad()
def likelihoods(
    model: PreTrainedModel,
    kv: ContextCache,
    queries: Sequence[Tensor],
    answers: Sequence[Tensor],
) -> list[Likelihood]:
    """Compare answers with what a model expects that sees a context through `kv`.

    Args:
        model: the model that made the cache.
        kv: a cache without a tail; it is not changed.
        queries: `[t_b]`, int64: the questions, as they stand behind the context.
        answers: `[a_b]`, int64, a_b > 0: their answers.

    Raises:
        KVzipError: if the cache has a tail.
    """
    if kv.tail_length:
        raise KVzipError(
            f"answers are read right behind the context: forget the {kv.tail_length} tokens there "
            "with kv.reset()"
        )
    found: list[Likelihood] = []
    vocabulary = model.get_input_embeddings().num_embeddings
    # layers of linear attention have their state for a single row
    positions = 1 if kv.stateful else LOGITS_AT_ONCE // vocabulary
    for rows in _batches(queries, answers, positions):
        found += _read(model, kv, rows)
    return found


def _batches(
    queries: Sequence[Tensor], answers: Sequence[Tensor], positions: int
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Pairs of question and answer, as many at once as have `positions` logit positions."""
    rows: list[tuple[Tensor, Tensor]] = []
    for query, answer in zip(queries, answers, strict=True):
        grown = [*rows, (query, answer)]
        if rows and len(grown) * _columns(grown) > positions:
            yield rows
            grown = [(query, answer)]
        rows = grown
    if rows:
        yield rows


def _columns(rows: Sequence[tuple[Tensor, Tensor]]) -> int:
    """Columns from the first that any answer is read from to the last."""
    first = min(len(query) for query, _ in rows)
    return max(len(query) + len(answer) for query, answer in rows) - first


def _read(
    model: PreTrainedModel, kv: ContextCache, rows: Sequence[tuple[Tensor, Tensor]]
) -> list[Likelihood]:
    """Read rows in one forward pass, padded on the right, where attention never looks."""
    length = max(len(query) + len(answer) for query, answer in rows) - 1
    ids = torch.zeros((len(rows), length), dtype=torch.long)
    for row, (query, answer) in zip(ids, rows, strict=True):
        row[: len(query) + len(answer) - 1] = torch.cat([query, answer[:-1]])
    positions = kv.seen_tokens + torch.arange(length)
    columns = _columns(rows)
    logits = model(
        input_ids=ids.to(model.device),
        position_ids=positions.expand(len(rows), -1).to(model.device),
        past_key_values=kv.fork(),
        use_cache=True,
        logits_to_keep=columns,
    ).logits
    first = length - columns
    starts = (len(query) - 1 - first for query, _ in rows)
    return [
        _judge(own[start : start + len(answer)], answer)
        for own, start, (_, answer) in zip(logits, starts, rows, strict=True)
    ]


def _judge(logits: Tensor, answer: Tensor) -> Likelihood:
    """Logits `[a, V]` in whose places the answer `[a]` stands."""
    chosen = answer.to(logits.device)[:, None]
    log_probabilities = logits.float().log_softmax(-1)
    own = log_probabilities.gather(1, chosen)[:, 0]
    flipped = log_probabilities.argmax(-1) != chosen[:, 0]
    others = log_probabilities.scatter(1, chosen, -torch.inf).amax(-1)
    margins = own - others
    return Likelihood(
        tokens=len(answer),
        log_probability=own.mean().item(),
        margin=margins.mean().item(),
        smallest_margin=margins.min().item(),
        flipped=int(flipped.sum()),
    )
