"""Scores of a chunk by reconstruction, right after it was read.

The chunk is the tail of the cache (see `chunks`). It is repeated in parts, by passes with reach
`"chunk"` (`reconstruction`): each sees the prefix, its part and itself.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvzip.cache import ContextCache, Scores
from kvzip.errors import KVzipError
from kvzip.layers import AnsweringLayer, Layer, SlidingLayer
from kvzip.pairs import Pairs, QuantizedPairs
from kvzip.prompts import Prompts
from kvzip.scoring.chunks import check_positions, read_into_tail
from kvzip.scoring.reconstruction import (
    PassingLayer,
    RepeatingLayer,
    Stretch,
    repeat,
    scorer_name,
)
from kvzip.states import StateLayer


@dataclass(frozen=True)
class RepeatedChunks:
    """Scores chunks by reconstruction (see `scoring.chunks.ChunkScorer`).

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
