"""The Triton kernel for zipped attention against float64, unwritten memory being NaN."""

import random
from dataclasses import replace

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
    LENGTHS,
    LOGITS,
    MARKS,
    ON_GPU,
    Dense,
    Zipped,
    assert_near,
    poison,
)
from kvzip.kernels import long_query, reference, zipped_attention

pytestmark = MARKS
by_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
by_length = pytest.mark.parametrize("on_device", [False, True], ids=["length", "length-on-device"])


def kernel(*args: object, **kwargs: object) -> Tensor:
    """Zipped attention; its partial results and its output are NaN at first."""
    with poison() as made:
        out = zipped_attention.zipped_attention(*args, **kwargs)
    assert len(made) >= 3  # partial results, their log-sum-exp, output
    return out


@by_dtype
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("t", "tail"), [(1, 6), (5, 0)])
def test_head_lengths(lengths, t, tail, dtype):
    Zipped(lengths, t=t, tail=tail, dtype=dtype).check(kernel)


@by_dtype
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("t", [1, 40])
def test_dimensions(dim, t, dtype):
    Zipped([65, 0, 3], group=4, dim=dim, t=t, tail=1, dtype=dtype).check(kernel)


@by_dtype
@pytest.mark.parametrize("group", GROUPS)
def test_groups(group, dtype):
    Zipped([65, 0, 3], group=group, dim=64, t=2, tail=1, dtype=dtype).check(kernel)


@pytest.mark.parametrize(
    ("group", "t"), [(1, 130), (4, 63), (7, 5), (8, 16), (16, 1), (4, 130), (7, 63), (16, 9)]
)
def test_lengths_of_questions(group, t):
    """One tile of query rows, several, and a last one that is not full."""
    Zipped([130, 0, 65], group=group, t=t, tail=3).check(kernel)


@by_dtype
@by_length
@pytest.mark.parametrize(("t", "tail"), [(1, 6), (7, 4), (63, 4)])
def test_rows_that_start_later(t, tail, on_device, dtype):
    last = tail + t - 1
    case = Zipped(
        [129, 0, 7], batch=3, t=t, tail=tail, starts=[0, last // 2, last], on_device=on_device,
        dtype=dtype,
    )  # fmt: skip
    case.check(kernel)


@pytest.mark.parametrize(("group", "t"), [(1, 130), (7, 1), (7, 5)])
def test_batches_without_padding(group, t):
    Zipped([66, 1, 0], batch=3, group=group, t=t, tail=2).check(kernel)


@pytest.mark.parametrize("starts", [None, [0, 3, 20]], ids=["", "starts"])
@pytest.mark.parametrize("window", [1, 2, 16, 10_000])
@pytest.mark.parametrize(("t", "tail"), [(1, 0), (1, 20), (3, 18)])
def test_windows(t, tail, window, starts):
    """The context is the last tokens within the window, the same number in every head."""
    if starts and t + tail <= 20:
        starts = [0] * 3
    context = min(window - 1, 130)
    case = Zipped(
        [context] * 3, batch=3 if starts else 1, t=t, tail=tail, starts=starts, window=window
    )
    case.check(kernel)


@by_dtype
@pytest.mark.parametrize("window", [16, 130])
def test_a_context_that_a_window_leaves_behind(window, dtype):
    """Whole programs see nothing: queries far behind a context that is longer than the window."""
    Zipped([300] * 3, t=3, tail=150, window=window, dtype=dtype).check(kernel)
    Zipped([300] * 3, t=200, window=window, dtype=dtype).check(kernel)
    # rows that start later are less far behind it, and padding is nowhere behind it
    starts = [0, 20, 29]
    Zipped([150] * 3, batch=3, t=3, tail=27, window=window, starts=starts, dtype=dtype).check(
        kernel
    )


@pytest.mark.parametrize("s", [1, 63, 64, 65, 128, 129, 255, 256, 257, 300, 511])
def test_tails_in_a_buffer_with_room(s):
    """The same buffer at every length; behind it there is NaN. From 257 on it is read in parts."""
    Zipped([37, 0, 64], tail=s - 1, spare=512 - s, on_device=True).check(kernel)


@pytest.mark.parametrize("spare_rows", [1, 5, 1000])
@pytest.mark.parametrize("lengths", [[37, 0, 64], [0, 0, 0], [200, 129, 0]], ids=str)
def test_spare_rows_are_not_read(lengths, spare_rows):
    """Keys and values may be longer than what the heads own; behind it there is NaN."""
    Zipped(lengths, t=2, spare_rows=spare_rows).check(kernel)


@pytest.mark.parametrize("t", [2, 17])
def test_questions_in_a_buffer_with_room(t):
    Zipped([37, 0, 64], t=t, tail=225, spare=90, on_device=True).check(kernel)
    Zipped([37, 0, 64], t=t, spare=400, on_device=True).check(kernel)


def test_a_long_tail():
    Zipped([0, 0, 5], tail=9000 if ON_GPU else 1500, t=2).check(kernel)
    Zipped([0, 9, 0], tail=9000 if ON_GPU else 1500, spare=3000, on_device=True).check(kernel)


@by_dtype
@pytest.mark.parametrize("factor", [1e-3, 30.0])
def test_flat_and_sharp_logits(factor, dtype):
    case = Zipped([140, 3, 0], t=3, tail=5, dtype=dtype)
    case.query *= factor
    case.check(kernel)


@by_dtype
def test_logits_far_below_zero(dtype):
    """A running maximum that starts at 0 would lose every weight."""
    case = Zipped([200, 3, 0], t=3, tail=5, dtype=dtype)
    case.query.fill_(4.0)
    for keys in (case.keys, case.tail_keys):
        keys.copy_(keys - 20)
    # float32 holds such logits to five digits only
    assert_near(case.run(kernel), case.expected(), dtype, bound=1e-2)


@pytest.mark.parametrize("seed", range(40 if ON_GPU else 10))
def test_random_cases(seed):
    """Any combination of what the other tests try one by one."""
    pick = random.Random(seed)
    heads, batch, t = (
        pick.choice([1, 2, 3, 8 if ON_GPU else 4]),
        pick.choice([1, 1, 3]),
        pick.choice([1, 1, 2, 33 if ON_GPU else 9]),
    )
    tail = pick.choice([0, 1, 30, 270])
    window = pick.choice([None, None, 5, 100])
    longest = pick.choice([0, 3, 200, 5000 if ON_GPU else 300])
    lengths = [pick.randint(0, longest) * pick.randint(0, 1) for _ in range(heads)]
    padded = pick.random() < 0.5
    case = Zipped(
        [pick.randint(0, 150)] * heads if window else lengths,
        batch=batch,
        group=pick.choice(GROUPS if ON_GPU else [1, 4, 7]),
        t=t,
        tail=tail,
        dim=pick.choice(DIMS),
        dtype=pick.choice([FLOAT32, FLOAT16, BFLOAT16] if ON_GPU else [FLOAT32, FLOAT16]),
        starts=[pick.randrange(t + tail) for _ in range(batch)] if padded else None,
        window=window,
        spare=pick.choice([0, 1, 400]),
        on_device=pick.random() < 0.5,
        seed=seed,
    )
    case.check(kernel)


@by_dtype
def test_the_same_call_gives_the_same_bits(dtype):
    case = Zipped([300, 0, 129], batch=3, t=3, tail=20, starts=[0, 1, 2], dtype=dtype)
    first = case.run(kernel)
    for _ in range(3 if ON_GPU else 1):
        assert torch.equal(case.run(kernel), first)


def test_calls_do_not_know_of_each_other():
    """Two shapes in turns give what each gives alone."""
    cases = [
        Zipped([300, 0, 129], t=3, tail=5),
        Zipped([1, 1], batch=3, t=1, tail=300, dim=64, on_device=True, spare=9),
        Zipped([300, 0, 129], t=3, tail=5, window=None, seed=50),
    ]
    alone = [case.check(kernel) for case in cases]
    for _ in range(2):
        for case, expected in zip(cases, alone, strict=True):
            assert torch.equal(case.run(kernel), expected)


def test_inputs_are_not_changed():
    case = Zipped([70, 0, 3], batch=3, t=2, tail=5, starts=[0, 1, 2], on_device=True)
    names = ["query", "keys", "values", "indptr", "tail_keys", "tail_values", "starts"]
    before = [getattr(case, name).clone() for name in names]
    case.run(kernel)
    for name, copy in zip(names, before, strict=True):
        torch.testing.assert_close(getattr(case, name), copy, rtol=0, atol=0, equal_nan=True)


def test_layouts_of_queries():
    """As transformers makes them, contiguous, and with elements apart."""
    case = Zipped([70, 0, 3], t=5, tail=2)
    layouts = [
        case.query,
        case.query.contiguous(),
        case.query.transpose(2, 3).contiguous().transpose(2, 3),
        torch.stack([case.query, case.query * torch.nan], dim=-1)[..., 0],
    ]
    for layout in layouts:
        case.query = layout
        case.check(kernel)


def test_parts_of_larger_tail_buffers():
    """Rows and heads of a tail need not follow each other in memory, keys unlike values."""
    case = Zipped([70, 0, 3], batch=3, t=2, tail=5)
    case.tail_keys = torch.cat([case.tail_keys, case.tail_keys * torch.nan], dim=1)[:, :3]
    case.tail_values = torch.stack([case.tail_values, case.tail_values * torch.nan], dim=2)[:, :, 0]
    case.check(kernel)


def test_equals_the_reference_where_rows_are_padding():
    """What padding itself gives is never used, but it must not be NaN."""
    case = Zipped([70, 0, 3], batch=3, t=9, starts=[0, 4, 8])
    got = case.run(kernel)
    assert got.isfinite().all()
    torch.testing.assert_close(got, case.run(reference.zipped_attention), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 8, 33])
def test_numbers_of_heads(heads):
    lengths = [(97 * h) % 131 for h in range(heads)]
    Zipped(lengths, t=2, tail=1).check(kernel)
    Zipped(lengths[::-1], t=1, tail=1).check(kernel)


@pytest.mark.parametrize("programs", [1, 3, 9])
def test_any_division_among_programs(monkeypatch, programs):
    """Heads that one program holds whole, and heads that many programs share."""
    monkeypatch.setattr(zipped_attention, "multiprocessors", lambda device: programs)
    Zipped([900, 0, 1, 333, 128], t=1, tail=2).check(kernel)
    Zipped([500, 0, 333], t=9, group=8, tail=2).check(kernel)


@by_dtype
@pytest.mark.parametrize("how", LOGITS.values(), ids=LOGITS)
@pytest.mark.parametrize("lengths", [[0, 1, 37], [130, 0, 0], [0, 0, 0]], ids=str)
def test_capped_logits_and_sinks(lengths, how, dtype):
    Zipped(lengths, t=1, tail=2, group=3, dtype=dtype, **how).check(kernel)
    Zipped(lengths, t=70, batch=2, starts=[0, 9], dtype=dtype, **how).check(kernel)


@pytest.mark.parametrize("how", LOGITS.values(), ids=LOGITS)
def test_capped_logits_and_sinks_in_a_window(how):
    Zipped([39, 39], batch=2, t=3, tail=30, starts=[0, 8], window=40, **how).check(kernel)
    Zipped([39, 39], tail=300, window=40, on_device=True, **how).check(kernel)


def test_sinks_as_large_as_any_logit():
    """A sink takes all of the softmax, or none of it."""
    case = Zipped([70, 0], group=2, t=2)
    for sink in (-1e4, 1e4):
        sinks = torch.tensor([sink] * 4, device=DEVICE)
        case.logits = replace(case.logits, sinks=sinks)
        got = case.check(kernel)
        assert bool((got == 0).all()) == (sink > 0)


def test_outputs_have_tokens_before_heads():
    """As the output projection reads them, so that nothing is copied behind."""
    out = Zipped([3, 4, 5], batch=3, t=2).run(kernel)
    assert out.transpose(1, 2).is_contiguous()
    assert out.device.type == DEVICE


@pytest.mark.parametrize(("t", "tail"), [(16, 0), (33, 7)])
@pytest.mark.parametrize("lengths", [[0, 70, 111], [0, 0], [5, 0, 260]], ids=str)
@pytest.mark.parametrize("sinks", [False, True])
def test_long_queries_are_blended(monkeypatch, sinks, lengths, t, tail):
    """The chunk, what is in front of it, and the context: three results, one softmax."""
    dense = Dense()
    monkeypatch.setattr(long_query, "fastest", lambda *args: dense)
    monkeypatch.setattr(long_query, "LONG_QUERY", 16)
    Zipped(lengths, batch=2, t=t, tail=tail, sinks=sinks).check(kernel)
    assert dense.asked == ([(t, True), (tail, False)] if tail else [(t, True)])


@pytest.mark.parametrize(
    "how", [{"on_device": True}, {"starts": [3, 0]}, {"window": 40}, {"softcap": 2.0}], ids=str
)
def test_long_queries_that_no_dense_kernel_takes(monkeypatch, how):
    monkeypatch.setattr(long_query, "fastest", lambda *args: 1 / 0)
    monkeypatch.setattr(long_query, "LONG_QUERY", 16)
    lengths = [39, 39] if "window" in how else [70, 3]
    Zipped(lengths, batch=2, t=20, tail=4, **how).check(kernel)
