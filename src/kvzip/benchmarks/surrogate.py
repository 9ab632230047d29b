"""Reading a context while a surrogate scores it, beside reading it and nothing else.

Surrogates have random weights in KVzap's published shapes: a linear map, and an MLP whose inner
layer is an eighth as wide as the hidden states (512 for 4,096). Their time depends on shapes only.
Contenders take turns on the same model and tokens. Compressing while reading by a surrogate is
there, too, once.

The error of outputs is the distance between the scores of a short context, read in chunks, and
those of the layers' attention inputs in float64, over the norm of the latter.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from kvzip import ModelKVzip
from kvzip.benchmarks.read_context import Watch
from kvzip.benchmarks.records import OURS, Record, Result, Subject, compare
from kvzip.benchmarks.timing import Spread, settle
from kvzip.benchmarks.workbench import Case, Workbench
from kvzip.hidden_states import observed_hidden_states
from kvzip.surrogates import kvzap

NAME = "surrogate"
PLAIN = "plain prefill"
LINEAR, MLP = f"{OURS}, scored by a linear KVzap", f"{OURS}, scored by an MLP KVzap"
STREAMED = f"{OURS}, streaming by an MLP KVzap"
SCORED, STREAMING = "scored while reading", "compressed while reading"

INNER_SHARE = 8
"""Hidden states are this many times as wide as the inner layer of an MLP."""
CHECKED = 4096
"""Tokens of the context that outputs are compared on, and that warms everything up."""
TOLERANCE = 0.02
ROUNDS = 3


def cases(bench: Workbench) -> Iterator[Case]:
    """Each model and context."""
    for subject in bench.model_subjects(NAME):
        yield Case(subject, partial(_measure, bench, subject))


def _measure(bench: Workbench, subject: Subject) -> Iterator[Record]:
    assert subject.context is not None
    model, ids = bench.model(subject.geometry), bench.tokens(subject.context)
    width = model.hf_model.config.get_text_config(decoder=True).hidden_size
    with TemporaryDirectory() as folder:
        scorers = {
            LINEAR: write_random(model, Path(folder) / "linear", None),
            MLP: write_random(model, Path(folder) / "mlp", width // INNER_SHARE),
        }
        short = ids[: min(CHECKED, len(ids))]
        errors = {name: _error(model, short, scorer) for name, scorer in scorers.items()}
        ways: dict[str, Callable[[], object]] = {
            PLAIN: partial(model.read, ids),
            **{name: partial(model.prefill, ids, scorer=one) for name, one in scorers.items()},
        }
        rounds = 1 if bench.plan.quick else ROUNDS
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                taken[name].append(_seconds(bench, way))
        spreads = {name: Spread.of(all_, f"{rounds} in turns") for name, all_ in taken.items()}
        results = [
            Result(name, spread, errors.get(name), TOLERANCE) for name, spread in spreads.items()
        ]
        yield from compare(replace(subject, case=SCORED), results)
        stream = partial(
            model.prefill, ids, ratio=subject.ratio, streaming=True, scorer=scorers[MLP]
        )
        once = Spread.of([_seconds(bench, stream)], "once")
        streamed = Result(STREAMED, once, errors[MLP], TOLERANCE)
        yield from compare(replace(subject, case=STREAMING), [results[0], streamed])


def write_random(model: ModelKVzip, folder: Path, hidden_dim: int | None) -> str:
    """Write a surrogate of a model with random weights; returns its name as a scorer."""
    generator = torch.Generator().manual_seed(0)
    width = model.hf_model.config.get_text_config(decoder=True).hidden_size

    def linear(outer: int, inner: int) -> tuple[Tensor, Tensor]:
        weight = torch.randn(outer, inner, generator=generator) * inner**-0.5
        return weight, torch.randn(outer, generator=generator)

    modules = []
    for layer in model.geometry.prunable:
        heads = model.geometry.layers[layer].kv_heads
        if hidden_dim is None:
            modules.append(kvzap.Module(*linear(heads, width)))
        else:
            modules.append(kvzap.Module(*linear(heads, hidden_dim), *linear(hidden_dim, width)))
    kvzap.save(modules, folder, {})
    return f"{kvzap.NAME}:{folder}"


def _seconds(bench: Workbench, way: Callable[[], object]) -> float:
    settle(bench.device)
    watch = Watch(bench)
    way()
    return watch.lap()


def _error(model: ModelKVzip, ids: Tensor, scorer: str) -> float:
    """How far scores are from those of the attention inputs in float64."""
    scores = model.prefill(ids, scorer=scorer, chunk_size=max(1, len(ids) // 2)).scores
    assert scores is not None
    modules = kvzap.read(Path(scorer.partition(":")[2]))
    exact: dict[int, Tensor] = {}

    def see(index: int, hidden: Tensor) -> None:
        if index in model.geometry.prunable:
            module = modules[model.geometry.prunable.index(index)]
            rows = hidden[0, -len(ids) :].double()
            exact[index] = module.to(rows.device, torch.float64)(rows).T.cpu()

    with observed_hidden_states(model.hf_model, see):
        model.read(ids)
    expected = torch.stack([exact[index] for index in model.geometry.prunable])
    return float((scores.values - expected).norm() / expected.norm())
