"""Cache layers: a context segment that is shared, and the tail of one request behind it.

    context segment: immutable, shared by every fork          tail: private, appended in place
    +--------+----------------------------+                   +-----------------------+
    | prefix | kept pairs of each KV head |  <-- query sees -->| question and answer   |
    +--------+----------------------------+                   +-----------------------+

Attention reads the two where they are, so that appending never copies the context and dropping a
tail restores the cache exactly. A full (unpruned) context has the same form: all of its
heads are equally long.
"""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvzip.errors import KVzipError
from kvzip.kernels import reference


@dataclass(frozen=True)
class Pairs:
    """Keys and values of one layer, packed head after head in the order of their positions.

    Attributes:
        keys: `[rows, D]`.
        values: `[rows, D]`.
        kept: `[H, s]`, bool, on the CPU: which of the s positions each head holds.
    """

    keys: Tensor
    values: Tensor
    kept: Tensor

    @classmethod
    def dense(cls, keys: Tensor, values: Tensor) -> "Pairs":
        """View contiguous `[H, s, D]` keys and values as packed pairs, without a copy."""
        kept = torch.ones(keys.shape[:2], dtype=torch.bool)
        return cls(keys.flatten(0, 1), values.flatten(0, 1), kept)

    @cached_property
    def indptr(self) -> Tensor:
        """`[H + 1]`, int64, on the CPU: head `h` owns rows `indptr[h]:indptr[h + 1]`."""
        return F.pad(self.kept.sum(1).cumsum(0), (1, 0))

    def dense_keys(self) -> Tensor:
        """Keys as `[H, s, D]`; only where nothing is evicted."""
        return self.keys.view(*self.kept.shape, -1)

    def dense_values(self) -> Tensor:
        """Values as `[H, s, D]`; only where nothing is evicted."""
        return self.values.view(*self.kept.shape, -1)

    def keep(self, kept: Tensor) -> "Pairs":
        """Copy the pairs at `kept` (`[H, s]`, bool, on the CPU, a subset of what is held)."""
        rows = kept[self.kept]
        if rows.all():
            return self
        keys, values = reference.compact(self.keys, self.values, rows.to(self.keys.device))
        return Pairs(keys, values, kept)


class Tail:
    """The pairs behind the context: `[B, H, length, D]`, appended in place.

    Args:
        starts: `[B]`, int64: first valid column of each row when rows of different lengths were
            padded on the left; None when there is no padding.
    """

    def __init__(self, starts: Tensor | None = None) -> None:
        self.starts = starts
        self.length = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add `[B, H, t, D]` keys and values behind what is there."""
        end = self.length + keys.shape[2]
        if self._buffers is None or end > self._buffers[0].shape[2]:
            self._resize(_capacity(end), keys, values)
        assert self._buffers is not None
        for buffer, new in zip(self._buffers, (keys, values), strict=True):
            buffer[:, :, self.length : end] = new.detach()
        self.length = end

    def view(self) -> tuple[Tensor, Tensor]:
        """Keys and values, `[B, H, length, D]`."""
        assert self._buffers is not None
        keys, values = self._buffers
        return keys[:, :, : self.length], values[:, :, : self.length]

    def truncate(self, length: int) -> None:
        """Forget everything behind the first `length` tokens, and free the memory it took."""
        if not 0 <= length <= self.length:
            raise KVzipError(f"a tail of {self.length} tokens cannot be cut to {length}")
        self.length = length
        if length == 0:
            self._buffers = None
        elif self._buffers is not None and _capacity(length) < self._buffers[0].shape[2]:
            self._resize(_capacity(length), *self._buffers)

    def buffers(self) -> tuple[Tensor, ...]:
        """The tensors that hold memory."""
        return self._buffers or ()

    def _resize(self, capacity: int, keys: Tensor, values: Tensor) -> None:
        resized = []
        for i, new in enumerate((keys, values)):
            batch, heads, _, dim = new.shape
            buffer = new.new_empty((batch, heads, capacity, dim))
            if self._buffers is not None:
                buffer[:, :, : self.length] = self._buffers[i][:, :, : self.length]
            resized.append(buffer)
        self._buffers = (resized[0], resized[1])


def _capacity(length: int) -> int:
    """Columns that a tail of this length holds: a power of two, so that it seldom moves."""
    return int(max(64, 1 << (length - 1).bit_length()))


class Layer(CacheLayerMixin):
    """A cache layer that stands in for the key tensor and attends by itself (see `attention`)."""

    is_compileable = False
    is_croppable = False
    supports_early_init = False
    is_sliding = False

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor) -> None:
        """Store new pairs, `[B, H, t, D]`."""

    @abstractmethod
    def attend(self, query: Tensor, scale: float, window: int | None) -> Tensor:
        """Attend from `[B, Hq, t, D]` to everything stored, causally; same shape back."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple["Layer", "Layer"]:
        """Store new pairs and return the layer in the place of keys and values."""
        if key_states.shape[-2] == 0:
            raise KVzipError(
                "there are no new tokens to read: transformers' generate expects the whole "
                "sequence, so pass torch.cat([kv.token_ids, query_ids]) with past_key_values=kv"
            )
        self.append(key_states, value_states)
        return self, self

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """No columns: attention is causal by construction and takes no mask."""
        return 0, 0

    def get_max_length(self) -> int:
        """-1, no limit of its own."""
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refuse beam search, whose beams would have to share one tail."""
        raise KVzipError("beam search is not supported with a kvzip cache: use num_beams=1")

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse speculative decoding: transformers reads the whole sequence again for it."""
        raise KVzipError(
            "speculative decoding is not supported with a kvzip cache: leave out assistant_model "
            "and prompt_lookup_num_tokens"
        )


class AnsweringLayer(Layer):
    """A layer with a context of `seen` positions and a tail."""

    def __init__(self, seen: int, tail: Tail) -> None:
        super().__init__()
        self.is_initialized = True
        self.seen = seen
        self.tail = tail

    @abstractmethod
    def fork(self, tail: Tail) -> "AnsweringLayer":
        """A layer that shares this context, with another tail."""

    @abstractmethod
    def context_tensors(self) -> Iterable[Tensor]:
        """The tensors that hold the context's pairs."""

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Store new pairs in the tail."""
        self.tail.append(keys, values)

    def get_seq_length(self) -> int:
        """Positions seen: prefix, context and tail."""
        return self.seen + self.tail.length


class ContextLayer(AnsweringLayer):
    """Full attention over a context segment and a tail.

    Args:
        seen: positions of the context, prefix included.
        context: the pairs kept of it.
        tail: what came after.
        retained: what the context was pruned from, when that is retained beside the kept pairs.
    """

    def __init__(
        self, seen: int, context: Pairs, tail: Tail, retained: Pairs | None = None
    ) -> None:
        super().__init__(seen, tail)
        self.context = context
        self.retained = retained

    @property
    def held(self) -> Pairs:
        """The pairs that pruning chooses from."""
        return self.retained or self.context

    def attend(self, query: Tensor, scale: float, window: int | None) -> Tensor:
        """Attend to the context and, causally, to the tail."""
        return reference.zipped_attention(
            query,
            self.context.keys,
            self.context.values,
            self.context.indptr,
            *self.tail.view(),
            scale,
            self.tail.starts,
        )

    def fork(self, tail: Tail) -> "ContextLayer":
        """A layer that shares this context, with another tail."""
        return ContextLayer(self.seen, self.context, tail, self.retained)

    def prune(self, kept: Tensor) -> None:
        """Hold the pairs at `kept` only, `[H, s]`, bool, on the CPU.

        They must be among those `held`.
        """
        self.context = self.held.keep(kept)

    def context_tensors(self) -> Iterable[Tensor]:
        """Keys and values of the context, and of what it was pruned from where that is retained."""
        yield from (self.context.keys, self.context.values)
        yield from (self.held.keys, self.held.values)


class SlidingLayer(AnsweringLayer):
    """Attention over the last `window` positions only: never pruned, rolled back with its tail.

    Args:
        seen: positions of the context, prefix included.
        keys: `[H, w, D]`, the context's last `w < window` tokens.
        values: `[H, w, D]`.
        window: positions that a query sees, its own included.
        tail: what came after.
    """

    is_sliding = True

    def __init__(self, seen: int, keys: Tensor, values: Tensor, window: int, tail: Tail) -> None:
        super().__init__(seen, tail)
        self.context_keys, self.context_values = keys, values
        self.window = window

    def attend(self, query: Tensor, scale: float, window: int | None) -> Tensor:
        """Attend to whatever of the context and the tail lies inside the window."""
        tail_keys, tail_values = self.tail.view()
        batch, device = query.shape[0], query.device
        held = self.context_keys.shape[1]
        columns = torch.arange(self.tail.length, device=device)
        starts = torch.zeros(1, 1, dtype=torch.long, device=device)
        if self.tail.starts is not None:
            starts = self.tail.starts.to(device)[:, None]
        tail_positions = self.seen + columns - starts  # [B or 1, length]
        context_positions = torch.arange(self.seen - held, self.seen, device=device)
        key_positions = torch.cat(
            [
                context_positions.expand(len(starts), -1),
                tail_positions.masked_fill(columns < starts, -1),
            ],
            dim=-1,
        )
        # padding attends from the first position of the tail, so that it sees something
        query_positions = tail_positions[:, -query.shape[2] :].clamp_min(self.seen)
        return reference.sliding_attention(
            query,
            torch.cat([self.context_keys.expand(batch, -1, -1, -1), tail_keys], dim=2),
            torch.cat([self.context_values.expand(batch, -1, -1, -1), tail_values], dim=2),
            query_positions,
            key_positions,
            self.window,
            scale,
        )

    def fork(self, tail: Tail) -> "SlidingLayer":
        """A layer that shares this context, with another tail."""
        return SlidingLayer(self.seen, self.context_keys, self.context_values, self.window, tail)

    def context_tensors(self) -> Iterable[Tensor]:
        """Keys and values of the window."""
        yield from (self.context_keys, self.context_values)
