"""Quantised keys or values: codes packed into 16-bit words, with scales.

A row of KV head `h` stands for

    row[d] = center[h, d] + gain[h, d] * scale[row, group of d] * level(code[row, d]) / largest

Center and gain even the channels of a head out, some of which are far larger than others in keys
(Liu et al., "KIVI", arXiv 2402.02750, section 3.1). They are the same for all rows of a head, so
that attention applies them to the query and to the result, and never to a row. With them the
bundled model's logits are nearer to those as made than without (`benchmarks/quantized_quality.py`).

    int4   levels -8, -7, ... 7; scales in float16, one for each group of dimensions
    int8   levels -127, -126, ... 127; one scale a row, float32
    fp8    the numbers of float8_e4m3fn, up to 448; one scale a row, float32

A scale is the largest element of its group, once center and gain are taken off; for int4 with a
sign, so that this element is level -8, which has no counterpart.

A code is a level counted from the lowest (int4: level + 8, int8: level + 128), or the byte of a
float8. A word holds one element of each of `slices` equal parts of the head dimension: the 4 bits
`[4j, 4j + 4)` of word `w` are the code of dimension `j * D / 4 + w`, the 8 bits `[8j, 8j + 8)`
that of dimension `j * D / 2 + w`. So a part is unpacked from all words at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kvzip.errors import KVzipError

BITS = {"int4": 4, "int8": 8, "fp8": 8}
"""Names of quantised dtypes, and bits of a code."""

KV_DTYPES = tuple(BITS)

LARGEST = {"int4": 8.0, "int8": 127.0, "fp8": 448.0}
"""The largest level of each, its sign aside."""

LARGEST_SCALE = 2.0**15
"""So that probabilities times scales are numbers of float16. Only rows that come behind those that
the gain was made for could need more."""

SCALE_BITS = 0.8
"""Bits of scales to an element that int4 may take: the finest groups within them are the default,
so that 0.3 of the pairs take at most 0.09 of the bytes of a bfloat16 cache."""

BLOCK = 64
"""Rows over which the largest element of a channel is looked for. The gain is the mean over all
blocks, so that a few rows unlike all others do not decide on it."""

NARROWEST = 2.0**-10
"""The least gain, as a share of the largest of its head."""


@dataclass(frozen=True)
class Quantization:
    """How pairs are quantised.

    Attributes:
        dtype: `"int4"`, `"int8"` or `"fp8"`.
        group: dimensions that share a scale, for int4: a half or a quarter of the head dimension,
            the finer one whose scales take at most 0.8 bits an element if None.

    Raises:
        KVzipError: for an unknown dtype, or a group with one that has a scale a row.
    """

    dtype: str
    group: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in BITS:
            raise KVzipError(f"unknown kv_dtype {self.dtype!r}: choose one of {', '.join(BITS)}")
        if self.group is not None and self.dtype != "int4":
            raise KVzipError(f"{self.dtype} has one scale a row: leave out the group size")

    @classmethod
    def of(cls, kv_dtype: "str | Quantization") -> "Quantization":
        """A quantisation by its name, or one that is given."""
        return kv_dtype if isinstance(kv_dtype, Quantization) else cls(kv_dtype)

    def __str__(self) -> str:
        return self.dtype if self.group is None else f"{self.dtype} in groups of {self.group}"

    @property
    def slices(self) -> int:
        """Codes in a word."""
        return 16 // BITS[self.dtype]

    def groups(self, head_dim: int) -> int:
        """Scales of a row.

        Raises:
            KVzipError: if the head dimension cannot be divided so.
        """
        if head_dim % self.slices:
            raise KVzipError(
                f"{self.dtype} packs {self.slices} parts of a head, whose dimension is {head_dim}: "
                f"it must be a multiple of {self.slices}"
            )
        if self.dtype != "int4":
            return 1
        if self.group is None:
            return 4 if SCALE_BITS * head_dim >= 16 * 4 else 2
        if self.group not in (head_dim // 2, head_dim // 4):
            raise KVzipError(
                f"a group of {self.group} does not suit heads of dimension {head_dim}: choose "
                f"{head_dim // 4} or {head_dim // 2}"
            )
        return head_dim // self.group

    def row_bytes(self, head_dim: int) -> int:
        """Bytes of a key or a value, its scales included."""
        groups = self.groups(head_dim)
        return head_dim * BITS[self.dtype] // 8 + groups * _scale_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class QuantizedRows:
    """Keys or values of one layer, packed head after head.

    Attributes:
        dtype: `"int4"`, `"int8"` or `"fp8"`.
        codes: `[rows, D * bits / 16]`, int16.
        scales: `[rows, groups]`, float16 for int4, `[rows, 1]`, float32 for the others.
        center: `[H, D]`, float32.
        gain: `[H, D]`, float32.
    """

    PARTS: ClassVar[tuple[str, ...]] = ("codes", "scales", "center", "gain")
    """Names of the tensors, in order."""

    dtype: str
    codes: Tensor
    scales: Tensor
    center: Tensor
    gain: Tensor

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, centers and gains."""
        return sum(part.nbytes for part in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor, by name."""
        return {name: getattr(self, name) for name in self.PARTS}

    def with_rows(self, codes: Tensor, scales: Tensor) -> "QuantizedRows":
        """Other rows with the same centers and gains."""
        return replace(self, codes=codes, scales=scales)

    @property
    def quantization(self) -> Quantization:
        """How these rows were quantised."""
        group = self.center.shape[1] // self.scales.shape[1]
        return Quantization(self.dtype, group if self.dtype == "int4" else None)


def channel_bytes(heads: int, head_dim: int) -> int:
    """Bytes of the centers and gains of so many heads, for keys or values."""
    return 2 * heads * head_dim * torch.float32.itemsize


def quantize(rows: Tensor, counts: list[int], how: Quantization) -> QuantizedRows:
    """Quantise packed rows.

    Args:
        rows: `[rows, D]`, floating point.
        counts: rows of each head.
        how: dtype and groups.

    Raises:
        KVzipError: if the head dimension does not suit.
    """
    how.groups(rows.shape[1])
    centers, gains = [], []
    for head in rows.split(counts):
        center, gain = _channels(head.float())
        centers.append(center)
        gains.append(gain)
    return encode(rows, counts, how, torch.stack(centers), torch.stack(gains))


def encode(
    rows: Tensor, counts: list[int], how: Quantization, center: Tensor, gain: Tensor
) -> QuantizedRows:
    """Quantise packed rows with centers and gains that are known; arguments as in `quantize`.

    Args:
        rows: `[rows, D]`.
        counts: rows of each head.
        how: dtype and groups.
        center: `[H, D]`, float32.
        gain: `[H, D]`, float32.
    """
    head_dim = rows.shape[1]
    groups, words = how.groups(head_dim), head_dim // how.slices
    codes = torch.empty((len(rows), words), dtype=torch.int16, device=rows.device)
    scale_dtype = _scale_dtype(how.dtype)
    scales = torch.empty((len(rows), groups), dtype=scale_dtype, device=rows.device)
    parts = zip(rows.split(counts), codes.split(counts), scales.split(counts), strict=True)
    for h, (head, head_codes, head_scales) in enumerate(parts):
        even = ((head.float() - center[h]) / gain[h]).unflatten(1, (groups, -1))
        head_scales.copy_(_scales(even, how.dtype).clamp(-LARGEST_SCALE, LARGEST_SCALE))
        divisor = head_scales.float().masked_fill(head_scales == 0, 1)  # what is all zero stays so
        share = (even / divisor[..., None]).flatten(1)
        head_codes.copy_(_pack(_codes(share * LARGEST[how.dtype], how.dtype), how))
    return QuantizedRows(how.dtype, codes, scales, center, gain)


def dequantize(
    rows: QuantizedRows, counts: list[int], dtype: torch.dtype = torch.float32
) -> Iterator[Tensor]:
    """What quantised rows stand for, a head at a time.

    Args:
        rows: the rows.
        counts: rows of each head.
        dtype: to compute in and to return.

    Yields:
        `[rows of the head, D]`.
    """
    slices = 16 // BITS[rows.dtype]
    held = sum(counts)
    parts = zip(rows.codes[:held].split(counts), rows.scales[:held].split(counts), strict=True)
    for h, (words, scales) in enumerate(parts):
        levels = _levels(_unpack(words, slices), rows.dtype).to(dtype)
        steps = scales.to(dtype)[..., None] / LARGEST[rows.dtype]
        grouped = levels.unflatten(1, (scales.shape[1], -1)) * steps
        yield grouped.flatten(1) * rows.gain[h].to(dtype) + rows.center[h].to(dtype)


def take(rows: QuantizedRows, index: Tensor) -> Tensor:
    """What some rows of every head stand for.

    Args:
        rows: the rows.
        index: `[H, count]`, int64: rows of each head.

    Returns:
        `[H, count, D]`, float32.
    """
    chosen = rows.with_rows(rows.codes[index.flatten()], rows.scales[index.flatten()])
    return torch.stack([*dequantize(chosen, [index.shape[1]] * len(index))])


def _channels(head: Tensor) -> tuple[Tensor, Tensor]:
    """Center and gain, `[D]`, of the rows `[rows, D]` of a head."""
    count, head_dim = head.shape
    if not count:
        return head.new_zeros(head_dim), head.new_ones(head_dim)
    center = head.mean(0)
    size = F.pad((head - center).abs(), (0, 0, 0, -count % BLOCK))
    gain = size.view(-1, BLOCK, head_dim).amax(1).mean(0)
    gain = gain.clamp_min(NARROWEST * gain.max())
    return center, gain.masked_fill(gain == 0, 1)  # rows that are all the same


def _scale_dtype(dtype: str) -> torch.dtype:
    return torch.float16 if dtype == "int4" else torch.float32


def _scales(even: Tensor, dtype: str) -> Tensor:
    """`[rows, groups]` of `[rows, groups, D / groups]`."""
    largest = even.abs().amax(-1)
    if dtype != "int4":
        return largest
    return torch.where(even.amax(-1) == largest, -largest, largest)


def _codes(scaled: Tensor, dtype: str) -> Tensor:
    """Codes, int32 and not negative, of elements that lie among the levels."""
    largest = LARGEST[dtype]
    if dtype == "fp8":
        return scaled.clamp(-largest, largest).to(torch.float8_e4m3fn).view(torch.uint8).int()
    if dtype == "int8":
        return scaled.round().clamp(-largest, largest).int() + 128
    return scaled.round().clamp(-largest, largest - 1).int() + 8


def _levels(codes: Tensor, dtype: str) -> Tensor:
    """The other way."""
    if dtype == "fp8":
        return codes.to(torch.uint8).view(torch.float8_e4m3fn).float()
    if dtype == "int8":
        return (codes - 128).float()
    return (codes - 8).float()


def _pack(codes: Tensor, how: Quantization) -> Tensor:
    """`[rows, D]` codes, int32 -> `[rows, words]`, int16."""
    bits = BITS[how.dtype]
    words = sum(part << (bits * j) for j, part in enumerate(codes.chunk(how.slices, dim=1)))
    assert isinstance(words, Tensor)
    return ((words ^ 0x8000) - 0x8000).to(torch.int16)  # bit 15 is the sign


def _unpack(words: Tensor, slices: int) -> Tensor:
    """`[rows, words]`, int16 -> `[rows, D]` codes, int32."""
    bits = 16 // slices
    wide = words.int()
    parts = [(wide >> (bits * j)) & (2**bits - 1) for j in range(slices)]
    return torch.cat(parts, dim=1)
