"""What each process of a tensor-parallel run does: `test_tensor_parallel` starts two of them.

    torchrun ... tensor_parallel_worker.py CHECKPOINT FOLDER

Everything that is seen goes to FOLDER/RANK.pt. FOLDER/one.kvz is there already.
"""

import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from kvzip import ContextCache, KVzipError, ModelKVzip
from kvzip.graphs import logits_of
from models import QUESTIONS, TEXT

RATIO = 0.4
STREAMING = {"streaming": True, "chunk_size": 40}
SCORERS = ["reconstruction+", "last-window", "expected-attention", "random"]
SAMPLING = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 8}


def seen(kv: ContextCache) -> dict:
    """What a cache holds."""
    assert kv.scores is not None
    return {"kept": kv.kept, "scores": kv.scores.values, "ratio": kv.ratio, "nbytes": kv.nbytes}


def work(model: ModelKVzip, folder: Path) -> dict:
    """Every stage; also what one process does, to compare with."""
    found = {"fingerprint": model.origin.fingerprint}
    kv = model.prefill(TEXT)
    found["full"] = seen(kv)
    for name, budget in {"ratio": {"ratio": RATIO}, "bytes": {"bytes": "60kB"}}.items():
        branch = kv.fork().prune(**budget)
        found[name] = seen(branch)
        found[f"{name} answers"] = model.ask(branch, QUESTIONS, max_new_tokens=8)
    kv.prune(RATIO)
    found["file"] = seen(model.load(kv.save(folder / "a.kvz")))
    found["codes"] = seen(
        model.load(kv.fork().prune(RATIO, kv_dtype="int8").save(folder / "b.kvz"))
    )
    model.generate(QUESTIONS[0], kv=kv, max_new_tokens=8, update_cache=True)
    found["conversation"] = model.generate(QUESTIONS[1], kv=kv, max_new_tokens=8)
    for level in ("pair-uniform", "head"):
        found[level] = seen(model.prefill(TEXT).prune(0.5, level=level))
    for scorer in SCORERS:
        found[scorer] = seen(model.prefill(TEXT, scorer=scorer, ratio=RATIO))
    retaining = ModelKVzip(model.hf_model, model.tokenizer, kv_type="retain").prefill(TEXT)
    found["retained"] = seen(retaining.prune(0.2).prune(0.6))
    for budget in ("chunk", "context"):
        found[f"streamed {budget}"] = seen(
            model.prefill(TEXT, ratio=RATIO, budget=budget, **STREAMING)
        )
    return found


def answer_where_one_process_cannot_record(model: ModelKVzip) -> str:
    """The first process fails to record its steps, the other would go ahead."""

    def record(forward, kv, batch, devices):
        if dist.get_rank() == 0:
            raise RuntimeError("out of memory")
        return partial(logits_of, forward, cache=kv)

    kv = model.prefill(TEXT, ratio=RATIO)
    records = model.decoder.records
    model.decoder.records = True
    with mock.patch("kvzip.room.record", record):
        answer = model.generate(QUESTIONS[0], kv=kv, max_new_tokens=8)
    assert not model.decoder.records
    model.decoder.records = records
    return answer


def refusals(model: ModelKVzip, folder: Path) -> dict[str, str]:
    """What is said, in every process, about what cannot be."""
    kv = model.prefill(TEXT, ratio=RATIO)
    wrong = {
        "exists": lambda: kv.save(folder / "a.kvz"),
        "full": lambda: kv.save("/dev/full/a.kvz"),
        "surrogate": lambda: model.prefill(TEXT, scorer="fastkvzip"),
        "uneven": lambda: ModelKVzip(folder / "uneven", tp_plan="auto"),
        "whole": lambda: ModelKVzip(folder / "whole", tp_plan="auto"),
    }
    said = {}
    for name, do in wrong.items():
        try:
            do()
        except KVzipError as error:
            said[name] = str(error)
    return said


def run_two_processes(checkpoint: Path, folder: Path, device: str) -> None:
    """Start them, on CPUs or CUDA devices, and wait for them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", __file__, str(checkpoint), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]


def main(checkpoint: str, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model = ModelKVzip(checkpoint, tp_plan="auto", dtype=torch.float32)
    rank = dist.get_rank()
    found = work(model, folder)
    torch.manual_seed(rank)  # processes that draw differently
    kv = model.prefill(TEXT, ratio=RATIO)
    found["sampled"] = [model.generate(QUESTIONS[0], kv=kv, **SAMPLING) for _ in range(3)]
    found["answer"] = model.generate(QUESTIONS[0], kv=kv, max_new_tokens=8)
    found["not recorded"] = answer_where_one_process_cannot_record(model)
    found["opened"] = seen(model.load(folder / "one.kvz"))
    found["said"] = refusals(model, folder)
    found["records"] = model.decoder.records
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
