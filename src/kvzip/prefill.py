"""Stage 1: read prefix and context in chunks, and hold every pair."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvzip.geometry import Geometry, LayerGeometry
from kvzip.kernels import Operations
from kvzip.kernels.logits import Logits
from kvzip.layers import AnsweringLayer, ContextLayer, Layer, SlidingLayer, Tail
from kvzip.pairs import Pairs
from kvzip.states import StateLayer

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, the tokens done and the tokens in all."""


def silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""


def run(model: PreTrainedModel, token_ids: Tensor, cache: Cache) -> None:
    """Run tokens `[t]`, int64, through a model, behind those in a cache; without logits.

    Positions are given: not every model counts what its cache has seen.
    """
    seen = cache.get_seq_length()
    positions = torch.arange(seen, seen + len(token_ids), device=model.device)
    model.base_model(
        input_ids=token_ids[None].to(model.device, non_blocking=True),
        position_ids=positions[None],
        past_key_values=cache,
        use_cache=True,
    )


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    geometry: Geometry,
    operations: Operations,
    token_ids: Tensor,
    *,
    chunk_size: int,
    retain: bool,
    progress: Progress = silent,
) -> list[AnsweringLayer | StateLayer]:
    """Run tokens through a model and return the full cache, a layer each, with empty tails.

    Logits are never computed. A chunk sees all tokens before it, so that the chunk size changes
    memory and speed but, beyond rounding, not the result.

    Args:
        model: a model whose attention implementation is `"kvzip"`.
        geometry: its geometry.
        operations: how to attend, then and later.
        token_ids: `[p + n]`, int64, on the CPU.
        chunk_size: tokens of one forward pass.
        retain: whether layers keep the dense pairs when they are pruned.
        progress: called with `("prefill", done, total)` after each chunk.
    """
    total = len(token_ids)
    cache = PrefillCache(
        [_reading_layer(layer, operations, total, retain) for layer in geometry.layers]
    )
    done = 0
    for chunk in token_ids.split(chunk_size):
        run(model, chunk, cache)
        done += len(chunk)
        progress("prefill", done, total)
    return cache.finish()


def _reading_layer(
    geometry: LayerGeometry, operations: Operations, total: int, retain: bool
) -> "FullReadingLayer | SlidingReadingLayer | StateLayer":
    if geometry.linear:
        return StateLayer()
    if geometry.window is None:
        return FullReadingLayer(operations, total, retain)
    return SlidingReadingLayer(operations, geometry.window)


class FullReadingLayer(Layer):
    """Full attention while reading: one buffer of the final size, written in place.

    Args:
        operations: how to attend.
        total: tokens that will be read.
        retain: whether the pairs stay when the context is pruned.
    """

    def __init__(self, operations: Operations, total: int, retain: bool) -> None:
        super().__init__()
        self.operations = operations
        self.total = total
        self.retain = retain
        self.length = 0
        self.buffers: tuple[Tensor, Tensor] | None = None

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Write a chunk's pairs behind those of the chunks before it."""
        if self.buffers is None:
            self.buffers = (self._buffer(keys), self._buffer(values))
        end = self.length + keys.shape[2]
        for buffer, new in zip(self.buffers, (keys, values), strict=True):
            buffer[:, self.length : end] = new[0]
        self.length = end

    def attend(self, query: Tensor, logits: Logits, window: int | None) -> Tensor:
        """Attend causally to everything read so far."""
        assert self.buffers is not None
        before = self.length - query.shape[2]
        read = (buffer[None, :, :before] for buffer in self.buffers)
        own = (buffer[None, :, before : self.length] for buffer in self.buffers)
        return self.operations.chunk_attention(query, *read, *own, logits)

    def get_seq_length(self) -> int:
        """Positions read so far."""
        return self.length

    def finish(self) -> ContextLayer:
        """Turn into a layer that answers; the pairs are handed over, not copied."""
        assert self.buffers is not None
        dense = Pairs.dense(*self.buffers)
        retained = dense if self.retain else None
        return ContextLayer(self.length, dense, Tail(), self.operations, retained)

    def _buffer(self, new: Tensor) -> Tensor:
        return new.new_empty((new.shape[1], self.total, new.shape[3]))


class SlidingReadingLayer(Layer):
    """Sliding attention while reading: holds the chunk and the window before it, no more."""

    is_sliding = True

    def __init__(self, operations: Operations, window: int) -> None:
        super().__init__()
        self.operations = operations
        self.window = window
        self.length = 0
        self.held: tuple[Tensor, Tensor] | None = None

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Put a chunk's pairs behind the last window of those before it."""
        self.length += keys.shape[2]
        if self.held is not None:
            old_keys, old_values = self._last_window()
            keys = torch.cat([old_keys, keys], dim=2)
            values = torch.cat([old_values, values], dim=2)
        self.held = (keys, values)

    def attend(self, query: Tensor, logits: Logits, window: int | None) -> Tensor:
        """Attend within the window, a window's worth of queries at a time: linear in length."""
        assert self.held is not None
        keys, values = self.held
        total, before = keys.shape[2], keys.shape[2] - query.shape[2]
        positions = torch.arange(total, device=query.device)[None]
        parts = []
        for start in range(before, total, self.window):
            end = min(start + self.window, total)
            seen = slice(max(0, start - self.window + 1), end)
            parts.append(
                self.operations.sliding_attention(
                    query[:, :, start - before : end - before],
                    keys[:, :, seen],
                    values[:, :, seen],
                    positions[:, start:end],
                    positions[:, seen],
                    self.window,
                    logits,
                )
            )
        return torch.cat(parts, dim=2)

    def get_seq_length(self) -> int:
        """Positions read so far."""
        return self.length

    def finish(self) -> SlidingLayer:
        """Turn into a layer that answers, with the last window of the context."""
        context = Pairs.dense(*(part[0].clone() for part in self._last_window()))
        return SlidingLayer(self.length, context, Tail(), self.operations, self.window)

    def _last_window(self) -> tuple[Tensor, Tensor]:
        """Views of the tokens that the next query still sees, `[1, H, w, D]` with `w < window`."""
        assert self.held is not None
        start = max(0, self.held[0].shape[2] - (self.window - 1))
        return self.held[0][:, :, start:], self.held[1][:, :, start:]


class PrefillCache(Cache):
    """The cache of a context that is being read."""

    def __init__(
        self, layers: Sequence[FullReadingLayer | SlidingReadingLayer | StateLayer]
    ) -> None:
        super().__init__(layers=list(layers))

    def finish(self) -> list[AnsweringLayer | StateLayer]:
        """The same pairs as layers that answer."""
        return [layer.finish() for layer in self.layers]
