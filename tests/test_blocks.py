"""Attention to packed heads by dense kernels on blocks, against float64."""

import pytest
import torch

from kernels import BFLOAT16, FLOAT32, MARKS, ON_GPU, Dense, Zipped, assert_near
from kvzip.kernels import long_query
from kvzip.kernels.blocks import BLOCKS, attend_to_blocks
from kvzip.kernels.zipped_attention import zipped_attention as kernel

pytestmark = MARKS

LENGTHS = [[0, 1, 37], [16, 15, 17], [64, 68, 0], [200, 3, 64], [0, 0]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("blocks", [(64, 16), (16,), (1000,)], ids=str)
def test_blocks_and_what_is_left(lengths: list[int], blocks: tuple[int, ...]) -> None:
    """Each block is asked for once; what is left, and its sum, complete the softmax."""
    case, dense = Zipped(lengths, group=3, t=5), Dense()
    own = dense(case.query, case.tail_keys[:, :, :5], case.tail_values[:, :, :5], 0.3, True)
    dense.asked.clear()
    inputs = case.keys, case.values, lengths, 0.3
    left = attend_to_blocks(*own, case.query, *inputs, dense, blocks)
    sizes = [size for size, _ in dense.asked]
    assert not any(causal for _, causal in dense.asked)
    rest = left.indptr.diff().tolist()
    assert sum(sizes) + sum(rest) == sum(lengths)
    assert max(rest) < blocks[-1]
    assert len(left.keys) == len(left.values) == sum(rest)
    for heads, (length, head_rest) in enumerate(zip(lengths, rest, strict=True)):
        begin = int(case.indptr[heads]) + length - head_rest
        rows = slice(int(left.indptr[heads]), int(left.indptr[heads]) + head_rest)
        assert torch.equal(left.keys[rows], case.keys[begin : begin + head_rest])
        assert torch.equal(left.values[rows], case.values[begin : begin + head_rest])


def test_blocks_are_few_and_descending() -> None:
    assert list(BLOCKS) == sorted(BLOCKS, reverse=True)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("tail", [0, 7])
def test_long_queries(monkeypatch, lengths, sinks, tail) -> None:
    """Chunk, tail in front of it, blocks and what is left: one softmax."""
    dense = Dense()
    monkeypatch.setattr(long_query, "fastest", lambda *args: dense)
    monkeypatch.setattr(long_query, "LONG_QUERY", 16)
    monkeypatch.setattr(long_query, "BLOCK_QUERY", 16)
    monkeypatch.setattr(long_query.attend_to_blocks, "__defaults__", ((64, 16),))
    case = Zipped(lengths, t=20, tail=tail, sinks=sinks)
    assert_near(case.run(kernel), case.expected(), FLOAT32)
    assert len(dense.asked) > 1 + bool(tail) or max(lengths) < 16


@pytest.mark.skipif(not ON_GPU, reason="needs the dense kernels of a GPU")
@pytest.mark.parametrize("lengths", [[20_481, 0, 4095], [4096, 37_000, 1]], ids=str)
@pytest.mark.parametrize("group", [1, 4])
def test_blocks_by_the_fastest_kernel(lengths, group) -> None:
    t = long_query.BLOCK_QUERY
    Zipped(lengths, group=group, t=t, tail=3, dim=128, dtype=BFLOAT16).check(kernel)


def test_rows_of_a_batch_take_no_blocks(monkeypatch) -> None:
    dense = Dense()
    monkeypatch.setattr(long_query, "fastest", lambda *args: dense)
    monkeypatch.setattr(long_query, "LONG_QUERY", 16)
    monkeypatch.setattr(long_query, "BLOCK_QUERY", 16)
    Zipped([5000], batch=2, t=20).check(kernel)
    assert dense.asked == [(20, True)]
