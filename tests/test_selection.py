"""Selection: exact counts, a total order, what must stay, and clear errors."""

from collections import Counter
from decimal import ROUND_FLOOR, Decimal
from fractions import Fraction
from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvzip import Budget, KVzipError
from kvzip.budget import Footprint
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


# Budgets other than a ratio, and what must stay

PAIR, FIXED = 16, 1000


@st.composite
def problems(draw) -> tuple[Tensor, Budget, Fraction | None]:
    """Scores, some of them of evicted pairs, a budget, and the pairs that it gives a head."""
    size = draw(SIZES)
    layers, heads, n = size
    seed = draw(SEEDS)
    generator = torch.Generator().manual_seed(seed)
    evicted = torch.rand(size, generator=generator) < draw(st.sampled_from([0.0, 0.0, 0.1, 0.5]))
    scores = random_scores(size, seed).masked_fill(evicted, -torch.inf)
    must = {}
    if draw(st.booleans()):
        start = draw(st.integers(0, n - 1))
        end = min(n, start + draw(st.integers(1, 3)))
        must = {"min_per_head": draw(st.integers(0, 5)), "keep": [(start, end)]}
    kind = draw(st.sampled_from(["ratio", "tokens", "bytes", "threshold"]))
    if kind == "ratio":
        ratio = draw(st.integers(1, 10)) / 10
        return scores, Budget(ratio, **must), Fraction(repr(ratio)) * n
    if kind == "tokens":
        tokens = draw(st.integers(1, 500)) / 10
        return scores, Budget(tokens=tokens, **must), min(Fraction(repr(tokens)), Fraction(n))
    if kind == "bytes":
        beside = draw(st.integers(0, PAIR * layers * heads * n + 50))
        pairs = min(beside // PAIR, layers * heads * n)
        return scores, Budget(bytes=FIXED + beside, **must), Fraction(pairs, layers * heads)
    return scores, Budget(threshold=draw(st.integers(0, 5)) / 4, **must), None


def oracle(scores: Tensor, budget: Budget, quota: Fraction | None, level: str) -> set | None:
    """The pairs to keep, one by one in plain Python; None where the budget cannot be kept."""
    layers, heads, n = scores.shape
    names = [(layer, head) for layer in range(layers) for head in range(heads)]
    value = {(*name, i): scores[(*name, i)].item() for name in names for i in range(n)}
    held = {pair for pair, score in value.items() if score > -torch.inf}

    def best(pairs: set, count: int) -> set:
        order = sorted(pairs, key=lambda pair: (-value[pair], pair[2], pair[0], pair[1]))
        return set(order[:count])

    everything = {name: {(*name, i) for i in range(n)} for name in names}
    required: dict = {}
    for name in names:
        kept = {(*name, i) for start, end in budget.keep for i in range(start, end)}
        missing = max(0, min(budget.min_per_head, n) - len(kept))
        required[name] = kept | best(everything[name] - kept, missing)
    must = set().union(*required.values())
    r = len(required[names[0]])
    if not must <= held or (quota is not None and r > quota):
        return None
    limit = budget.ratio is None
    tops = {name: max(value[pair] for pair in everything[name]) for name in names}
    if quota is None:
        if level == "pair":
            return must | {pair for pair in held if value[pair] >= budget.threshold}
        chosen = [name for name in names if tops[name] >= budget.threshold]
    elif level == "pair":
        count = floor(quota * len(names))
        if count > len(held) and not limit:
            return None
        return must | best(held - must, min(count, len(held)) - len(must))
    elif level == "pair-uniform":
        count = floor(quota)
        if not limit and any(len(everything[name] & held) < count for name in names):
            return None
        rest = (best((everything[name] & held) - must, count - r) for name in names)
        return must.union(*rest)
    else:
        # as many whole heads as leave room for what the others must keep
        count = max(
            count
            for count in range(len(names) + 1)
            if count * n + (len(names) - count) * r <= quota * len(names)
        )
        there = sum(top > -torch.inf for top in tops.values())
        if count > there and not limit:
            return None
        chosen = sorted(names, key=lambda name: (-tops[name], name))[: min(count, there)]
    whole = must.union(*(everything[name] for name in chosen))
    return whole if whole <= held else None


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=200)
@given(problem=problems())
def test_any_budget_keeps_what_an_oracle_keeps(level, problem):
    scores, budget, quota = problem
    if quota is None and level == "pair-uniform":
        with pytest.raises(KVzipError, match="choose level 'pair' or 'head'"):
            select(scores, budget, level)
        return
    expected = oracle(scores, budget, quota, level)
    if expected is None:
        with pytest.raises(KVzipError, match=r"already evicted|pairs a head"):
            select(scores, budget, level, Footprint(FIXED, PAIR))
        return
    mask = select(scores, budget, level, Footprint(FIXED, PAIR))
    assert (mask.dtype, mask.shape) == (torch.bool, scores.shape)
    assert chosen(mask) == expected
    if quota is not None:
        assert len(expected) <= quota * scores.shape[0] * scores.shape[1]


@pytest.mark.parametrize("level", LEVELS)
@given(size=SIZES, one=RATIOS, other=RATIOS, seed=SEEDS)
def test_a_smaller_budget_keeps_a_subset_beside_what_must_stay(level, size, one, other, seed):
    scores = random_scores(size, seed)
    must = {"min_per_head": 1, "keep": [(0, 1)]}
    ratios = [min(1.0, ratio + 1 / size[2]) for ratio in sorted((one, other))]
    small, large = (select(scores, Budget(ratio, **must), level) for ratio in ratios)
    assert not (small & ~large).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threshold", [0.1, 0.7, -4.3])
def test_a_threshold_is_rounded_like_the_scores(dtype, threshold):
    exact = torch.tensor(threshold, dtype=dtype)
    scores = torch.stack([exact, torch.nextafter(exact.double(), torch.tensor(-9.0).double())])
    assert select(scores.to(dtype).view(1, 1, 2), Budget(threshold=threshold))[0, 0, 0]
    below = torch.nextafter(exact, torch.tensor(-torch.inf, dtype=dtype))
    assert not select(below.view(1, 1, 1), Budget(threshold=threshold)).any()


def test_scores_of_infinity_do_not_displace_what_must_stay():
    scores = torch.tensor([[[torch.inf, torch.inf, torch.inf, 0.0]]])
    mask = select(scores, Budget(tokens=2, min_per_head=2, keep=[(3, 4)]))
    assert mask[0, 0].tolist() == [True, False, False, True]


def test_spans_count_for_the_pairs_of_a_head_and_its_best_others_are_added():
    scores = torch.tensor([[[0.9, 0.8, 0.2, 0.3, 0.1], [0.4, 0.5, 0.1, 0.2, 0.3]]])
    budget = Budget(tokens=3, min_per_head=3, keep=[(0, 2)])
    assert select(scores, budget)[0].tolist() == [
        [True, True, False, True, False],
        [True, True, False, False, True],
    ]


@pytest.mark.parametrize("level", ["pair", "pair-uniform"])
@pytest.mark.parametrize(
    ("ratio", "window", "favoured"), [(0.5, 4, 4), (0.5, 40, 6), (0.3, 40, 3), (0.05, 4, 0)]
)
def test_the_last_tokens_come_first_within_an_eighth_of_the_budget(level, ratio, window, favoured):
    """Of 100 tokens; the best scores are those of the first."""
    scores = -torch.arange(100.0).expand(2, 3, 100).contiguous()
    kept = select(scores, ratio, level, window=window)
    expected = torch.zeros(100, dtype=torch.bool)
    expected[: int(ratio * 100) - favoured] = True
    expected[100 - favoured :] = True
    assert torch.equal(kept, expected.expand(2, 3, 100))


def test_evicted_pairs_of_the_last_tokens_never_return():
    scores = torch.rand(2, 3, 100)
    scores[0, 0, 95:] = -torch.inf
    kept = select(scores, 0.5, window=10)
    assert not kept[0, 0, 95:].any()
    assert kept[1, :, 94:].all()
    assert int(kept.sum()) == 300


def test_whole_heads_do_not_care_for_the_last_tokens():
    scores = torch.rand(2, 3, 100)
    assert torch.equal(select(scores, 0.5, "head", window=10), select(scores, 0.5, "head"))


@pytest.mark.parametrize("small", [0.1, 0.3])
def test_a_smaller_budget_keeps_a_subset_of_the_last_tokens_too(small):
    scores = torch.rand(2, 3, 100)
    assert not (select(scores, small, window=20) & ~select(scores, 0.6, window=20)).any()
