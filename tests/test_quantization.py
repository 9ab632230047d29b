"""Packing of quantised rows, against the definition computed element by element in float64."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kernels import random
from kvzip import KVzipError
from kvzip.kernels.quantization import (
    KV_DTYPES,
    LARGEST_SCALE,
    Quantization,
    QuantizedRows,
    channel_bytes,
    dequantize,
    encode,
    quantize,
    take,
)

COUNTS = [63, 0, 1, 130]
DIMS = [32, 64, 80, 96, 128, 256]
STEPS = {"int4": 1 / 8, "int8": 1 / 127}
by_dtype = pytest.mark.parametrize("kv_dtype", KV_DTYPES)


def definition(rows: QuantizedRows, counts: list[int]) -> Tensor:
    """`[rows, D]` in float64, an element at a time, from what the module's docstring says."""
    head_dim, groups = rows.center.shape[1], rows.scales.shape[1]
    bits = {"int4": 4, "int8": 8, "fp8": 8}[rows.dtype]
    width = head_dim * bits // 16
    out = torch.zeros(sum(counts), head_dim, dtype=torch.float64)
    words, scales = rows.codes.cpu(), rows.scales.double().cpu()
    ends = torch.tensor([0, *counts]).cumsum(0).tolist()
    for h, (first, end) in enumerate(pairwise(ends)):
        for d in range(head_dim):
            shift = bits * (d // width)
            code = (words[first:end, d % width].int() >> shift) & (2**bits - 1)
            if rows.dtype == "fp8":
                level = code.to(torch.uint8).view(torch.float8_e4m3fn).double() / 448
            else:
                level = (code - 2 ** (bits - 1)).double() / {4: 8, 8: 127}[bits]
            scale = scales[first:end, d * groups // head_dim]
            center, gain = rows.center[h, d].double(), rows.gain[h, d].double()
            out[first:end, d] = center.cpu() + gain.cpu() * scale * level
    return out


def channelled(counts: list[int], dim: int, seed: int = 0) -> Tensor:
    """Rows whose channels differ in size and in their mean, as keys' do."""
    size, mean = random(1, dim, seed=seed + 1).abs() + 0.1, 5 * random(1, dim, seed=seed + 2)
    return random(sum(counts), dim, seed=seed) * size + mean


@by_dtype
@pytest.mark.parametrize("dim", DIMS)
def test_what_rows_stand_for(dim, kv_dtype):
    rows = channelled(COUNTS, dim)
    quantized = quantize(rows, COUNTS, Quantization(kv_dtype))
    got = torch.cat([*dequantize(quantized, COUNTS, torch.float64)])
    torch.testing.assert_close(got.cpu(), definition(quantized, COUNTS), rtol=1e-12, atol=1e-12)
    assert quantized.codes.dtype == torch.int16
    assert len(quantized) == sum(COUNTS)


@pytest.mark.parametrize("kv_dtype", STEPS)
@pytest.mark.parametrize("dim", DIMS)
def test_no_element_is_further_off_than_half_a_step(dim, kv_dtype):
    rows = channelled(COUNTS, dim)
    quantized = quantize(rows, COUNTS, Quantization(kv_dtype))
    groups = quantized.scales.shape[1]
    steps = quantized.scales.double().abs().repeat_interleave(dim // groups, 1) * STEPS[kv_dtype]
    gain = quantized.gain.double().repeat_interleave(torch.tensor(COUNTS, device=rows.device), 0)
    off = (rows.double() - definition(quantized, COUNTS).to(rows.device)).abs()
    # int4 has no level 8: what is opposite to the largest element may be a whole step off
    reach = 1.0 if kv_dtype == "int4" else 0.5
    assert (off <= reach * steps * gain * (1 + 1e-2) + 1e-6).all()
    assert (off <= 0.5 * steps * gain * (1 + 1e-3) + 1e-6).double().mean() > 0.97


@pytest.mark.parametrize(
    ("kv_dtype", "error"), [("int4", 0.1), ("int8", 0.01), ("fp8", 0.03)], ids=KV_DTYPES
)
def test_errors_are_small_beside_what_differs_between_rows(kv_dtype, error):
    rows = channelled([4000], 128)
    quantized = quantize(rows, [4000], Quantization(kv_dtype))
    off = definition(quantized, [4000]).to(rows.device) - rows
    assert error / 4 < off.norm() / (rows - rows.mean(0)).norm() < error


def test_channels_far_larger_than_others_spoil_nothing():
    """As biases make them in keys: without center and gain the other channels would be lost."""
    rows = random(500, 64)
    loud = rows.clone()
    loud[:, 7] = 200 + 50 * loud[:, 7]
    loud[:, 40] = -3000
    errors = []
    for part in (rows, loud):
        off = definition(quantize(part, [500], Quantization("int4")), [500]).to(rows.device) - part
        errors.append(off[:, [d for d in range(64) if d not in (7, 40)]].norm())
    assert errors[1] < 1.1 * errors[0]


def test_a_few_rows_unlike_all_others_spoil_nothing():
    """Such as those of the first tokens, which every query attends to."""
    rows = random(2000, 64)
    odd = rows.clone()
    odd[:2, :8] *= 20
    errors = []
    for part in (rows, odd):
        off = definition(quantize(part, [2000], Quantization("int4")), [2000]).to(rows.device)
        errors.append((off - part)[2:].norm())
    assert errors[1] < 1.2 * errors[0]


@by_dtype
def test_rows_that_are_all_the_same_stay_so(kv_dtype):
    rows = random(1, 32).expand(9, -1).contiguous()
    for same in (rows, torch.zeros_like(rows)):
        quantized = quantize(same, [9], Quantization(kv_dtype))
        assert torch.equal(torch.cat([*dequantize(quantized, [9])]), same)


@by_dtype
def test_half_precision_rows(kv_dtype):
    rows = channelled(COUNTS, 64).bfloat16()
    one, other = (quantize(part, COUNTS, Quantization(kv_dtype)) for part in (rows, rows.float()))
    for name, part in one.tensors().items():
        assert torch.equal(part, other.tensors()[name])


@by_dtype
def test_more_rows_are_evened_out_as_the_first_ones(kv_dtype):
    rows, more = channelled([270], 64).split([200, 70])
    how = Quantization(kv_dtype)
    first = quantize(rows, [200], how)
    behind = encode(more, [70], how, first.center, first.gain)
    off = definition(behind, [70]).to(rows.device) - more
    assert off.norm() < 0.15 * (more - more.mean(0)).norm()
    again = encode(rows, [200], first.quantization, first.center, first.gain)
    assert torch.equal(again.codes, first.codes)
    assert torch.equal(again.scales, first.scales)


@by_dtype
def test_rows_beyond_all_bounds_are_cut_off(kv_dtype):
    how = Quantization(kv_dtype)
    first = quantize(random(100, 32), [100], how)
    behind = encode(1e9 * random(5, 32), [5], how, first.center, first.gain)
    assert behind.scales.abs().max() == LARGEST_SCALE
    assert torch.cat([*dequantize(behind, [5])]).isfinite().all()


@by_dtype
def test_some_rows_of_every_head(kv_dtype):
    counts = [5, 9]
    quantized = quantize(random(14, 32), counts, Quantization(kv_dtype))
    whole = torch.cat([*dequantize(quantized, counts)])
    index = torch.tensor([[0, 3], [5, 13]], device=whole.device)
    assert torch.equal(take(quantized, index), whole[index])


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_int4_at_a_ratio_of_30_percent_takes_9_percent(dim):
    assert 0.3 * Quantization("int4").row_bytes(dim) <= 0.09 * 2 * dim


@by_dtype
@pytest.mark.parametrize("dim", DIMS)
def test_bytes(dim, kv_dtype):
    how = Quantization(kv_dtype)
    quantized = quantize(random(sum(COUNTS), dim), COUNTS, how)
    rows = sum(COUNTS) * how.row_bytes(dim)
    assert quantized.nbytes == rows + channel_bytes(len(COUNTS), dim)
    assert quantized.nbytes == sum(
        p.untyped_storage().nbytes() for p in quantized.tensors().values()
    )


@pytest.mark.parametrize(("group", "groups"), [(None, 4), (32, 4), (64, 2)])
def test_groups(group, groups):
    how = Quantization("int4", group)
    quantized = quantize(random(50, 128), [50], how)
    assert quantized.scales.shape == (50, groups)
    assert quantized.scales.dtype == torch.float16
    assert quantized.quantization.groups(128) == groups


@pytest.mark.parametrize("group", [0, 16, 33, 128])
def test_groups_that_do_not_suit(group):
    with pytest.raises(KVzipError, match=rf"a group of {group} .* 128: choose 32 or 64"):
        quantize(random(3, 128), [3], Quantization("int4", group))


@pytest.mark.parametrize(("kv_dtype", "dim"), [("int4", 30), ("int8", 33), ("fp8", 1)])
def test_dimensions_that_cannot_be_packed(kv_dtype, dim):
    with pytest.raises(KVzipError, match=f"whose dimension is {dim}: it must be a multiple of"):
        quantize(random(3, dim), [3], Quantization(kv_dtype))


@pytest.mark.parametrize("kv_dtype", ["int3", "", "INT4", "float8"])
def test_unknown_dtypes(kv_dtype):
    with pytest.raises(KVzipError, match="choose one of int4, int8, fp8"):
        Quantization.of(kv_dtype)


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_groups_belong_to_int4(kv_dtype):
    with pytest.raises(KVzipError, match="one scale a row"):
        Quantization(kv_dtype, 32)
