"""Each operation of `kernels/reference.py` against float64."""

import pytest
import torch

from kernels import (
    BFLOAT16,
    DEVICE,
    DIMS,
    DTYPES,
    FLOAT32,
    GROUPS,
    LENGTHS,
    LOGITS,
    MARKS,
    Chunk,
    Repeating,
    Zipped,
    attend,
    check_compact,
    random,
    some_logits,
)
from kvzip.kernels import reference

pytestmark = MARKS
zipped, chunk, score = (
    reference.zipped_attention,
    reference.chunk_attention,
    reference.reconstruction_score,
)


class TestZippedAttention:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
    @pytest.mark.parametrize(("t", "tail"), [(1, 0), (1, 6), (5, 0), (3, 4)])
    def test_head_lengths(self, lengths, t, tail, dtype):
        Zipped(lengths, t=t, tail=tail, dtype=dtype).check(zipped)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("group", GROUPS)
    @pytest.mark.parametrize("dim", DIMS)
    def test_groups_and_dimensions(self, group, dim, dtype):
        Zipped([65, 0, 3], group=group, dim=dim, t=2, tail=1, dtype=dtype).check(zipped)

    @pytest.mark.parametrize("t", [63, 130])
    def test_long_questions(self, t):
        Zipped([65, 0, 3], t=t, tail=3).check(zipped)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("t", [1, 7])
    def test_rows_that_start_later(self, t, dtype):
        Zipped([9, 0], batch=3, t=t, tail=7 - t, starts=[0, 5, 6], dtype=dtype).check(zipped)
        Zipped([9, 0], batch=3, t=t, tail=10, starts=[0, 5, 10], dtype=dtype).check(zipped)

    @pytest.mark.parametrize("starts", [None, [0, 3, 20]], ids=["", "starts"])
    @pytest.mark.parametrize("window", [1, 2, 16, 10_000])
    @pytest.mark.parametrize(("t", "tail"), [(1, 20), (21, 0), (21, 40)])
    def test_windows(self, t, tail, window, starts):
        """A context as long as the window leaves of it, and a longer one."""
        for length in (min(window - 1, 130), 40):
            case = Zipped([length] * 3, batch=3, t=t, tail=tail, starts=starts, window=window)
            case.check(zipped)

    @pytest.mark.parametrize("s", [1, 64, 100])
    def test_a_tail_in_a_buffer_with_room(self, s):
        Zipped([37, 0], tail=s - 1, spare=128 - s, on_device=True).check(zipped)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("how", LOGITS.values(), ids=LOGITS)
    @pytest.mark.parametrize("window", [None, 5])
    def test_capped_logits_and_sinks(self, window, how, dtype):
        starts = [0, 3, 1]
        case = Zipped(
            [9, 9], batch=3, group=3, t=4, tail=2, starts=starts, window=window, dtype=dtype, **how
        )
        case.check(zipped)
        Zipped([9, 0, 33], t=1, dtype=dtype, **how).check(zipped)

    def test_spare_rows_are_not_read(self):
        Zipped([37, 0, 64], t=2, spare_rows=5).check(zipped)

    @pytest.mark.parametrize("window", [None, 6])
    @pytest.mark.parametrize("starts", [None, [0, 3, 8]])
    @pytest.mark.parametrize("max_logits", [1, 200, 1000])
    def test_blocks(self, monkeypatch, max_logits, starts, window):
        lengths = [31, 31, 31] if window else [31, 0, 64]
        case = Zipped(lengths, batch=3, t=9, tail=2, starts=starts, window=window)
        expected = case.run(zipped)
        monkeypatch.setattr(reference, "MAX_LOGITS", max_logits)
        torch.testing.assert_close(case.run(zipped), expected)
        case.check(zipped)

    @pytest.mark.parametrize("factor", [1e-3, 30.0])
    def test_flat_and_sharp_logits(self, factor):
        case = Zipped([40, 3], t=3)
        case.query *= factor
        case.check(zipped)

    def test_float64_stays_float64(self):
        Zipped([40, 3], t=3, dtype=torch.float64).check(zipped)


class TestChunkAttention:
    @pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
    @pytest.mark.parametrize("group", GROUPS)
    @pytest.mark.parametrize(
        ("t", "s"), [(1, 0), (1, 64), (5, 0), (63, 0), (7, 57), (64, 47), (2, 1)]
    )
    def test_sizes(self, t, s, group, dtype):
        Chunk(t, s, batch=2, group=group, dtype=dtype).check(chunk)

    @pytest.mark.parametrize("dim", DIMS)
    @pytest.mark.parametrize("s", [0, 3])
    def test_dimensions(self, dim, s):
        Chunk(6, s, dim=dim).check(chunk)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("how", LOGITS.values(), ids=LOGITS)
    @pytest.mark.parametrize("s", [0, 37])
    @pytest.mark.parametrize("max_logits", [1, 10**6])
    def test_capped_logits_and_sinks(self, monkeypatch, max_logits, s, how, dtype):
        monkeypatch.setattr(reference, "MAX_LOGITS", max_logits)
        Chunk(7, s, batch=2, group=3, dtype=dtype, **how).check(chunk)

    def test_float64_stays_float64(self):
        Chunk(6, 3, dtype=torch.float64).check(chunk)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("window", [1, 4, 63, 1000])
@pytest.mark.parametrize("how", [{}, *LOGITS.values()], ids=["plain", *LOGITS])
def test_sliding_attention(how, window, group):
    """Keys at any positions, in any order; those at negative positions are hidden."""
    heads, batch, t, s = 2, 2, 5, 70
    logits = some_logits(0.3, heads * group, **how)
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
        query, keys, values, query_positions.to(DEVICE), key_positions.to(DEVICE), window, logits
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
                all_seen = torch.ones(1, len(seen), device=DEVICE).bool()
                pairs = (part[b, h // group, seen] for part in (keys, values))
                expected = attend(alone, *pairs, all_seen, logits, h)
                torch.testing.assert_close(got[b, h, i].double(), expected[0], atol=2e-6, rtol=2e-5)
                compared += 1
    assert compared >= batch * heads * group * (t - 1)


class TestReconstructionScore:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        ("p", "m", "t"), [(5, 1, 1), (0, 7, 9), (3, 63, 70), (64, 65, 66), (1, 111, 3)]
    )
    def test_sizes(self, p, m, t, dtype):
        Repeating(p, m, t, dtype=dtype).check(score)

    @pytest.mark.parametrize("group", GROUPS)
    @pytest.mark.parametrize("dim", DIMS)
    def test_groups_and_dimensions(self, group, dim):
        Repeating(4, 9, 6, group=group, dim=dim).check(score)

    @pytest.mark.parametrize("how", LOGITS.values(), ids=LOGITS)
    def test_capped_logits_and_sinks(self, how):
        Repeating(4, 33, 40, group=3, **how).check(score)

    @pytest.mark.parametrize("max_logits", [1, 500, 3000])
    def test_blocks(self, monkeypatch, max_logits):
        case = Repeating(4, 33, 40, group=4)
        expected = case.run(score)
        monkeypatch.setattr(reference, "MAX_LOGITS", max_logits)
        torch.testing.assert_close(case.run(score), expected)

    def test_inputs_are_not_changed(self):
        case = Repeating(4, 33, 40, group=4)
        parts = [case.query, case.prefix, case.chunk, case.repeat]
        copies = [part.clone() for part in parts]
        case.run(score)
        assert all(map(torch.equal, parts, copies))

    def test_float64_stays_float64(self):
        case = Repeating(4, 33, 40, dtype=torch.float64)
        torch.testing.assert_close(case.run(score), case.expected(), atol=1e-14, rtol=1e-12)

    def test_huge_logits_do_not_overflow(self):
        case = Repeating(4, 9, 6, sharpness=2000)
        torch.testing.assert_close(case.run(score).double(), case.expected(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [0, 0.3, 1])
@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 111])
def test_compact(rows, share, dtype):
    check_compact(reference.compact, rows, share, dtype)
