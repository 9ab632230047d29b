"""A decoding step recorded as a CUDA graph: hundreds of kernels, launched at once.

A graph runs the same kernels on the same addresses each time. So tails have their final size, the
column to write and the number of columns in use are read on the device, and tokens and positions
are copied to where the graph expects them.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvzip.cache import ContextCache
from kvzip.kernels import Operations
from kvzip.layers import Tail
from kvzip.single_token import SingleTokenLinear

Forward = Callable[..., Any]
Step = Callable[[Tensor, Tensor], Tensor]
"""tokens `[B, 1]`, positions `[B, 1]` -> logits `[B, V]`."""

WARM_UP_RUNS = 2
"""Runs before recording: kernels are compiled and libraries set up while that is allowed."""


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


def record(forward: Forward, kv: ContextCache, batch: int) -> Step:
    """Record the step that appends one token to every row.

    Args:
        forward: a model's forward pass.
        kv: the cache; its tails hold something already, and have room for all that will come.
        batch: number of rows.

    Returns:
        A function that takes the step. Each call appends to the tails of `kv`. The logits that it
        returns are overwritten by the next call.

    Raises:
        RuntimeError: if the forward pass does what cannot be recorded (such as waiting for the
            device), or memory runs out.
    """
    device = kv.layers[0].context.keys.device
    tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
    positions = torch.full_like(tokens, kv.seen_tokens)
    cursor = torch.tensor([kv.tail_length], device=device)
    end = cursor + 1
    tails = [layer.tail for layer in kv.layers]
    layers = [
        layer.fork(CursorTail(layer.tail, cursor, end, layer.operations)) for layer in kv.layers
    ]
    recording = Cache(layers=layers)

    stream = _side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_RUNS):
            logits_of(forward, tokens, positions, recording)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    generator = torch.cuda.default_generators[stream.device_index]
    state = generator.clone_state()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            logits = logits_of(forward, tokens, positions, recording)
    except RuntimeError:
        generator.graphsafe_set_state(state)  # which a recording that fails leaves unusable
        raise

    def step(next_tokens: Tensor, next_positions: Tensor) -> Tensor:
        tokens.copy_(next_tokens)
        positions.copy_(next_positions)
        cursor.fill_(tails[0].length)
        end.fill_(tails[0].length + 1)
        graph.replay()
        for tail in tails:
            tail.length += 1
        return logits

    return step


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream to record on; libraries keep memory for every stream that they have seen."""
    return torch.cuda.Stream(device)


class CursorTail(Tail):
    """The buffers of a tail, written at a column that is known on the device only.

    Args:
        tail: whose buffers these are.
        cursor: `[1]`, int64, on the device: the column that the step writes.
        end: `[1]`, int64, on the device: columns in use after that.
        operations: how to write it.
    """

    def __init__(self, tail: Tail, cursor: Tensor, end: Tensor, operations: Operations) -> None:
        super().__init__(tail.starts)
        self.operations = operations
        self.buffers = tail.buffers
        self.length = tail.length
        self._cursor, self._end = cursor, end

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Write one column."""
        self.operations.append(*self.buffers, keys, values, self._cursor)

    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """The whole buffers, and how much of them is in use."""
        keys, values = self.buffers
        return keys, values, self._end
