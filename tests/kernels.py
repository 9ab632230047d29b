"""What tests of the reference and of the kernels share: cases, float64 oracles, tolerances, poison.

Triton kernels run on the GPU where there is one (marked `gpu`) and in Triton's interpreter
elsewhere, with fewer rows.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from kvzip.kernels.logits import Logits

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
MARKS = [pytest.mark.gpu] if ON_GPU else []  # `pytestmark` of files that run Triton kernels

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [FLOAT32, FLOAT16, BFLOAT16]
KERNEL_DTYPES = [
    FLOAT32,
    FLOAT16,
    pytest.param(
        BFLOAT16,
        marks=pytest.mark.skipif(
            not ON_GPU, reason="Triton's interpreter computes bfloat16 dot products wrongly"
        ),
    ),
]
GROUPS = [1, 4, 7, 8, 16]
DIMS = [32, 64, 80, 96, 128, 256]
# rows of each KV head: empty, one, odd, around tiles of 64 and 128, one head far longer than others
LENGTHS = {
    "odd": [0, 1, 37],
    "tile-of-64": [63, 64, 65],
    "tile-of-128": [127, 128, 129],
    "huge": [0, 20_011 if ON_GPU else 1111, 2],
    "huge-first": [1111, 0, 0],
    "one": [1, 1, 1],
    "all-empty": [0, 0, 0],
    "odd-tiles": [111, 0, 63],
}
BOUNDS = {torch.float64: 1e-12, FLOAT32: 1e-5, FLOAT16: 2e-3, BFLOAT16: 1e-2}
"""Relative error allowed in all; a single row may have three times as much."""


def random(*shape: int, seed: int = 0, dtype: torch.dtype = FLOAT32) -> Tensor:
    """Normal numbers, the same for the same arguments on every device."""
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def with_spare(tensor: Tensor, dim: int, spare: int) -> Tensor:
    """The tensor in a larger buffer: NaN behind its end."""
    shape = list(tensor.shape)
    shape[dim] = spare
    return torch.cat([tensor, tensor.new_full(shape, torch.nan)], dim=dim)


def by_token(tensor: Tensor) -> Tensor:
    """Tokens before heads in memory, `[..., H, t, D]`, as transformers makes queries."""
    return tensor.transpose(-2, -3).contiguous().transpose(-2, -3)


def probabilities(products: Tensor, visible: Tensor, logits: Logits, head: int) -> Tensor:
    """Of one query head, in float64: `[t, s]`, bool `[t, s]` -> `[t, s]`."""
    found = products.double() * logits.scale
    if logits.softcap is not None:
        found = torch.tanh(found / logits.softcap) * logits.softcap
    found = found.masked_fill(~visible, -torch.inf)
    if logits.sinks is None:
        return found.softmax(-1)
    column = torch.full_like(found[:, :1], float(logits.sinks[head]))
    return torch.cat([column, found], dim=-1).softmax(-1)[:, 1:]


def attend(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, logits: Logits, head: int = 0
) -> Tensor:
    """One query head in float64: `[t, D]`, `[s, D]`, `[s, D]`, bool `[t, s]` -> `[t, D]`."""
    products = query.double() @ keys.double().T
    return probabilities(products, visible, logits, head) @ values.double()


def some_logits(
    scale: float, query_heads: int, softcap: float | None = None, sinks: bool = False
) -> Logits:
    """Sinks between -2 and 3, where they are asked for."""
    heads = torch.linspace(-2, 3, query_heads, device=DEVICE)
    return Logits(scale, softcap, heads if sinks else None)


LOGITS = {
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "softcap-and-sinks": {"softcap": 0.7, "sinks": True},
}
"""What a model may do to logits; the caps are near those of the random inputs."""


def assert_near(got: Tensor, expected: Tensor, dtype: torch.dtype, bound: float = 0) -> None:
    """Within the bounds in all and row by row, so that a single wrong row is seen."""
    assert got.dtype == dtype
    assert got.shape == expected.shape
    difference, bound = got.double() - expected, bound or BOUNDS[dtype]
    assert difference.norm() <= bound * expected.norm()
    rows, expected_rows = difference.norm(dim=-1), expected.norm(dim=-1)
    wrong = ~(rows <= 3 * bound * expected_rows)  # NaN is wrong
    assert not wrong.any(), f"wrong rows: {wrong.nonzero().tolist()[:20]}"


@contextmanager
def poison() -> Iterator[list[Tensor]]:
    """Fresh tensors are full of NaN meanwhile, so that what a kernel leaves unwritten shows."""
    made: list[Tensor] = []

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
                made.append(tensor)
            return tensor

        return call

    with ExitStack() as stack:
        for owner, name in (
            (torch.Tensor, "new_empty"),
            (torch, "empty"),
            (torch, "empty_like"),
        ):
            replacement = poisoned(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield made


class Zipped:
    """Inputs of `zipped_attention`, with NaN in every row and column that must not be read.

    Args:
        lengths: rows of each KV head.
        t: queries of each row.
        tail: columns in front of them.
        spare: columns behind them.
        spare_rows: rows behind the packed ones.
        on_device: whether the kernel gets the whole buffers and reads the length on the device.
    """

    def __init__(
        self,
        lengths: list[int],
        *,
        batch: int = 1,
        group: int = 2,
        t: int = 1,
        tail: int = 0,
        dim: int = 32,
        dtype: torch.dtype = FLOAT32,
        starts: list[int] | None = None,
        window: int | None = None,
        spare: int = 2,
        spare_rows: int = 0,
        on_device: bool = False,
        softcap: float | None = None,
        sinks: bool = False,
        seed: int = 0,
    ) -> None:
        def make(*shape: int) -> Tensor:
            nonlocal seed
            seed += 1
            return random(*shape, seed=seed, dtype=dtype)

        heads, rows, s = len(lengths), sum(lengths), tail + t
        self.lengths = lengths
        self.indptr = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE)
        self.query = by_token(make(batch, heads * group, t, dim))
        self.keys = with_spare(make(rows, dim), 0, spare_rows)
        self.values = with_spare(make(rows, dim), 0, spare_rows)
        self.tail_keys = with_spare(make(batch, heads, s, dim), 2, spare)
        self.tail_values = with_spare(make(batch, heads, s, dim), 2, spare)
        self.starts = None if starts is None else torch.tensor(starts, device=DEVICE)
        self.window = window
        self.on_device = on_device
        self.logits = some_logits(dim**-0.5, heads * group, softcap, sinks)
        self.s = s

    def run(self, attention: Callable[..., Tensor]) -> Tensor:
        tail = slice(None) if self.on_device else slice(0, self.s)
        return attention(
            self.query,
            self.keys,
            self.values,
            self.indptr,
            self.tail_keys[:, :, tail],
            self.tail_values[:, :, tail],
            self.logits,
            tail_length=torch.tensor([self.s], device=DEVICE) if self.on_device else None,
            starts=self.starts,
            window=self.window,
        )

    def visible(self, length: int, start: int) -> Tensor:
        """`[t, length + s]`: by position; the first token behind the context is at 0."""
        t = self.query.shape[2]
        key_positions = torch.arange(-length, self.s, device=DEVICE)
        key_positions[length:] -= start
        padding = torch.arange(-length, self.s, device=DEVICE) >= 0
        padding &= key_positions < 0
        query_positions = key_positions[length + self.s - t :]
        behind = query_positions.clamp_min(0)[:, None] - key_positions
        seen = (behind >= 0) & ~padding
        if self.window is not None:
            seen &= behind < self.window
        for i in range(t):  # padding sees the context and itself
            if query_positions[i] < 0:
                seen[i, length:] = False
                seen[i, length + self.s - t + i] = True
        return seen

    def expected(self) -> Tensor:
        batch, query_heads = self.query.shape[:2]
        group = query_heads // len(self.lengths)
        out = torch.zeros(self.query.shape, dtype=torch.float64, device=DEVICE)
        for b in range(batch):
            start = 0 if self.starts is None else int(self.starts[b])
            for h, length in enumerate(self.lengths):
                rows = slice(int(self.indptr[h]), int(self.indptr[h]) + length)
                keys = torch.cat([self.keys[rows], self.tail_keys[b, h, : self.s]])
                values = torch.cat([self.values[rows], self.tail_values[b, h, : self.s]])
                visible = self.visible(length, start)
                for head in range(h * group, (h + 1) * group):
                    one = self.query[b, head]
                    out[b, head] = attend(one, keys, values, visible, self.logits, head)
        return out

    def check(self, attention: Callable[..., Tensor]) -> Tensor:
        got = self.run(attention)
        assert_near(got, self.expected(), self.query.dtype)
        return got


class Chunk:
    """Inputs of `chunk_attention`: slices of buffers with NaN behind."""

    def __init__(
        self,
        t: int,
        s: int,
        *,
        batch: int = 1,
        heads: int = 2,
        group: int = 2,
        dim: int = 32,
        dtype: torch.dtype = FLOAT32,
        softcap: float | None = None,
        sinks: bool = False,
    ) -> None:
        self.query = by_token(random(batch, heads * group, t, dim, seed=1, dtype=dtype))
        parts = (random(batch, heads, s + t, dim, seed=i, dtype=dtype) for i in (2, 3))
        self.keys, self.values = (with_spare(part, 2, 9) for part in parts)
        self.s = s
        self.logits = some_logits(0.7 * dim**-0.5, heads * group, softcap, sinks)

    def run(self, attention: Callable[..., Tensor]) -> Tensor:
        own = slice(self.s, self.s + self.query.shape[2])
        return attention(
            self.query,
            self.keys[:, :, : self.s],
            self.values[:, :, : self.s],
            self.keys[:, :, own],
            self.values[:, :, own],
            self.logits,
        )

    def expected(self) -> Tensor:
        batch, query_heads, t, _ = self.query.shape
        end, group = self.s + t, query_heads // self.keys.shape[1]
        own = torch.arange(self.s, end, device=DEVICE)
        visible = torch.arange(end, device=DEVICE) <= own[:, None]
        out = torch.zeros(self.query.shape, dtype=torch.float64, device=DEVICE)
        for b in range(batch):
            for head in range(query_heads):
                keys, values = (
                    self.keys[b, head // group, :end],
                    self.values[b, head // group, :end],
                )
                one = self.query[b, head]
                out[b, head] = attend(one, keys, values, visible, self.logits, head)
        return out

    def check(self, attention: Callable[..., Tensor]) -> None:
        assert_near(self.run(attention), self.expected(), self.query.dtype)


class Dense:
    """A dense kernel (`kernels.dense.Attend`) in float64 that notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, bool]] = []

    def __call__(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        self.asked.append((keys.shape[2], causal))
        group = query.shape[1] // keys.shape[1]
        keys, values = (part.repeat_interleave(group, dim=1).double() for part in (keys, values))
        logits = query.double() @ keys.mT * scale
        if causal:
            hidden = torch.ones(logits.shape[-2:], device=DEVICE).triu(1).bool()
            logits = logits.masked_fill(hidden, -torch.inf)
        out = (logits.softmax(-1) @ values).to(query.dtype)
        return out, logits.logsumexp(-1).float()


class Repeating:
    """Inputs of `reconstruction_score` as a scoring pass has them: slices of larger buffers.

    Args:
        p: columns of the prefix.
        m: columns of the chunk.
        t: tokens of the repeat input.
        before: columns of the context between prefix and chunk, which are not looked at.
    """

    def __init__(
        self,
        p: int,
        m: int,
        t: int,
        *,
        group: int = 2,
        dim: int = 32,
        dtype: torch.dtype = FLOAT32,
        heads: int = 2,
        before: int = 3,
        sharpness: float = 2.0,
        softcap: float | None = None,
        sinks: bool = False,
    ) -> None:
        self.query = by_token(random(heads * group, t, dim, seed=1, dtype=dtype) * sharpness)
        gap = random(heads, before, dim).to(dtype) * torch.nan
        prefix, chunk, repeat = (
            random(heads, size, dim, seed=size + i, dtype=dtype)
            for i, size in enumerate((p, m, t), 7)
        )
        context = torch.cat([prefix, gap, chunk, gap], dim=1)
        self.prefix, self.chunk = context[:, :p], context[:, p + before : p + before + m]
        self.repeat = with_spare(repeat, 1, 4)[:, :t]
        self.logits = some_logits(dim**-0.5, heads * group, softcap, sinks)

    def run(self, score: Callable[..., Tensor]) -> Tensor:
        return score(self.query, self.prefix, self.chunk, self.repeat, self.logits)

    def expected(self) -> Tensor:
        heads, p, _ = self.prefix.shape
        m, t = self.chunk.shape[1], self.repeat.shape[1]
        best = torch.zeros(heads, m, dtype=torch.float64, device=DEVICE)
        keys = torch.cat([self.prefix, self.chunk, self.repeat], dim=1).double()
        hidden = torch.ones(t, p + m + t, device=DEVICE).triu(p + m + 1).bool()
        for head in range(len(self.query)):
            h = head * heads // len(self.query)
            products = self.query[head].double() @ keys[h].T
            weights = probabilities(products, ~hidden, self.logits, head)
            best[h] = torch.maximum(best[h], weights[:, p : p + m].amax(0))
        return best

    def check(self, score: Callable[..., Tensor]) -> Tensor:
        got, expected = self.run(score), self.expected()
        assert got.dtype == FLOAT32
        assert 0 < expected.max() <= 1
        torch.testing.assert_close(got.double(), expected, atol=1e-7, rtol=1e-4)
        assert (got.double() - expected).norm() < BOUNDS[FLOAT32] * expected.norm()
        return got


def check_compact(
    compact: Callable[..., tuple[Tensor, Tensor]],
    rows: int,
    share: float,
    dtype: torch.dtype,
    dim: int = 80,
) -> None:
    """Random rows stay; all others are NaN."""
    keys, values = (random(rows, dim, seed=i, dtype=dtype) for i in (1, 2))
    stay = torch.rand(rows, generator=torch.Generator().manual_seed(0)) < share
    kept = stay.nonzero().flatten().tolist()
    stay = stay.to(DEVICE)
    keys[~stay] = values[~stay] = torch.nan
    for got, source in zip(compact(keys, values, stay), (keys, values), strict=True):
        assert got.dtype == dtype
        assert got.shape == (len(kept), dim)
        assert torch.equal(got, source[kept])
        assert not got.isnan().any()
        assert got.untyped_storage().nbytes() == got.nbytes
