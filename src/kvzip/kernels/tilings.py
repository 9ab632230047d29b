"""How attention over a packed context and a tail is cut up among programs.

All of it follows from shapes, which the host knows, and not from how the rows are spread over the
heads. Sizes were measured on an H200.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton

WAVES = 6
"""Where compute decides, a multiprocessor gets this many programs, one after the other."""


@dataclass(frozen=True)
class Tiling:
    """How a program goes through its work.

    Attributes:
        block_m: query rows of a tile.
        block_n: pairs of a tile of the context.
        tail_n: pairs of a tile of the tail.
        warps: warps of a program.
        stages: tiles in flight.
        programs: programs to aim at on each multiprocessor.
    """

    block_m: int
    block_n: int
    tail_n: int
    warps: int
    stages: int
    programs: int


@dataclass(frozen=True)
class Split:
    """What is one program's: a chunk of a head's rows, or a stretch of a tail's columns.

    Attributes:
        tiles: tiles of query rows; each has all of the other programs to itself.
        chunk: rows of a chunk; the last one of a head is filled in part only.
        context_slots: chunks that there are at most, however long each head is.
        tail_slots: stretches of the tail of one head and batch row, 0 without a tail.
        tail_columns: columns of a stretch.
    """

    tiles: int
    chunk: int
    context_slots: int
    tail_slots: int
    tail_columns: int


def choose_tiling(m: int, head_dim: int, element_size: int) -> Tiling:
    """Tiles for `m` query rows a KV head.

    A stage of keys and values takes 32 KiB: three of them and the queries fit into the shared
    memory of a multiprocessor twice, unless the queries are many.

    Args:
        m: query rows that share a KV head.
        head_dim: D.
        element_size: bytes of an element.
    """
    row = triton.next_power_of_2(head_dim) * element_size  # bytes
    block_m = min(max(16, triton.next_power_of_2(m)), 128 if row <= 256 else 64)
    block_n = min(max(16, 16384 // row), 128)
    if block_m * row > 16384:
        return Tiling(block_m, block_n, block_n, warps=8, stages=3, programs=1)
    return Tiling(block_m, block_n, block_n, warps=2 if block_m == 16 else 4, stages=3, programs=2)


def choose_quantized_tiling(m: int, head_dim: int, element_size: int, bits: int) -> Tiling:
    """Tiles for `m` query rows a KV head over codes of so many bits.

    Measured for one token and heads of 128. Codes are unpacked in registers, which is what limits
    the tiles, and a warp that has a tile to itself waits for no other. Tiles of the tail are small,
    so that they take no shared memory from the codes.

    Args:
        m: query rows that share a KV head.
        head_dim: D.
        element_size: bytes of an element of the queries.
        bits: of a code.
    """
    row = triton.next_power_of_2(head_dim) * element_size  # bytes of a query
    tail_n = min(max(16, 8192 // row), 64)
    block_m = min(max(16, triton.next_power_of_2(m)), 128 if row <= 256 else 64)
    if block_m == 16:
        if head_dim * bits <= 256:  # warps divide words, and 16 of them are not worth dividing
            return Tiling(16, 64, tail_n, warps=1, stages=3, programs=4)
        if row > 256:
            return Tiling(16, 64, tail_n, 4, stages=3, programs=2)
        if bits == 4:
            return Tiling(16, 32, 16, warps=1, stages=3, programs=8)
        return Tiling(16, 64, 16, warps=2, stages=3, programs=4)
    block_n = min(max(32, 8192 // row), 64)
    return Tiling(block_m, block_n, tail_n, 4 if block_m == 32 else 8, stages=3, programs=1)


def choose_split(
    tiling: Tiling,
    processors: int,
    *,
    batch: int,
    kv_heads: int,
    m: int,
    rows: int,
    columns: int,
) -> Split:
    """Chunks and stretches such that programs fill a device, and none takes longer than others.

    Args:
        tiling: how a program goes through its work.
        processors: multiprocessors of the device.
        batch: B.
        kv_heads: H.
        m: query rows that share a KV head, those of all batch rows.
        rows: packed rows of all heads.
        columns: columns of the tail, 0 without one.
    """
    tiles = triton.cdiv(m, tiling.block_m)
    at_once = tiling.programs * processors  # programs that run side by side
    tail_slots, tail_columns = 0, 1
    if columns:
        # a stretch of the tail takes no longer than a chunk of the context
        stretch = max(256, rows // at_once)
        most = max(1, at_once // (4 * batch * kv_heads * tiles))
        tail_slots = min(triton.cdiv(columns, stretch), most)
        tail_columns = triton.cdiv(columns, tail_slots)
    if tiles == 1:  # all in one go; the last chunk of each head is filled in part only
        programs = max(at_once - tail_slots * batch * kv_heads - kv_heads, at_once // 2, 1)
    else:
        programs = triton.cdiv(WAVES * at_once, tiles)
    chunk = max(tiling.block_n, triton.cdiv(triton.cdiv(rows, programs), 16) * 16)
    return Split(tiles, chunk, rows // chunk + kv_heads, tail_slots, tail_columns)


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4  # Triton's interpreter
