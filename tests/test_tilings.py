"""How attention is cut up: nothing is left out, and a device is filled in one go."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import DIMS
from kvzip.kernels.tilings import Tiling, choose_quantized_tiling, choose_split, choose_tiling

QUERIES = [1, 4, 7, 16, 17, 28, 64, 65, 500, 16_000]

tilings = st.builds(
    Tiling,
    block_m=st.sampled_from([16, 64, 128]),
    block_n=st.sampled_from([16, 64, 128]),
    tail_n=st.just(16),
    warps=st.just(4),
    stages=st.just(3),
    programs=st.integers(1, 8),
)
head_lengths = st.lists(st.integers(0, 40_000), min_size=1, max_size=33)


@given(
    tiling=tilings,
    processors=st.integers(1, 132),
    lengths=head_lengths,
    batch=st.integers(1, 16),
    queries=st.integers(1, 600),
    columns=st.integers(0, 9000),
)
def test_every_row_and_column_has_a_program(tiling, processors, lengths, batch, queries, columns):
    heads, m, rows = len(lengths), batch * queries, sum(lengths)
    split = choose_split(
        tiling, processors, batch=batch, kv_heads=heads, m=m, rows=rows, columns=columns
    )
    assert split.tiles * tiling.block_m >= m
    assert sum(-(-length // split.chunk) for length in lengths) <= split.context_slots
    assert split.tail_slots * split.tail_columns >= columns
    assert (split.tail_slots == 0) == (columns == 0)
    assert split.chunk >= tiling.block_n
    assert split.chunk % 16 == 0
    tails, at_once = split.tail_slots * batch * heads, tiling.programs * processors
    if split.tiles == 1 and tails + heads <= at_once // 2:
        assert split.context_slots + tails <= at_once


def test_one_long_head_is_divided_as_many_short_ones():
    """131,072 rows on 132 multiprocessors: two programs each, chunks of one length."""
    tiling = choose_tiling(4, 128, 2)
    split = choose_split(tiling, 132, batch=1, kv_heads=8, m=4, rows=8 * 131_072, columns=256)
    assert (split.tiles, split.tail_slots, split.tail_columns) == (1, 1, 256)
    assert split.chunk == 4240  # 1,048,576 rows among 264 - 8 - 8 programs, a multiple of 16
    assert split.context_slots + split.tail_slots * 8 <= 264


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("m", QUERIES)
def test_tiles_fit_the_matrix_units_and_the_shared_memory(m, dim, element_size):
    plain = choose_tiling(m, dim, element_size)
    quantized = [choose_quantized_tiling(m, dim, element_size, bits) for bits in (4, 8)]
    for tiling in (plain, *quantized):
        for side in (tiling.block_m, tiling.block_n, tiling.tail_n):
            assert side >= 16
            assert side & (side - 1) == 0
    assert 2 * plain.block_n * dim * element_size <= 32 * 1024
