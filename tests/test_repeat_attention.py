"""Attention of a repeat input and the scores that come with it, against float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import (
    BOUNDS,
    DEVICE,
    DIMS,
    FLOAT32,
    GROUPS,
    KERNEL_DTYPES,
    LOGITS,
    MARKS,
    ON_GPU,
    Dense,
    Repeating,
    assert_near,
    attend,
    random,
    with_spare,
)
from kvzip.kernels import chunk_attention, reference, repeat_attention

pytestmark = MARKS
by_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)


@pytest.fixture(params=["dense", "none"])
def kernel(request, monkeypatch) -> Callable[..., tuple[Tensor, Tensor]]:
    """With a dense kernel, and where there is none; on a GPU with the one that is found."""
    if not ON_GPU or request.param == "none":
        dense = Dense() if request.param == "dense" else None
        for module in (repeat_attention, chunk_attention):
            monkeypatch.setattr(module, "fastest", lambda *args: dense)
    return repeat_attention.repeat_attention


class Case(Repeating):
    """Inputs of `repeat_attention`: values beside the keys of `Repeating`."""

    def __init__(self, p: int, m: int, t: int, **how) -> None:
        super().__init__(p, m, t, **how)
        heads, dim, dtype = len(self.prefix), self.query.shape[-1], self.query.dtype
        values = (random(heads, size, dim, seed=9 + size, dtype=dtype) for size in (p, m, t))
        self.values = [with_spare(part, 1, 3)[:, : part.shape[1]] for part in values]

    def run(self, operation: Callable[..., tuple[Tensor, Tensor]], **weights) -> Tensor:
        prefix, chunk, own = self.values
        self.out, scores = operation(
            self.query[None],
            self.prefix,
            prefix,
            self.chunk,
            chunk,
            self.repeat[None],
            own[None],
            self.logits,
            **weights,
        )
        return scores

    def check(self, operation: Callable[..., tuple[Tensor, Tensor]]) -> None:
        scores, expected = self.run(operation), self.expected()
        dtype = self.query.dtype
        assert (scores.double() - expected).norm() <= BOUNDS[dtype] * expected.norm()
        assert_near(self.out[0], self.attended(), dtype)

    def attended(self) -> Tensor:
        t, seen = self.query.shape[1], self.prefix.shape[1] + self.chunk.shape[1]
        visible = torch.ones(t, seen + t, device=DEVICE).tril(seen).bool()
        keys = torch.cat([self.prefix, self.chunk, self.repeat], dim=1)
        values = torch.cat(self.values, dim=1)
        group = len(self.query) // len(keys)
        return torch.stack(
            [
                attend(
                    query, keys[head // group], values[head // group], visible, self.logits, head
                )
                for head, query in enumerate(self.query)
            ]
        )


@by_dtype
@pytest.mark.parametrize(
    ("p", "m", "t"), [(5, 1, 1), (0, 7, 9), (3, 63, 70), (64, 65, 66), (129, 127, 128)]
)
def test_sizes(kernel, p, m, t, dtype):
    Case(p, m, t, dtype=dtype).check(kernel)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("group", [GROUPS[0], GROUPS[2]])
def test_dimensions_and_groups(kernel, dim, group):
    Case(4, 9, 66, group=group, dim=dim).check(kernel)


@pytest.mark.parametrize("how", LOGITS.values(), ids=LOGITS)
def test_capped_logits_and_sinks(kernel, how):
    Case(4, 9, 66, group=3, **how).check(kernel)


@pytest.mark.parametrize("how", [{}, *LOGITS.values()], ids=["plain", *LOGITS])
def test_weights(kernel, how):
    """Against the reference, which is held to float64 where it scores alone."""
    case = Case(4, 70, 66, **how)
    weights = {
        "query_weights": random(4, 66, seed=1).exp(),
        "key_weights": random(4, 70, seed=2).exp(),
    }
    expected = case.run(reference.repeat_attention, **weights)
    assert not torch.allclose(expected, case.run(reference.repeat_attention), rtol=0.1)
    got = case.run(kernel, **weights)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("p", "m", "t"), [(5, 1, 1), (0, 7, 9), (3, 63, 70)])
def test_the_reference(p, m, t):
    Case(p, m, t, group=3).check(reference.repeat_attention)
    Case(p, m, t, softcap=0.7, sinks=True).check(reference.repeat_attention)


def test_inputs_are_not_changed(kernel):
    case = Case(4, 70, 66)
    parts = [case.query, case.prefix, case.chunk, case.repeat, *case.values]
    copies = [part.clone() for part in parts]
    case.run(kernel)
    assert all(map(torch.equal, parts, copies))
    assert case.out.dtype == FLOAT32
