"""Train the bundled model on one GPU, from scratch, for a given number of minutes.

    python training/train.py --out build/tiny --minutes 17
    python training/train.py --out build/smoke --smoke        # CPU, seconds

Samples are packed into one row of tokens a step; attention stays inside a sample, and positions
start anew with each. Contexts grow with the training. The run saves a checkpoint now and then and
goes on from it when it is started again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.context import SpawnProcess
from multiprocessing.queues import Queue
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GenerationConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from corpus import ANSWER_WEIGHT, Encoder, samples
from muon import Muon

TINY = Path(__file__).parents[1] / "src" / "kvzip" / "assets" / "tiny"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
LONGEST_SAMPLE = 8192
SHORTEST_SAMPLE = 48

STEADY = 0.4

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
"""Ids, positions, weights, each `[1, tokens]`, and the sample boundaries `[boundaries]`, int32."""


@dataclass(frozen=True)
class Settings:
    """What a run needs besides the model's shape.

    `curriculum`: from this share of the training on, contexts have up to so many tokens.
    """

    tokens_per_step: int = 131_072
    curriculum: tuple[tuple[float, int], ...] = ((0.0, 600), (0.12, 1500), (0.3, 2800), (0.5, 4200))
    warmup_steps: int = 200
    lr: float = 2.5e-3
    weight_decay: float = 0.02
    workers: int = 6
    save_every_seconds: float = 60.0
    seed: int = 0


def tiny_config(vocabulary: int) -> Qwen3Config:
    """Return the shape of the bundled model: 6.7 M parameters, 8 query and 4 KV heads of 32."""
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=LONGEST_SAMPLE,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.02,
    )


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    boundaries: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sample of a packed row.

    Args:
        query: `[1, heads, tokens, D]`; key and value have fewer heads.
        boundaries: `[samples + 1]`, int32, the first token of every sample and the end.
    """
    query, key, value = (s[0].transpose(0, 1).to(value.dtype) for s in (query, key, value))
    groups = query.size(1) // key.size(1)
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        attended = varlen_attn(
            query, key, value, boundaries, boundaries, LONGEST_SAMPLE, LONGEST_SAMPLE,
            scale=scaling, window_size=(-1, 0),
        )  # fmt: skip
        assert isinstance(attended, Tensor)
    else:
        attended = torch.cat(
            [
                F.scaled_dot_product_attention(
                    *(states[start:end].transpose(0, 1) for states in (query, key, value)),
                    is_causal=True,
                    scale=scaling,
                ).transpose(0, 1)
                for start, end in zip(
                    boundaries[:-1].tolist(), boundaries[1:].tolist(), strict=True
                )
                if end > start
            ]
        )
    return attended[None], None


def loss_and_hits(model: Qwen3ForCausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the weighted loss, and the share of answer tokens that would be generated rightly."""
    ids, positions, weights, boundaries = batch
    hidden = model.model(
        input_ids=ids, position_ids=positions, boundaries=boundaries, use_cache=False
    ).last_hidden_state
    logits = model.lm_head(hidden[0, :-1]).float()
    targets, weights = ids[0, 1:], weights[0, 1:]
    losses = F.cross_entropy(logits, targets, reduction="none")
    answers = weights == ANSWER_WEIGHT
    hits = ((logits.argmax(-1) == targets) & answers).sum() / answers.sum().clamp_min(1)
    return (losses * weights).sum() / weights.sum(), hits


def packed(
    encoder: Encoder, rng: Random, tokens: int, longest: Synchronized
) -> Iterator[list[Any]]:
    """Yield batches of exactly `tokens` tokens as arrays: ids, positions, weights, boundaries.

    The tail that no sample fits is one padding sample without weight.
    """
    source, left_over = None, None
    size = 0
    while True:
        if size != longest.value:
            size = longest.value
            source = samples(encoder, rng, size)
        ids = np.full(tokens, encoder.pad, dtype=np.uint16)
        weights = np.zeros(tokens, dtype=np.float32)
        positions = np.zeros(tokens, dtype=np.int32)
        boundaries = np.full(tokens // SHORTEST_SAMPLE + 2, tokens, dtype=np.int32)
        start = count = 0
        while True:
            sample = left_over or next(source)
            left_over = None
            length = len(sample.ids)
            if start + length > tokens:
                left_over = sample if length <= tokens else None
                break
            ids[start : start + length] = sample.ids
            weights[start + 1 : start + length] = sample.weights[1:]
            positions[start : start + length] = np.arange(length)
            boundaries[count] = start
            start, count = start + length, count + 1
        rest = tokens - start
        if rest <= LONGEST_SAMPLE:
            positions[start:] = np.arange(rest)
            boundaries[count] = start
            yield [ids, positions, weights, boundaries]


def produce(
    queue: Queue, tokenizer_file: str, seed: str, tokens: int, longest: Synchronized
) -> None:
    """Put packed batches into the queue for ever (the body of one worker)."""
    encoder = Encoder(Tokenizer.from_file(tokenizer_file))
    for arrays in packed(encoder, Random(seed), tokens, longest):
        queue.put(arrays)


def start_workers(settings: Settings, run: int) -> tuple[Queue, Synchronized, list[SpawnProcess]]:
    """Start the processes that write batches; return their queue and the context length they use.

    Args:
        run: part of the seed, so that a run which goes on does not see the same documents again.
    """
    context = get_context("spawn")
    longest = context.Value("i", settings.curriculum[0][1])
    queue = context.Queue(maxsize=2 * settings.workers)
    tokenizer_file = str(TINY / "tokenizer.json")
    workers = [
        context.Process(
            target=produce,
            args=(
                queue,
                tokenizer_file,
                f"{settings.seed}:{run}:{number}",
                settings.tokens_per_step,
                longest,
            ),
            daemon=True,
        )
        for number in range(settings.workers)
    ]
    for worker in workers:
        worker.start()
    return queue, longest, workers


def optimizers_for(model: Qwen3ForCausalLM, settings: Settings) -> list[torch.optim.Optimizer]:
    """Return Muon for the weight matrices and AdamW for the embedding and the norms."""
    named = list(model.named_parameters())
    matrices = [weight for name, weight in named if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in named if weight.ndim < 2 or "embed" in name]
    return [
        Muon(matrices, lr=settings.lr, weight_decay=settings.weight_decay),
        torch.optim.AdamW(others, lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate(settings: Settings, step: int, progress: float) -> float:
    """Return warm-up, a steady stretch, then a straight fall to one hundredth of the peak."""
    fall = (progress - STEADY) / (1 - STEADY)
    return settings.lr * min(1.0, (step + 1) / settings.warmup_steps, max(0.01, 1 - fall))


def train(
    out: Path,
    minutes: float,
    settings: Settings,
    config: Qwen3Config,
    weights: Path | None = None,
    elapsed: float = 0.0,
) -> list[float]:
    """Train and save the model in `out`; return the losses that were logged.

    Args:
        weights: a folder with weights to start from, instead of random ones.
        elapsed: seconds of training to take as done already, with `weights`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    AttentionInterface.register("packed", packed_attention)
    AttentionMaskInterface.register("packed", lambda *_, **__: None)
    torch.manual_seed(settings.seed)
    if weights:
        model = Qwen3ForCausalLM.from_pretrained(weights, dtype=torch.float32)
    else:
        model = Qwen3ForCausalLM(config)
    model = model.to(device)
    model.config._attn_implementation = "packed"
    optimizers = optimizers_for(model, settings)
    step = 0
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, elapsed = state["step"], state["elapsed"]

    queue, longest, workers = start_workers(settings, run=step)
    forward = torch.compile(loss_and_hits, dynamic=False) if device == "cuda" else loss_and_hits
    logged: list[float] = []
    started = saved_at = time.monotonic()
    first_step, before = step, elapsed
    while (progress := elapsed / (60 * minutes)) < 1:
        longest.value = [size for begin, size in settings.curriculum if begin <= progress][-1]
        rate = learning_rate(settings, step, progress)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        ids, positions, shares, boundaries = map(torch.from_numpy, queue.get())
        batch = (
            ids.long()[None].to(device),
            positions.long()[None].to(device),
            shares[None].to(device),
            boundaries.to(device),
        )
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss, hits = forward(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if step == first_step + 1:
            loss.item()
            started = time.monotonic()  # compilation is not training
        if step % 50 == 0 or device == "cpu":
            logged.append(loss.item())
            now = before + time.monotonic() - started
            speed = (step - first_step) * settings.tokens_per_step / max(now - before, 1e-9)
            line = {
                "step": step, "seconds": round(now), "loss": round(logged[-1], 4),
                "answer_tokens_right": round(hits.item(), 4), "lr": round(rate, 6),
                "longest": longest.value, "tokens_per_second": round(speed), "queue": queue.qsize(),
            }  # fmt: skip
            print(json.dumps(line), flush=True)
        elapsed = before + time.monotonic() - started
        if time.monotonic() - saved_at > settings.save_every_seconds:
            saved_at = time.monotonic()
            save_checkpoint(out, model, optimizers, step, elapsed)
            save(model, out)
    for worker in workers:
        worker.terminate()
    save_checkpoint(out, model, optimizers, step, elapsed)
    save(model, out)
    return logged


def save_checkpoint(
    out: Path,
    model: Qwen3ForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    step: int,
    elapsed: float,
) -> None:
    """Write everything that a run needs to go on, whole or not at all."""
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
        "elapsed": elapsed,
    }
    torch.save(state, out / "checkpoint.new")
    (out / "checkpoint.new").replace(out / "checkpoint.pt")


def save(model: Qwen3ForCausalLM, out: Path) -> None:
    """Write a folder that transformers opens: bfloat16 weights, configuration and tokenizer."""
    copy = Qwen3ForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(do_sample=False, eos_token_id=2, pad_token_id=0)
    copy.to(torch.bfloat16).save_pretrained(out)
    if out.resolve() != TINY.resolve():
        for name in TOKENIZER_FILES:
            shutil.copy(TINY / name, out / name)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=17.0)
    parser.add_argument("--lr", type=float, default=Settings.lr)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--weights", type=Path, help="a folder with weights to start from")
    parser.add_argument("--elapsed", type=float, default=0.0, help="minutes done, with --weights")
    parser.add_argument(
        "--smoke", action="store_true", help="a minute model for some seconds on a CPU"
    )
    arguments = parser.parse_args()
    vocabulary = Tokenizer.from_file(str(TINY / "tokenizer.json")).get_vocab_size()
    if arguments.smoke:
        smoke(arguments.out, vocabulary)
        return
    settings = Settings(lr=arguments.lr, seed=arguments.seed)
    train(
        arguments.out,
        arguments.minutes,
        settings,
        tiny_config(vocabulary),
        arguments.weights,
        60 * arguments.elapsed,
    )


def smoke(out: Path, vocabulary: int, seconds: float = 8.0) -> list[float]:
    """Train a much smaller model for some seconds; return its losses."""
    config = tiny_config(vocabulary)
    config.update({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2})
    config.layer_types = config.layer_types[:2]
    settings = Settings(tokens_per_step=2048, curriculum=((0.0, 60),), warmup_steps=4, workers=1)
    return train(out, seconds / 60, settings, config)


if __name__ == "__main__":
    main()
