"""What bounding a long answer costs the bundled model: bytes on the way, and tokens that change.

The model repeats a context of the `eval` split, token for token, which makes an answer of about
4,000 tokens in its 8,192 positions. It does so once with all pairs held, and then with what it has
said shrinking to one share after another, by the scores of a surrogate and, to compare with, at
random. Bytes are those of all keys and values behind the context that is shared, read from the live
tensors of the cache after every step: tokens in the window and on their way, and what is kept of
the others. The copy of the context that shrinking makes is told apart.

    python benchmarks/long_generation.py [--documents 1] [--tokens 3900] [--out FILE.jsonl]
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from kvzip import Budget, ContextCache, ModelKVzip, Shrinking, decoding, surrogates
from kvzip.benchmarks.provenance import provenance
from kvzip.shrinking import Shrinker
from kvzip.surrogates.predicting import Surrogate
from kvzip.synthetic import FAMILIES, make_document

REQUEST = "Repeat the previous context exactly."
SURROGATE = "kvzap:linear"
RANDOM = "random"
AMOUNTS = (Budget(1.0), Budget(0.5), Budget(0.3), Budget(0.1), Budget(threshold=-4))
RANDOM_AMOUNTS = (Budget(0.3), Budget(0.1))
EVERY = 250
"""Tokens from one note of bytes to the next."""


@dataclass(frozen=True)
class AtRandom:
    """A surrogate that knows nothing."""

    heads: Sequence[int]
    generator: torch.Generator
    scorer: str = RANDOM
    window: int = 0

    def predict(self, layer: int, hidden: Tensor) -> Tensor:
        return torch.rand(self.heads[layer], len(hidden), generator=self.generator)

    def complete(self, scores: Tensor) -> Tensor:
        return scores


@contextmanager
def bytes_noted(model: ModelKVzip) -> Iterator[list[tuple[int, int]]]:
    """Bytes of a cache's tail and those of its context, behind every forward pass into it."""
    noted: list[tuple[int, int]] = []

    def note(module: Any, arguments: Any, named: dict[str, Any], output: Any) -> None:
        cache = named.get("past_key_values")
        if isinstance(cache, ContextCache) and named["input_ids"].shape[1] == 1:
            context = cache.fork().nbytes
            noted.append((cache.nbytes - context, context))

    hook = model.hf_model.base_model.register_forward_hook(note, with_kwargs=True)
    try:
        yield noted
    finally:
        hook.remove()


def answer(
    model: ModelKVzip, kv: ContextCache, query: Tensor, new: int, shrinker: Shrinker | None
) -> tuple[Tensor, dict[str, Any]]:
    """An answer's tokens, and what it took."""
    start = perf_counter()
    with bytes_noted(model) as noted:
        said = decoding.generate(
            model.decoder,
            model.tokenizer,
            kv,
            query,
            max_positions=model.geometry.max_positions,
            shrinker=shrinker,
            max_new_tokens=new,
        )
    seconds = perf_counter() - start
    context = kv.nbytes
    behind = [tail + grown - context for tail, grown in noted]
    took = {
        "seconds": seconds,
        "bytes_of_the_context": context,
        "bytes_behind_it": behind[EVERY - 1 :: EVERY],
        "largest_bytes_behind_it": max(behind),
    }
    return said, took


def measure(document: int, tokens: int) -> Iterator[dict[str, Any]]:
    model = ModelKVzip(device="cpu")
    heads = {i: model.geometry.layers[i].kv_heads for i in model.geometry.prunable}
    text = make_document(
        list(FAMILIES),
        seed=f"long-{document}",
        split="eval",
        tokens=tokens,
        count_tokens=lambda part: len(model.prompts.context_ids(part)),
    ).context
    kv, query = model.read(text), model.apply_template(REQUEST)
    context = kv.document.token_ids[kv.document.prefix_length :]
    predicted = surrogates.load(SURROGATE, model.hf_model, heads)
    ways: list[tuple[Surrogate, Budget]] = [(predicted, amount) for amount in AMOUNTS]
    for amount in RANDOM_AMOUNTS:
        generator = torch.Generator().manual_seed(document)
        ways.append((AtRandom(list(heads.values()), generator), amount))
    settings = {
        **provenance(model.hf_model.device),
        "document": document,
        "context_tokens": len(context),
        "window": Shrinking(Budget(1.0)).window,
        "block": Shrinking(Budget(1.0)).block,
    }
    new = len(context) + 1  # with its end
    whole, took = answer(model, kv, query, new, None)
    said = {"tokens": len(whole), "of_the_context": agreeing(whole, context)}
    yield {**settings, "scorer": None, "amount": None, **said, **took}
    for surrogate, amount in ways:
        shrinker = Shrinker(model.hf_model, surrogate, Shrinking(amount))
        got, took = answer(model, kv, query, new, shrinker)
        said = {
            "tokens": len(got),
            "of_the_context": agreeing(got, context),
            "of_the_unshrunk_answer": agreeing(got, whole),
            "first_difference": first_difference(got, whole),
        }
        how = {"scorer": surrogate.scorer, "amount": str(amount)}
        yield {**settings, **how, **said, **took}


def agreeing(one: Tensor, other: Tensor) -> int:
    """Places at which two sequences have the same token."""
    shorter = min(len(one), len(other))
    return int((one[:shorter] == other[:shorter]).sum())


def first_difference(one: Tensor, other: Tensor) -> int | None:
    """The first place at which they have not, None if there is none."""
    shorter = min(len(one), len(other))
    places = (one[:shorter] != other[:shorter]).nonzero()
    if len(places):
        return int(places[0])
    return None if len(one) == len(other) else shorter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=3900)
    parser.add_argument("--out", type=Path, help="append the results to this file, a line each")
    options = parser.parse_args()
    for document in range(options.documents):
        for result in measure(document, options.tokens):
            line = json.dumps(result)
            print(line, flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
