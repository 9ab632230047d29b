"""Scores of a chunk right after it was read, when nothing is known of what comes behind it.

A chunk that is read while compressing (`streaming`) is the tail of the cache. Here is what its
scorer must do, and what all of them do alike; `repeated_chunks` scores by reconstruction,
`surrogates.predicting` by a surrogate.
"""

from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from kvzip.cache import ContextCache, Scores
from kvzip.errors import KVzipError
from kvzip.layers import Tail
from kvzip.prefill import run


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
