"""A decoding step recorded as a CUDA graph (`recording.py`): hundreds of kernels, launched at once.

A graph runs the same kernels on the same addresses each time. So tails have their final size, the
column to write and the number of columns in use are read on the device, and tokens and positions
are copied to where the graph expects them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvzip.cache import ContextCache
from kvzip.kernels import Operations
from kvzip.layers import Tail
from kvzip.recording import Recording
from kvzip.single_token import SingleTokenLinear

Forward = Callable[..., Any]
Step = Callable[[Tensor, Tensor], Tensor]
"""tokens `[B, 1]`, positions `[B, 1]` -> logits `[B, V]`."""


def logits_of(forward: Forward, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
    """Logits `[B, V]` behind the last of `[B, t]` tokens."""
    output = forward(
        input_ids=tokens,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits: Tensor = output.logits
    return logits[:, -1]


def plain_forward(model: PreTrainedModel) -> Forward:
    """The forward pass of a model, for steps that are recorded without being compiled."""

    def forward(**inputs: Any) -> Any:
        with SingleTokenLinear():
            return model(**inputs)

    return forward


def record(forward: Forward, kv: ContextCache, batch: int, devices: Sequence[torch.device]) -> Step:
    """Record the step that appends one token to every row.

    Args:
        forward: a model's forward pass.
        kv: the cache; its tails hold something already, and have room for all that will come.
        batch: number of rows.
        devices: CUDA devices that the forward pass may run on, that of tokens and logits first.

    Returns:
        A function that takes the step. Each call appends to the tails of `kv`. The logits that it
        returns are overwritten by the next call.

    Raises:
        RuntimeError: if the forward pass does what cannot be recorded (such as waiting for the
            device), or memory runs out.
    """
    tails = [layer.tail for layer in kv.layers]
    tokens = torch.zeros(batch, 1, dtype=torch.long, device=devices[0])
    positions = torch.full_like(tokens, kv.seen_tokens)
    cursors = {device: Cursor.at(kv.tail_length, device) for device in devices}
    layers = [
        layer.fork(CursorTail(tail, cursors[tail.buffers[0].device], layer.operations))
        for layer, tail in zip(kv.layers, tails, strict=True)
    ]
    cache = Cache(layers=layers)
    recording = Recording(lambda: logits_of(forward, tokens, positions, cache), devices)

    def step(next_tokens: Tensor, next_positions: Tensor) -> Tensor:
        tokens.copy_(next_tokens)
        positions.copy_(next_positions)
        for cursor in cursors.values():
            cursor.move(tails[0].length)
        recording.replay()
        for tail in tails:
            tail.length += 1
        return recording.result

    return step


@dataclass(frozen=True)
class Cursor:
    """Where the step writes, known on a device only.

    Attributes:
        column: `[1]`, int64: the column.
        end: `[1]`, int64: columns in use after that.
    """

    column: Tensor
    end: Tensor

    @classmethod
    def at(cls, column: int, device: torch.device) -> "Cursor":
        """Made on a device."""
        here = torch.tensor([column], device=device)
        return cls(here, here + 1)

    def move(self, column: int) -> None:
        """To another column."""
        self.column.fill_(column)
        self.end.fill_(column + 1)


class CursorTail(Tail):
    """The buffers of a tail, written at a column that is known on the device only.

    Args:
        tail: whose buffers these are.
        cursor: on the tail's device.
        operations: how to write it.
    """

    def __init__(self, tail: Tail, cursor: Cursor, operations: Operations) -> None:
        super().__init__(tail.starts)
        self.operations = operations
        self.buffers = tail.buffers
        self.length = tail.length
        self._cursor = cursor

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Write one column."""
        self.operations.append(*self.buffers, keys, values, self._cursor.column)

    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """The whole buffers, and how much of them is in use."""
        keys, values = self.buffers
        return keys, values, self._cursor.end
