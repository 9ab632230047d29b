"""Watch what attention does while a context is read again over its own full cache.

Tokens `[a, b)` of prefix and context go through the model once more, in throw-away layers:

    +------------------------------+-----------+- - - - - - +
    | pairs of the cache, [0, a)   | [a, b)    |            |   layers with full attention
    +------------------------------+-----------+- - - - - - +
                        | lead-in  | observed  |                what runs through the model

Layers with full attention find all pairs in the cache. Sliding layers hold none of those before a,
so that they read a lead-in of their own. It is as long as wrong pairs can reach: the first
sliding layer's output is right one window behind the start, the next one's two windows behind it.
Layers of linear attention forget nothing for sure, so that with them all tokens are read again.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvzip.cache import ContextCache
from kvzip.errors import KVzipError
from kvzip.kernels import Operations
from kvzip.kernels.logits import Logits, softmax
from kvzip.kernels.reference import MAX_LOGITS
from kvzip.layers import AnsweringLayer, ContextLayer, Layer
from kvzip.prefill import Progress, SlidingReadingLayer, run, silent
from kvzip.states import StateLayer

CHUNK_SIZE = 2000
"""Tokens of one forward pass."""


class Observer(Protocol):
    """What a scorer puts at one layer."""

    def see(self, query: Tensor, keys: Tensor, logits: Logits) -> None:
        """Take note of a chunk of successive tokens.

        Args:
            query: `[Hq, t, D]`, with positions applied.
            keys: `[H, s, D]`, of all tokens from the first to the chunk's last, which are the
                queries' own.
            logits: what the layer makes of the products of queries and keys.
        """
        ...


@torch.no_grad()
def observe(
    model: PreTrainedModel,
    kv: ContextCache,
    tokens: slice,
    observers: Sequence[Observer],
    *,
    chunk_size: int = CHUNK_SIZE,
    progress: Progress = silent,
) -> None:
    """Run tokens of a full cache through the model again and show observers what attends.

    Args:
        model: the model that made the cache.
        kv: a full cache; it is read, never changed.
        tokens: which of the `[p + n]` tokens to observe, start and stop given.
        observers: one for each layer that can be pruned, in order.
        chunk_size: tokens of one forward pass; it changes memory and speed only.
        progress: called with `("score", done, total)` after each chunk.

    Raises:
        KVzipError: if pairs are evicted already, or for a chunk size below 1.
    """
    require_full(kv)
    if chunk_size < 1:
        raise KVzipError(f"score_chunk is {chunk_size}: read at least one token at a time")
    start = 0 if kv.stateful else max(0, tokens.start - lead_in(kv.attending))
    waiting = iter(observers)
    layers = [
        ObservingLayer(layer, start, tokens.start, next(waiting))
        if isinstance(layer, ContextLayer)
        else _beginning(layer, start)
        for layer in kv.layers
    ]
    cache = Cache(layers=layers)
    done, total = 0, tokens.stop - start
    for chunk in kv.document.token_ids[start : tokens.stop].split(chunk_size):
        run(model, chunk, cache)
        done += len(chunk)
        progress("score", done, total)


def require_full(kv: ContextCache) -> None:
    """Raise KVzipError if pairs of the cache are gone."""
    if not kv.held.all():
        raise KVzipError("an evicted cache cannot be scored again: prefill the context anew")


def lead_in(layers: Sequence[AnsweringLayer]) -> int:
    """Tokens to read first, so that what sliding layers lack reaches no layer that is observed."""
    last = max(i for i, layer in enumerate(layers) if isinstance(layer, ContextLayer))
    return sum(layer.window - 1 for layer in layers[:last] if layer.window is not None)


def causal_attention(query: Tensor, keys: Tensor, logits: Logits) -> Iterator[Tensor]:
    """The attention probabilities of a chunk, a block of queries at a time.

    Args:
        query: `[Hq, t, D]`.
        keys: `[H, s, D]`, the last t of them the queries' own.
        logits: what to make of the products of queries and keys.

    Yields:
        `[H, G, block, c]`, float32 (float64 for float64 inputs): probabilities over the first c
        keys, those that the block's last query sees.
    """
    accumulate = torch.promote_types(query.dtype, torch.float32)
    t, s = query.shape[1], keys.shape[1]
    grouped = query.unflatten(0, (keys.shape[0], -1)).to(accumulate)  # [H, G, t, D]
    across = keys[:, None].to(accumulate).mT  # [H, 1, D, s]
    columns = torch.arange(s, device=query.device)
    sinks = None if logits.sinks is None else logits.sinks.view(keys.shape[0], -1, 1, 1)
    size = max(1, MAX_LOGITS // (query.shape[0] * s))
    for first in range(0, t, size):
        rows = slice(first, min(first + size, t))
        visible = s - t + rows.stop
        found = logits.of(grouped[:, :, rows] @ across[..., :visible])
        hidden = columns[:visible] > columns[s - t :][rows, None]
        yield softmax(found.masked_fill_(hidden, -torch.inf), sinks)


class ObservingLayer(Layer):
    """Full attention to pairs that are there already, before the eyes of an observer.

    Args:
        layer: the layer of the cache; its context is read.
        start: position of the first token that will run through.
        first: position of the first token to observe.
        observer: who sees queries and keys.
    """

    def __init__(self, layer: ContextLayer, start: int, first: int, observer: Observer) -> None:
        super().__init__()
        self.is_initialized = True
        self.keys, self.values = layer.held.dense_keys(), layer.held.dense_values()
        self.operations: Operations = layer.operations
        self.length, self.first, self.observer = start, first, observer

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Move on: the pairs are in the cache."""
        self.length += keys.shape[2]

    def attend(self, query: Tensor, logits: Logits, window: int | None) -> Tensor:
        """Show the queries that are to be observed, then attend."""
        t, end = query.shape[2], self.length
        observed = min(t, end - self.first)
        if observed > 0:
            self.observer.see(query[0, :, t - observed :], self.keys[:, :end], logits)
        pairs = self.keys[None], self.values[None]
        before = (part[:, :, : end - t] for part in pairs)
        own = (part[:, :, end - t : end] for part in pairs)
        return self.operations.chunk_attention(query, *before, *own, logits)

    def get_seq_length(self) -> int:
        """Positions in front of the next token."""
        return self.length


def _beginning(layer: AnsweringLayer | StateLayer, start: int) -> SlidingReadingLayer | StateLayer:
    """A throw-away layer that begins to read at a position, and knows nothing of those before."""
    if isinstance(layer, StateLayer):
        return StateLayer()
    assert layer.window is not None
    reading = SlidingReadingLayer(layer.operations, layer.window)
    reading.length = start
    return reading
