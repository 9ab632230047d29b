"""The Triton kernels for scores by reconstruction against float64, unwritten memory being NaN."""

import random as randomness
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import (
    BFLOAT16,
    DEVICE,
    DIMS,
    FLOAT16,
    FLOAT32,
    GROUPS,
    KERNEL_DTYPES,
    LOGITS,
    MARKS,
    ON_GPU,
    Repeating,
    poison,
    random,
)
from kvzip.kernels import reconstruction_score, reference

pytestmark = MARKS
by_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)


def kernel(*args: object, **weights: Tensor) -> Tensor:
    """Scores; what the kernels write to is NaN at first."""
    with poison() as made:
        scores = reconstruction_score.reconstruction_score(*args, **weights)
    assert len(made) >= 2  # log-sum-exp, largest of each split
    return scores


class Weighted(Repeating):
    """Products of probabilities and weights, some of them 0, that differ by orders of magnitude.

    Args:
        by: `"query"`, `"key"` or `"both"`.
    """

    def __init__(self, p: int, m: int, t: int, *, by: str = "both", **how: Any) -> None:
        super().__init__(p, m, t, **how)
        heads = len(self.query)
        sizes = {"query": t, "key": m} if by == "both" else {by: {"query": t, "key": m}[by]}
        self.weights = {
            f"{name}_weights": (random(heads, size, seed=size) * 3).exp()
            for name, size in sizes.items()
        }
        for weights in self.weights.values():
            weights[:, 2::5] = 0

    def run(self, score: Callable[..., Tensor]) -> Tensor:
        return score(self.query, self.prefix, self.chunk, self.repeat, self.logits, **self.weights)

    def expected(self) -> Tensor:
        heads, p, _ = self.prefix.shape
        m, t = self.chunk.shape[1], self.repeat.shape[1]
        keys = torch.cat([self.prefix, self.chunk, self.repeat], dim=1).double()
        keys = keys.repeat_interleave(len(self.query) // heads, dim=0)
        hidden = torch.ones(t, p + m + t, device=DEVICE).triu(p + m + 1).bool()
        logits = self.query.double() @ keys.mT * self.logits.scale
        products = logits.masked_fill(hidden, -torch.inf).softmax(-1)[..., p : p + m]
        if "query_weights" in self.weights:
            products = products * self.weights["query_weights"].double()[:, :, None]
        if "key_weights" in self.weights:
            products = products * self.weights["key_weights"].double()[:, None, :]
        return products.unflatten(0, (heads, -1)).amax((1, 2))

    def check(self, score: Callable[..., Tensor]) -> Tensor:
        got, expected = self.run(score), self.expected()
        assert got.dtype == FLOAT32
        assert not torch.allclose(expected, super().expected(), rtol=0.1)
        torch.testing.assert_close(got.double(), expected, atol=1e-7, rtol=1e-4)
        return got


@by_dtype
@pytest.mark.parametrize(
    ("p", "m", "t"),
    [
        (5, 1, 1), (0, 7, 9), (0, 1, 1), (3, 63, 70), (64, 65, 66), (1, 111, 3), (3, 2, 130),
        (63, 64, 65), (127, 128, 129), (128, 129, 127), (129, 127, 128), (1, 130, 257),
    ],
)  # fmt: skip
def test_sizes(p, m, t, dtype):
    Repeating(p, m, t, dtype=dtype).check(kernel)


@by_dtype
@pytest.mark.parametrize("dim", DIMS)
def test_dimensions(dim, dtype):
    Repeating(4, 9, 66, group=2, dim=dim, dtype=dtype).check(kernel)


@by_dtype
@pytest.mark.parametrize("group", GROUPS)
def test_groups(group, dtype):
    Repeating(4, 9, 6, group=group, dtype=dtype).check(kernel)


@pytest.mark.parametrize("heads", [1, 3, 8])
def test_numbers_of_heads(heads):
    Repeating(4, 130, 9, heads=heads, group=3).check(kernel)


@by_dtype
@pytest.mark.parametrize("how", LOGITS.values(), ids=LOGITS)
@pytest.mark.parametrize(("p", "m", "t"), [(4, 9, 66), (0, 129, 5), (70, 1, 1)])
def test_capped_logits_and_sinks(p, m, t, how, dtype):
    Repeating(p, m, t, group=3, dtype=dtype, **how).check(kernel)


def test_capped_logits_and_sinks_with_weights():
    case = Weighted(4, 9, 66, group=3, softcap=0.7, sinks=True)
    expected = case.run(reference.reconstruction_score)
    torch.testing.assert_close(case.run(kernel), expected, atol=1e-6, rtol=1e-4)


@by_dtype
@pytest.mark.parametrize("sharpness", [1e-3, 30.0, 300.0])
def test_flat_and_sharp_logits(sharpness, dtype):
    """Sharp logits give scores near 0 and 1, of which those near 0 are compared loosely."""
    case = Repeating(4, 70, 66, sharpness=sharpness, dtype=dtype)
    got, expected = case.run(kernel), case.expected()
    error = (got.double() - expected).abs()
    assert (error <= 1e-3 * expected + 1e-7).all()
    assert expected.max() > (0.9 if sharpness > 1 else 0.01)


@pytest.mark.parametrize("score", [kernel, reference.reconstruction_score], ids=["triton", "ref"])
@pytest.mark.parametrize("by", ["query", "key", "both"])
@pytest.mark.parametrize(
    ("p", "m", "t"),
    [(5, 1, 1), (0, 7, 9), (3, 63, 70), (64, 65, 66), (129, 127, 128), (1, 130, 257)],
)
def test_weights(p, m, t, by, score):
    Weighted(p, m, t, by=by).check(score)


@by_dtype
@pytest.mark.parametrize("group", GROUPS)
def test_weights_of_each_query_head(group, dtype):
    Weighted(4, 9, 6, group=group, heads=3, dim=80, dtype=dtype).check(kernel)


@pytest.mark.parametrize("programs", [1, 3, 1000])
def test_weights_with_any_division_among_programs(monkeypatch, programs):
    monkeypatch.setattr(reconstruction_score, "_programs", lambda device: programs)
    Weighted(4, 66, 140, group=5, heads=1).check(kernel)


def test_weights_in_blocks_of_queries(monkeypatch):
    monkeypatch.setattr(reference, "MAX_LOGITS", 4 * 10 * 120)
    Weighted(4, 66, 50).check(reference.reconstruction_score)


def test_weights_of_one_change_nothing():
    case = Weighted(4, 130, 140)
    alone = case.run(lambda *args, **weights: kernel(*args))
    case.weights = {name: torch.ones_like(weights) for name, weights in case.weights.items()}
    assert torch.equal(case.run(kernel), alone)


def test_weights_of_zero_give_zero():
    case = Weighted(4, 9, 6)
    for name in ("query_weights", "key_weights"):
        weights = {**case.weights, name: torch.zeros_like(case.weights[name])}
        for score in (kernel, reference.reconstruction_score):
            got = score(case.query, case.prefix, case.chunk, case.repeat, case.logits, **weights)
            assert torch.equal(got, torch.zeros_like(got))


def test_each_query_sees_itself_and_no_later_token():
    """Later tokens of the repeat input would take all of the softmax."""
    case = Repeating(2, 5, 140)
    case.repeat.copy_(torch.arange(140, device=case.repeat.device)[None, :, None] / 4.0)
    case.query.copy_(case.query.abs() + 1)
    case.check(kernel)


@pytest.mark.parametrize("programs", [1, 3, 20, 1000])
def test_any_division_among_programs(monkeypatch, programs):
    """One program for all queries of a KV head, or one for each tile of them."""
    monkeypatch.setattr(reconstruction_score, "_programs", lambda device: programs)
    Repeating(4, 66, 140, group=5, heads=1).check(kernel)


@pytest.mark.parametrize("seed", range(30 if ON_GPU else 8))
def test_random_cases(seed):
    pick = randomness.Random(seed)
    longest = pick.choice([3, 70, 1500 if ON_GPU else 200])
    Repeating(
        pick.randint(0, longest),
        pick.randint(1, longest),
        pick.randint(1, longest),
        heads=pick.choice([1, 2, 5]),
        group=pick.choice(GROUPS if ON_GPU else [1, 4, 7]),
        dim=pick.choice(DIMS),
        dtype=pick.choice([FLOAT32, FLOAT16, BFLOAT16] if ON_GPU else [FLOAT32, FLOAT16]),
        before=pick.choice([0, 1, 100]),
    ).check(kernel)


def test_a_chunk_as_long_as_in_use():
    size = 2048 if ON_GPU else 300
    Repeating(30, size, size + 20, group=4 if ON_GPU else 1, dim=64).check(kernel)


@by_dtype
def test_the_same_call_gives_the_same_bits(dtype):
    case = Repeating(4, 130, 140, dtype=dtype)
    first = case.run(kernel)
    for _ in range(3):
        assert torch.equal(case.run(kernel), first)


def test_calls_do_not_know_of_each_other():
    cases = [Repeating(4, 130, 140), Repeating(0, 9, 5, group=7, dim=64, heads=3)]
    alone = [case.check(kernel) for case in cases]
    for _ in range(2):
        for case, expected in zip(cases, alone, strict=True):
            assert torch.equal(case.run(kernel), expected)


def test_layouts():
    """Queries as transformers makes them or contiguous; keys of their own or parts of buffers."""
    case = Repeating(4, 70, 66)
    for query in (case.query, case.query.contiguous()):
        case.query = query
        case.check(kernel)
    for name in ("prefix", "chunk", "repeat"):
        setattr(case, name, getattr(case, name).contiguous())
    case.check(kernel)


def test_inputs_are_not_changed():
    case = Repeating(4, 70, 66)
    parts = [case.query, case.prefix, case.chunk, case.repeat]
    copies = [part.clone() for part in parts]
    case.run(kernel)
    assert all(map(torch.equal, parts, copies))


def test_scores_rank_as_the_reference_ranks_them():
    """What is kept depends on the order of scores."""
    case = Repeating(4, 200, 70, group=4)
    got, expected = case.run(kernel), case.run(reference.reconstruction_score)
    order = expected.argsort(dim=-1, descending=True)
    ranked = got.gather(1, order)
    assert (ranked[:, 1:] <= ranked[:, :-1] * (1 + 1e-4)).all()
