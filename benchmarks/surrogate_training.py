"""How long it takes to train a surrogate of a large model: `kvzip train-surrogate` with a clock.

A model in a published shape has random weights, and pieces of text are random tokens. So seconds
and bytes are those of a pretrained model of the shape; what is learnt says nothing. Reading,
scoring and drawing is one stage (`score`) with what ridge regression adds up on the way, or with
the copies of the drawn tokens to the CPU for an MLP; fitting is another, and checking the pieces
that were held out a third. Time grows with the samples in all three, but for the equations that
ridge regression solves at the end, one system a layer.

Before that, a few samples are taken apart: after each step of theirs the device is waited for, so
that together the steps may take longer than a sample otherwise does.

A line is printed after every stage, with what is known by then (`done` says which), and one on
stderr every hundred samples, so that a run that is stopped has told how far it came. The last line
of a kind has everything, and is what goes to a file.

    python benchmarks/surrogate_training.py --kind linear mlp [--samples 1000] [--out FILE.jsonl]
    python benchmarks/surrogate_training.py --kind linear --seconds 60
    python benchmarks/surrogate_training.py --geometry tiny --device cpu --samples 6
"""

import argparse
import json
import resource
import statistics
import sys
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from kvzip import ModelKVzip
from kvzip.benchmarks.geometries import ROOM, random_model, tokenizer
from kvzip.benchmarks.provenance import provenance
from kvzip.benchmarks.timing import settle
from kvzip.cli.train_surrogate import HIDDEN_SHARE, Kind
from kvzip.scoring.contribution import projection_products
from kvzip.surrogates import fitting, training
from kvzip.surrogates.kvzap import Module

WARM_UP = 2
"""Samples that are learnt from first, without a clock, for kernels and libraries."""
APART = 5
"""Samples that are taken apart."""
TOLD = 100
"""Samples between two lines on stderr."""


class Clock:
    """Seconds since the last look at it, when the device has done what it was given."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        settle(device)
        self._last = self._now()

    def lap(self) -> float:
        """Seconds since the last lap."""
        self._last, before = self._now(), self._last
        return self._last - before

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return perf_counter()


def say(done: str, known: dict[str, Any]) -> None:
    """Print what was just done, and all that is known."""
    print(json.dumps({"done": done, **known}), flush=True)


def measure(model: ModelKVzip, kind: Kind, options: argparse.Namespace) -> dict[str, Any]:
    """Train once: seconds of each stage, and peaks of memory."""
    device = torch.device(model.hf_model.device)
    width = model.hf_model.config.get_text_config(decoder=True).hidden_size
    hidden_dim = width // HIDDEN_SHARE if kind is Kind.mlp else None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 1000, (options.samples, options.piece), generator=generator)
    fitted, held_out = training.split([*ids], generator)
    if kind is Kind.mlp:
        training.refuse_too_many(model, len(fitted) * min(options.drawn, options.piece))
    clock = Clock(device)
    training.train(model, [*ids[:WARM_UP]], hidden_dim=hidden_dim, drawn=options.drawn)
    known: dict[str, Any] = {
        "geometry": options.geometry,
        "dtype": str(model.hf_model.dtype).removeprefix("torch."),
        "kind": kind.value,
        "hidden_dim": hidden_dim,
        "samples": options.samples,
        "seconds_allowed": options.seconds,
        "tokens_a_sample": options.piece,
        "seconds_of_warm_up": clock.lap(),
    }
    say("warm-up", known)
    known["seconds_a_sample_apart"] = take_apart(
        model, fitting.begin_fit(hidden_dim, generator), ids[:APART], options.drawn
    )
    say("samples apart", known)
    if device.type == "cuda":
        settle(device)
        known["device_bytes_of_weights"] = sum(p.nbytes for p in model.hf_model.parameters())
        known["device_bytes_before"] = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    fit = fitting.begin_fit(hidden_dim, generator)
    clock = Clock(device)
    seconds = known["seconds"] = {}
    count = 0
    for tokens in in_time(model, fitted, generator, options):
        fit.add(tokens)
        count += 1
    seconds["score"] = clock.lap()
    known["samples_fitted"] = count
    known["tokens_fitted"] = count * min(options.drawn, options.piece)
    say("score", known)
    modules = fit.modules(lambda done, total: None)
    seconds["fit"] = clock.lap()
    say("fit", known)
    refuse_what_is_not_finite(modules)
    unseen = held_out[: ceil(count * len(held_out) / len(fitted))]
    fitting.explained(
        modules, training.draw(model, unseen, options.drawn, generator, lambda done: None)
    )
    seconds["check"] = clock.lap()
    known["samples_held_out"] = len(unseen)
    known["seconds_in_all"] = sum(seconds.values())
    if device.type == "cuda":
        known["device_bytes_at_peak"] = torch.cuda.max_memory_allocated(device)
    known["host_bytes_at_peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return known


def take_apart(
    model: ModelKVzip, fit: fitting.Ridge | fitting.Perceptrons, ids: Tensor, drawn: int
) -> dict[str, float]:
    """Median seconds of each step of a sample, with a wait for the device behind each."""
    laps: dict[str, list[float]] = {"read": [], "score": [], "add": []}
    rows = torch.arange(min(drawn, ids.shape[1]))
    clock = Clock(torch.device(model.hf_model.device))
    products = None
    for piece in ids:
        clock.lap()
        hidden, kv = training.read(model, piece, rows)
        laps["read"].append(clock.lap())
        if products is None:
            products = projection_products(model.hf_model, kv)
            once = clock.lap()
        scores = training.score(model, kv, products)[..., rows].transpose(1, 2)
        del kv
        laps["score"].append(clock.lap())
        fit.add(fitting.Drawn(hidden, scores.clamp_min(training.LEAST_SCORE).log()))
        laps["add"].append(clock.lap())
    medians = {step: statistics.median(each) for step, each in laps.items()}
    return {**medians, "projection_products_once": once}


def in_time(
    model: ModelKVzip,
    pieces: list[Tensor],
    generator: torch.Generator,
    options: argparse.Namespace,
) -> Iterator[fitting.Drawn]:
    """Tokens drawn from pieces, from the first one on until the seconds allowed are over."""
    start = perf_counter()

    def tell(done: int) -> None:
        if done % TOLD == 0:
            line = {"samples": done, "seconds": perf_counter() - start}
            print(json.dumps(line), file=sys.stderr, flush=True)

    for tokens in training.draw(model, pieces, options.drawn, generator, tell):
        yield tokens
        if options.seconds is not None and perf_counter() - start >= options.seconds:
            return


def refuse_what_is_not_finite(modules: list[Module]) -> None:
    """Stop if something went wrong on the way: there is no figure without a result."""
    parts = [tensor for module in modules for tensor in module.tensors()]
    if not all(bool(part.isfinite().all()) for part in parts):
        raise SystemExit("the surrogate that was trained holds NaN or infinity: no figure")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", type=Kind, nargs="+", default=[*Kind], metavar="linear|mlp")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument(
        "--seconds", type=float, help="read no more samples of a kind after so many seconds"
    )
    parser.add_argument("--piece", type=int, default=training.PIECE, help="tokens of a sample")
    parser.add_argument(
        "--drawn", type=int, default=training.DRAWN, help="tokens drawn from a sample"
    )
    parser.add_argument("--geometry", default="llama3.1-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="append the results to this file, a line each")
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    positions = 2 * options.piece + ROOM
    origin, start = provenance(device), perf_counter()
    model = ModelKVzip(random_model(options.geometry, positions, device, dtype), tokenizer())
    say("model", {**origin, "seconds_to_make_it": perf_counter() - start})
    for kind in options.kind:
        line = json.dumps({**origin, **measure(model, kind, options)})
        print(line, flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
