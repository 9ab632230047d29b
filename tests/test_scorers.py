"""Scorers to compare with, against plain float64 arithmetic on whole attention matrices."""

import copy
import subprocess
import sys
from functools import lru_cache

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, SmolLM3Config

from kvzip import ContextCache, KVzipError, ModelKVzip
from kvzip.cache import Scores
from kvzip.kernels.logits import Logits
from kvzip.scoring import REPEATING, SCORERS, get_scorer, observation
from kvzip.scoring.expected_attention import QueryMoments
from kvzip.scoring.last_window import pool
from kvzip.scoring.rotary import Rotary, rotaries
from models import (
    GEMMA3_LAYERS,
    GEMMA3_WINDOW,
    SHAPE,
    TEXT,
    Oracle,
    assert_same,
    make_hf_model,
    make_model,
    make_tokenizer,
    random_ids,
    shared_model,
    snapshot,
)

KINDS = ["llama", "qwen3", "gemma3"]
ANYWHERE = [name for name in SCORERS if name != "heads"]  # which needs a file of its model
BASELINES = [name for name in ANYWHERE if name not in REPEATING]
OBSERVING = ["prefill-attention", "last-window", "expected-attention"]
LENGTH, SNAP_WINDOW, SNAP_KERNEL, FUTURE, EPSILON = 90, 32, 7, 512, 0.01


def run(name: str, model: ModelKVzip, kv: ContextCache, **how) -> Scores:
    positions = model.geometry.max_positions
    return get_scorer(name)(model.hf_model, model.prompts, kv, max_positions=positions, **how)


@lru_cache
def watched(kind: str, n: int = LENGTH) -> tuple[ContextCache, list[tuple[Tensor, Tensor]]]:
    """A full cache, and queries `[Hq, s, D]` and keys `[H, s, D]` of its prunable layers."""
    kv = shared_model(kind).read(random_ids(n))
    oracle = Oracle()
    oracle.logits(kind, kv.token_ids, dtype=torch.float64)
    full = [
        layer
        for layer in sorted(oracle.keys)
        if kind != "gemma3" or GEMMA3_LAYERS[layer] == "full_attention"
    ]
    assert len(full) == len(kv.prunable)
    return kv, [(oracle.queries[layer], oracle.keys[layer]) for layer in full]


def attention(queries: Tensor, keys: Tensor) -> Tensor:
    """`[Hq, s, s]`, float64: the whole causal attention matrix of every query head."""
    group, scale = len(queries) // len(keys), queries.shape[-1] ** -0.5
    logits = queries @ keys.repeat_interleave(group, dim=0).mT * scale
    later = torch.ones(logits.shape[-2:]).triu(1).bool()
    return logits.masked_fill(later, -torch.inf).softmax(-1)


def by_kv_head(per_query_head: Tensor, kv_heads: int) -> Tensor:
    """`[Hq, ...]` -> `[H, G, ...]`."""
    return per_query_head.unflatten(0, (kv_heads, -1))


def oracle_prefill_attention(kv: ContextCache, layers: list[tuple[Tensor, Tensor]]) -> Tensor:
    p = kv.document.prefix_length
    scores = []
    for queries, keys in layers:
        got = attention(queries, keys)[:, p:, p:].amax(1)
        scores.append(by_kv_head(got, len(keys)).amax(1))
    return torch.stack(scores)


def oracle_last_window(kv: ContextCache, layers: list[tuple[Tensor, Tensor]]) -> Tensor:
    p, n = kv.document.prefix_length, kv.document.context_length
    w = min(SNAP_WINDOW, n)
    scores = []
    for queries, keys in layers:
        mean = attention(queries, keys)[:, -w:, p : p + n - w].mean(1)
        reach = SNAP_KERNEL // 2
        columns = [
            mean[:, max(0, i - reach) : i + reach + 1].amax(-1) for i in range(mean.shape[-1])
        ]
        pooled = torch.stack(columns, dim=-1) if columns else mean
        before = by_kv_head(pooled, len(keys)).mean(1)
        within = torch.tensor([1 + (i + 1) / w for i in range(w)], dtype=torch.float64)
        scores.append(torch.cat([before, within.expand(len(keys), w)], dim=-1))
    return torch.stack(scores)


def rotation(position: int, dim: int, theta: float) -> Tensor:
    """`[D, D]`: rotary embedding as a matrix, dimension i turned together with i + D / 2."""
    matrix = torch.zeros(dim, dim, dtype=torch.float64)
    for i in range(dim // 2):
        angle = torch.tensor(position * theta ** (-2 * i / dim), dtype=torch.float64)
        j = i + dim // 2
        matrix[i, i] = matrix[j, j] = angle.cos()
        matrix[i, j], matrix[j, i] = -angle.sin(), angle.sin()
    return matrix


def full_theta(kind: str) -> float:
    """The rotary base of the layers with full attention."""
    parameters = shared_model(kind).hf_model.config.rope_parameters
    return parameters.get("full_attention", parameters)["rope_theta"]


def oracle_expected_attention(
    kind: str, kv: ContextCache, layers: list[tuple[Tensor, Tensor]], future: int = FUTURE
) -> Tensor:
    p, n = kv.document.prefix_length, kv.document.context_length
    theta = full_theta(kind)
    scores = []
    for layer, (queries, keys) in zip(kv.prunable, layers, strict=True):
        dim, group = keys.shape[-1], len(queries) // len(keys)
        turns = torch.stack([rotation(i, dim, theta) for i in range(p, p + n)])
        ahead = [rotation(i, dim, theta) for i in range(p + n, p + n + future)]
        ahead = torch.stack(ahead).mean(0)
        values = layer.context.dense_values()[:, p:].double()
        for h, own in enumerate(keys[:, p:]):
            expected = []
            for query in queries[h * group : (h + 1) * group, p:]:
                plain = torch.einsum("ike,ik->ie", turns, query)  # transposed: turned back
                mean = ahead @ plain.mean(0)
                covariance = ahead @ plain.T.cov(correction=0).view(dim, dim) @ ahead.T
                exponent = own @ mean / dim**0.5
                exponent = exponent + ((own @ covariance) * own).sum(-1) / dim / 2
                expected.append(exponent.exp() / exponent.exp().sum())
            scores.append((torch.stack(expected).mean(0) + EPSILON) * values[h].norm(dim=-1))
    return torch.stack(scores).unflatten(0, (len(layers), -1))


def oracle_key_norm(kv: ContextCache, layers: list[tuple[Tensor, Tensor]]) -> Tensor:
    p = kv.document.prefix_length
    return torch.stack([-keys[:, p:].square().sum(-1).sqrt() for _, keys in layers])


def oracle(name: str, kind: str, n: int = LENGTH) -> Tensor:
    """`[L, H, n]`, float64."""
    kv, layers = watched(kind, n)
    if name == "prefill-attention":
        return oracle_prefill_attention(kv, layers)
    if name == "last-window":
        return oracle_last_window(kv, layers)
    if name == "expected-attention":
        return oracle_expected_attention(kind, kv, layers)
    return oracle_key_norm(kv, layers)


def assert_equals_oracle(name: str, kind: str, n: int = LENGTH, **how) -> Tensor:
    kv, _ = watched(kind, n)
    scores, expected = run(name, shared_model(kind), kv, **how), oracle(name, kind, n)
    assert scores.scorer == name
    assert scores.values.dtype == torch.float32
    assert scores.values.shape == expected.shape
    torch.testing.assert_close(scores.values.double(), expected, atol=1e-5, rtol=0)
    return expected


@pytest.mark.parametrize("chunk_size", [7, 2000])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OBSERVING)
def test_scores_equal_the_oracle(name, kind, chunk_size):
    expected = assert_equals_oracle(name, kind, chunk_size=chunk_size)
    assert expected[..., : LENGTH - SNAP_WINDOW].std() > 1e-3  # a hundred times the tolerance


@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3"])
def test_key_norms_equal_the_oracle(kind):
    assert assert_equals_oracle("key-norm", kind).std() > 0.1


def test_expected_attention_knows_phi3():
    """Queries, keys and values come out of one projection there."""
    assert_equals_oracle("expected-attention", "phi3")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BASELINES)
def test_the_chunk_size_does_not_change_the_scores(name, kind):
    model, kv = shared_model(kind), watched(kind)[0]
    whole = run(name, model, kv).values
    for chunk_size in (1, 7, LENGTH + 100):
        parts = run(name, model, kv, chunk_size=chunk_size).values
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", OBSERVING)
def test_blocks_of_queries_do_not_change_the_scores(name, monkeypatch):
    model, kv = shared_model(), watched("llama")[0]
    whole = run(name, model, kv).values
    monkeypatch.setattr(observation, "MAX_LOGITS", 5 * 4 * kv.seen_tokens)
    torch.testing.assert_close(run(name, model, kv).values, whole, atol=1e-6, rtol=0)


def test_no_block_of_probabilities_is_larger_than_it_may(monkeypatch):
    monkeypatch.setattr(observation, "MAX_LOGITS", 4 * 20 * 3)
    generator = torch.Generator().manual_seed(0)
    query, keys = (torch.randn(h, t, 8, generator=generator) for h, t in ((4, 10), (2, 20)))
    blocks = list(observation.causal_attention(query, keys, Logits(1.0)))
    assert [block.shape for block in blocks] == [
        (2, 2, 3, 13),
        (2, 2, 3, 16),
        (2, 2, 3, 19),
        (2, 2, 1, 20),
    ]


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("name", ANYWHERE)
def test_scoring_leaves_the_cache_as_it_was(name, kind):
    model = shared_model(kind)
    kv = model.read(TEXT)
    model.generate("what jumps?", kv=kv, update_cache=True, max_new_tokens=4)
    before, tails = snapshot(kv), [layer.tail for layer in kv.layers]
    scores = run(name, model, kv)
    assert_same(snapshot(kv), before)
    assert [layer.tail for layer in kv.layers] == tails
    assert kv.scores is None
    assert scores.values.shape == kv.held.shape


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("name", ANYWHERE)
def test_a_tail_does_not_change_the_scores(name, kind):
    model = shared_model(kind)
    kv = model.read(TEXT)
    before = run(name, model, kv).values
    model.generate("what jumps?", kv=kv, update_cache=True, max_new_tokens=4)
    assert torch.equal(run(name, model, kv).values, before)


@pytest.mark.parametrize("name", ANYWHERE)
def test_scores_are_the_same_every_time(name):
    model, kv = shared_model(), watched("llama")[0]
    first = run(name, model, kv).values
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    assert torch.equal(run(name, model, kv).values, first)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", ANYWHERE)
def test_scores_select_pairs(name):
    model = shared_model()
    kv = model.read(TEXT)
    kv.scores = run(name, model, kv)
    total = kv.scores.values.numel()
    assert kv.prune(0.3).kept.sum() == int(0.3 * total)
    assert kv.realised_ratio == pytest.approx(0.3, abs=1 / total)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 5, 31, 32, 33, 36])
@pytest.mark.parametrize("name", [*OBSERVING, "key-norm"])
def test_short_contexts(name, n, kind):
    expected = assert_equals_oracle(name, kind, n)
    assert expected.isfinite().all()


@pytest.mark.parametrize("name", BASELINES)
def test_half_precision_is_accumulated_in_float32(name):
    context = random_ids(60)
    half, exact = make_model("qwen2", dtype=torch.bfloat16), shared_model("qwen2")
    scores = run(name, half, half.read(context)).values
    assert scores.dtype == torch.float32
    if name in ("prefill-attention", "expected-attention", "key-norm"):
        # bfloat16 sums would have 8 bits: far fewer different values
        assert len(scores.unique()) > 0.9 * scores.numel()
    expected = run(name, exact, exact.read(context)).values
    torch.testing.assert_close(scores, expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("name", ANYWHERE)
def test_a_retained_cache_is_scored_again_after_pruning(name):
    model = make_model(kv_type="retain")
    kv = model.prefill(TEXT)
    before = run(name, model, kv).values
    assert torch.equal(run(name, model, kv.prune(0.3)).values, before)


@pytest.mark.parametrize("name", ANYWHERE)
def test_an_evicted_cache_cannot_be_scored_again(name):
    kv = shared_model().prefill(TEXT).prune(0.5)
    with pytest.raises(KVzipError, match="cannot be scored again"):
        run(name, shared_model(), kv)


@pytest.mark.parametrize("name", OBSERVING)
@pytest.mark.parametrize("size", [0, -1])
def test_a_chunk_size_must_be_positive(name, size):
    with pytest.raises(KVzipError, match="chunk"):
        run(name, shared_model(), watched("llama")[0], chunk_size=size)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("name", BASELINES)
def test_progress_is_reported(name, kind):
    calls = []
    kv = watched(kind)[0]
    kv_prefix = kv.document.prefix_length
    run(name, shared_model(kind), kv, chunk_size=40, progress=lambda *call: calls.append(call))
    total = {"prefill-attention": 90, "expected-attention": 90, "last-window": 32}.get(name)
    if total is None:
        assert calls == [("score", 90, 90)]
        return
    if kind == "gemma3":  # a window's worth of tokens to begin with
        assert kv_prefix > GEMMA3_WINDOW
        total += GEMMA3_WINDOW - 1
    assert calls == [("score", min(done, total), total) for done in range(40, total + 40, 40)]


class TestObservation:
    """What observers are shown."""

    class Notes:
        def __init__(self) -> None:
            self.chunks: list[tuple[Tensor, Tensor, Logits]] = []

        def see(self, query: Tensor, keys: Tensor, logits: Logits) -> None:
            self.chunks.append((query.clone(), keys.clone(), logits))

    def observe(self, kind: str, kv: ContextCache, tokens: slice, chunk_size: int) -> list[Notes]:
        notes = [self.Notes() for _ in kv.prunable]
        model = shared_model(kind).hf_model
        observation.observe(model, kv, tokens, notes, chunk_size=chunk_size)
        return notes

    @pytest.mark.parametrize("start", [0, 1, 40, 80, -1])
    @pytest.mark.parametrize("kind", KINDS)
    def test_queries_and_keys_are_those_of_the_whole_pass(self, kind, start):
        kv, layers = watched(kind)
        total = len(kv.token_ids)
        start %= total
        for chunk_size in (7, total):
            notes = self.observe(kind, kv, slice(start, total), chunk_size)
            for note, (queries, keys) in zip(notes, layers, strict=True):
                end = start
                for query, seen, logits in note.chunks:
                    end += query.shape[1]
                    assert query.shape[1] <= chunk_size
                    assert logits.scale == pytest.approx(queries.shape[-1] ** -0.5)
                    torch.testing.assert_close(seen.double(), keys[:, :end], atol=1e-4, rtol=0)
                own = torch.cat([query for query, _, _ in note.chunks], dim=1)
                assert end == total
                torch.testing.assert_close(own.double(), queries[:, start:], atol=1e-4, rtol=0)

    def test_tokens_behind_the_stop_are_not_read(self):
        kv, layers = watched("llama")
        notes = self.observe("llama", kv, slice(20, 50), 2000)
        for note, (queries, _) in zip(notes, layers, strict=True):
            ((query, keys, _),) = note.chunks
            assert keys.shape[1] == 50
            torch.testing.assert_close(query.double(), queries[:, 20:50], atol=1e-4, rtol=0)

    @pytest.mark.parametrize(
        ("layer_types", "lead"),
        [
            ("sfs", 15),  # the last one's pairs reach no layer that is observed
            ("fss", 0),
            ("ssf", 30),
            ("sfsf", 30),
        ],
    )
    def test_the_lead_in_is_what_sliding_layers_need_and_no_more(self, layer_types, lead):
        kinds = {"s": "sliding_attention", "f": "full_attention"}
        changes = {
            "layer_types": [kinds[letter] for letter in layer_types],
            "num_hidden_layers": len(layer_types),
        }
        model = ModelKVzip(make_hf_model("gemma3", **changes), make_tokenizer())
        kv = model.read(random_ids(100))
        assert observation.lead_in(kv.layers) == lead
        whole, part = ([self.Notes() for _ in kv.prunable] for _ in range(2))
        total = len(kv.token_ids)
        observation.observe(model.hf_model, kv, slice(0, total), whole)
        start = total - 20
        observation.observe(model.hf_model, kv, slice(start, total), part)
        for a, b in zip(whole, part, strict=True):
            torch.testing.assert_close(a.chunks[0][0][:, start:], b.chunks[0][0], atol=1e-4, rtol=0)


class TestLastWindow:
    def test_pooling_takes_the_maximum_of_seven(self):
        peaks = torch.zeros(1, 1, 20)
        peaks[..., 0], peaks[..., 10], peaks[..., 19] = 1, 2, 3
        expected = [1] * 4 + [0] * 3 + [2] * 7 + [0] * 2 + [3] * 4
        assert pool(peaks)[0, 0].tolist() == expected

    @pytest.mark.parametrize("columns", [0, 1, 2, 3, 4, 6])
    def test_pooling_of_few_columns(self, columns):
        values = torch.arange(columns, dtype=torch.float32).expand(2, 3, columns)
        expected = [min(i + 3, columns - 1) for i in range(columns)]
        assert pool(values)[0, 0].tolist() == expected
        assert pool(values).shape == (2, 3, columns)

    def test_the_window_stays_latest_tokens_first(self):
        model = shared_model()
        kv = model.read(random_ids(LENGTH))
        kv.scores = run("last-window", model, kv)
        kv.prune(0.5, level="pair-uniform")
        assert kv.kept[..., -SNAP_WINDOW:].all()
        kv.prune(0.1, level="pair-uniform")
        assert kv.kept[..., -9:].all()
        assert not kv.kept[..., :-9].any()

    def test_a_window_holds_a_token(self):
        with pytest.raises(KVzipError, match="window is 0"):
            run("last-window", shared_model(), watched("llama")[0], window=0)

    def test_a_window_may_be_longer_than_the_context(self):
        kv, _ = watched("llama", 5)
        values = run("last-window", shared_model(), kv, window=1000).values
        expected = torch.tensor([1.2, 1.4, 1.6, 1.8, 2.0])
        torch.testing.assert_close(values, expected.expand_as(values))


class TestExpectedAttention:
    def test_future_positions_stay_below_the_models_own(self):
        model, kv = shared_model(), watched("llama")[0]
        limit = kv.seen_tokens + 3
        scores = get_scorer("expected-attention")(
            model.hf_model, model.prompts, kv, max_positions=limit
        )
        expected = oracle_expected_attention("llama", *watched("llama"), future=3)
        torch.testing.assert_close(scores.values.double(), expected, atol=1e-5, rtol=0)
        assert (oracle("expected-attention", "llama") - expected).abs().max() > 1e-3

    def test_scaled_angles_are_undone(self):
        """YaRN multiplies cosines and sines by a number, and so queries and keys."""
        yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
        model = make_model(rope_parameters={**yarn, "rope_theta": 10000.0})
        kv = model.read(random_ids(LENGTH))
        angles = model.hf_model.model.rotary_emb(torch.zeros(1), torch.arange(5)[None])
        squared = angles[0].square() + angles[1].square()
        assert squared.min() > 1.1  # or else this shows nothing
        queries = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))
        for rotary in rotaries(model.hf_model, kv, 1024):
            turned = rotary.turn(queries, torch.arange(5))
            torch.testing.assert_close(
                turned.norm(dim=-1), queries.norm(dim=-1) * squared.sqrt()[0, :, 0]
            )
            back = rotary.undo(turned, torch.arange(5))
            torch.testing.assert_close(back, queries, atol=1e-5, rtol=0)

    def test_layers_without_positions(self):
        """Some layers of some models do not rotate; they are found out by their queries."""
        torch.manual_seed(0)
        config = SmolLM3Config(**SHAPE, no_rope_layers=[1, 0, 1], use_sliding_window=False)
        hf_model = AutoModelForCausalLM.from_config(config).eval()
        model = ModelKVzip(hf_model, make_tokenizer())
        kv = model.read(random_ids(40))
        queries = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))
        turned = [r.turn(queries, torch.arange(5)) for r in rotaries(hf_model, kv, 1024)]
        assert [torch.equal(one, queries) for one in turned] == [False, True, False]
        assert run("expected-attention", model, kv).values.isfinite().all()

    def test_moments_are_accumulated_in_float32_where_nothing_rotates(self):
        moments = QueryMoments(Rotary(None, lambda *parts: parts[:2]))
        query = torch.randn(4, 100, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
        for first in range(0, 100, 30):
            moments.see(
                query[:, first : first + 30], query[:2, : min(first + 30, 100)], Logits(1.0)
            )
        mean, covariance = moments.ahead(torch.arange(3))
        exact = query.double()
        torch.testing.assert_close(mean.double(), exact.mean(1), atol=1e-6, rtol=0)
        expected = torch.stack([head.T.cov(correction=0) for head in exact])
        torch.testing.assert_close(covariance.double(), expected, atol=1e-5, rtol=0)

    def test_rotary_positions_of_another_kind(self, monkeypatch):
        model, kv = shared_model(), watched("llama")[0]
        decoder = copy.deepcopy(model.hf_model.get_decoder())
        monkeypatch.setattr(model.hf_model, "get_decoder", lambda: decoder)
        assert run("expected-attention", model, kv).values.isfinite().all()
        decoder.rotary_emb.inv_freq.mul_(0.5)
        with pytest.raises(KVzipError, match="needs rotary positions"):
            run("expected-attention", model, kv)

    def test_no_rotary_positions(self, monkeypatch):
        model, kv = shared_model(), watched("llama")[0]
        monkeypatch.setattr(model.hf_model, "get_decoder", lambda: torch.nn.Linear(1, 1))
        with pytest.raises(KVzipError, match="LlamaForCausalLM has none"):
            run("expected-attention", model, kv)


def test_sinks_and_recent_tokens():
    model = shared_model()
    kv = model.read(random_ids(40))
    kv.scores = run("sink-recent", model, kv)
    kv.prune(0.25, level="pair-uniform")
    kept = [*range(4), *range(34, 40)]
    assert torch.equal(kv.kept, torch.isin(torch.arange(40), torch.tensor(kept)).expand(3, 2, 40))


def test_a_context_of_sinks_alone():
    model = shared_model()
    values = run("sink-recent", model, model.read(random_ids(3))).values
    torch.testing.assert_close(values, torch.tensor([4 / 3, 5 / 3, 2]).expand(3, 2, 3))


def test_random_scores_differ_by_head_and_seed():
    model, kv = shared_model(), watched("llama")[0]
    values = run("random", model, kv).values
    assert len(values.unique()) > 0.99 * values.numel()
    assert values.mean().item() == pytest.approx(0.5, abs=0.05)
    assert not torch.equal(run("random", model, kv, seed=1).values, values)


class TestRegistry:
    def test_every_scorer_is_there(self):
        assert list(SCORERS) == ["reconstruction", "reconstruction+", "heads", *BASELINES]
        for name, module in SCORERS.items():
            assert get_scorer(name).__module__ == module

    @pytest.mark.parametrize("name", REPEATING)
    def test_reconstruction_is_found_by_name(self, name):
        kv, _ = watched("llama")
        assert run(name, shared_model(), kv).scorer == name

    @pytest.mark.parametrize(
        ("wrong", "meant"),
        [
            ("expected", "'expected-attention'"),
            ("last_window", "'last-window'"),
            ("KEY-NORM", "'key-norm'"),
            ("recontruction", "'reconstruction'"),
        ],
    )
    def test_a_name_that_looks_like_one(self, wrong, meant):
        with pytest.raises(KVzipError, match=f"unknown scorer '{wrong}': did you mean .*{meant}"):
            get_scorer(wrong)

    def test_a_name_like_no_other(self):
        with pytest.raises(KVzipError, match=r"choose one of reconstruction, reconstruction\+, "):
            get_scorer("xyz")

    def test_nothing_is_imported_before_it_is_asked_for(self):
        code = "import sys, kvzip.scoring; print([m for m in sys.modules if 'torch' in m])"
        shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert shown.stdout.strip() == "[]", shown.stderr
