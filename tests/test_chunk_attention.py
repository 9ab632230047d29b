"""Dense attention of a chunk: blending two softmaxes, and the kernels that PyTorch brings along."""

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
    LOGITS,
    MARKS,
    Chunk,
    assert_near,
    attend,
    by_token,
    random,
)
from kvzip.kernels import chunk_attention, dense, reference

pytestmark = MARKS
HALF = [FLOAT16, BFLOAT16]
SIZES = [(1, 0), (1, 70), (5, 0), (63, 64), (64, 1), (130, 257), (7, 1000)]


class TestBlend:
    """Attention over two sets of keys from attention over each."""

    def parts(self, case: Chunk, dtype: torch.dtype) -> list[Tensor]:
        """Outputs and log-sum-exps over the context and over the chunk, every pair visible."""
        parts = []
        for columns in (slice(0, case.s), slice(case.s, case.s + case.query.shape[2])):
            keys, values = (
                buffer[:, :, columns].repeat_interleave(2, dim=1).double()
                for buffer in (case.keys, case.values)
            )
            logits = case.query.double() @ keys.mT * case.logits.scale
            parts += [(logits.softmax(-1) @ values).to(dtype), torch.logsumexp(logits, -1).float()]
        return parts

    def check(self, case: Chunk, dtype: torch.dtype, layouts: tuple) -> Tensor:
        one, one_lse, other, other_lse = self.parts(case, dtype)
        one, other = layouts[0](one), layouts[1](other)
        end = case.s + case.query.shape[2]
        visible = torch.ones(case.query.shape[2], end, device=DEVICE).bool()
        expected = torch.stack(
            [
                torch.stack(
                    [
                        attend(
                            query, case.keys[b, h // 2, :end], case.values[b, h // 2, :end],
                            visible, case.logits,
                        )
                        for h, query in enumerate(row)
                    ]
                )
                for b, row in enumerate(case.query)
            ]
        )  # fmt: skip
        kept = other.clone()
        got, lse = dense.blend(one, one_lse, other, other_lse)
        assert got is one
        assert torch.equal(other, kept)
        torch.testing.assert_close(lse, torch.logaddexp(one_lse, other_lse))
        assert_near(got, expected, dtype)
        return got

    # blending multiplies no matrices: the interpreter is right in bfloat16, too
    @pytest.mark.parametrize("dtype", [FLOAT32, *HALF], ids=str)
    @pytest.mark.parametrize("dim", DIMS)
    def test_dimensions(self, dim, dtype):
        self.check(Chunk(5, 9, dim=dim, dtype=dtype), dtype, (by_token, by_token))

    @pytest.mark.parametrize("t", [1, 31, 32, 33, 63, 130])
    @pytest.mark.parametrize("batch", [1, 3])
    def test_sizes(self, batch, t):
        self.check(Chunk(t, 9, batch=batch), FLOAT32, (by_token, by_token))

    @pytest.mark.parametrize("one", [by_token, Tensor.contiguous])
    @pytest.mark.parametrize("other", [by_token, Tensor.contiguous])
    def test_layouts(self, one, other):
        """The two kernels may lay their outputs out differently."""
        self.check(Chunk(33, 9, batch=3), FLOAT32, (one, other))

    def test_log_sum_exps_with_gaps(self):
        """Log-sum-exps need not be contiguous."""
        one, one_lse, other, other_lse = self.parts(Chunk(33, 9, batch=3), FLOAT32)
        expected, _ = dense.blend(one.clone(), one_lse, other, other_lse)
        one_lse, other_lse = (
            lse.transpose(1, 2).contiguous().transpose(1, 2) for lse in (one_lse, other_lse)
        )
        assert torch.equal(dense.blend(one, one_lse, other, other_lse)[0], expected)

    @pytest.mark.parametrize("gap", [-400.0, 0.0, 400.0])
    def test_far_apart(self, gap):
        """One side outweighs the other by far, and nothing overflows."""
        one, other = random(1, 2, 9, 32, seed=1), random(1, 2, 9, 32, seed=2)
        lse = random(1, 2, 9)
        expected = {-400.0: one.clone(), 0.0: (one + other) / 2, 400.0: other}[gap]
        got, _ = dense.blend(one, lse, other, lse + gap)
        torch.testing.assert_close(got, expected)

    def test_nothing_seen(self):
        """What saw nothing has no share, whatever it holds."""
        one, lse = random(1, 2, 9, 32), random(1, 2, 9)
        nothing = torch.full_like(lse, -torch.inf)
        got, both = dense.blend(one.clone(), lse, random(1, 2, 9, 32, seed=1), nothing)
        assert torch.equal(got, one)
        torch.testing.assert_close(both, lse)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("t", "s"), [(1, 0), (1, 65), (7, 0), (5, 64)])
def test_falls_back_to_the_reference(monkeypatch, t, s, group):
    """Where PyTorch has no faster kernel."""
    asked = []
    monkeypatch.setattr(chunk_attention, "fastest", lambda *args: asked.append(args))
    case = Chunk(t, s, batch=2, group=group)
    case.check(chunk_attention.chunk_attention)
    assert asked == [(case.query.device, FLOAT32, 32)]
    assert torch.equal(
        case.run(chunk_attention.chunk_attention), case.run(reference.chunk_attention)
    )


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("s", [0, 40])
def test_blends_what_the_fastest_kernel_gives(monkeypatch, s, sinks):
    """The chunk is attended to causally, the context in full, and an empty one not at all."""
    asked = []

    def attend_somehow(query, keys, values, scale, causal):
        asked.append((keys.shape[2], causal))
        keys, values = (part.repeat_interleave(2, dim=1).double() for part in (keys, values))
        logits = query.double() @ keys.mT * scale
        if causal:
            hidden = torch.ones(logits.shape[-2:], device=DEVICE).triu(1).bool()
            logits = logits.masked_fill(hidden, -torch.inf)
        out = (logits.softmax(-1) @ values).float()
        return out, logits.logsumexp(-1).float()

    monkeypatch.setattr(chunk_attention, "fastest", lambda *args: attend_somehow)
    Chunk(33, s, batch=2, sinks=sinks).check(chunk_attention.chunk_attention)
    assert asked == ([(33, True), (40, False)] if s else [(33, True)])


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("t", "s"), [(1, 0), (5, 64), (130, 33)])
def test_capped_logits_are_left_to_the_kernel_for_packed_pairs(monkeypatch, t, s, sinks):
    monkeypatch.setattr(chunk_attention, "fastest", lambda *args: 1 / 0)
    case = Chunk(t, s, batch=2, group=3, softcap=0.7, sinks=sinks)
    case.check(chunk_attention.chunk_attention)


@pytest.mark.gpu
class TestOnAGPU:
    """The kernels that are used in fact."""

    @pytest.fixture(params=["fastest", "_cudnn", "_flash"])
    def kernel(self, request, monkeypatch):
        """The one that is chosen, and each by itself where it works."""

        def choose(dtype: torch.dtype, dim: int):
            if request.param != "fastest":
                chosen = getattr(dense, request.param)
                if dense._works(chosen, torch.device("cuda"), dtype, dim):
                    monkeypatch.setattr(chunk_attention, "fastest", lambda *args: chosen)
            return chunk_attention.chunk_attention

        return choose

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    @pytest.mark.parametrize("dim", [64, 96, 128, 256])
    @pytest.mark.parametrize(("t", "s"), SIZES)
    def test_sizes(self, kernel, t, s, dim, dtype):
        Chunk(t, s, dim=dim, dtype=dtype).check(kernel(dtype, dim))

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    @pytest.mark.parametrize("group", GROUPS)
    @pytest.mark.parametrize("batch", [1, 3])
    def test_groups(self, kernel, batch, group, dtype):
        case = Chunk(65, 130, batch=batch, heads=3, group=group, dim=128, dtype=dtype)
        case.check(kernel(dtype, 128))

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    @pytest.mark.parametrize("how", LOGITS.values(), ids=LOGITS)
    def test_capped_logits_and_sinks(self, kernel, how, dtype):
        case = Chunk(130, 1000, group=4, dim=128, dtype=dtype, **how)
        case.check(kernel(dtype, 128))

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    @pytest.mark.parametrize("dim", [64, 128])
    def test_half_precision_has_a_fast_kernel(self, dim, dtype):
        assert dense.fastest(torch.device("cuda"), dtype, dim) is not None

    @pytest.mark.parametrize("dim", [32, 80, 128, 256])
    def test_float32_is_left_to_the_reference(self, dim):
        assert dense.fastest(torch.device("cuda"), FLOAT32, dim) is None
        Chunk(37, 70, dim=dim).check(chunk_attention.chunk_attention)

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    def test_a_long_context_in_a_buffer(self, kernel, dtype):
        Chunk(1000, 20_000, heads=2, group=4, dim=128, dtype=dtype).check(kernel(dtype, 128))

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    def test_the_same_call_gives_the_same_bits(self, dtype):
        case = Chunk(130, 257, dim=128, dtype=dtype)
        first = case.run(chunk_attention.chunk_attention)
        assert torch.equal(case.run(chunk_attention.chunk_attention), first)

    def test_a_kernel_that_is_wrong_is_not_used(self, monkeypatch):
        """A kernel that raises, and one whose result is off, are both passed over."""

        def raises(*args):
            raise RuntimeError("no such kernel")

        def forgets_the_scale(query, keys, values, scale, causal):
            return dense._flash(query, keys, values, 1.0, causal)

        device = torch.device("cuda")
        assert dense._works(dense._flash, device, FLOAT16, 64)
        assert not dense._works(raises, device, FLOAT16, 64)
        assert not dense._works(forgets_the_scale, device, FLOAT16, 64)
