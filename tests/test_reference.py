"""Each operation of `kernels/reference.py` against plain float64 loops."""

import math

import pytest
import torch
from torch import Tensor

from kvzip.kernels import reference

GROUPS = [1, 4, 7, 8]
DIMS = [32, 64, 80, 96, 128, 256]
DTYPES = [torch.float32, torch.bfloat16]
# rows of each KV head: empty, one, odd, around a tile of 64, one head far longer than the others
LENGTHS = {
    "odd": [0, 1, 37],
    "tile": [63, 64, 65],
    "huge": [0, 1111, 2],
    "one": [1, 1, 1],
    "all-empty": [0, 0, 0],
    "odd-tiles": [111, 0, 63],
}


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Rounding of the result alone: float32 sums, or one rounding to 8 bits."""
    return {"atol": 2e-6, "rtol": 2e-5} if dtype == torch.float32 else {"atol": 1e-3, "rtol": 2**-8}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def attend(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
    """One head in float64: `[t, D]`, `[s, D]`, `[s, D]`, bool `[t, s]` -> `[t, D]`."""
    query, keys, values = query.double(), keys.double(), values.double()
    rows = []
    for i in range(len(query)):
        seen = visible[i].nonzero().flatten()
        weights = torch.softmax(keys[seen] @ query[i] * scale, dim=0)
        rows.append(weights @ values[seen])
    return torch.stack(rows)


def assert_equals(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, **tolerance(dtype))


class Zipped:
    """Inputs of `zipped_attention`, with NaN in every row that must not be read."""

    def __init__(
        self,
        lengths: list[int],
        *,
        batch: int = 1,
        group: int = 2,
        t: int = 1,
        tail: int = 0,
        dim: int = 32,
        dtype: torch.dtype = torch.float32,
        starts: list[int] | None = None,
    ) -> None:
        heads, rows, s = len(lengths), sum(lengths), tail + t
        self.indptr = torch.tensor([0, *lengths]).cumsum(0)
        self.query = random(batch, heads * group, t, dim, seed=1, dtype=dtype)
        self.keys = self._with_spare(random(rows, dim, seed=2, dtype=dtype), 0)
        self.values = self._with_spare(random(rows, dim, seed=3, dtype=dtype), 0)
        self.tail_keys = self._with_spare(random(batch, heads, s, dim, seed=4, dtype=dtype), 2)
        self.tail_values = self._with_spare(random(batch, heads, s, dim, seed=5, dtype=dtype), 2)
        self.starts = None if starts is None else torch.tensor(starts)
        self.scale = dim**-0.5
        self.s = s

    @staticmethod
    def _with_spare(tensor: Tensor, dim: int) -> Tensor:
        """Rows behind the last one are NaN, as in a buffer with spare room."""
        shape = list(tensor.shape)
        shape[dim] = 5
        return torch.cat([tensor, torch.full(shape, torch.nan, dtype=tensor.dtype)], dim=dim)

    def run(self) -> Tensor:
        tail = slice(0, self.s)
        return reference.zipped_attention(
            self.query,
            self.keys,
            self.values,
            self.indptr,
            self.tail_keys[:, :, tail],
            self.tail_values[:, :, tail],
            self.scale,
            self.starts,
        )

    def expected(self) -> Tensor:
        batch, query_heads, t, dim = self.query.shape
        group = query_heads // (len(self.indptr) - 1)
        out = torch.zeros(batch, query_heads, t, dim, dtype=torch.float64)
        for b in range(batch):
            start = 0 if self.starts is None else int(self.starts[b])
            for head in range(query_heads):
                h = head // group
                rows = slice(int(self.indptr[h]), int(self.indptr[h + 1]))
                context = rows.stop - rows.start
                visible = torch.ones(t, context + self.s).bool()
                for i in range(t):
                    own = self.s - t + i
                    visible[i, context:] = False
                    visible[i, context + start : context + own + 1] = True
                    visible[i, context + own] = True
                out[b, head] = attend(
                    self.query[b, head],
                    torch.cat([self.keys[rows], self.tail_keys[b, h, : self.s]]),
                    torch.cat([self.values[rows], self.tail_values[b, h, : self.s]]),
                    visible,
                    self.scale,
                )
        return out

    def check(self) -> None:
        assert_equals(self.run(), self.expected(), self.query.dtype)


class TestZippedAttention:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
    @pytest.mark.parametrize(("t", "tail"), [(1, 0), (1, 6), (5, 0), (3, 4)])
    def test_head_lengths(self, lengths, t, tail, dtype):
        Zipped(lengths, t=t, tail=tail, dtype=dtype).check()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("group", GROUPS)
    @pytest.mark.parametrize("dim", DIMS)
    def test_groups_and_dimensions(self, group, dim, dtype):
        Zipped([65, 0, 3], group=group, dim=dim, t=2, tail=1, dtype=dtype).check()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("t", [1, 7])
    def test_rows_that_start_later(self, t, dtype):
        Zipped([9, 0], batch=3, t=t, tail=7 - t, starts=[0, 5, 6], dtype=dtype).check()
        Zipped([9, 0], batch=3, t=t, tail=10, starts=[0, 5, 10], dtype=dtype).check()

    @pytest.mark.parametrize("starts", [None, [0, 3, 8]])
    @pytest.mark.parametrize("max_logits", [1, 200, 1000])
    def test_blocks(self, monkeypatch, max_logits, starts):
        case = Zipped([31, 0, 64], batch=3, t=9, tail=2, starts=starts)
        expected = case.run()
        monkeypatch.setattr(reference, "MAX_LOGITS", max_logits)
        torch.testing.assert_close(case.run(), expected)
        case.check()

    @pytest.mark.parametrize("factor", [1e-3, 30.0])
    def test_flat_and_sharp_logits(self, factor):
        case = Zipped([40, 3], t=3)
        case.query *= factor
        case.check()

    def test_float64_stays_float64(self):
        case = Zipped([40, 3], t=3, dtype=torch.float64)
        torch.testing.assert_close(case.run(), case.expected(), atol=1e-13, rtol=1e-12)


class TestCausalAttention:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("group", GROUPS)
    @pytest.mark.parametrize(("t", "s"), [(1, 1), (1, 65), (5, 5), (63, 63), (7, 64), (64, 111)])
    def test_sizes(self, t, s, group, dtype):
        self.check(t, s, group, 32, dtype)

    @pytest.mark.parametrize("dim", DIMS)
    def test_dimensions(self, dim):
        self.check(6, 9, 2, dim, torch.float32)

    def check(self, t, s, group, dim, dtype):
        heads, batch, scale = 2, 2, 0.2
        query = random(batch, heads * group, t, dim, seed=1, dtype=dtype)
        keys, values = (random(batch, heads, s, dim, seed=i, dtype=dtype) for i in (2, 3))
        visible = torch.arange(s) <= torch.arange(s - t, s)[:, None]
        expected = torch.stack(
            [
                torch.stack(
                    [
                        attend(
                            query[b, h], keys[b, h // group], values[b, h // group], visible, scale
                        )
                        for h in range(heads * group)
                    ]
                )
                for b in range(batch)
            ]
        )
        got = reference.causal_attention(query, keys, values, scale)
        assert got.dtype == dtype
        # scaled_dot_product_attention may round probabilities to bfloat16
        loose = {"atol": 1e-2, "rtol": 2**-6}
        limits = tolerance(dtype) if dtype == torch.float32 else loose
        torch.testing.assert_close(got.double(), expected, **limits)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("window", [1, 4, 63, 1000])
def test_sliding_attention(window, group):
    """Keys at any positions, in any order; those at negative positions are hidden."""
    heads, batch, t, s, scale = 2, 2, 5, 70, 0.3
    query = random(batch, heads * group, t, 32, seed=1)
    keys, values = (random(batch, heads, s, 32, seed=i) for i in (2, 3))
    query_positions = torch.stack([torch.arange(60, 65), torch.arange(63, 68)])
    order = torch.randperm(s, generator=torch.Generator().manual_seed(0))
    key_positions = torch.stack([torch.arange(s), torch.arange(s)[order]])
    key_positions[:, 3:6] = -1
    key_positions[0, 60:65] = query_positions[0]
    hidden = torch.isin(key_positions[1], query_positions[1])
    assert hidden.sum() >= 4  # nearly every query has its own key, so that it sees something
    got = reference.sliding_attention(
        query, keys, values, query_positions, key_positions, window, scale
    )
    compared = 0
    for b in range(batch):
        for h in range(heads * group):
            for i, position in enumerate(query_positions[b].tolist()):
                seen = [
                    j
                    for j, at in enumerate(key_positions[b].tolist())
                    if at >= 0 and position - window < at <= position
                ]
                if not seen:
                    continue
                alone = query[b, h, i : i + 1]
                all_seen = torch.ones(1, len(seen)).bool()
                expected = attend(
                    alone, keys[b, h // group, seen], values[b, h // group, seen], all_seen, scale
                )
                torch.testing.assert_close(got[b, h, i].double(), expected[0], atol=2e-6, rtol=2e-5)
                compared += 1
    assert compared >= batch * heads * group * (t - 1)


class TestReconstructionScore:
    def inputs(self, p, m, t, group, dim, dtype=torch.float32):
        heads = 2
        query = random(heads * group, t, dim, seed=1, dtype=dtype) * 2
        keys = [random(heads, size, dim, seed=size + 7, dtype=dtype) for size in (p, m, t)]
        return query, *keys, dim**-0.5

    def expected(self, query, prefix, chunk, repeat, scale) -> Tensor:
        heads, p, _ = prefix.shape
        m, t, group = chunk.shape[1], query.shape[1], len(query) // heads
        best = torch.zeros(heads, m, dtype=torch.float64)
        for head in range(len(query)):
            h = head // group
            for i in range(t):
                keys = torch.cat([prefix[h], chunk[h], repeat[h, : i + 1]]).double()
                weights = torch.softmax(keys @ query[head, i].double() * scale, dim=0)
                best[h] = torch.maximum(best[h], weights[p : p + m])
        return best

    def check(self, case) -> None:
        got, expected = reference.reconstruction_score(*case), self.expected(*case)
        assert got.dtype == torch.float32
        assert 0 < expected.max() <= 1
        torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=2e-5)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        ("p", "m", "t"), [(5, 1, 1), (0, 7, 9), (3, 63, 70), (64, 65, 66), (1, 111, 3)]
    )
    def test_sizes(self, p, m, t, dtype):
        self.check(self.inputs(p, m, t, 2, 32, dtype))

    @pytest.mark.parametrize("group", GROUPS)
    @pytest.mark.parametrize("dim", DIMS)
    def test_groups_and_dimensions(self, group, dim):
        self.check(self.inputs(4, 9, 6, group, dim))

    @pytest.mark.parametrize("max_logits", [1, 500, 3000])
    def test_blocks(self, monkeypatch, max_logits):
        case = self.inputs(4, 33, 40, 4, 32)
        expected = reference.reconstruction_score(*case)
        monkeypatch.setattr(reference, "MAX_LOGITS", max_logits)
        torch.testing.assert_close(reference.reconstruction_score(*case), expected)

    def test_inputs_are_not_changed(self):
        case = self.inputs(4, 33, 40, 4, 32)
        copies = [part.clone() for part in case[:4]]
        reference.reconstruction_score(*case)
        assert all(map(torch.equal, case[:4], copies))

    def test_float64_stays_float64(self):
        case = self.inputs(4, 33, 40, 2, 32, torch.float64)
        got = reference.reconstruction_score(*case)
        torch.testing.assert_close(got, self.expected(*case), atol=1e-14, rtol=1e-12)

    def test_huge_logits_do_not_overflow(self):
        query, *keys, scale = self.inputs(4, 9, 6, 2, 32)
        case = (query * 1000, *keys, scale)
        got = reference.reconstruction_score(*case)
        torch.testing.assert_close(got.double(), self.expected(*case), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("share", [0, 0.3, 1])
@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 111])
def test_compact(rows, share, dtype):
    keys, values = (random(rows, 80, seed=i, dtype=dtype) for i in (1, 2))
    stay = torch.rand(rows, generator=torch.Generator().manual_seed(0)) < share
    keys[~stay] = values[~stay] = math.nan
    kept = [i for i in range(rows) if stay[i]]
    for got, source in zip(reference.compact(keys, values, stay), (keys, values), strict=True):
        assert got.dtype == dtype
        assert got.shape == (len(kept), 80)
        assert torch.equal(got, source[kept])
        assert got.untyped_storage().nbytes() == got.nbytes
        assert not got.isnan().any()
