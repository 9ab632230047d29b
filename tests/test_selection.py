"""Selection: exact counts, a total order, and clear errors."""

from collections import Counter
from decimal import ROUND_FLOOR, Decimal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvzip import KVzipError
from kvzip.selection import LEVELS, select

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 40))
RATIOS = st.integers(1, 1000).map(lambda thousandths: thousandths / 1000)
SEEDS = st.integers(0, 1000)


def floor_of(ratio: float, total: int) -> int:
    """floor(ratio * total) for the decimal number that was written."""
    return int((Decimal(repr(ratio)) * total).to_integral_value(ROUND_FLOOR))


def random_scores(size: tuple[int, int, int], seed: int, distinct: bool = False) -> Tensor:
    """Scores `[L, H, n]`: all different, or of four values only."""
    generator = torch.Generator().manual_seed(seed)
    total = size[0] * size[1] * size[2]
    if distinct:
        return torch.randperm(total, generator=generator).view(size) / total
    return torch.randint(4, size, generator=generator) / 4


def best_pairs(scores: Tensor, count: int) -> set[tuple[int, int, int]]:
    """The best pairs as (layer, head, position), sorted in plain Python."""
    layers, heads, n = scores.shape
    pairs = [(l, h, i) for l in range(layers) for h in range(heads) for i in range(n)]  # noqa: E741
    pairs.sort(key=lambda pair: (-scores[pair].item(), pair[2], pair[0], pair[1]))
    return set(pairs[:count])


def chosen(mask: Tensor) -> set[tuple[int, int, int]]:
    return {tuple(pair) for pair in mask.nonzero().tolist()}


@given(SIZES, RATIOS, SEEDS)
def test_pair_keeps_the_best_with_ties_by_position_layer_head(size, ratio, seed):
    scores = random_scores(size, seed)
    mask = select(scores, ratio)
    count = floor_of(ratio, scores.numel())
    assert mask.dtype == torch.bool
    assert mask.shape == scores.shape
    assert mask.sum() == count
    assert chosen(mask) == best_pairs(scores, count)


@given(SIZES, RATIOS, SEEDS)
def test_pair_uniform_keeps_the_best_of_every_head(size, ratio, seed):
    scores = random_scores(size, seed)
    mask = select(scores, ratio, "pair-uniform")
    for layer in range(size[0]):
        for head in range(size[1]):
            alone = scores[layer : layer + 1, head : head + 1]
            best = {i for _, _, i in best_pairs(alone, floor_of(ratio, size[2]))}
            assert set(mask[layer, head].nonzero().flatten().tolist()) == best


@given(SIZES, RATIOS, SEEDS)
def test_head_keeps_whole_heads_by_their_largest_score(size, ratio, seed):
    scores = random_scores(size, seed)
    mask = select(scores, ratio, "head")
    best = best_pairs(scores.amax(-1, keepdim=True), floor_of(ratio, size[0] * size[1]))
    for layer in range(size[0]):
        for head in range(size[1]):
            assert mask[layer, head].all() == ((layer, head, 0) in best)
            assert mask[layer, head].any() == ((layer, head, 0) in best)


@given(SIZES, RATIOS, SEEDS)
def test_the_order_of_layers_does_not_matter_for_distinct_scores(size, ratio, seed):
    scores = random_scores(size, seed, distinct=True)
    order = torch.randperm(size[0], generator=torch.Generator().manual_seed(seed))
    assert torch.equal(select(scores[order], ratio), select(scores, ratio)[order])


@given(SIZES, RATIOS, SEEDS)
def test_the_kept_scores_do_not_depend_on_the_order_of_equals(size, ratio, seed):
    scores = random_scores(size, seed)
    generator = torch.Generator().manual_seed(seed)
    shuffled = scores.flatten()[torch.randperm(scores.numel(), generator=generator)].view(size)
    kept, kept_shuffled = (Counter(s[select(s, ratio)].tolist()) for s in (scores, shuffled))
    assert kept == kept_shuffled


@pytest.mark.parametrize("level", LEVELS)
@given(size=SIZES, one=RATIOS, other=RATIOS, seed=SEEDS)
def test_a_smaller_ratio_keeps_a_subset(level, size, one, other, seed):
    scores = random_scores(size, seed)
    small, large = (select(scores, ratio, level) for ratio in sorted((one, other)))
    assert not (small & ~large).any()


@pytest.mark.parametrize("level", LEVELS)
@given(size=SIZES, seed=SEEDS)
def test_ratio_one_keeps_everything(level, size, seed):
    assert select(random_scores(size, seed), 1.0, level).all()
    assert select(random_scores(size, seed), 1, level).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("ratio", [1e-12, 5e-324, 0.0999])
def test_a_tiny_ratio_keeps_nothing(level, ratio):
    assert not select(torch.rand(1, 2, 5), ratio, level).any()


@pytest.mark.parametrize(
    ("ratio", "count"), [(0.29, 29), (0.57, 57), (0.58, 58), (0.07, 7), (1 / 3, 33), (0.999, 99)]
)
def test_ratios_count_as_the_decimals_that_were_written(ratio, count):
    assert select(torch.rand(2, 5, 10), ratio).sum() == count


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_scores_of_any_dtype(dtype):
    scores = torch.tensor([[[0.5, 0.25, 0.75, 0.5]]], dtype=dtype)
    assert select(scores, 0.5)[0, 0].tolist() == [True, False, True, False]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("ratio", [0, -1, 1.0001, torch.nan, torch.inf, -torch.inf, "x", None, [1]])
def test_bad_ratios_are_refused(level, ratio):
    with pytest.raises(KVzipError, match=r"in \(0, 1\]"):
        select(torch.rand(2, 2, 5), ratio, level)


@pytest.mark.parametrize("level", ["", "pairs", "PAIR", None])
def test_unknown_levels_are_refused(level):
    with pytest.raises(KVzipError, match="unknown level"):
        select(torch.rand(2, 2, 5), 0.5, level)


@pytest.mark.parametrize("level", LEVELS)
def test_nan_scores_are_refused(level):
    scores = torch.rand(2, 2, 5)
    scores[1, 0, 3] = torch.nan
    with pytest.raises(KVzipError, match="NaN"):
        select(scores, 0.5, level)


@given(SIZES, RATIOS, SEEDS)
def test_evicted_pairs_never_return(size, ratio, seed):
    scores = random_scores(size, seed)
    evicted = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.5
    left = (~evicted).sum().item()
    scores = scores.masked_fill(evicted, -torch.inf)
    if floor_of(ratio, scores.numel()) > left:
        with pytest.raises(KVzipError, match=f"{left} of {scores.numel()} are left"):
            select(scores, ratio)
    else:
        assert not (select(scores, ratio) & evicted).any()


@pytest.mark.parametrize("level", ["pair-uniform", "head"])
def test_a_head_that_lacks_pairs_is_an_error_at_other_levels(level):
    scores = torch.rand(2, 2, 4)
    scores[0, 1, :3] = -torch.inf
    with pytest.raises(KVzipError, match="already evicted"):
        select(scores, 1.0, level)
