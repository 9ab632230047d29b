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

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvzip.errors import KVzipError
from kvzip.kernels import Operations
from kvzip.kernels.logits import Logits
from kvzip.kernels.quantization import Quantization
from kvzip.pairs import Pairs, QuantizedPairs


class Tail:
    """The pairs behind the context: `[B, H, length, D]`, appended in place.

    Args:
        starts: `[B]`, int64: first valid column of each row when rows of different lengths were
            padded on the left; None when there is no padding.
        room: columns to make room for at once; beyond them the buffers double.
    """

    def __init__(self, starts: Tensor | None = None, room: int = 0) -> None:
        self.starts = starts
        self.length = 0
        self.buffers: tuple[Tensor, ...] = ()
        self._room = room

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add `[B, H, t, D]` keys and values behind what is there."""
        end = self.length + keys.shape[2]
        if not self.buffers or end > self.buffers[0].shape[2]:
            self._resize(self._room if end <= self._room else _capacity(end), keys, values)
        for buffer, new in zip(self.buffers, (keys, values), strict=True):
            buffer[:, :, self.length : end] = new.detach()
        self.length = end

    def view(self) -> tuple[Tensor, Tensor]:
        """Keys and values, `[B, H, length, D]`."""
        keys, values = self.buffers
        return keys[:, :, : self.length], values[:, :, : self.length]

    def columns(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What attention reads: keys and values, and the number of columns in use if not all."""
        return *self.view(), None

    def truncate(self, length: int) -> None:
        """Forget everything behind the first `length` tokens, and free the memory it took."""
        if not 0 <= length <= self.length:
            raise KVzipError(f"a tail of {self.length} tokens cannot be cut to {length}")
        self.length = length
        if length == 0:
            self.buffers = ()
        elif _capacity(length) < self.buffers[0].shape[2]:
            self._resize(_capacity(length), *self.buffers)

    def drop_first(self, count: int) -> None:
        """Forget the first `count` tokens, and free the memory that they took."""
        if not 0 <= count <= self.length:
            raise KVzipError(f"a tail of {self.length} tokens has no first {count}")
        rest = [part[:, :, count:] for part in self.view()]
        self.truncate(0)
        if rest[0].shape[2]:
            self.append(*rest)

    def _resize(self, capacity: int, *like: Tensor) -> None:
        held = self.view() if self.buffers else ()
        self.buffers = tuple(_columns(part, capacity) for part in like)
        for buffer, part in zip(self.buffers, held, strict=False):
            buffer[:, :, : self.length] = part


def _columns(like: Tensor, capacity: int) -> Tensor:
    batch, heads, _, dim = like.shape
    return like.new_empty((batch, heads, capacity, dim))


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
    def attend(self, query: Tensor, logits: Logits, window: int | None) -> Tensor:
        """Attend from `[B, Hq, t, D]` to everything stored, causally; same shape back."""

    @torch.compiler.disable  # what happens here is in-place, and no matter for a compiler
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
    """A layer with a context of `seen` positions and a tail.

    Args:
        seen: positions of the context, prefix included.
        context: the pairs held of it.
        tail: what came after.
        operations: how to attend.
        window: tokens that a query sees, its own included, or None for all.
    """

    def __init__(
        self,
        seen: int,
        context: Pairs | QuantizedPairs,
        tail: Tail,
        operations: Operations,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.is_initialized = True
        self.seen = seen
        self.context = context
        self.tail = tail
        self.operations = operations
        self.window = window

    @abstractmethod
    def fork(self, tail: Tail) -> "AnsweringLayer":
        """A layer that shares this context, with another tail."""

    @abstractmethod
    def absorb(self, kept: Tensor) -> None:
        """Make the first t tokens of the tail a part of the context, and free what they took of it.

        Args:
            kept: `[H, t]`, bool: which of their pairs stay, where a layer can do without any.
        """

    def context_tensors(self) -> Iterable[Tensor]:
        """The tensors that hold the context's pairs."""
        yield from self.context.tensors().values()

    def tail_tensors(self) -> Iterable[Tensor]:
        """The tensors that hold the tail's pairs."""
        yield from self.tail.buffers

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Store new pairs in the tail."""
        self.tail.append(keys, values)

    def restart(self, other: "AnsweringLayer | None") -> None:
        """Start again: with a copy of another layer's tail, or an empty one; buffers stay."""
        self.tail.length = 0
        if other is not None and other.tail.length:
            self.tail.append(*other.tail.view())

    def adopt(self, answered: "AnsweringLayer") -> None:
        """Take over what a fork, whose tail began as a copy of this one's, has come to."""
        if answered.seen == self.seen:
            self.tail.append(*(part[:, :, self.tail.length :] for part in answered.tail.view()))
            return
        self.context, self.seen = answered.context, answered.seen
        self.tail = Tail(room=answered.tail.length)
        self.tail.append(*answered.tail.view())

    def truncate(self, length: int) -> None:
        """Forget everything behind the first `length` tokens of the tail."""
        self.tail.truncate(length)

    def attend(self, query: Tensor, logits: Logits, window: int | None) -> Tensor:
        """Attend to the context and, causally, to the tail; layers that slide know their window."""
        tail_keys, tail_values, tail_length = self.tail.columns()
        starts = self.tail.starts
        return self.context.attention(self.operations)(
            query,
            self.context.keys,
            self.context.values,
            self.context.indptr,
            tail_keys,
            tail_values,
            logits,
            tail_length=tail_length,
            starts=None if starts is None else starts.to(query.device),
            window=self.window,
            counts=self.context.counts,
        )

    def get_seq_length(self) -> int:
        """Positions seen: prefix, context and tail."""
        return self.seen + self.tail.length


class ContextLayer(AnsweringLayer):
    """Full attention over a context segment that can be pruned, and a tail.

    Args:
        seen: positions of the context, prefix included.
        context: the pairs kept of it.
        tail: what came after.
        operations: how to attend and to compact.
        retained: what the context was pruned from, when that is retained beside the kept pairs.
    """

    def __init__(
        self,
        seen: int,
        context: Pairs | QuantizedPairs,
        tail: Tail,
        operations: Operations,
        retained: Pairs | QuantizedPairs | None = None,
    ) -> None:
        super().__init__(seen, context, tail, operations)
        self.retained = retained

    @property
    def held(self) -> Pairs | QuantizedPairs:
        """The pairs that pruning chooses from."""
        return self.retained or self.context

    def fork(self, tail: Tail) -> "ContextLayer":
        """A layer that shares this context, with another tail."""
        return ContextLayer(self.seen, self.context, tail, self.operations, self.retained)

    def prune(self, kept: Tensor, how: Quantization | None = None) -> None:
        """Hold the pairs at `kept` only, `[H, s]`, bool; they must be among those `held`.

        Args:
            kept: which ones.
            how: quantise them so; None leaves them as they are held.
        """
        context = self.held.keep(kept, self.operations)
        self.context = context if how is None else context.quantize(how)

    def absorb(self, kept: Tensor) -> None:
        """Make the pairs at `kept` of the tail's first tokens context, and free the others."""
        count = kept.shape[1]
        keys, values = (part[0, :, :count] for part in self.tail.view())
        self.context = self.context.extend(keys, values, kept.to(keys.device), self.operations)
        self.seen += count
        self.tail.drop_first(count)

    def context_tensors(self) -> Iterable[Tensor]:
        """Keys and values of the context, and of what it was pruned from where that is retained."""
        yield from super().context_tensors()
        yield from self.held.tensors().values()


class SlidingLayer(AnsweringLayer):
    """Attention over the last `window` positions only: never pruned, rolled back with its tail.

    Its context is the last `window - 1` tokens, or all of them if there are fewer.
    """

    is_sliding = True
    context: Pairs

    def last_tokens(self, count: int | None = None) -> Pairs:
        """What a query sees of context and tail: behind `count` tokens of the tail, or all."""
        count = self.tail.length if count is None else count
        if not count:
            return self.context
        assert self.window is not None
        context = self.context.dense_keys(), self.context.dense_values()
        joined = (
            torch.cat([old, new[0, :, :count]], dim=1)
            for old, new in zip(context, self.tail.view(), strict=True)
        )
        # a copy even where it looks contiguous: a view would hold all of it
        last = (part[:, max(0, part.shape[1] - self.window + 1) :].clone() for part in joined)
        return Pairs.dense(*(part.contiguous() for part in last))

    def absorb(self, kept: Tensor) -> None:
        """Make the tail's first tokens context, which holds the last tokens of both."""
        count = kept.shape[1]
        self.context = self.last_tokens(count)
        self.seen += count
        self.tail.drop_first(count)

    def fork(self, tail: Tail) -> "SlidingLayer":
        """A layer that shares this context, with another tail."""
        return SlidingLayer(self.seen, self.context, tail, self.operations, self.window)
