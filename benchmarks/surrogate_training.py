"""How long it takes to train a surrogate of a large model: `kvzip train-surrogate` with a clock.

A model in a published shape has random weights, and pieces of text are random tokens. So seconds
and bytes are those of a pretrained model of the shape; what is learnt says nothing. Reading,
scoring and drawing is one stage (`score`) with what ridge regression adds up on the way, or with
the copies of the drawn tokens to the CPU for an MLP; fitting is another, and checking the pieces
that were held out a third. Time grows with the samples in all three, but for the equations that
ridge regression solves at the end, one system a layer.

    python benchmarks/surrogate_training.py --kind linear mlp [--samples 1000] [--out FILE.jsonl]
    python benchmarks/surrogate_training.py --geometry tiny --device cpu --samples 6
"""

import argparse
import json
import resource
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from kvzip import ModelKVzip
from kvzip.benchmarks.geometries import ROOM, random_model, tokenizer
from kvzip.benchmarks.provenance import provenance
from kvzip.benchmarks.timing import settle
from kvzip.cli.train_surrogate import HIDDEN_SHARE, Kind
from kvzip.surrogates.training import DRAWN, PIECE, Trained, train

WARM_UP = 2
"""Samples that are learnt from first, without a clock, for kernels and libraries."""


class Clock:
    """Seconds of each stage of `train`, by what it tells of its progress."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        settle(device)
        self._last = self._now()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if done < total:
            return
        self._last, before = self._now(), self._last
        self.seconds[stage] = self._last - before

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return perf_counter()


def measure(model: ModelKVzip, kind: Kind, options: argparse.Namespace) -> dict[str, Any]:
    """Train once: seconds of each stage, and peaks of memory."""
    device = torch.device(model.hf_model.device)
    width = model.hf_model.config.get_text_config(decoder=True).hidden_size
    hidden_dim = width // HIDDEN_SHARE if kind is Kind.mlp else None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 1000, (options.samples, options.piece), generator=generator)
    train(model, [*ids[:WARM_UP]], hidden_dim=hidden_dim, drawn=options.drawn)
    weights = held = peak = None
    if device.type == "cuda":
        weights = sum(parameter.nbytes for parameter in model.hf_model.parameters())
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    clock = Clock(device)
    trained = train(model, [*ids], hidden_dim=hidden_dim, drawn=options.drawn, progress=clock)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    refuse_what_is_not_finite(trained)
    return {
        "geometry": options.geometry,
        "dtype": str(model.hf_model.dtype).removeprefix("torch."),
        "kind": kind.value,
        "hidden_dim": hidden_dim,
        "samples": options.samples,
        "tokens_a_sample": options.piece,
        "samples_fitted": trained.pieces,
        "samples_held_out": trained.held_out,
        "tokens_fitted": trained.tokens,
        "seconds": clock.seconds,
        "seconds_in_all": sum(clock.seconds.values()),
        "device_bytes_of_weights": weights,
        "device_bytes_before": held,
        "device_bytes_at_peak": peak,
        "host_bytes_at_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def refuse_what_is_not_finite(trained: Trained) -> None:
    """Stop if something went wrong on the way: there is no figure without a result."""
    parts = [tensor for module in trained.modules for tensor in module.tensors()]
    if not all(bool(part.isfinite().all()) for part in parts):
        raise SystemExit("the surrogate that was trained holds NaN or infinity: no figure")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", type=Kind, nargs="+", default=[*Kind], metavar="linear|mlp")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--piece", type=int, default=PIECE, help="tokens of a sample")
    parser.add_argument("--drawn", type=int, default=DRAWN, help="tokens drawn from a sample")
    parser.add_argument("--geometry", default="llama3.1-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="append the results to this file, a line each")
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    positions = 2 * options.piece + ROOM
    model = ModelKVzip(random_model(options.geometry, positions, device, dtype), tokenizer())
    for kind in options.kind:
        line = json.dumps({**provenance(device), **measure(model, kind, options)})
        print(line, flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
