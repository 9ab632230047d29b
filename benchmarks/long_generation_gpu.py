"""What a long answer costs on a GPU, with and without eviction of what has been said.

A model in a published shape with random weights reads random tokens while a surrogate with random
weights scores them, and keeps 0.3 of the pairs; then it answers, token after token, once with all
of its answer held and once with 0.3 of it. Times depend on shapes only; what is said means nothing.

A step is the median time from one token to the next, as the host hears of them. Where the answer
shrinks, or the step is recorded as a CUDA graph for the first time, that takes longer by what the
work costs: shrinking is timed alone, with the device waited for, and what is left beyond a step is
recording. Memory is what tensors take beyond weights and the context that is asked: tails, and
the copy of the context that shrinking makes.

First, short answers are compared that shrink to all of their pairs, and not at all. How many of
their first tokens agree is reported and not judged: with random weights the best logits lie close
together, and rounding may turn a token. That shrinking to all pairs changes nothing is tested.

    python benchmarks/long_generation_gpu.py [--tokens 4096] [--context 32768] [--out FILE.jsonl]
    python benchmarks/long_generation_gpu.py --geometry tiny --device cpu --context 400
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from kvzip import Budget, ContextCache, ModelKVzip, Shrinking, decoding, surrogates
from kvzip.benchmarks.geometries import ROOM, find, random_model, tokenizer
from kvzip.benchmarks.provenance import provenance
from kvzip.benchmarks.surrogate import INNER_SHARE, write_random
from kvzip.benchmarks.timing import settle
from kvzip.shrinking import Shrinker

REQUEST = "What is it?"
KINDS = ("linear", "mlp")
RATIO = 0.3
EVERY = 512
"""Tokens from one note of memory to the next."""
CHECKED = 64
SMALL = Shrinking(Budget(1.0), window=16, block=16)
"""How the answers that are compared first shrink: three times, and to all of their pairs."""


def held(device: torch.device) -> int:
    """Bytes that the device holds for tensors."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def now(device: torch.device) -> float:
    """Seconds, when the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


@dataclass
class Arrivals(BaseStreamer):
    """When each token arrived, and what the device held then; the question is not counted."""

    device: torch.device
    seconds: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    asked: bool = False

    def put(self, value: Tensor) -> None:
        """Take note of a token."""
        if self.asked:
            self.seconds.append(perf_counter())
            self.bytes.append(held(self.device))
        self.asked = True

    def end(self) -> None:
        """Take note of nothing."""

    def gaps(self) -> list[float]:
        """Seconds from each token to the next."""
        pairs = zip(self.seconds, self.seconds[1:], strict=False)
        return [after - before for before, after in pairs]


@dataclass(frozen=True)
class TimedShrinker(Shrinker):
    """Shrinks, with a clock.

    Attributes:
        seconds: that each block took.
        behind: tokens of the sequence, question included, that had been read when it came to it.
        bytes: of keys and values of the answer's own cache after it, its copy of the context too.
    """

    seconds: list[float] = field(default_factory=list)
    behind: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)

    def shrink(self, kv: ContextCache, token_ids: Tensor) -> None:
        """Shrink, and note how long it took."""
        device = torch.device(self.model.device)
        self.behind.append(kv.seen_tokens)
        start = now(device)
        super().shrink(kv, token_ids)
        self.seconds.append(now(device) - start)
        self.bytes.append(kv.nbytes)


def answer(
    model: ModelKVzip, kv: ContextCache, new: int, shrinker: TimedShrinker | None
) -> tuple[Tensor, Arrivals]:
    """An answer of so many tokens, and when they came."""
    arrivals = Arrivals(torch.device(model.hf_model.device))
    said = decoding.generate(
        model.decoder,
        model.tokenizer,
        kv,
        model.apply_template(REQUEST),
        max_positions=model.geometry.max_positions,
        streamer=arrivals,
        shrinker=shrinker,
        min_new_tokens=new,
        max_new_tokens=new,
    )
    return said, arrivals


def compare(model: ModelKVzip, kv: ContextCache, shrinker: TimedShrinker) -> dict[str, Any]:
    """Short answers that shrink to all of their pairs, beside those that do not."""
    whole, _ = answer(model, kv, CHECKED, None)
    shrunk, _ = answer(model, kv, CHECKED, shrinker)
    agreeing = int((whole == shrunk).int().cumprod(0).sum())
    return {"checked_tokens": CHECKED, "first_tokens_that_agree": agreeing}


def measure(
    model: ModelKVzip, kv: ContextCache, new: int, shrinker: TimedShrinker | None
) -> dict[str, Any]:
    """An answer's times and memory."""
    device = torch.device(model.hf_model.device)
    kv.room = None  # every answer starts without one
    settle(device)
    before = held(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    said, arrivals = answer(model, kv, new, shrinker)
    gaps = arrivals.gaps()
    step = median(gaps)
    found = {
        "new_tokens": len(said),
        "seconds": arrivals.seconds[-1] - arrivals.seconds[0],
        "seconds_a_token": mean(gaps),
        "median_step": step,
        "first_recording": gaps[0] - step,  # of no use where steps are not recorded
        "recorded": model.decoder.records,
        "device_bytes_on_the_way": [there - before for there in arrivals.bytes[EVERY - 1 :: EVERY]],
        "device_bytes_at_the_end": arrivals.bytes[-1] - before,
    }
    if device.type == "cuda":
        found["device_bytes_at_peak"] = torch.cuda.max_memory_allocated(device) - before
    if shrinker is not None:
        found |= stalls(shrinker, kv, len(model.apply_template(REQUEST)), gaps, step)
    return found


def stalls(
    shrinker: TimedShrinker, kv: ContextCache, asked: int, gaps: Sequence[float], step: float
) -> dict[str, Any]:
    """What each block took: shrinking, and what is left of that token's time beyond a step.

    Args:
        shrinker: after the answer.
        kv: the cache that was asked.
        asked: tokens of the question.
        gaps: seconds from each new token to the next.
        step: seconds of a step.
    """
    # The cache has read the question and all new tokens but the one that came last, behind which
    # the device waited: with s tokens behind the context, that is number s - asked.
    places = [behind - kv.seen_tokens - asked for behind in shrinker.behind]
    return {
        "blocks": len(places),
        "seconds_to_shrink": shrinker.seconds,
        "seconds_to_record": [
            gaps[place] - shrunk - step
            for place, shrunk in zip(places, shrinker.seconds, strict=True)
        ],
        "bytes_of_the_context": kv.nbytes,
        "bytes_of_context_copy_and_kept": shrinker.bytes,
    }


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Read a context, compare, and answer in both ways."""
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    positions = options.context + options.tokens + ROOM
    model = ModelKVzip(random_model(options.geometry, positions, device, dtype), tokenizer())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 1000, (options.context,), generator=generator)
    heads = {i: model.geometry.layers[i].kv_heads for i in model.geometry.prunable}
    inner = find(options.geometry).hidden // INNER_SHARE if options.kind == "mlp" else None
    with TemporaryDirectory() as folder:
        scorer = write_random(model, Path(folder) / options.kind, inner)
        surrogate = surrogates.load(scorer, model.hf_model, heads)
        kv = model.prefill(ids, scorer=scorer)
    if options.ratio < 1:
        kv.prune(options.ratio)
    checked = compare(model, kv, TimedShrinker(model.hf_model, surrogate, SMALL))
    how = Shrinking(Budget(options.shrink))
    settings = {
        **provenance(device),
        "geometry": options.geometry,
        "dtype": str(dtype).removeprefix("torch."),
        "context_tokens": options.context,
        "context_kept": options.ratio,
        "surrogate": f"kvzap, {options.kind}, random weights",
        "window": how.window,
        "block": how.block,
        **checked,
    }
    yield {**settings, "shrink": None, **measure(model, kv, options.tokens, None)}
    shrinker = TimedShrinker(model.hf_model, surrogate, how)
    yield {**settings, "shrink": options.shrink, **measure(model, kv, options.tokens, shrinker)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", default="llama3.1-8b")
    parser.add_argument("--context", type=int, default=32768, help="tokens")
    parser.add_argument("--tokens", type=int, default=4096, help="new tokens of an answer")
    parser.add_argument("--ratio", type=float, default=RATIO, help="kept of the context")
    parser.add_argument("--shrink", type=float, default=RATIO, help="kept of what has been said")
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0], help="of the surrogate")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="append the results to this file, a line each")
    options = parser.parse_args()
    for result in run(options):
        line = json.dumps(result)
        print(line, flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
