"""Weights in 8 or 4 bits together with an evicted cache of 4 bits, on a GPU.

A model in a published shape with random weights is saved as a checkpoint and loaded with each
quantisation in turn. Each reads a context of random tokens, keeps 0.3 of the pairs (chosen at
random), quantises them, and decodes with compiled steps. It tells memory and seconds: an answer of
two tokens is mostly the question's reading, and what a longer one takes more is steps. The logits
behind a short text are compared with those of the weights as made: what is reported is how much
quantising random weights changes them, not what it costs a trained model.

    python benchmarks/quantized_weights.py [--layers 8] [--kinds int8 w8a8 fp8] [--out FILE.jsonl]

A quantisation that cannot run leaves a line with the reason.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kvzip import ModelKVzip
from kvzip.benchmarks.geometries import ROOM, STD, find, tokenizer
from kvzip.benchmarks.provenance import provenance
from kvzip.quantized_weights import QUANTIZATIONS

RATIO, KV_DTYPE = 0.3, "int4"
SHORT = 64
"""Tokens that logits are compared behind."""


def save_checkpoint(options: argparse.Namespace, folder: Path) -> None:
    """Random weights in the shape of a geometry, with as many layers as are asked for."""
    config = find(options.geometry).config(options.context + ROOM)
    config.num_hidden_layers = options.layers
    torch.manual_seed(0)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(0.0, STD)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def timed(action: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds of an action, the device waited for, and its result."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    result = action()
    wait()
    return time.perf_counter() - start, result


def held(device: str) -> int | None:
    """Bytes of device memory in use."""
    return torch.cuda.memory_allocated() if device.startswith("cuda") else None


def measure(kind: str | None, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One quantisation."""
    device, tokens = options.device, options.tokens
    before = held(device)
    model = ModelKVzip(
        folder,
        dtype=torch.bfloat16,
        device=device,
        quantization=kind,
        compile=device.startswith("cuda"),
    )
    weights = held(device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 1000, (options.context,), generator=generator)
    with torch.no_grad():
        logits: Tensor = model.hf_model(ids[None, :SHORT].to(device)).logits[0, -1].float().cpu()
    model.read(ids)  # kernels and plans
    read, kv = timed(lambda: model.read(ids), device)
    full = kv.nbytes
    model.score(kv, scorer="random")
    kv.prune(RATIO, kv_dtype=KV_DTYPE)
    query = model.apply_template("What is it?")

    def answer(count: int) -> tuple[float, str]:
        length = {"min_new_tokens": count, "max_new_tokens": count}
        return timed(lambda: model.generate(query, kv=kv, **length), device)

    first, said = answer(tokens + 2)
    short, _ = answer(2)
    seconds, again = answer(tokens + 2)
    if again != said:
        raise SystemExit(f"{kind}: an answer that is given twice differs")
    return {
        "weights": kind or "bfloat16",
        "logits": logits,
        "bytes_of_weights": None if weights is None or before is None else weights - before,
        "cache_full": full,
        "cache": kv.nbytes,
        "seconds_to_read": read,
        "seconds_of_first_answer": first,
        "seconds_of_two_tokens": short,
        "seconds_a_token": (seconds - short) / tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", default="llama3.1-8b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--context", type=int, default=32768, help="tokens")
    parser.add_argument("--tokens", type=int, default=64, help="that are timed")
    parser.add_argument("--kinds", nargs="*", default=QUANTIZATIONS, choices=QUANTIZATIONS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="append the results to this file, a line each")
    options = parser.parse_args()
    expected: Tensor | None = None
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(options, Path(folder))
        for kind in (None, *options.kinds):
            try:
                found = measure(kind, options, Path(folder))
            except Exception as error:  # the others go on
                found = {"weights": kind, "error": f"{type(error).__name__}: {error}"[:300]}
            else:
                logits = found.pop("logits")
                expected = logits if expected is None else expected
                found["logits_changed"] = float((logits - expected).norm() / expected.norm())
            line = {
                **provenance(torch.device(options.device), sys.argv),
                **{name: getattr(options, name) for name in ("geometry", "layers", "context")},
                **found,
            }
            print(json.dumps(found), flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
