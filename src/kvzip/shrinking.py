"""Eviction behind the context: of a conversation, and of an answer while it is generated.

    context segment                                     tail, dense
    +--------+-----------------+- - - - - - - - - - +   +----------------------+------------------+
    | prefix | kept pairs      | kept pairs of what |<--| tokens that have     | the last         |
    |        |                 | was said           |   | left the window      | `window` tokens  |
    +--------+-----------------+- - - - - - - - - - +   +----------------------+------------------+

Whenever `block` tokens have left the window they are scored by a surrogate, their best pairs become
a part of the context, and the others are freed. Scores are made from hidden states, which one more
forward pass over these tokens brings back: it attends to the pairs that are there already, and
stores none. The decoding step, recorded or not, knows nothing of this.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvzip.budget import OF_TOKENS, Budget
from kvzip.cache import ContextCache
from kvzip.errors import KVzipError, KVzipWarning
from kvzip.interrupts import uninterrupted
from kvzip.layers import AnsweringLayer, Tail
from kvzip.prefill import run
from kvzip.scoring import get_scorer, is_surrogate
from kvzip.selection import select
from kvzip.states import StateLayer
from kvzip.surrogates.predicting import Surrogate, predicting, scored_layers

WINDOW = 128
"""Last tokens that are held whole, as in KVzap (Jegou and Jeblick, arXiv 2601.07891)."""

BLOCK = 512
"""Tokens that leave the window before they are scored: a recorded step is recorded anew each time,
and the context is copied."""

SCORER = "kvzap:linear"
"""The surrogate where nothing else is said."""

READ_AT_ONCE = 8000
"""Tokens of one forward pass while they are scored."""


@dataclass(frozen=True)
class Shrinking:
    """How to evict of what stands behind the context: questions and answers alike.

    Attributes:
        amount: how many pairs to keep, as a ratio (floor(ratio * L * H * t) of every t tokens that
            are scored at once) or as a threshold.
        scorer: a surrogate (see `surrogates.load`); None for that of the cache, or `"kvzap:linear"`
            where the cache was scored otherwise.
        window: last tokens of which every pair is held.
        block: tokens that may leave the window before they are scored.
    """

    amount: Budget
    scorer: str | None = None
    window: int = WINDOW
    block: int = BLOCK

    def __post_init__(self) -> None:
        if not isinstance(self.amount, Budget):
            raise KVzipError(
                f"amount is a Budget, such as Budget(0.3) or Budget(threshold=-4): got "
                f"{self.amount!r}"
            )
        self.amount.refuse_all_but(OF_TOKENS, "shrinking")
        if self.scorer is not None and not is_surrogate(self.scorer):
            get_scorer(self.scorer)
            raise KVzipError(
                "what stands behind the context is scored by a surrogate, not by "
                f"{self.scorer!r}: choose {SCORER!r}, or train one with kvzip train-surrogate"
            )
        for name in ("window", "block"):
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise KVzipError(f"{name} is a number of tokens, 1 or more: got {size!r}")

    @classmethod
    def of(cls, how: "float | Budget | Shrinking") -> "Shrinking":
        """These settings, or those of a budget alone; a number is a ratio."""
        return how if isinstance(how, Shrinking) else cls(Budget.of(how))

    @property
    def columns(self) -> int:
        """Tokens behind the context that are held at a time."""
        return self.window + self.block


@dataclass(frozen=True)
class Shrinker:
    """Evicts of what stands behind the context of a model's caches.

    Attributes:
        model: the model.
        surrogate: made for it.
        how: how much to keep, and sizes.
    """

    model: PreTrainedModel
    surrogate: Surrogate
    how: Shrinking

    def check(self, kv: ContextCache) -> None:
        """Raise KVzipError if a cache cannot shrink for good."""
        if kv.retained:
            raise KVzipError("shrinking frees what it evicts: use kv_type='evict'")

    @torch.no_grad()
    def shrink(self, kv: ContextCache, token_ids: Tensor) -> None:
        """Make what has left the window a part of the context, and free what is not kept of it.

        Layer after layer is worked off, so that memory peaks at what was held, with one layer's
        pairs twice. If scoring goes wrong or is interrupted, nothing has changed.

        Args:
            kv: the cache, with a tail of a single row.
            token_ids: `[s]`, int64, on the CPU: the tokens in its tail.

        Raises:
            KVzipError: if scores hold NaN.
        """
        leaving = token_ids[: max(0, len(token_ids) - self.how.window)]
        if not len(leaving):
            return
        reader = kv.fork([_written(layer) for layer in kv.layers])
        with predicting(self.model, self.surrogate, scored_layers(kv)) as predictions:
            for part in leaving.split(READ_AT_ONCE):
                run(self.model, part, reader)
        scores = predictions.last(len(leaving), self.model.device)
        kept = select(scores.values, self.how.amount)
        states = {
            index: layer.state
            for index, layer in enumerate(reader.layers)
            if isinstance(layer, StateLayer)
        }
        del reader  # it holds on to every layer's pairs
        comparable = kv.scorers == {scores.scorer} or not kv.document.context_length
        with uninterrupted():
            kv.absorb(leaving, scores if comparable else None, kept, states)

    def shrink_conversation(self, kv: ContextCache) -> None:
        """Make all of a cache's tail but the window a part of its context, for good.

        Raises:
            KVzipError: as `check` and `shrink`.

        Warns:
            KVzipWarning: if nothing is kept.
        """
        self.check(kv)
        before = kv.document.context_length
        self.shrink(kv, kv.history[: kv.tail_length])
        self.warn_if_all_gone(kv, before)

    def warn_if_all_gone(self, kv: ContextCache, context_length: int) -> None:
        """Warn if nothing was kept of what became context behind its first so many tokens."""
        absorbed = kv.document.context_length - context_length
        if absorbed and not kv.kept[..., context_length:].any():
            warnings.warn(
                f"no pair of {absorbed} tokens behind the context is kept by {self.how.amount}, "
                f"only those of the last {self.how.window} tokens: lower the threshold, or give a "
                "larger ratio",
                KVzipWarning,
                stacklevel=4,
            )


class WrittenTail(Tail):
    """A tail that is read a second time: what is appended stands there already.

    Args:
        tail: whose buffers these are.
    """

    def __init__(self, tail: Tail) -> None:
        super().__init__(tail.starts)
        self.buffers = tail.buffers

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Go on to the next columns."""
        self.length += keys.shape[2]


def _written(layer: object) -> Tail:
    """What a layer's tail is for one that reads it again; layers without pairs have none."""
    return WrittenTail(layer.tail) if isinstance(layer, AnsweringLayer) else Tail()
