"""Attention over quantised rows, reference and Triton kernel, against float64.

The oracle dequantises element by element (`test_quantization.definition`).
"""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import (
    BFLOAT16,
    DEVICE,
    DIMS,
    FLOAT32,
    GROUPS,
    KERNEL_DTYPES,
    LENGTHS,
    MARKS,
    ON_GPU,
    Zipped,
    poison,
)
from kvzip.kernels import reference, zipped_attention
from kvzip.kernels.quantization import KV_DTYPES, Quantization, quantize
from kvzip.kernels.quantized_chunk import levels
from test_quantization import definition

pytestmark = MARKS
by_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
by_kv_dtype = pytest.mark.parametrize("kv_dtype", KV_DTYPES)


class Quantized(Zipped):
    """Inputs of `quantized_attention`; scales of spare rows are NaN.

    Args:
        lengths: rows of each KV head.
        kv_dtype: what they are quantised to.
        group: dimensions that share a scale.
        more: as for `Zipped`.
    """

    def __init__(
        self, lengths: list[int], kv_dtype: str, *, scale_group: int | None = None, **more
    ) -> None:
        spare_rows = more.pop("spare_rows", 0)
        super().__init__(lengths, **more)
        how = Quantization(kv_dtype, scale_group)
        self.inputs = []
        for name in ("keys", "values"):
            rows = getattr(self, name)
            dim = rows.shape[1]
            rows = rows * torch.linspace(0.2, 2, dim, device=DEVICE) + (
                torch.arange(dim, device=DEVICE) % 5
            )
            rows = quantize(rows, lengths, how)
            setattr(self, name, definition(rows, lengths).to(DEVICE))
            codes = torch.cat(
                [rows.codes, rows.codes.new_full((spare_rows, rows.codes.shape[1]), -1)]
            )
            scales = torch.cat(
                [rows.scales, rows.scales.new_full((spare_rows, rows.scales.shape[1]), torch.nan)]
            )
            self.inputs.append(rows.with_rows(codes, scales))

    def run(self, attention):
        tail = slice(None) if self.on_device else slice(0, self.s)
        return attention(
            self.query,
            *self.inputs,
            self.indptr,
            self.tail_keys[:, :, tail],
            self.tail_values[:, :, tail],
            self.logits,
            tail_length=torch.tensor([self.s], device=DEVICE) if self.on_device else None,
            starts=self.starts,
            window=self.window,
        )


def kernel(*args: object, **kwargs: object) -> Tensor:
    """The kernel; its partial results and its output are NaN at first."""
    with poison() as made:
        out = zipped_attention.quantized_attention(*args, **kwargs)
    assert len(made) >= 3  # partial results, their log-sum-exp, output
    return out


@by_kv_dtype
@by_dtype
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_head_lengths(lengths, dtype, kv_dtype):
    Quantized(lengths, kv_dtype, t=3, tail=4, dtype=dtype).check(kernel)


@by_kv_dtype
@by_dtype
@pytest.mark.parametrize("dim", DIMS)
def test_dimensions(dim, dtype, kv_dtype):
    Quantized([65, 0, 3], kv_dtype, group=4, dim=dim, t=2, tail=1, dtype=dtype).check(kernel)


@by_dtype
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("parts", [2, 4])
def test_groups_of_dimensions(parts, dim, dtype):
    Quantized([65, 0, 130], "int4", scale_group=dim // parts, dim=dim, tail=1, dtype=dtype).check(
        kernel
    )


@by_kv_dtype
@pytest.mark.parametrize("group", GROUPS)
def test_groups_of_query_heads(group, kv_dtype):
    Quantized([65, 0, 3], kv_dtype, group=group, dim=64, t=2, tail=1).check(kernel)


@by_kv_dtype
@pytest.mark.parametrize(("group", "t"), [(1, 130), (8, 9), (7, 5)])
def test_lengths_of_questions(group, t, kv_dtype):
    """One tile of query rows, several, and a last one that is not full."""
    Quantized([130, 0, 65], kv_dtype, group=group, t=t, tail=3).check(kernel)


@by_kv_dtype
@pytest.mark.parametrize("on_device", [False, True], ids=["length", "length-on-device"])
def test_batches_whose_rows_start_later(on_device, kv_dtype):
    case = Quantized(
        [129, 0, 7], kv_dtype, batch=3, t=7, tail=4, starts=[0, 5, 10], on_device=on_device
    )
    case.check(kernel)


@by_kv_dtype
@pytest.mark.parametrize(
    "how", [{"softcap": 5.0}, {"sinks": True}, {"softcap": 3.0, "sinks": True}]
)
def test_logits_that_are_more_than_scaled(how, kv_dtype):
    Quantized([129, 0, 7], kv_dtype, t=3, tail=4, **how).check(kernel)


@by_kv_dtype
def test_windows(kv_dtype):
    Quantized([15] * 3, kv_dtype, batch=3, t=3, tail=18, window=16, starts=[0, 3, 20]).check(kernel)


@by_kv_dtype
@pytest.mark.parametrize("spare_rows", [1, 300])
def test_spare_rows_are_not_read(spare_rows, kv_dtype):
    for lengths in ([37, 0, 64], [0, 0, 0]):
        Quantized(lengths, kv_dtype, t=2, spare_rows=spare_rows).check(kernel)


@by_kv_dtype
@pytest.mark.parametrize("dtype", [torch.float16], ids=str)
@pytest.mark.parametrize("factor", [1e-3, 30.0])
def test_flat_and_sharp_logits(factor, dtype, kv_dtype):
    case = Quantized([140, 3, 0], kv_dtype, t=3, tail=5, dtype=dtype)
    case.query *= factor
    case.check(kernel)


@by_kv_dtype
def test_queries_beyond_half_precision(kv_dtype):
    """Half-precision products are made of queries over their largest element."""
    case = Quantized([140, 3, 0], kv_dtype, t=3, tail=5, dtype=torch.float16)
    for rows in case.inputs[:1]:
        rows.gain.mul_(1e4)
        rows.center.mul_(1e4)
    case.keys *= 1e4
    case.tail_keys.mul_(0)
    case.query /= 1e3
    case.check(kernel)


@by_kv_dtype
def test_the_same_call_gives_the_same_bits_and_changes_nothing(kv_dtype):
    case = Quantized([300, 0, 129], kv_dtype, batch=3, t=3, tail=20, starts=[0, 1, 2])
    before = [part.clone() for rows in case.inputs for part in rows.tensors().values()]
    first = case.run(kernel)
    assert torch.equal(case.run(kernel), first)
    after = [part for rows in case.inputs for part in rows.tensors().values()]
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("programs", [1, 3])
@by_kv_dtype
def test_any_division_among_programs(monkeypatch, programs, kv_dtype):
    monkeypatch.setattr(zipped_attention, "multiprocessors", lambda device: programs)
    Quantized([500, 0, 1, 333, 128], kv_dtype, t=1, tail=2).check(kernel)


@by_kv_dtype
@pytest.mark.parametrize("dtype", [torch.float64, FLOAT32, torch.float16, BFLOAT16], ids=str)
@pytest.mark.parametrize("t", [1, 5])
def test_the_reference(t, dtype, kv_dtype):
    case = Quantized(
        [37, 0, 130], kv_dtype, batch=2, t=t, tail=3, dim=64, starts=[0, 2], dtype=dtype
    )
    case.check(reference.quantized_attention)


@by_kv_dtype
def test_the_reference_in_blocks(monkeypatch, kv_dtype):
    monkeypatch.setattr(reference, "MAX_LOGITS", 1000)
    Quantized([37, 0, 130], kv_dtype, t=9, tail=3).check(reference.quantized_attention)


@triton.jit
def _unpack_kernel(
    p_words, p_out, part: tl.constexpr, kind: tl.constexpr, dtype: tl.constexpr,
    asm: tl.constexpr, n: tl.constexpr,
):  # fmt: skip
    o_n = tl.program_id(0) * n + tl.arange(0, n)
    tl.store(p_out + o_n, levels(tl.load(p_words + o_n), part, kind, dtype, asm).to(tl.float32))


@pytest.mark.parametrize("dtype", [tl.float16, tl.float32], ids=str)
@pytest.mark.parametrize(
    ("kv_dtype", "part"), [("int4", 0), ("int4", 1), ("int4", 2), ("int4", 3),
                           ("int8", 0), ("int8", 1), ("fp8", 0), ("fp8", 1)],
)  # fmt: skip
def test_every_word_is_unpacked_exactly(kv_dtype, part, dtype):
    words = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    got = torch.full((2**16,), torch.nan, device=DEVICE)
    _unpack_kernel[(16,)](
        words.to(torch.int16).to(DEVICE), got,
        part=part, kind=kv_dtype, dtype=dtype, asm=ON_GPU, n=4096,
    )  # fmt: skip
    bits = 4 if kv_dtype == "int4" else 8
    codes = (words >> (bits * part)) & (2**bits - 1)
    expected = codes.float() - 2 ** (bits - 1)
    if kv_dtype == "fp8":
        expected = codes.to(torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = expected.isfinite()
    assert torch.equal(got.cpu()[numbers], expected[numbers])
