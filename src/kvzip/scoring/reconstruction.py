"""Scores from reconstruction: how much attention a pair gets while the model repeats its context.

Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", NeurIPS 2025,
arXiv 2505.23416, section 3. The context is cut into chunks; for each, one forward pass reads a
request to repeat the chunk and the chunk itself on top of the cache (teacher forcing).

What that pass attends to is its reach. With reach `"context"`, as published, it is the whole
context; with `"chunk"` it is the prefix, the chunk and the pass itself, which costs the same for
every chunk however long the context is. The scores are taken over the same columns either way.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvzip.cache import ContextCache, Scores
from kvzip.errors import KVzipError
from kvzip.kernels import Operations
from kvzip.kernels.logits import Logits
from kvzip.layers import AnsweringLayer, ContextLayer, Layer, SlidingLayer, Tail
from kvzip.prefill import Progress, run, silent
from kvzip.prompts import Prompts
from kvzip.scoring.observation import require_full
from kvzip.states import StateLayer

CHUNK_SIZE = 2000
"""Tokens that one request asks the model to repeat (the paper's m)."""

SHORTEST_CHUNK = 256
"""Where the positions left allow no chunks of this size, scores would be slow and poor."""

REACHES = ("context", "chunk")


@torch.no_grad()
def score(
    model: PreTrainedModel,
    prompts: Prompts,
    kv: ContextCache,
    *,
    max_positions: int,
    chunk_size: int = CHUNK_SIZE,
    reach: str = "context",
    progress: Progress = silent,
) -> Scores:
    """Score every context pair of the layers with full attention.

    Args:
        model: the model that made the cache.
        prompts: its prompts.
        kv: a full cache; it is read, never changed.
        max_positions: positions that the model was made for.
        chunk_size: context tokens that one forward pass repeats; fewer where the positions behind
            the context leave room for fewer.
        reach: what a repeat attends to, `"context"` or `"chunk"`.
        progress: called with `("score", done, total)` after each chunk.

    Returns:
        Scores `[L, H, n]`, each the largest attention probability that the pair gets from any
        query of its chunk's repeat input.

    Raises:
        KVzipError: if pairs are evicted already, or the context leaves no room for a repeat.
    """
    values = score_chunks(
        model,
        prompts,
        kv,
        max_positions=max_positions,
        chunk_size=chunk_size,
        reach=reach,
        progress=progress,
    )
    return Scores(values, scorer_name(reach))


class Weigh(Protocol):
    """What probabilities of one layer are multiplied with before the largest is taken."""

    def __call__(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the repeat input's queries, `[Hq, t]`, and of a chunk's pairs, `[Hq, m]`.

        Args:
            values: `[H, m, D]`, of the chunk.
        """
        ...


def score_chunks(
    model: PreTrainedModel,
    prompts: Prompts,
    kv: ContextCache,
    *,
    max_positions: int,
    chunk_size: int,
    reach: str,
    progress: Progress,
    weigh: Mapping[int, Weigh] = MappingProxyType({}),
) -> Tensor:
    """Repeat a context, chunk after chunk: `[L, H, n]`, float32, on the CPU.

    Args:
        model: see `score`, as for the others.
        prompts: see `score`.
        kv: see `score`.
        max_positions: see `score`.
        chunk_size: see `score`.
        reach: see `score`.
        progress: see `score`.
        weigh: by layer, how its probabilities are weighted; not at all where there is nothing.

    Raises:
        KVzipError: see `score`.
    """
    check_reach(reach)
    require_full(kv)
    if chunk_size < 1:
        raise KVzipError(f"score_chunk is {chunk_size}: repeat at least one token at a time")
    p, n = kv.document.prefix_length, kv.document.context_length
    context = kv.document.token_ids[p:]
    room = max_positions - p - n - len(prompts.repeat_ids(context, context[:0]))
    enough = min(chunk_size, n, SHORTEST_CHUNK)
    if room < enough:
        raise KVzipError(
            f"the context takes {p + n} of the model's {max_positions} positions, which leaves too "
            f"few to repeat it in: shorten it by {enough - room} tokens"
        )
    scores: list[Tensor] = []
    start, before = p, None
    for chunk in context.split(min(chunk_size, room)):
        columns = slice(start, start + len(chunk))
        layers = [
            _repeating(layer, p, columns, reach, weigh.get(index))
            for index, layer in enumerate(kv.layers)
        ]
        scores.append(repeat(model, prompts.repeat_ids(before, chunk), layers).cpu())
        start, before = start + len(chunk), chunk
        progress("score", start - p, n)
    return torch.cat(scores, dim=-1).float()


def check_reach(reach: str) -> None:
    """Raise KVzipError for an unknown reach."""
    if reach not in REACHES:
        raise KVzipError(f"unknown reach {reach!r}: choose one of {', '.join(REACHES)}")


def scorer_name(reach: str, scorer: str = "reconstruction") -> str:
    """What scores are called that were made with this reach."""
    return scorer if reach == "context" else f"{scorer}, reach {reach}"


def repeat(model: PreTrainedModel, repeat_ids: Tensor, layers: list[Layer | StateLayer]) -> Tensor:
    """Run a repeat input through a model.

    Args:
        model: the model.
        repeat_ids: `[t]`, int64: the request and the chunk.
        layers: throw-away layers, a `RepeatingLayer` for each that is to be scored.

    Returns:
        `[L, H, m]`, on the model's device: scores of the chunk.
    """
    run(model, repeat_ids, Cache(layers=layers))
    scored = [layer.chunk_scores for layer in layers if isinstance(layer, RepeatingLayer)]
    return torch.stack([scores.to(model.device) for scores in scored])


def _repeating(
    layer: AnsweringLayer | StateLayer,
    prefix_length: int,
    chunk: slice,
    reach: str,
    weigh: Weigh | None,
) -> Layer | StateLayer:
    """A throw-away layer over the same dense context that reads one repeat input."""
    if isinstance(layer, StateLayer):
        return layer.fork(Tail())
    if isinstance(layer, SlidingLayer):
        return PassingLayer(layer.fork(Tail()))
    assert isinstance(layer, ContextLayer)
    context = Stretch(layer.held.dense_keys(), layer.held.dense_values())
    prefix, part = partial(context.cut, slice(prefix_length)), context.cut(chunk)
    seen = context if reach == "context" else None
    return RepeatingLayer(layer.seen, prefix, part, seen, layer.operations, weigh)


@dataclass(frozen=True)
class Stretch:
    """Dense pairs of successive tokens: keys and values, `[H, s, D]`."""

    keys: Tensor
    values: Tensor

    def cut(self, tokens: slice) -> "Stretch":
        """Some of the tokens, as a view."""
        return Stretch(self.keys[:, tokens], self.values[:, tokens])


class RepeatingLayer(Layer):
    """Observes the queries of a repeat input and scores one chunk of the context by them.

    Args:
        length: positions in front of the repeat input.
        prefix: gives the prefix when it is needed.
        chunk: what is repeated.
        seen: what the repeat input attends to, itself aside; prefix and chunk if None.
        operations: how to attend and score.
        weigh: how probabilities are weighted, or None.
    """

    chunk_scores: Tensor
    """`[H, m]`, there after the forward pass."""

    def __init__(
        self,
        length: int,
        prefix: Callable[[], Stretch],
        chunk: Stretch,
        seen: Stretch | None,
        operations: Operations,
        weigh: Weigh | None = None,
    ) -> None:
        super().__init__()
        self.is_initialized = True
        self.length = length
        self.prefix, self.chunk, self.seen = prefix, chunk, seen
        self.operations = operations
        self.weigh = weigh

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Hold the repeat input's own pairs for as long as it takes to attend."""
        self.own = keys, values

    def attend(self, query: Tensor, logits: Logits, window: int | None) -> Tensor:
        """Score the chunk, and attend."""
        (keys, values), prefix, chunk = self.own, self.prefix(), self.chunk
        del self.own
        by_query, by_key = self.weigh(chunk.values) if self.weigh else (None, None)
        weights = {"query_weights": by_query, "key_weights": by_key}
        if self.seen is None:
            stretches = prefix.keys, prefix.values, chunk.keys, chunk.values
            out, self.chunk_scores = self.operations.repeat_attention(
                query, *stretches, keys, values, logits, **weights
            )
            return out
        self.chunk_scores = self.operations.reconstruction_score(
            query[0], prefix.keys, chunk.keys, keys[0].contiguous(), logits, **weights
        )
        return self.operations.chunk_attention(
            query, self.seen.keys[None], self.seen.values[None], keys, values, logits
        )

    def get_seq_length(self) -> int:
        """Positions in front of the repeat input."""
        return self.length


class PassingLayer(Layer):
    """Lets a repeat input through a sliding layer, and holds nothing of it.

    Args:
        layer: whose last tokens the repeat input sees, as far as its window leaves them.
    """

    is_sliding = True

    def __init__(self, layer: SlidingLayer) -> None:
        super().__init__()
        self.is_initialized = True
        self.layer = layer

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Hold the repeat input's own pairs for as long as it takes to attend."""
        self.own = keys, values

    def attend(self, query: Tensor, logits: Logits, window: int | None) -> Tensor:
        """Attend within the window."""
        own, last = [part.contiguous() for part in self.own], self.layer.last_tokens()
        del self.own
        return self.layer.operations.zipped_attention(
            query, last.keys, last.values, last.indptr, *own, logits, window=self.layer.window
        )

    def get_seq_length(self) -> int:
        """Positions in front of the repeat input."""
        return self.layer.get_seq_length()
