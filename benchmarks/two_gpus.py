"""A model on two GPUs beside the same on one: the same answers, and memory of each GPU.

Three ways to hold one model, each in processes of its own:

- `one`: on the first GPU;
- `layers`: layers divided, one process (`device_map="balanced"`);
- `heads`: heads divided, two processes (`tp_plan="auto"` under torchrun).

The bundled model (float32) answers the bundled questions from a cache that it zips, and from a file
that `one` wrote: answers must be the same everywhere. A model in a published shape with random
weights (bfloat16) reads random tokens, keeps 0.3 of the pairs and decodes. It tells seconds and
memory. What it says means nothing, and sums of two parts are rounded otherwise than whole ones; how
many pairs are chosen alike is reported for both models, and not judged.

    python benchmarks/two_gpus.py --out two_gpus.json
    python benchmarks/two_gpus.py --cpu --geometry tiny --context 300     # only the plumbing
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kvzip import ContextCache, ModelKVzip
from kvzip.benchmarks.geometries import ROOM, random_model, tokenizer
from kvzip.benchmarks.provenance import provenance
from kvzip.cli.demo import bundled_document

WAYS = ("one", "layers", "heads")
RATIO = 0.3
ONE_FILE = "bundled.kvz"
BUNDLED, LARGE = "bundled", "large"
CHECKPOINT = "checkpoint"


def placing(way: str, cpu: bool) -> dict[str, Any]:
    """Arguments that say where a model goes."""
    first = "cpu" if cpu else "cuda:0"
    return {
        "one": {"device": first},
        "layers": {"device_map": {"": "cpu"} if cpu else "balanced"},
        "heads": {"tp_plan": "auto"},
    }[way]


class Stages:
    """Seconds of stages, and memory of each GPU when they end and at their peak."""

    def __init__(self) -> None:
        self.seen: dict[str, dict[str, Any]] = {}
        # a process that others stand beside tells of its own GPU only
        gpus, own = range(torch.cuda.device_count()), os.environ.get("LOCAL_RANK")
        self.gpus = [gpu for gpu in gpus if own is None or gpu == int(own)]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        for gpu in self.gpus:
            torch.cuda.synchronize(gpu)
            torch.cuda.reset_peak_memory_stats(gpu)
        start = time.perf_counter()
        yield
        for gpu in self.gpus:
            torch.cuda.synchronize(gpu)
        self.seen[name] = {
            "seconds": time.perf_counter() - start,
            "bytes": {str(gpu): torch.cuda.memory_allocated(gpu) for gpu in self.gpus},
            "peak": {str(gpu): torch.cuda.max_memory_allocated(gpu) for gpu in self.gpus},
        }


def answers_of_the_bundled_model(way: str, cpu: bool, folder: Path) -> dict[str, list[str]]:
    """From a cache that it zips, and from the file of `one`."""
    model = ModelKVzip(dtype=torch.float32, **placing(way, cpu))
    document, questions = bundled_document()
    asked = [question.text for question in questions]
    kv = model.prefill(document, ratio=RATIO)
    keep(kv, model, BUNDLED, way, folder)
    if way == "one":
        kv.save(folder / ONE_FILE)
    return {
        "zipped": model.ask(kv, asked, max_new_tokens=64),
        "opened": model.ask(model.load(folder / ONE_FILE), asked, max_new_tokens=64),
    }


def keep(kv: ContextCache, model: ModelKVzip, name: str, way: str, folder: Path) -> None:
    """Write down which pairs a process has kept."""
    torch.save(kv.kept, folder / f"{name}.{way}.{model.division.rank}.pt")


def make_checkpoint(options: argparse.Namespace) -> None:
    """The model in a published shape."""
    device = torch.device("cpu" if options.cpu else "cuda:0")
    made = random_model(options.geometry, options.context + ROOM, device, torch.bfloat16)
    made.save_pretrained(options.folder / CHECKPOINT)
    tokenizer().save_pretrained(options.folder / CHECKPOINT)
    del made
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Stages of the large model."""
    stages = Stages()
    with stages.stage("load"):
        checkpoint = options.folder / CHECKPOINT
        model = ModelKVzip(checkpoint, dtype=torch.bfloat16, **placing(way, options.cpu))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 1000, (options.context,), generator=generator)
    query = model.apply_template("What is it?")
    kv = model.read(ids[:1000])
    model.score(kv).prune(RATIO)  # kernels are compiled, libraries set up
    model.generate(query, kv=kv, max_new_tokens=4)
    del kv
    with stages.stage("prefill"):
        kv = model.read(ids)
    full = kv.nbytes
    with stages.stage("score"):
        model.score(kv)
    with stages.stage("prune"):
        kv.prune(RATIO)
    seconds = {}
    long, short = options.tokens + 2, 2
    names = {"first answer": long, "answer of 2 tokens": short, "long answer": long}
    for name, count in names.items():
        with stages.stage(name):
            answer = model.generate(query, kv=kv, min_new_tokens=count, max_new_tokens=count)
        seconds[count] = stages.seen[name]["seconds"]
    keep(kv, model, LARGE, way, options.folder)
    return {
        "stages": stages.seen,
        "cache_full": full,
        "cache_zipped": kv.nbytes,
        "answer": answer,
        "seconds_a_token": (seconds[long] - seconds[short]) / options.tokens,
        "steps_recorded": model.decoder.records,
    }


def work(way: str, options: argparse.Namespace) -> None:
    """What a process does; its findings go to the folder."""
    found = {"answers": answers_of_the_bundled_model(way, options.cpu, options.folder)}
    found[LARGE] = measure(way, options)
    rank = int(os.environ.get("RANK", 0))
    (options.folder / f"{way}.{rank}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def start(way: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the processes of one way; what each of them found."""
    command = [sys.executable]
    if way == "heads":
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [__file__, "--way", way, "--folder", str(options.folder)]
    command += ["--geometry", options.geometry, "--context", str(options.context)]
    command += ["--tokens", str(options.tokens), *(["--cpu"] if options.cpu else [])]
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if options.cpu else {})}
    begun = time.perf_counter()
    subprocess.run(command, check=True, env=environment)
    print(f"{way}: {time.perf_counter() - begun:.1f} s in all", flush=True)
    files = sorted(options.folder.glob(f"{way}.*.json"))
    return [json.loads(file.read_text()) for file in files]


def kept(name: str, way: str, folder: Path) -> torch.Tensor:
    """`[L, H, n]`, the heads of all processes."""
    files = sorted(folder.glob(f"{name}.{way}.*.pt"))
    return torch.cat([torch.load(file) for file in files], dim=1)


def kept_alike(name: str, way: str, folder: Path) -> float:
    """The share of the pairs that a way has kept which `one` has kept, too."""
    mine, chosen = (kept(name, one, folder) for one in (way, "one"))
    return float((mine & chosen).sum() / mine.sum())


def compare(found: dict[str, list[dict[str, Any]]], folder: Path) -> dict[str, Any]:
    """Each way beside one GPU."""
    expected = found["one"][0]["answers"]
    result = {}
    for way, processes in found.items():
        result[way] = {
            "same_answers": all(process["answers"] == expected for process in processes),
            "answers": processes[0]["answers"],
            "pairs_kept_alike": {name: kept_alike(name, way, folder) for name in (BUNDLED, LARGE)},
            "processes": [process[LARGE] for process in processes],
        }
    return result


def show(way: str, one: dict[str, Any]) -> None:
    """Print what was found of one way."""
    print(f"{way}: same answers {one['same_answers']}, pairs kept alike {one['pairs_kept_alike']}")
    for process in one["processes"]:
        for name, stage in process["stages"].items():
            peak = {gpu: f"{size / 1e9:.2f} GB" for gpu, size in stage["peak"].items()}
            print(f"    {name}: {stage['seconds']:.2f} s, peak {peak}", flush=True)
        recorded = "recorded" if process["steps_recorded"] else "not recorded"
        print(f"    a token: {process['seconds_a_token'] * 1e3:.2f} ms, {recorded}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("two_gpus.json"))
    parser.add_argument("--geometry", default="llama3.1-8b")
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument(
        "--folder", type=Path, help="for checkpoint and findings; a new one if none"
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="all of them if none is named")
    parser.add_argument("--way", choices=WAYS, help="one process of it; for this program itself")
    options = parser.parse_args()
    options.ways = WAYS if options.ways is None else options.ways
    if options.ways[0] != WAYS[0]:
        parser.error(f"--ways begins with {WAYS[0]}, which the others are compared with")
    if options.way is not None:
        work(options.way, options)
        return 0
    setting = {name: getattr(options, name) for name in ("geometry", "context", "tokens")}
    where = provenance(torch.device("cpu" if options.cpu else "cuda:0"), sys.argv)
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        options.folder = Path(folder)
        make_checkpoint(options)
        for way in options.ways:  # each is written down at once, should a later one be stopped
            found[way] = start(way, options)
            result = compare(found, options.folder)
            written = {"provenance": where, **setting, "ways": result}
            options.out.write_text(json.dumps(written, indent=2))
            show(way, result[way])
    return 0 if all(one["same_answers"] for one in result.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
