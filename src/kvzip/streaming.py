"""Compression while reading: the stages 1 to 4, chunk after chunk, in bounded memory.

A chunk is read on top of what was kept of the chunks before it, scored (`scoring.repeated_chunks`,
or by a surrogate as it is read), and compacted, before the next one is read. At no time is more
held than the kept pairs and one chunk.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import floor, inf

import torch
from torch import Tensor

from kvzip.budget import OF_TOKENS, Budget, check_ratio
from kvzip.cache import ContextCache, Scores, warn_all_below
from kvzip.errors import KVzipError
from kvzip.interrupts import uninterrupted
from kvzip.prefill import Progress, silent
from kvzip.scoring.chunks import ChunkScorer
from kvzip.selection import best_pairs, check_scores, favour_last, select, with_last

CHUNK_SIZE = 8000
"""Tokens that are read, scored and compacted at once."""

BUDGETS = ("chunk", "context")
BUDGET = "chunk"
"""Leaves alone what was kept before, and copies it once a chunk instead of twice."""


@dataclass(frozen=True)
class Streaming:
    """How to compress while reading.

    Attributes:
        amount: how much of the context's pairs to keep, as a ratio or a threshold.
        chunk_size: tokens that are read, scored and compacted at once.
        budget: for a ratio, `"chunk"`: every chunk keeps its share; `"context"`: the best pairs of
            all chunks so far are kept, so that earlier chunks are pruned again as later ones
            arrive. A threshold keeps what reaches it of any chunk.
    """

    amount: Budget
    chunk_size: int = CHUNK_SIZE
    budget: str = BUDGET

    def __post_init__(self) -> None:
        self.amount.refuse_all_but(OF_TOKENS, "streaming")
        if self.chunk_size < 1:
            raise KVzipError(f"chunk_size is {self.chunk_size}: it must be 1 or more")
        if self.budget not in BUDGETS:
            raise KVzipError(f"unknown budget {self.budget!r}: choose one of {', '.join(BUDGETS)}")


def chunks_of(pieces: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Token ids `[t]` of any lengths as chunks of `size`, the last one shorter."""
    held = torch.empty(0, dtype=torch.long)
    for piece in pieces:
        *whole, held = torch.cat([held, piece]).split(size)
        yield from whole
        if len(held) == size:
            yield held
            held = held[:0]
    if len(held):
        yield held


@torch.no_grad()
def extend(
    kv: ContextCache,
    pieces: Iterable[Tensor],
    scorer: ChunkScorer,
    how: Streaming,
    *,
    total: int | None,
    max_positions: int,
    progress: Progress = silent,
) -> None:
    """Read further into a context, and compress while reading.

    If anything goes wrong, or the reading is interrupted, the cache holds the last whole chunk;
    unless memory runs out while layers are compacted, which leaves a cache of no use.

    Args:
        kv: the cache, without a conversation; it grows.
        pieces: token ids `[t]` of any lengths.
        scorer: reads and scores chunks, with the model that made the cache.
        how: how much to keep, and sizes.
        total: tokens of all pieces, None if that is not known.
        max_positions: positions that the model was made for.
        progress: called with `("stream", done, total)` after each chunk, the total being what is
            done where it is not known.

    Raises:
        KVzipError: if there is nothing to read, positions run out, or the cache holds a
            conversation, has no scores or retains evicted pairs.

    Warns:
        KVzipWarning: if no score reaches the threshold.
    """
    if kv.seen_tokens > len(kv.document.token_ids) or len(kv.history):
        raise KVzipError("the cache holds a conversation: forget it first with kv.reset()")
    if kv.retained:
        raise KVzipError("streaming frees what it evicts: use kv_type='evict'")
    if kv.scores is None and kv.document.context_length:
        raise kv.unscored("extend")
    if total is not None:
        scorer.check(kv, total, min(total, how.chunk_size), max_positions)
    done, largest = 0, -inf
    for chunk in chunks_of(pieces, how.chunk_size):
        try:
            scorer.check(kv, len(chunk), len(chunk), max_positions)
            scores = scorer.read(kv, chunk)
            with uninterrupted():
                _compact(kv, chunk, scores, how)
        except BaseException:
            kv.reset()
            raise
        best = kv.division.gather(scores.values.amax(-1)).max()
        done, largest = done + len(chunk), max(largest, float(best))
        progress("stream", done, total or done)
    if not done:
        raise KVzipError("the context is empty: give some text to read")
    if how.amount.threshold is not None and largest < how.amount.threshold:
        first = max(0, kv.document.context_length - scores.window)
        if first and not kv.division.gather(kv.kept[..., :first].any(-1)).any():
            warn_all_below(how.amount, largest, scores.window)


def _compact(kv: ContextCache, chunk: Tensor, scores: Scores, how: Streaming) -> None:
    """Make the tail a part of the context, and keep what is to be kept of both."""
    check_scores(scores.values)
    before = kv.document.context_length
    if how.amount.ratio is not None and how.budget == "chunk":
        new = kv.division.gather(scores.values)
        share = check_ratio(how.amount.ratio)
        quota = _target(share, new, before + len(chunk)) - _target(share, new, before)
        new = favour_last(new, scores.window, share * len(chunk))
        kv.absorb(chunk, scores, kv.division.own(best_pairs(new, quota)))
        kv.ratio = how.amount.ratio
        return
    everything = kv.division.gather(_with_earlier(kv, scores.values))
    if how.amount.ratio is not None:
        share = check_ratio(how.amount.ratio)
        target = _target(share, everything, before + len(chunk))
        held = (everything[..., :before] > -torch.inf).sum() + everything[..., before:].numel()
        favoured = favour_last(everything, scores.window, share * (before + len(chunk)))
        kept = best_pairs(favoured, min(target, int(held)))
        kv.ratio = how.amount.ratio
    else:
        kept = with_last(select(everything, how.amount), everything, scores.window)
        kv.ratio = int(kept.sum()) / kept.numel()
    _keep(kv, chunk, scores, kv.division.own(kept))


def _target(share: Fraction, scores: Tensor, tokens: int) -> int:
    """Pairs to keep of so many tokens in all heads that are scored, `[L, H, ...]`."""
    layers, heads = scores.shape[:2]
    return floor(share * layers * heads * tokens)


def _with_earlier(kv: ContextCache, new: Tensor) -> Tensor:
    """Scores of the context and a chunk, `[L, H, n + t]`, `-inf` where a pair is gone."""
    if kv.scores is None:
        return new
    held = kv.held.to(new.device)
    earlier = kv.scores.values.to(new.device).masked_fill(~held, -torch.inf)
    return torch.cat([earlier, new], dim=-1)


def _keep(kv: ContextCache, chunk: Tensor, scores: Scores, kept: Tensor) -> None:
    """Keep the pairs at `kept`, `[L, H, n + t]`, of the context and of the tail."""
    before = kv.document.context_length
    kv.keep(kept[..., :before])
    kv.absorb(chunk, scores, kept[..., before:])
