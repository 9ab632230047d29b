"""Compression while reading: against plain prefill, one pass, an oracle, and counted bytes."""

from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from math import floor
from typing import Any

import pytest
import torch
from torch import Tensor

import kvzip.scoring.repeated_chunks as repeated_chunks
import kvzip.streaming as streaming
from kvzip import ContextCache, KVzipError, ModelKVzip, Scores
from kvzip.budget import Budget
from kvzip.kernels.quantization import KV_DTYPES
from kvzip.layers import ContextLayer, Layer
from kvzip.scoring.repeated_chunks import RepeatedChunks
from kvzip.streaming import chunks_of
from models import (
    QUESTIONS,
    TEXT,
    Oracle,
    assert_same,
    logits_of,
    make_model,
    random_ids,
    shared_model,
    snapshot,
)
from test_memory import _only_new_objects, held_bytes, kept_bytes, live_bytes, pair_bytes
from test_scoring import full_layers

KINDS = ["llama", "qwen3", "gemma3"]
BUDGETS = streaming.BUDGETS
N, CHUNK, RATIO = 70, 16, 0.3
FREE_OF_NOISE = {"atol": 1e-4, "rtol": 0}

_ = _only_new_objects  # a fixture that is used by being here


def stream(model: ModelKVzip, context: Any, **how: Any) -> ContextCache:
    return model.prefill(context, **{"ratio": RATIO, "streaming": True, "chunk_size": CHUNK, **how})


def stages(
    model: ModelKVzip, ids: Tensor, budget: str, size: int = CHUNK
) -> tuple[ContextCache, list[Tensor]]:
    """A cache that was read in chunks, and its kept pairs behind each of them."""
    kv = stream(model, ids[:size], chunk_size=size, budget=budget)
    kept = [kv.kept]
    kv.extend(
        ids[size:], chunk_size=size, budget=budget, progress=lambda *call: kept.append(kv.kept)
    )
    return kv, kept


def asked(model: ModelKVzip, kv: ContextCache) -> Tensor:
    return logits_of(model, kv, model.apply_template(QUESTIONS[1]))


def assert_equal_caches(model: ModelKVzip, one: ContextCache, other: ContextCache) -> None:
    """Tokens and kept pairs are equal, scores of what is kept and logits within rounding."""
    assert torch.equal(one.token_ids, other.token_ids)
    assert one.seen_tokens == other.seen_tokens
    assert torch.equal(one.kept, other.kept)
    assert one.scores.scorer == other.scores.scorer
    assert one.ratio == other.ratio
    torch.testing.assert_close(
        one.scores.values[one.kept], other.scores.values[one.kept], atol=1e-5, rtol=0
    )
    torch.testing.assert_close(asked(model, one), asked(model, other), **FREE_OF_NOISE)


class StopError(Exception):
    """Raised in the middle."""


# Against what is known


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("size", [1, 7, 16, N, N + 9])
@pytest.mark.parametrize("kind", KINDS)
def test_ratio_one_equals_plain_prefill(kind, size, budget):
    model = shared_model(kind)
    ids = random_ids(17 if size == 1 else N)
    plain = model.read(ids)
    kv = stream(model, ids, ratio=1.0, chunk_size=size, budget=budget)
    assert kv.kept.all()
    assert kv.realised_ratio == kv.ratio == 1
    assert torch.equal(kv.token_ids, plain.token_ids)
    assert kv.seen_tokens == plain.seen_tokens
    assert kv.nbytes == plain.nbytes
    for layer, expected in zip(kv.layers, plain.layers, strict=True):
        for held, plainly in zip(layer.context_tensors(), expected.context_tensors(), strict=True):
            torch.testing.assert_close(held, plainly, **FREE_OF_NOISE)
    torch.testing.assert_close(asked(model, kv), asked(model, plain), **FREE_OF_NOISE)
    assert model.ask(kv, QUESTIONS, max_new_tokens=6) == model.ask(
        plain, QUESTIONS, max_new_tokens=6
    )


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("score_chunk", [N, 25])
@pytest.mark.parametrize("kind", KINDS)
def test_one_chunk_equals_two_passes(kind, score_chunk, budget):
    model, ids = shared_model(kind), random_ids(N)
    twice = model.prefill(ids, ratio=RATIO, reach="chunk", score_chunk=score_chunk)
    kv = stream(model, ids, chunk_size=N, score_chunk=score_chunk, budget=budget)
    torch.testing.assert_close(kv.scores.values, twice.scores.values, atol=1e-5, rtol=0)
    assert_equal_caches(model, kv, twice)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_scores_equal_masked_attention(kind, budget):
    model, ids = shared_model(kind), random_ids(3 * CHUNK + 5)
    kv, kept = stages(model, ids, budget)
    assert all(0 < stage.sum() < stage.numel() for stage in kept)
    token_ids, p = kv.token_ids, kv.document.prefix_length
    question = model.apply_template(QUESTIONS[1])
    s = len(token_ids) + len(question)
    oracle = Oracle()
    oracle.hidden = hidden_pairs(kind, kept, p, s)
    logits = oracle.logits(kind, torch.cat([token_ids, question]), dtype=torch.float64)
    torch.testing.assert_close(
        asked(model, kv).double(), logits[-len(question) :].double(), atol=2e-3, rtol=0
    )
    # A chunk is repeated by queries that see the prefix, the chunk and themselves.
    for i, start in enumerate(range(p, len(token_ids), CHUNK)):
        read = token_ids[: start + CHUNK]
        chunk = read[start:]
        before = read[p:start] if i else None
        repeat = model.prompts.repeat_ids(before, chunk)
        oracle = Oracle()
        oracle.hidden = hidden_pairs(kind, kept[:i], p, len(read) + len(repeat))
        for hidden in oracle.hidden.values():
            hidden[:, len(read) :, p:start] = True
        oracle.logits(kind, torch.cat([read, repeat]), dtype=torch.float64)
        for row, layer in enumerate(full_layers(kind)):
            torch.testing.assert_close(
                kv.scores.values[row, :, start - p : start - p + len(chunk)].double(),
                scores_of(oracle, layer, p, start, len(read)),
                atol=1e-4,
                rtol=0,
            )


def hidden_pairs(kind: str, kept: list[Tensor], p: int, s: int) -> dict[int, Tensor]:
    """`[H, s, s]` by layer: what was evicted after a chunk is hidden from all tokens behind it."""
    hidden = {layer: torch.zeros(2, s, s, dtype=torch.bool) for layer in full_layers(kind)}
    for stage in kept:
        end = p + stage.shape[-1]
        for layer, layer_kept in zip(hidden, stage, strict=True):
            hidden[layer][:, end:, p:end] |= ~layer_kept[:, None]
    return hidden


def scores_of(oracle: Oracle, layer: int, p: int, start: int, end: int) -> Tensor:
    """`[H, m]`: the largest probability of each of the tokens `start` to `end`."""
    queries, keys = oracle.queries[layer][:, end:], oracle.keys[layer]
    keys = torch.cat([keys[:, :p], keys[:, start:]], dim=1)
    group, scale = len(queries) // len(keys), queries.shape[-1] ** -0.5
    m = end - start
    later = torch.ones(queries.shape[1], keys.shape[1]).triu(p + m + 1).bool()
    logits = queries @ keys.repeat_interleave(group, dim=0).mT * scale
    weights = logits.masked_fill(later, -torch.inf).softmax(-1)[..., p : p + m]
    return weights.amax(1).view(len(keys), group, m).amax(1)


# Budgets


@pytest.mark.parametrize(
    ("n", "size", "ratio"), [(61, 7, 0.29), (53, 11, 0.07), (37, 37, 0.501), (29, 1, 0.13)]
)
@pytest.mark.parametrize("budget", BUDGETS)
def test_budgets_are_exact_behind_every_chunk(budget, n, size, ratio):
    model, ids = shared_model(), random_ids(n)
    counts = []
    kv = stream(model, ids[:size], ratio=ratio, chunk_size=size, budget=budget)
    counts.append((kv.document.context_length, int(kv.kept.sum())))
    if n > size:
        kv.extend(
            ids[size:],
            chunk_size=size,
            budget=budget,
            progress=lambda *call: counts.append((kv.document.context_length, int(kv.kept.sum()))),
        )
    ends = [*range(size, n, size), n]
    exact = round(ratio * 1000)
    assert counts == [(end, exact * 6 * end // 1000) for end in ends]
    assert kv.realised_ratio == counts[-1][1] / (6 * n)
    at_once = stream(model, ids, ratio=ratio, chunk_size=size, budget=budget)
    assert torch.equal(at_once.kept, kv.kept)


def test_the_budget_of_the_context_keeps_the_best_of_what_is_left():
    model, ids = shared_model("qwen3"), random_ids(N)
    kv, kept = stages(model, ids, "context")
    held = torch.zeros(3, 2, 0, dtype=torch.bool)
    dropped = False
    for stage in kept:
        n = stage.shape[-1]
        new = torch.ones(3, 2, n - held.shape[-1], dtype=torch.bool)
        left = torch.cat([held, new], dim=-1)
        assert not (stage & ~left).any(), "an evicted pair came back"
        scores = kv.scores.values[..., :n]
        assert scores[stage].min() >= scores[left & ~stage].max()
        dropped |= bool((held & ~stage[..., : held.shape[-1]]).any())
        held = stage
    assert dropped, "no earlier chunk was pruned again"


def test_the_budget_of_a_chunk_never_prunes_an_earlier_one():
    kv, kept = stages(shared_model("qwen3"), random_ids(N), "chunk")
    for before, after in pairwise(kept):
        start = before.shape[-1]
        assert torch.equal(after[..., :start], before)
        new, scores = after[..., start:], kv.scores.values[..., start : after.shape[-1]]
        assert scores[new].min() >= scores[~new].max()


@pytest.mark.parametrize("budget", BUDGETS)
def test_pruning_goes_on_and_revives_nothing(budget):
    model = shared_model("gemma3")
    kv = stream(model, random_ids(N), ratio=0.5, budget=budget)
    before = kv.kept
    with pytest.raises(KVzipError, match="already evicted"):
        kv.prune(0.8)
    assert torch.equal(kv.kept, before)
    kv.prune(0.21)
    assert int(kv.kept.sum()) == floor(0.21 * before.numel())
    assert not (kv.kept & ~before).any()
    scores = kv.scores.values
    assert scores[kv.kept].min() >= scores[before & ~kv.kept].max()
    before = kv.kept
    kv.extend(random_ids(9, seed=4))
    assert kv.ratio == 0.21
    assert int(kv.kept.sum()) == floor(0.21 * kv.kept.numel())
    assert budget == "context" or torch.equal(kv.kept[..., :N], before)


# Extending


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_extending_equals_one_pass(kind, budget, tmp_path):
    model, ids = shared_model(kind), random_ids(N)
    once = stream(model, ids, budget=budget)
    at = 2 * CHUNK
    kv = stream(model, ids[:at], budget=budget)
    loaded = model.load(kv.save(tmp_path / "part.kvz"))
    how = {"chunk_size": CHUNK, "budget": budget}
    assert kv.extend(ids[at:], **how) is kv
    assert_same(snapshot(kv), snapshot(once))
    assert_equal_caches(model, kv, once)
    model.extend(loaded, ids[at:], **how)
    assert_equal_caches(model, loaded, once)
    again = model.load(loaded.save(tmp_path / "whole.kvz"))
    assert_equal_caches(model, again, once)
    assert model.ask(again, QUESTIONS, max_new_tokens=6) == model.ask(
        once, QUESTIONS, max_new_tokens=6
    )


def test_a_cache_of_two_passes_is_extended():
    model, ids = shared_model(), random_ids(N)
    kv = model.prefill(ids, ratio=0.5)
    before = kv.kept
    model.extend(kv, random_ids(23, seed=1), chunk_size=10, ratio=0.2)
    assert kv.scores.scorer == "reconstruction + reconstruction, reach chunk"
    kv.extend(random_ids(5, seed=2), chunk_size=10)
    assert kv.scores.scorer == "reconstruction + reconstruction, reach chunk"
    assert torch.equal(kv.kept[..., :N], before)
    assert kv.scores.values.shape == kv.kept.shape == (3, 2, N + 28)
    assert kv.ratio == 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_extending_a_fork_leaves_the_original(kind):
    model, ids = shared_model(kind), random_ids(N)
    kv = stream(model, ids)
    before, answers = snapshot(kv), model.ask(kv, QUESTIONS, max_new_tokens=5)
    scores = kv.scores.values.clone()
    fork = kv.fork()
    for budget in BUDGETS:
        fork.extend(random_ids(20, seed=1), chunk_size=CHUNK, budget=budget)
    assert fork.document.context_length == N + 40
    assert_same(snapshot(kv), before)
    assert torch.equal(kv.scores.values, scores)
    assert model.ask(kv, QUESTIONS, max_new_tokens=5) == answers


def test_two_models_at_once():
    first, second = shared_model("llama"), shared_model("gemma3")
    ids = random_ids(N)
    alone = [stream(model, ids) for model in (first, second)]
    caches: list[ContextCache] = []

    def read_other(*call: object) -> None:
        if not caches:
            caches.append(stream(second, ids))

    both = stream(first, ids, progress=read_other)
    for model, one, other in zip((first, second), alone, (both, *caches), strict=True):
        assert_same(snapshot(one), snapshot(other))
        with pytest.raises(KVzipError, match="was made with model"):
            (second if model is first else first).extend(one, ids)
        assert_same(snapshot(one), snapshot(other))
        one.extend(ids[:9])  # finds its own model
        assert one.document.context_length == N + 9


# Pieces


@pytest.mark.parametrize("lengths", [(1,) * N, (5, 31, 1, 33), (16, 16, 38), (N,)], ids=str)
def test_pieces_of_any_length_equal_one_tensor(lengths):
    model, ids = shared_model("qwen3"), random_ids(N)
    pieces = (piece for piece in ids.split(list(lengths)))
    assert_same(snapshot(stream(model, pieces)), snapshot(stream(model, ids)))


def test_pieces_of_text_equal_their_tokens():
    model = shared_model()
    words = [f"{word} " for word in TEXT.split()]
    ids = [model.prompts.context_ids(word) for word in words]
    expected = stream(model, torch.cat(ids))
    for pieces in (iter(words), words, [words[0], *ids[1:]]):
        assert_same(snapshot(stream(model, pieces)), snapshot(expected))
    assert_same(snapshot(stream(model, TEXT)), snapshot(stream(model, [TEXT])))


def test_no_piece_is_read_ahead():
    model, ids = shared_model(), random_ids(N)
    given, done = [], []

    def pieces() -> Iterator[Tensor]:
        for i, piece in enumerate(ids.split(4)):
            given.append(4 * i + len(piece))
            yield piece

    def progress(stage: str, tokens: int, total: int) -> None:
        done.append((stage, tokens, total))
        assert given[-1] == tokens

    stream(model, pieces(), progress=progress)
    ends = [*range(CHUNK, N, CHUNK), N]
    assert done == [("stream", end, end) for end in ends]
    done.clear()
    stream(model, ids, progress=lambda *call: done.append(call))
    assert done == [("stream", end, N) for end in ends]


@pytest.mark.parametrize("size", [1, 3, 8, 50])
def test_chunks_of(size):
    ids = random_ids(41)
    for lengths in ([41], [0, 40, 0, 1], [1] * 41, [3, 30, 8]):
        chunks = [*chunks_of(ids.split(lengths), size)]
        assert torch.equal(torch.cat(chunks), ids)
        assert {len(chunk) for chunk in chunks[:-1]} <= {size}
        assert 0 < len(chunks[-1]) <= size
    assert [*chunks_of([], size)] == [*chunks_of([ids[:0]], size)] == []


@pytest.mark.parametrize("n", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1])
@pytest.mark.parametrize("kind", KINDS)
def test_contexts_around_a_chunk(kind, n):
    model = shared_model(kind)
    kv = stream(model, random_ids(n), ratio=0.5)
    layers = len(kv.prunable)
    assert kv.kept.shape == (layers, 2, n)
    assert int(kv.kept.sum()) == floor(0.5 * layers * 2 * n)
    assert model.ask(kv, QUESTIONS, max_new_tokens=4)


# Memory


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1}], ids=["", "one-head"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_what_is_evicted_is_freed(kind, changes, budget):
    model = make_model(kind, **changes)
    kv = stream(model, random_ids(200), chunk_size=64, budget=budget)
    assert held_bytes(kv) == kv.nbytes == kept_bytes(kv)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("size", [64, 100])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_memory_peaks_at_kept_pairs_a_chunk_and_a_layer(kind, size, budget, monkeypatch):
    """Counted on all live tensors, whenever the model or the cache has done something."""
    model, ids = wide_model(kind), random_ids(4 * size)
    stream(model, ids, chunk_size=size, budget=budget)  # everything lazy is there
    kv = stream(model, ids[:size], chunk_size=size, budget=budget)
    layers, heads, _ = kv.kept.shape
    dense_layer = heads * size * pair_bytes(kv)
    # beside pairs: masks, scores and tokens, on the CPU
    bookkeeping = 16 * layers * heads * len(ids)
    elsewhere = live_bytes() - held_bytes(kv)
    config = model.hf_model.config
    # of the forward pass itself, in one layer: queries and a few hidden states, float32
    activations = 4 * size * (config.num_attention_heads * 128 + 4 * config.hidden_size)
    over = []

    def watch(name: str, owner: Any) -> None:
        inner = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            if isinstance(args[0], Layer) and args[0] not in kv.layers:
                return result  # a repeat's own activations, gone with the layer's forward pass
            kept = [sum(t.nbytes for t in layer.context_tensors()) for layer in kv.layers]
            allowed = sum(kept) + len(kept) * dense_layer  # the kept pairs and the chunk
            allowed += max(kept) + dense_layer  # a copy of a layer
            allowed += activations
            over.append(live_bytes() - elsewhere - bookkeeping - allowed)
            return result

        monkeypatch.setattr(owner, name, watched)

    watch("absorb", ContextLayer)
    watch("prune", ContextLayer)
    watch("repeat", repeated_chunks)
    watch("_repeating", repeated_chunks)
    watch("update", Layer)
    kv.extend(ids[size:], chunk_size=size, budget=budget)
    assert len(over) >= 3 * (1 + layers)
    assert max(over) <= 0
    assert held_bytes(kv) == kv.nbytes == kept_bytes(kv)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_chunk_takes_no_more_than_its_own_pairs(kind, monkeypatch):
    model, ids = shared_model(kind), random_ids(225)
    inner, held = RepeatedChunks.read, []

    def read(scorer: RepeatedChunks, kv: ContextCache, chunk: Tensor) -> Scores:
        kept, scores = kv.nbytes, inner(scorer, kv, chunk)
        pairs = len(kv.layers) * 2 * len(chunk)
        held.append((kv.nbytes, kept + pairs * pair_bytes(kv)))
        return scores

    monkeypatch.setattr(RepeatedChunks, "read", read)
    stream(model, ids, chunk_size=75)
    assert len(held) == 3
    assert all(now <= allowed for now, allowed in held), held


@cache
def wide_model(kind: str) -> ModelKVzip:
    """Heads so wide that pairs take much more memory than what is noted about them."""
    return make_model(kind, head_dim=128)


# Interruptions


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["progress", "pieces", "repeat", "forward"])
def test_an_interruption_leaves_the_last_whole_chunk(kind, budget, where, monkeypatch):
    model, ids = shared_model(kind), random_ids(4 * CHUNK)
    how = {"chunk_size": CHUNK, "budget": budget}
    kv = stream(model, ids[:CHUNK], budget=budget)
    inner, calls = RepeatedChunks.read, []

    def pieces() -> Iterator[Tensor]:
        yield ids[CHUNK : 3 * CHUNK]
        yield ids[3 * CHUNK : -5]
        if where == "pieces":
            raise StopError
        yield ids[-5:]

    def progress(stage: str, done: int, total: int) -> None:
        if where == "progress" and done == 2 * CHUNK:
            raise StopError

    def read(*args: Any) -> Scores:
        scores = inner(*args)
        calls.append(scores)
        if where == "repeat" and len(calls) == 3:
            raise KeyboardInterrupt
        return scores

    def forward(*args: Any) -> None:
        if where == "forward" and len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(RepeatedChunks, "read", read)
    hook = model.hf_model.base_model.layers[1].register_forward_hook(forward)
    try:
        with pytest.raises((StopError, KeyboardInterrupt)):
            kv.extend(pieces(), progress=progress, **how)
    finally:
        hook.remove()
        monkeypatch.undo()
    at = 3 * CHUNK
    expected = stream(model, ids[:at], budget=budget)
    assert kv.document.context_length == at
    assert kv.tail_length == 0
    assert_same(snapshot(kv), snapshot(expected))
    assert_equal_caches(model, kv, expected)
    kv.extend(ids[at:], **how)
    assert_same(snapshot(kv), snapshot(stream(model, ids, budget=budget)))


def test_an_interruption_while_a_chunk_is_compacted(monkeypatch):
    """Not even then is there a tail that the next question would see."""
    model, ids = shared_model(), random_ids(2 * CHUNK)
    kv = stream(model, ids[:CHUNK])
    before = snapshot(kv)

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(streaming, "best_pairs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kv.extend(ids[CHUNK:])
    monkeypatch.undo()
    assert_same(snapshot(kv), before)


def test_the_ratio_is_that_of_the_chunks_read_when_interrupted():
    model = shared_model()
    kv = stream(model, random_ids(CHUNK), ratio=0.5)

    def progress(*call: object) -> None:
        raise StopError

    with pytest.raises(StopError):
        kv.extend(random_ids(3 * CHUNK), ratio=0.2, chunk_size=CHUNK, progress=progress)
    assert kv.ratio == 0.2


# Quantised pairs


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_pairs_are_quantised_behind_the_end(kind, budget, kv_dtype):
    """The same pairs are kept as without, and channels are evened out over all that was read."""
    model = shared_model(kind)
    kv = stream(model, random_ids(N), budget=budget, kv_dtype=kv_dtype)
    plain = stream(model, random_ids(N), budget=budget)
    assert kv.kv_dtype == kv_dtype
    assert plain.kv_dtype is None
    assert not torch.equal(asked(model, kv), asked(model, plain))
    assert_same(snapshot(kv), snapshot(plain.quantize(kv_dtype)))
    assert torch.equal(kv.scores.values, plain.scores.values)


def test_a_cache_is_quantised_when_more_is_read():
    model = shared_model()
    first, second = random_ids(N).split([CHUNK * 2, N - CHUNK * 2])
    kv, plain = stream(model, first), stream(model, first)
    kv.extend(second, chunk_size=CHUNK, kv_dtype="int4")
    assert_same(snapshot(kv), snapshot(plain.extend(second, chunk_size=CHUNK).quantize("int4")))
    again = kv.fork()
    for one, how in ((kv, {}), (again, {"kv_dtype": "int4"})):
        one.extend(random_ids(CHUNK), **how)  # it is quantised like the rest, asked or not
    assert kv.kv_dtype == "int4"
    assert_same(snapshot(again), snapshot(kv))


@pytest.mark.parametrize("streamed", [True, False])
def test_what_cannot_be_quantised_is_refused_before_scores_are_made(streamed, monkeypatch):
    model, reading = make_model(head_dim=30), {"streaming": streamed, "ratio": RATIO}
    for scoring in (RepeatedChunks, ModelKVzip):
        name = "read" if scoring is RepeatedChunks else "score"
        monkeypatch.setattr(scoring, name, lambda *_, **__: 1 / 0)
    with pytest.raises(KVzipError, match=r"dimension is 30: it must be a multiple of 4"):
        model.prefill(TEXT, kv_dtype="int4", **reading)
    with pytest.raises(KVzipError, match="unknown kv_dtype 'int3': choose one of int4, int8, fp8"):
        model.prefill(TEXT, kv_dtype="int3", **reading)


def test_codes_do_not_turn_into_others_when_more_is_read():
    kv = stream(shared_model(), TEXT, kv_dtype="int4")
    before = snapshot(kv)
    with pytest.raises(KVzipError, match=r"does not turn into int8: prefill again"):
        kv.extend(TEXT, kv_dtype="int8")
    assert_same(snapshot(kv), before)


# Bad input


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"ratio": None}, "say how much to keep"),
        ({"ratio": 0}, "got 0"),
        ({"ratio": 1.01}, "got 1.01"),
        ({"budget": "all"}, "unknown budget 'all': choose one of chunk, context"),
        ({"reach": "far"}, "unknown reach 'far'"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"chunk_size": -3}, "chunk_size is -3"),
        ({"score_chunk": 0}, "score_chunk is 0"),
        ({"load_score": True}, "leave out load_score"),
    ],
    ids=str,
)
def test_bad_settings(how, said):
    with pytest.raises(KVzipError, match=said):
        stream(shared_model(), TEXT, **how)


@pytest.mark.parametrize(
    ("context", "said"),
    [
        ("", "context is empty"),
        ([], "context is empty"),
        (iter(()), "context is empty"),
        (random_ids(0), "got shape"),
        (random_ids(6).view(2, 3), "got shape"),
        (torch.tensor([3, 400]), "the model knows 0 to 399"),
        ([TEXT, torch.tensor([-1])], "the model knows 0 to 399"),
    ],
    ids=["text", "list", "iterator", "tensor", "2d", "unknown", "unknown-later"],
)
def test_bad_contexts(context, said):
    model = shared_model()
    with pytest.raises(KVzipError, match=said):
        stream(model, context)
    kv = stream(model, TEXT)
    before = snapshot(kv)
    with pytest.raises(KVzipError, match=said):
        kv.extend(context if not isinstance(context, list) else iter(context[1:]))
    assert_same(snapshot(kv), before)


def test_pieces_need_streaming():
    with pytest.raises(KVzipError, match="streaming=True"):
        shared_model().prefill([TEXT])


@pytest.mark.parametrize("empty", ["", random_ids(0)], ids=["text", "tokens"])
def test_empty_pieces_are_passed_over(empty):
    model = shared_model()
    ids = model.prompts.context_ids(TEXT)
    kv = stream(model, [empty, ids[:20], empty, ids[20:], empty])
    assert_same(snapshot(kv), snapshot(stream(model, ids)))


@pytest.mark.parametrize("thing", [None, 7, b"bytes", [3, 4], [None]], ids=str)
def test_what_is_neither_text_nor_tokens_is_refused(thing):
    kv = stream(shared_model(), TEXT)
    before = snapshot(kv)
    with pytest.raises(KVzipError, match="text or token ids"):
        kv.extend(thing)
    assert_same(snapshot(kv), before)


def test_retained_pairs_are_refused():
    model = make_model(kv_type="retain")
    kv = model.prefill(TEXT)
    for read in (lambda: stream(model, TEXT), lambda: kv.extend(TEXT)):
        with pytest.raises(KVzipError, match="kv_type='evict'"):
            read()


def test_a_conversation_is_refused():
    model = shared_model()
    kv = stream(model, TEXT)
    model.generate(QUESTIONS[0], kv=kv, update_cache=True, max_new_tokens=3)
    before = snapshot(kv)
    with pytest.raises(KVzipError, match=r"kv\.reset\(\)"):
        kv.extend(TEXT)
    assert_same(snapshot(kv), before)
    kv.reset()
    assert kv.extend(TEXT).document.context_length > 0


def test_a_cache_without_scores_is_refused():
    model = shared_model()
    kv = model.read(TEXT)
    before = snapshot(kv)
    with pytest.raises(KVzipError, match=r"no scores to extend by: call model\.score\(kv\) first"):
        kv.extend(TEXT, ratio=0.3)
    assert_same(snapshot(kv), before)


def test_codes_without_scores_are_refused_with_what_is_left_to_do():
    kv = shared_model().read(TEXT).quantize("int8")
    before = snapshot(kv)
    said = "no scores to {} by, and what is quantised cannot be scored any more: prefill .* anew"
    with pytest.raises(KVzipError, match=said.format("extend")):
        kv.extend(TEXT, ratio=0.3)
    with pytest.raises(KVzipError, match=said.format("prune")):
        kv.prune(0.3)
    assert_same(snapshot(kv), before)


@pytest.mark.parametrize("how", [{"threshold": 2.0}, {"bytes": "prefix"}], ids=["score", "bytes"])
@pytest.mark.filterwarnings("ignore:no score reaches")
def test_a_cache_that_kept_nothing_does_not_say_how_much_to_keep_of_more(how, tmp_path):
    model = shared_model()
    kv = model.prefill(TEXT)
    if "bytes" in how:
        how = {"bytes": kv.footprint().fixed}
    kv.prune(**how)
    for one in (kv, model.load(kv.save(tmp_path / "context.kvz"))):
        before = snapshot(one)
        said = r"nothing of the context was kept \(ratio 0\.0\), .* by a ratio in \(0, 1\], such"
        with pytest.raises(KVzipError, match=said):
            one.extend(TEXT)
        assert_same(snapshot(one), before)
        one.extend(TEXT, ratio=0.5)
        assert one.ratio == 0.5
        assert one.realised_ratio == pytest.approx(0.25, abs=0.01)


@pytest.mark.filterwarnings("ignore:no score reaches")
def test_a_stream_whose_first_chunks_keep_nothing_goes_on():
    model = shared_model()
    nothing = stream(model, TEXT, ratio=Budget(threshold=2.0))
    assert not nothing.kept.any()
    with pytest.raises(KVzipError, match="nothing of the context was kept"):
        nothing.extend(TEXT)
    nothing.extend(TEXT, ratio=Budget(threshold=0.0))
    assert nothing.realised_ratio == 0.5


def test_a_cache_of_no_model_is_refused():
    kv = stream(shared_model(), TEXT)
    alone = ContextCache(kv.layers, kv.document, kv.origin, scores=kv.scores)
    with pytest.raises(KVzipError, match=r"model\.extend\(kv, context\)"):
        alone.extend(TEXT)


def test_scores_that_are_no_numbers_are_refused(monkeypatch):
    model, ids = shared_model(), random_ids(2 * CHUNK)
    kv = stream(model, ids[:CHUNK])
    before = snapshot(kv)
    inner = repeated_chunks.repeat
    monkeypatch.setattr(repeated_chunks, "repeat", lambda *args: inner(*args) * torch.nan)
    with pytest.raises(KVzipError, match="NaN"):
        kv.extend(ids[CHUNK:])
    assert_same(snapshot(kv), before)


# Positions


def room(model: ModelKVzip, kv: ContextCache | None, repeated: int) -> int:
    """Tokens that can be read, the last ones in a chunk whose repeat takes `repeated`."""
    ids = model.prompts.prefix_ids() if kv is None else kv.token_ids
    request = len(model.prompts.repeat_ids(random_ids(8), random_ids(0)))
    return model.geometry.max_positions - len(ids) - request - repeated


def test_positions_are_checked_before_any_work_if_the_length_is_known():
    model = make_model(max_position_embeddings=200)
    kv = stream(model, random_ids(10))
    before, calls = snapshot(kv), []
    too_many = random_ids(room(model, kv, CHUNK) + 1)
    with pytest.raises(KVzipError, match="of the model's 200 positions"):
        kv.extend(too_many, chunk_size=CHUNK, progress=lambda *call: calls.append(call))
    assert not calls
    assert_same(snapshot(kv), before)
    with pytest.raises(KVzipError, match="of the model's 200 positions"):
        stream(model, random_ids(200), progress=lambda *call: calls.append(call))
    assert not calls


def test_positions_are_checked_at_each_chunk_if_the_length_is_not_known():
    model = make_model(max_position_embeddings=200)
    ids = random_ids(300)
    kv = stream(model, ids[:CHUNK])
    with pytest.raises(KVzipError, match="of the model's 200 positions"):
        kv.extend(iter(ids[CHUNK:].split(5)), chunk_size=CHUNK)
    n = kv.document.context_length
    assert n > CHUNK
    assert n % CHUNK == 0
    assert_same(snapshot(kv), snapshot(stream(model, iter([ids[:n]]))))
    assert model.ask(kv, QUESTIONS[:1], max_new_tokens=3)


def test_a_known_length_is_refused_only_if_it_does_not_fit():
    """Chunks that fit one by one fit when their number is known, too."""
    model = make_model(max_position_embeddings=200)
    n = room(model, None, CHUNK) // CHUNK * CHUNK
    ids = random_ids(n)
    expected = stream(model, iter([ids]))
    assert_same(snapshot(stream(model, ids)), snapshot(expected))


@pytest.mark.parametrize("scorer", ["random", "key-norm", "reconstruction+"])
def test_scores_of_another_kind_are_no_measure(scorer):
    """They would be ranked against each other."""
    model = shared_model()
    kv = model.prefill(TEXT, scorer=scorer).prune(0.5)
    before = kv.nbytes
    with pytest.raises(KVzipError, match=f"scored by '{scorer.replace('+', '.')}'"):
        kv.extend(TEXT, ratio=0.5, budget="context")
    assert kv.nbytes == before
    assert kv.scorers == {scorer}


@pytest.mark.parametrize("reach", ["context", "chunk"])
def test_either_reach_may_go_on(reach):
    kv = shared_model().prefill(TEXT, reach=reach).prune(0.5)
    kv.extend(TEXT, ratio=0.5)
    assert "reconstruction, reach chunk" in kv.scorers
