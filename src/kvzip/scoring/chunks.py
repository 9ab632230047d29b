"""Scores of a chunk right after it was read, when nothing is known of what comes behind it.

A chunk that is read while compressing (`streaming`) is the tail of the cache. By reconstruction, it
is then repeated in parts, by passes with reach `"chunk"` (`scoring.reconstruction`).
"""

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvzip.cache import ContextCache, Scores
from kvzip.errors import KVzipError
from kvzip.layers import AnsweringLayer, Layer, SlidingLayer, Tail
from kvzip.pairs import Pairs, QuantizedPairs
from kvzip.prefill import run
from kvzip.prompts import Prompts
from kvzip.scoring.reconstruction import (
    PassingLayer,
    RepeatingLayer,
    Stretch,
    repeat,
    scorer_name,
)
from kvzip.states import StateLayer


class ChunkScorer(Protocol):
    """Reads chunks and scores each before the next one is read."""

    def check(self, kv: ContextCache, tokens: int, longest: int, max_positions: int) -> None:
        """Raise KVzipError unless positions are left to read and score what comes.

        Args:
            kv: the cache that chunks are read into.
            tokens: of all chunks that are known to come.
            longest: tokens of the longest of them.
            max_positions: positions that the model was made for.
        """
        ...

    def read(self, kv: ContextCache, chunk: Tensor) -> Scores:
        """Read a chunk into the empty tail of a cache.

        Args:
            kv: the cache.
            chunk: `[t]`, int64, on the CPU.

        Returns:
            The chunk's scores, `[L, H, t]`.
        """
        ...


@dataclass(frozen=True)
class RepeatedChunks:
    """Scores chunks by reconstruction.

    Attributes:
        model: the model.
        prompts: its prompts.
        score_chunk: tokens that one forward pass repeats.
    """

    model: PreTrainedModel
    prompts: Prompts
    score_chunk: int

    def __post_init__(self) -> None:
        if self.score_chunk < 1:
            raise KVzipError(f"score_chunk is {self.score_chunk}: it must be 1 or more")

    def check(self, kv: ContextCache, tokens: int, longest: int, max_positions: int) -> None:
        """Raise KVzipError unless the tokens, and a repeat of some, fit behind the context."""
        ids = kv.document.token_ids
        repeated = min(longest, self.score_chunk)
        request = len(self.prompts.repeat_ids(ids, ids[:0]))
        what = f"{tokens} more tokens and a repeat of {repeated}"
        check_positions(kv, tokens + request + repeated, what, max_positions)

    def read(self, kv: ContextCache, chunk: Tensor) -> Scores:
        """Read a chunk and repeat it."""
        read_into_tail(self.model, kv, chunk)
        context = kv.document.token_ids[kv.document.prefix_length :]
        before = context[-self.score_chunk :] if len(context) else None
        scores, start = [], 0
        for part in chunk.split(self.score_chunk):
            columns = slice(start, start + len(part))
            layers = [_repeating(layer, kv.document.prefix_length, columns) for layer in kv.layers]
            scores.append(repeat(self.model, self.prompts.repeat_ids(before, part), layers))
            start, before = start + len(part), part
        return Scores(torch.cat(scores, dim=-1).float(), scorer_name("chunk"))


def read_into_tail(model: PreTrainedModel, kv: ContextCache, chunk: Tensor) -> None:
    """Read tokens `[t]`, int64, into the empty tail of a cache that has room for no more."""
    for layer in kv.attending:
        layer.tail = Tail(room=len(chunk))
    run(model, chunk, kv)


def check_positions(kv: ContextCache, more: int, what: str, max_positions: int) -> None:
    """Raise KVzipError unless so many positions are left behind the context.

    Args:
        kv: the cache.
        more: positions that are needed.
        what: what they are needed for, in words.
        max_positions: positions that the model was made for.
    """
    taken = len(kv.document.token_ids)
    missing = taken + more - max_positions
    if missing > 0:
        raise KVzipError(
            f"the context takes {taken} of the model's {max_positions} positions, {what} do not "
            f"fit: leave out {missing} tokens"
        )


def _repeating(
    layer: AnsweringLayer | StateLayer, prefix_length: int, part: slice
) -> Layer | StateLayer:
    """A throw-away layer that repeats a part of the tail, and sees no more than that."""
    if isinstance(layer, StateLayer):
        return layer.branch()
    if isinstance(layer, SlidingLayer):
        return PassingLayer(layer)
    keys, values = layer.tail.view()
    chunk = Stretch(keys[0], values[0]).cut(part)
    prefix = partial(_prefix, layer.context, prefix_length, keys.dtype)
    return RepeatingLayer(layer.get_seq_length(), prefix, chunk, None, layer.operations)


def _prefix(context: Pairs | QuantizedPairs, prefix_length: int, dtype: torch.dtype) -> Stretch:
    """The first rows of every head."""
    return Stretch(*context.first(prefix_length, dtype))
