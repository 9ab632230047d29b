"""What the sections share: the device, what was asked for, and what is made once."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvzip import ContextCache, ModelKVzip
from kvzip.benchmarks import ceilings, geometries
from kvzip.benchmarks.lengths import head_lengths
from kvzip.benchmarks.records import Record, Subject
from kvzip.cache import Document
from kvzip.kernels import Operations, operations
from kvzip.layers import ContextLayer, Tail
from kvzip.pairs import Pairs

MODEL_GEOMETRY, MODEL_CONTEXT, MODEL_RATIO = "llama3.1-8b", 131_072, 0.3
"""What the whole-model sections measure unless told otherwise."""


LONGEST_CONTEXT = 2**20
"""Positions that random models are made for: their number changes nothing else."""

PREFIX = 32
"""Tokens of the prompt's prefix, which is never evicted, where no prompt is read."""


@dataclass(frozen=True)
class Case:
    """One figure: what it is about, and how its lines are made."""

    subject: Subject
    run: Callable[[], Iterable[Record]]


@dataclass(frozen=True)
class Plan:
    """What was asked for; None for each section's own choice.

    Attributes:
        geometries: names.
        contexts: lengths in tokens.
        ratios: keep ratios.
        quick: fewer figures and fewer rounds.
    """

    geometries: tuple[str, ...] | None = None
    contexts: tuple[int, ...] | None = None
    ratios: tuple[float, ...] | None = None
    quick: bool = False


@dataclass(frozen=True)
class Workbench:
    """A device and a plan.

    Attributes:
        device: what is measured.
        dtype: of weights and pairs.
        plan: what was asked for.
    """

    device: torch.device
    dtype: torch.dtype
    plan: Plan

    @property
    def on_gpu(self) -> bool:
        """Whether this is a CUDA device; elsewhere the sections run at the sizes of a test."""
        return self.device.type == "cuda"

    @cached_property
    def ceilings(self) -> ceilings.Ceilings:
        """The device's ceilings, measured when first asked for."""
        return ceilings.measure(self.device, self.dtype)

    @property
    def ours(self) -> Operations:
        """The operations under test."""
        return operations("auto", self.device, self.dtype)

    @property
    def rounds(self) -> int:
        """Samples of each contender."""
        return (10 if self.plan.quick else 20) if self.on_gpu else 2

    def operation_subjects(self, benchmark: str) -> Iterator[Subject]:
        """The whole matrix of geometries, contexts and ratios."""
        quick, plan = self.plan.quick, self.plan
        full = geometries.MEASURED
        for geometry in plan.geometries or (full[:1] if quick else full):
            for context in plan.contexts or ((32_768, 131_072) if quick else
                                             (8_192, 32_768, 131_072)):  # fmt: skip
                for ratio in plan.ratios or ((0.3,) if quick else (1.0, 0.5, 0.3, 0.1)):
                    yield Subject(benchmark, geometry, context, ratio)

    def context_subjects(self, benchmark: str) -> Iterator[Subject]:
        """Every geometry at its longest context, for operations that know no ratio."""
        full = geometries.MEASURED
        chosen = self.plan.geometries or (full[:1] if self.plan.quick else full)
        for geometry in chosen:
            yield Subject(benchmark, geometry, max(self.plan.contexts or (MODEL_CONTEXT,)))

    def model_subjects(
        self, benchmark: str, usual: Sequence[str] = (MODEL_GEOMETRY,)
    ) -> Iterator[Subject]:
        """What the whole-model sections measure: those geometries that are usual, if none is asked.

        Args:
            benchmark: name of the section.
            usual: geometries.
        """
        for geometry in self.plan.geometries or usual:
            for context in self.plan.contexts or (MODEL_CONTEXT,):
                for ratio in self.plan.ratios or (MODEL_RATIO,):
                    yield Subject(benchmark, geometry, context, ratio)

    def hf_model(self, geometry: str) -> PreTrainedModel:
        """A random model that can read the longest context; the last one is kept."""
        positions = max((*(self.plan.contexts or ()), LONGEST_CONTEXT)) + geometries.ROOM
        return _random_model(geometry, positions, self.device, self.dtype)

    def model(self, geometry: str, *, backend: str = "auto", compile: bool = False) -> ModelKVzip:
        """kvzip around the random model of a geometry."""
        hf_model = geometries.twin(self.hf_model(geometry), "sdpa")
        return ModelKVzip(hf_model, geometries.tokenizer(), backend=backend, compile=compile)

    def rehearsing_model(self, geometry: str) -> ModelKVzip:
        """The same with one layer: once it has read a context, kernels and plans are there."""
        hf_model = geometries.first_layer(self.hf_model(geometry))
        return ModelKVzip(hf_model, geometries.tokenizer())

    def tokens(self, count: int, seed: int = 0) -> Tensor:
        """`[count]` random token ids that every vocabulary has, on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(2, 1000, (count,), generator=generator)


@lru_cache(maxsize=1)
def _random_model(
    geometry: str, positions: int, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    return geometries.random_model(geometry, positions, device, dtype)


def random_pairs(bench: Workbench, geometry: str, context: int, ratio: float) -> list[Pairs]:
    """Random pairs for every layer: a prefix, and heads as long as `head_lengths` says."""
    shape = geometries.find(geometry)
    pairs = []
    for layer in range(shape.layers):
        lengths = torch.tensor(head_lengths(context, shape.kv_heads, ratio, seed=layer))
        kept = torch.arange(PREFIX + context) < PREFIX + lengths[:, None]
        size = (int(kept.sum()), shape.head_dim)
        keys, values = (
            torch.empty(size, dtype=bench.dtype, device=bench.device).normal_() for _ in range(2)
        )
        pairs.append(Pairs(keys, values, kept))
    return pairs


def zipped_cache(model: ModelKVzip, pairs: list[Pairs], token_ids: Tensor) -> ContextCache:
    """A cache of a model from pairs, without reading anything.

    Args:
        model: whose cache it shall be.
        pairs: of each layer.
        token_ids: `[PREFIX + n]`.
    """
    layers = [ContextLayer(len(token_ids), part, Tail(), model.operations) for part in pairs]
    kept = sum(int(part.kept.sum()) for part in pairs)
    held = sum(part.kept.numel() for part in pairs)
    return ContextCache(layers, Document(token_ids, PREFIX), model.origin, ratio=kept / held)
