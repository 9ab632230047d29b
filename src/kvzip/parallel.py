"""KV heads divided among processes: tensor parallelism as transformers does it, under torchrun.

    process 0: heads 0 to H/P - 1  |  process 1: heads H/P to 2 H/P - 1  |  ...   in every layer

Each process runs the same program, holds the pairs of its own heads and gets the same answers. What
compares heads of all processes, which pairs are best, each of them computes from all scores, and
takes its part of the result.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from kvzip.errors import KVzipError
from kvzip.geometry import Geometry

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Division:
    """How KV heads are divided; all of them in one process by default.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        group: what they talk through, None for a single process.
        device: where what they tell each other has to be.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    device: torch.device = CPU

    def gather(self, values: Tensor) -> Tensor:
        """From `[L, H / P, ...]` of each process to `[L, H, ...]`, the same in all of them."""
        if self.size == 1:
            return values
        mine = values.to(self.device).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine, group=self.group)
        return torch.cat(parts, dim=1).to(values.device)

    def own(self, values: Tensor) -> Tensor:
        """This process's part, `[L, H / P, ...]`, of `[L, H, ...]`."""
        return values.chunk(self.size, dim=1)[self.rank].contiguous()

    def all(self, fact: bool) -> bool:
        """Whether something is so in every process."""
        if self.size > 1:
            told = torch.tensor([fact], dtype=torch.int32, device=self.device)
            dist.all_reduce(told, op=dist.ReduceOp.MIN, group=self.group)
            fact = bool(told.item())
        return fact

    def agreed(self, tokens: Tensor) -> Tensor:
        """What the first process has drawn."""
        if self.size > 1:
            dist.broadcast(tokens, group=self.group, group_src=0)
        return tokens

    def collect(self, tensor: Tensor) -> list[Tensor]:
        """A tensor of each process, on the CPU, in order: all in the first, none in the others."""
        if self.size == 1:
            return [tensor]
        parts = [tensor] * self.size if self.rank == 0 else None
        dist.gather_object(tensor, parts, group=self.group, group_dst=0)
        return parts or []

    def first(self, work: Callable[[], None]) -> None:
        """Let the first process do something; raise in all of them what it raises.

        Raises:
            KVzipError: that of `work`.
        """
        failed: BaseException | None = None
        if self.rank == 0:
            try:
                work()
            except BaseException as error:  # the others wait to be told
                failed = error
        if self.size > 1:
            said = [None if failed is None else str(failed) or type(failed).__name__]
            dist.broadcast_object_list(said, group=self.group, group_src=0, device=self.device)
            if said[0] is not None and failed is None:
                failed = KVzipError(said[0])
        if failed is not None:
            raise failed


WHOLE = Division()


def check_processes() -> None:
    """Raise KVzipError if there are no processes to divide a model among."""
    if "WORLD_SIZE" not in os.environ and not dist.is_initialized():
        raise KVzipError(
            "tp_plan divides a model among processes, and this is a single one: start the program "
            "with torchrun --nproc-per-node N"
        )


def division(model: PreTrainedModel) -> Division:
    """How a model that is loaded divides its KV heads.

    Args:
        model: the model.

    Raises:
        KVzipError: if its weights are divided in another way, or its heads not evenly.
    """
    meshes = {mesh for p in model.parameters() if (mesh := getattr(p, "device_mesh", None))}
    if not meshes:
        return WHOLE
    mesh = meshes.pop()
    if meshes or mesh.ndim != 1:
        raise KVzipError(
            f"the weights of {type(model).__name__} are divided in more than one way: load it with "
            "tp_plan='auto' alone"
        )
    size: int = mesh.size()
    total = _kv_heads(model)
    if total % size:
        raise KVzipError(
            f"{type(model).__name__} has {total} KV heads, which cannot be divided among {size} "
            f"processes: start a number of them that divides {total}"
        )
    return Division(mesh.get_local_rank(), size, mesh.get_group(), model.device)


def check_divided(model: PreTrainedModel, division: Division, geometry: Geometry) -> None:
    """Raise KVzipError unless each layer has its part of the heads, as this process sees it."""
    if division.size == 1:
        return
    if any(layer.linear for layer in geometry.layers):
        raise KVzipError(
            f"{type(model).__name__} has layers of linear attention, which tp_plan does not "
            "divide: spread its layers with device_map='auto' instead"
        )
    total = _kv_heads(model)
    wrong = {layer.kv_heads for layer in geometry.layers} - {total // division.size}
    if wrong:
        raise KVzipError(
            f"the plan of {type(model).__name__} leaves {max(wrong)} of {total} KV heads to each "
            f"of {division.size} processes: spread its layers with device_map='auto' instead"
        )


def _kv_heads(model: PreTrainedModel) -> int:
    heads: int = model.config.get_text_config(decoder=True).num_key_value_heads
    return heads
