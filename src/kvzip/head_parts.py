"""The tensors of a .kvz file, divided by heads: each process has a part of every layer's heads.

A file holds all heads and does not say how many processes wrote it: any number of them may read it.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

BY_ROW = ("keys", "values", "positions", "scores", "codes", "scales")
"""Tensors of a layer with full attention that hold a row for each pair; others, for each head."""


def merge(name: str, parts: Sequence[Tensor]) -> Tensor:
    """A tensor of all heads.

    Args:
        name: what the file calls it.
        parts: it in each process, in order.
    """
    if not name.startswith("layers."):
        return parts[0]
    if not name.endswith(".indptr"):
        return torch.cat([*parts])
    whole = parts[0]
    for part in parts[1:]:
        whole = torch.cat([whole, whole[-1] + part[1:]])
    return whole


def part_of(
    tensors: Mapping[str, Tensor], windows: Sequence[int | None], rank: int, size: int
) -> dict[str, Tensor]:
    """What one process holds of a file.

    Args:
        tensors: of the file, by name.
        windows: window of each layer, None for full attention.
        rank: number of the process.
        size: number of processes.

    Returns:
        Copies, so that nothing holds what other processes have.
    """
    part = {name: whole for name, whole in tensors.items() if not name.startswith("layers.")}
    for i, window in enumerate(windows):
        prefix = f"layers.{i}."
        layer = {name: whole for name, whole in tensors.items() if name.startswith(prefix)}
        if window is not None:
            part |= {name: whole.chunk(size)[rank].clone() for name, whole in layer.items()}
            continue
        indptr = layer.pop(f"{prefix}indptr")
        heads = (len(indptr) - 1) // size
        own = indptr[rank * heads : (rank + 1) * heads + 1]
        part[f"{prefix}indptr"] = own - own[0]
        by_head, by_row = slice(rank * heads, (rank + 1) * heads), slice(int(own[0]), int(own[-1]))
        for name, whole in layer.items():
            rows = by_row if name.rpartition(".")[2] in BY_ROW else by_head
            part[name] = whole[rows].clone()
    return part
