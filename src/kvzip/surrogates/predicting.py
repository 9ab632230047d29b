"""Scores from a surrogate: while a context is read, or when it was read already."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvzip.cache import ContextCache, Scores
from kvzip.hidden_states import observed_hidden_states
from kvzip.kernels.logits import Logits
from kvzip.layers import ContextLayer
from kvzip.prefill import Progress, silent
from kvzip.prompts import Prompts
from kvzip.scoring.chunks import check_positions, read_into_tail
from kvzip.scoring.observation import CHUNK_SIZE, observe


class Surrogate(Protocol):
    """Predicts scores of tokens from their attention inputs."""

    @property
    def scorer(self) -> str:
        """What scores by it are called."""
        ...

    @property
    def window(self) -> int:
        """Last tokens that a threshold leaves alone."""
        ...

    @property
    def fingerprint(self) -> str | None:
        """That of the model that it was trained on, None if nothing says so."""
        ...

    def predict(self, layer: int, hidden: Tensor) -> Tensor:
        """Scores `[H, t]`, at least float32, of tokens with attention inputs `[t, d]`.

        Args:
            layer: place among the layers that are scored.
            hidden: on that layer's device.
        """
        ...

    def complete(self, scores: Tensor) -> Tensor:
        """The scores `[L, H, n]` of tokens that were all read, now that it is known which."""
        ...


class Predictions:
    """The scores of the tokens that a model reads, as they come.

    Args:
        surrogate: predicts them.
        scored: indices of the layers that are scored.
    """

    def __init__(self, surrogate: Surrogate, scored: Sequence[int]) -> None:
        self._surrogate = surrogate
        self._places = {index: place for place, index in enumerate(scored)}
        self._parts: list[list[Tensor]] = [[] for _ in scored]

    def see(self, index: int, hidden: Tensor) -> None:
        """Score the tokens of one forward pass, `[1, t, d]`, at one layer."""
        place = self._places.get(index)
        if place is not None:
            self._parts[place].append(self._surrogate.predict(place, hidden[0]))

    def last(self, tokens: int, device: torch.device | str = "cpu") -> Scores:
        """Scores `[L, H, tokens]` of the last tokens that were read, which others may follow."""
        layers = [torch.cat(parts, dim=-1)[:, -tokens:] for parts in self._parts]
        values = torch.stack([layer.to(device, torch.float32) for layer in layers])
        return Scores(values, self._surrogate.scorer, self._surrogate.window)

    def whole(self, tokens: int) -> Scores:
        """The same of a context whose last tokens these are, on the CPU."""
        scores = self.last(tokens)
        return replace(scores, values=self._surrogate.complete(scores.values))


@contextmanager
def predicting(
    model: PreTrainedModel, surrogate: Surrogate, scored: Sequence[int]
) -> Iterator[Predictions]:
    """Score what a model reads for as long as the `with` statement lasts.

    Args:
        model: the model.
        surrogate: made for it.
        scored: indices of the layers that are scored.
    """
    predictions = Predictions(surrogate, scored)
    with observed_hidden_states(model, predictions.see):
        yield predictions


@dataclass(frozen=True)
class PredictedChunks:
    """Scores chunks by a surrogate as they are read (see `scoring.chunks.ChunkScorer`).

    Attributes:
        model: the model.
        surrogate: made for it.
    """

    model: PreTrainedModel
    surrogate: Surrogate

    def check(self, kv: ContextCache, tokens: int, longest: int, max_positions: int) -> None:
        """Raise KVzipError unless the tokens fit behind the context."""
        check_positions(kv, tokens, f"{tokens} more tokens", max_positions)

    def read(self, kv: ContextCache, chunk: Tensor) -> Scores:
        """Read a chunk and score what its tokens look like."""
        with predicting(self.model, self.surrogate, scored_layers(kv)) as predictions:
            read_into_tail(self.model, kv, chunk)
        return predictions.last(len(chunk), self.model.device)


def scored_layers(kv: ContextCache) -> list[int]:
    """Indices of the layers with full attention."""
    return [index for index, layer in enumerate(kv.layers) if isinstance(layer, ContextLayer)]


def score(
    model: PreTrainedModel,
    prompts: Prompts,
    kv: ContextCache,
    *,
    max_positions: int,
    chunk_size: int = CHUNK_SIZE,
    progress: Progress = silent,
    surrogate: Surrogate,
) -> Scores:
    """Score a context that was read already, by reading it once more: `prefill` needs no more.

    Args:
        model: the model that made the cache.
        prompts: not used.
        kv: a full cache; it is read, never changed.
        max_positions: not used.
        chunk_size: context tokens of one forward pass; it does not change the scores.
        progress: called with `("score", done, total)` after each chunk.
        surrogate: made for the model.

    Returns:
        Scores `[L, H, n]`.

    Raises:
        KVzipError: if pairs are evicted already, or for a chunk size below 1.
    """
    p, n = kv.document.prefix_length, kv.document.context_length
    unseen = [Unseen()] * len(kv.prunable)
    with predicting(model, surrogate, scored_layers(kv)) as predictions:
        observe(model, kv, slice(p, p + n), unseen, chunk_size=chunk_size, progress=progress)
    return predictions.whole(n)


class Unseen:
    """An observer of attention (see `scoring.observation.Observer`) that looks away."""

    def see(self, query: Tensor, keys: Tensor, logits: Logits) -> None:
        """Take note of nothing."""
