"""Every supported type of model answers as transformers does; whatever cannot work is an error."""

from functools import lru_cache
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from kvzip import KVzipError, ModelKVzip, attention, checks, storage
from kvzip.cli import models
from kvzip.evaluation.likelihood import likelihoods
from kvzip.geometry import refuse_layer_types
from kvzip.kernels import quantization, reference
from kvzip.kernels.logits import Logits
from kvzip.kernels.quantization import Quantization, dequantize, quantize
from kvzip.model_types import EXPECTED, REFUSED, TESTED, ModelType
from kvzip.pairs import Pairs, QuantizedPairs
from kvzip.scoring import SCORERS
from kvzip.states import StateLayer
from models import (
    END,
    GEMMA3_LAYERS,
    KINDS,
    QUESTIONS,
    SHAPE,
    SPECIAL,
    TEXT,
    VOCABULARY,
    Oracle,
    assert_same,
    greedy,
    logits_of,
    make_hf_model,
    make_model,
    make_tokenizer,
    random_ids,
    shared_hf_model,
    shared_model,
    snapshot,
)

NEW_TOKENS = 16


@lru_cache(maxsize=1)  # the checks of a type come one after the other
def subject(model_type: ModelType) -> checks.Subject:
    return checks.Subject(model_type)


@pytest.mark.parametrize("check", checks.CHECKS)
@pytest.mark.parametrize("model_type", TESTED, ids=attrgetter("id"))
def test_types(model_type, check):
    assert checks.CHECKS[check](subject(model_type))


def test_types_are_named_once():
    ids = [model_type.id for model_type in (*TESTED, *EXPECTED, *REFUSED)]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("name", "owner", "attribute", "replacement"),
    [
        ("gemma2", Logits, "of", lambda self, products: products * self.scale),
        ("gpt_oss", reference, "softmax", lambda logits, sinks: logits.softmax(-1)),
        ("qwen3_next", StateLayer, "absorb", lambda self, behind: None),
        ("qwen3_next", StateLayer, "adopt", lambda self, answered: None),
        ("qwen3_next", StateLayer, "fork", lambda self, tail=None: self),
        ("qwen3_next", StateLayer, "restart", lambda self, other: self.restore(self.context)),
        ("qwen3_next", StateLayer, "truncate", lambda self, length: None),
    ],
    ids=["capping", "sinks", "absorb", "adopt", "fork", "restart", "truncate"],
)
def test_checks_can_fail(monkeypatch, name, owner, attribute, replacement):
    """What is particular about a type is checked: without it, a check fails."""
    (model_type,) = [one for one in TESTED if one.id == name]
    monkeypatch.setattr(owner, attribute, replacement)
    assert not all(checks.check(model_type).passed.values())


def quantize_and_attend_to_what_was_made(pairs: Pairs, how: Quantization) -> QuantizedPairs:
    """Codes that nothing reads."""
    keys, values = (
        quantize(part, pairs.counts.tolist(), how) for part in (pairs.keys, pairs.values)
    )
    coded = QuantizedPairs(keys, values, pairs.kept)

    def attention(query, keys, values, *rest, **settings):
        return reference.zipped_attention(query, pairs.keys, pairs.values, *rest, **settings)

    object.__setattr__(coded, "attention", lambda operations: attention)
    return coded


def swapped(*args):
    keys, values = storage_quantized(*args)
    return values, keys


storage_quantized = storage._quantized


@pytest.mark.parametrize(
    ("owner", "attribute", "replacement"),
    [
        (Pairs, "quantize", lambda self, how: self),
        (Pairs, "quantize", quantize_and_attend_to_what_was_made),
        (reference, "dequantize", lambda *args: (2 * head for head in dequantize(*args))),
        (quantization, "_unpack", lambda words, slices: words.int().repeat(1, slices) & 7),
        (storage, "_quantized", swapped),
    ],
    ids=["not-quantised", "not-read", "read-wrong", "packed-wrong", "saved-wrong"],
)
def test_the_check_of_codes_can_fail(monkeypatch, owner, attribute, replacement):
    of_type = subject(TESTED[0])
    assert checks.quantized_cache(of_type)
    monkeypatch.setattr(owner, attribute, replacement)
    assert not checks.quantized_cache(of_type)


def test_the_documentation_has_the_tables():
    text = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    checked = [checks.Checked(one, dict.fromkeys(checks.CHECKS, True)) for one in TESTED]
    assert models.table(checked) in text
    assert models.refusals() in text
    for one in EXPECTED:
        assert f"`{one.id}`" in text


class TestLinearAttention:
    """Layers with a state of their own, which stands behind all that was read."""

    @pytest.fixture
    def model(self):
        (model_type,) = [one for one in TESTED if one.id == "qwen3_next"]
        return ModelKVzip(checks.make_model(model_type, VOCABULARY), make_tokenizer())

    def test_geometry(self, model):
        assert model.geometry.prunable == (1,)
        assert [layer.linear for layer in model.geometry.layers] == [True, False, True]
        assert model.geometry.stateful
        assert not model.decoder.records

    def test_bytes_hold_states_twice(self, model):
        """Behind the context and behind the tail."""
        kv = model.read(TEXT)
        states = [layer.state for i, layer in enumerate(kv.layers) if i != 1]
        sizes = [tensor.nbytes for state in states for tensor in state.tensors().values()]
        pairs = 2 * kv.layers[1].context.keys.nbytes
        assert kv.nbytes == pairs + 2 * sum(sizes)

    def test_a_conversation_is_forgotten_whole(self, model):
        kv = model.prefill(TEXT)
        model.generate(QUESTIONS[0], kv=kv, max_new_tokens=4, update_cache=True)
        before = snapshot(kv)
        with pytest.raises(KVzipError, match="cannot go back to the middle of a conversation"):
            kv.truncate(2)
        assert_same(snapshot(kv), before)
        kv.reset()
        assert kv.tail_length == 0
        for layer in kv.layers[::2]:
            assert torch.equal(layer.state.recurrent, layer.context.recurrent)

    def test_chunks_change_nothing(self, model):
        at_once, in_chunks = model.read(TEXT), model.read(TEXT, chunk_size=7)
        for one, other in zip(at_once.layers[::2], in_chunks.layers[::2], strict=True):
            for name, tensor in one.state.tensors().items():
                torch.testing.assert_close(other.state.tensors()[name], tensor)

    @pytest.mark.parametrize("scorer", [name for name in SCORERS if name != "heads"])
    def test_scorers(self, model, scorer):
        kv = model.prefill(TEXT, scorer=scorer)
        before = snapshot(model.read(TEXT))
        assert_same(snapshot(kv), before)  # scoring leaves the cache as it was
        assert kv.scores.values.shape == kv.kept.shape
        assert kv.scores.values.isfinite().all()

    def test_reading_further(self, model):
        whole = model.prefill(TEXT, ratio=1.0, streaming=True, chunk_size=20)
        ids = whole.document.token_ids[whole.document.prefix_length :]
        kv = model.prefill(ids[:40], ratio=1.0, streaming=True, chunk_size=20).extend(
            ids[40:], chunk_size=20
        )
        query = question(model)
        assert torch.equal(logits_of(model, kv, query), logits_of(model, whole, query))

    def test_likelihoods(self, model):
        kv = model.read(TEXT)
        queries = [model.apply_template(text) for text in QUESTIONS]
        answers = [random_ids(n, seed=n) for n in (1, 4, 2)]
        together = likelihoods(model.hf_model, kv, queries, answers)
        alone = [
            likelihoods(model.hf_model, kv, [query], [answer])[0]
            for query, answer in zip(queries, answers, strict=True)
        ]
        assert together == alone


class TestImages:
    @pytest.fixture
    def model(self):
        (model_type,) = [one for one in TESTED if one.id == "gemma3"]
        model = checks.make_model(model_type, VOCABULARY)
        model.config.image_token_id = VOCABULARY - 1
        return ModelKVzip(model, make_tokenizer())

    def test_in_a_context(self, model):
        with pytest.raises(KVzipError, match="token 399, which stands for an image: only text"):
            model.read(torch.tensor([5, VOCABULARY - 1, 6]))

    def test_in_a_question(self, model):
        kv = model.read(TEXT)
        with pytest.raises(KVzipError, match="pixel_values cannot be read"):
            model.generate(TEXT, kv=kv, pixel_values=torch.zeros(1, 3, 28, 28))

    def test_in_stock_generate(self, model):
        kv = model.read(TEXT)
        ids = torch.cat([kv.token_ids, random_ids(3), torch.tensor([VOCABULARY - 1] * 4)])
        with pytest.raises(KVzipError, match="causal text only"):
            model.hf_model.generate(
                ids[None],
                pixel_values=torch.zeros(1, 3, 28, 28),
                attention_mask=torch.ones_like(ids[None]),
                token_type_ids=(ids == VOCABULARY - 1).long()[None],
                past_key_values=kv.fork(),
                max_new_tokens=2,
            )


def question(model: ModelKVzip) -> torch.Tensor:
    return model.apply_template(QUESTIONS[0])


def answer_ids(model: ModelKVzip, kv, query_ids, new_tokens: int = NEW_TOKENS) -> torch.Tensor:
    """Tokens of an answer, by transformers' own generate on a fork."""
    return greedy(
        model.hf_model, torch.cat([kv.token_ids, query_ids]), new_tokens, past_key_values=kv.fork()
    )


@pytest.mark.parametrize("state", ["full", "ratio-1", "evicted-and-back"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_with_all_pairs_answers_as_stock_transformers(kind, state):
    model, stock = shared_model(kind), shared_hf_model(kind)
    kv, query = model.prefill(TEXT), question(model)
    if state == "ratio-1":
        kv.prune(1.0)
    elif state == "evicted-and-back":
        model = make_model(kind, kv_type="retain")
        kv = model.prefill(TEXT).prune(0.1).prune(1.0)
    ids = torch.cat([kv.token_ids, query])
    expected = greedy(stock, ids, NEW_TOKENS)
    assert len(set(expected.tolist())) > 4
    assert torch.equal(answer_ids(model, kv, query), expected)
    text = make_tokenizer().decode(expected, skip_special_tokens=True)
    assert model.generate(query, kv=kv, max_new_tokens=NEW_TOKENS) == text
    expected_logits = stock(ids[None]).logits[0, -len(query) :]
    torch.testing.assert_close(logits_of(model, kv, query), expected_logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("level", ["pair", "pair-uniform", "head"])
@pytest.mark.parametrize("kind", KINDS)
def test_eviction_equals_masking_the_evicted_pairs(kind, level):
    model = shared_model(kind)
    kv, query = model.prefill(TEXT), question(model)
    full_logits = logits_of(model, kv, query)
    kv.prune(0.4, level)
    oracle = Oracle()
    p, full = (
        kv.document.prefix_length,
        [i for i, layer in enumerate(kv.layers) if layer in kv.prunable],
    )
    if kind == "gemma3":
        assert full == [i for i, name in enumerate(GEMMA3_LAYERS) if name == "full_attention"]
    for layer, kept in zip(full, kv.kept, strict=True):
        oracle.evicted[layer] = torch.cat([torch.zeros(len(kept), p).bool(), ~kept], dim=1)
    ids = torch.cat([kv.token_ids, query])
    expected = oracle.logits(kind, ids)[-len(query) :]
    assert (expected - full_logits).abs().max() > 0.01  # eviction is not without consequence
    torch.testing.assert_close(logits_of(model, kv, query), expected, atol=1e-4, rtol=0)

    tokens: list[int] = []
    for _ in range(NEW_TOKENS):
        tokens.append(
            oracle.logits(kind, torch.cat([ids, torch.tensor(tokens).long()]))[-1].argmax()
        )
        if tokens[-1] == END:
            break
    assert answer_ids(model, kv, query).tolist() == [int(token) for token in tokens]


@pytest.mark.parametrize("n", [1, 5, 15, 16, 17, 40])
def test_contexts_around_the_window_of_sliding_layers(n):
    model, stock = shared_model("gemma3", chat_template=None), shared_hf_model("gemma3")
    kv, query = model.read(random_ids(n), chunk_size=7), random_ids(30, seed=1)
    expected = stock(torch.cat([kv.token_ids, query])[None]).logits[0, -len(query) :]
    torch.testing.assert_close(logits_of(model, kv, query), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_cache_answers_the_same(kind, tmp_path):
    model = shared_model(kind)
    kv, query = model.prefill(TEXT).prune(0.4), question(model)
    again = model.load(kv.save(tmp_path / "context.kvz"))
    assert torch.equal(logits_of(model, again, query), logits_of(model, kv, query))
    assert model.ask(again, QUESTIONS, max_new_tokens=8) == model.ask(
        kv, QUESTIONS, max_new_tokens=8
    )


@pytest.mark.parametrize("ratio", [1.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_answers_as_one_by_one(kind, ratio):
    model = shared_model(kind)
    kv = model.prefill(TEXT).prune(ratio)
    questions = [*QUESTIONS, TEXT]  # so long that the others' padding outruns a window
    alone = [model.generate(text, kv=kv, max_new_tokens=16) for text in questions]
    assert len(set(alone)) == len(alone)
    assert model.ask(kv, questions, max_new_tokens=16) == alone


@pytest.mark.parametrize("kinds", [*pairwise(KINDS), ("qwen2", "qwen2")], ids="-".join)
def test_two_models_interleaved(kinds):
    models = [make_model(kind, seed=seed) for seed, kind in enumerate(kinds)]
    caches = [model.prefill(TEXT).prune(0.5) for model in models]
    expected = [
        [
            make_model(kind, seed=seed).generate(text, kv=caches[seed], max_new_tokens=8)
            for text in QUESTIONS
        ]
        for seed, kind in enumerate(kinds)
    ]
    for j, text in enumerate(QUESTIONS):
        for i, (model, kv) in enumerate(zip(models, caches, strict=True)):
            assert model.generate(text, kv=kv, max_new_tokens=8) == expected[i][j]
    assert expected[0] != expected[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_other_caches_work_as_before(kind, padded):
    ids = torch.stack([random_ids(20), random_ids(20, seed=1)])
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :5] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    expected = shared_hf_model(kind).generate(ids, **settings)
    assert torch.equal(shared_model(kind).hf_model.generate(ids, **settings), expected)


class TestWhatCannotWork:
    """Features that a kvzip cache does not implement are errors, never ignored."""

    @pytest.mark.parametrize("model_type", REFUSED, ids=attrgetter("id"))
    def test_types(self, model_type):
        causes = {
            "chunked": "chunked_attention",
            "keys and values differ": "keys have 48 dimensions and values 32",
            "begin anew": "begin anew",
            "convolution": "layers of type conv",
            "pairs and a state": "layers of type hybrid",
            "every layer slides": r"slides \(window 16 tokens\)",
            "no layer holds": "has left no state",
            "latent": "does not hand the pairs of its cache, untouched",
            "interface": "does not hand the pairs of its cache, untouched",
        }
        (cause,) = [said for part, said in causes.items() if part in model_type.note]
        model = checks.make_model(model_type, VOCABULARY)
        with pytest.raises(KVzipError, match=cause):
            ModelKVzip(model, make_tokenizer())

    def test_an_argument_of_attention_that_is_not_known(self):
        module = SimpleNamespace()
        with pytest.raises(KVzipError, match="asks for position_bias, which attention"):
            attention.attention(
                module,
                torch.zeros(1, 2, 3, 16),
                object(),
                object(),
                None,
                position_bias=torch.ones(1),
            )

    @pytest.mark.parametrize(
        ("changes", "cause"),
        [
            ({"layer_types": ["chunked_attention", "full_attention"]}, "chunked_attention"),
            ({"layer_types": ["full_attention", "hybrid"]}, "hybrid"),
            ({"attention_chunk_size": 64}, "chunked_attention"),
        ],
        ids=["chunked", "hybrid", "chunk-size"],
    )
    def test_types_of_layers(self, changes, cause):
        config = LlamaConfig()
        for name, value in changes.items():
            object.__setattr__(config, name, value)
        with pytest.raises(KVzipError, match=cause):
            refuse_layer_types(config)

    def test_a_model_without_a_cache(self):
        from transformers import MambaConfig

        config = MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=4)
        with pytest.raises(KVzipError):
            ModelKVzip(AutoModelForCausalLM.from_config(config), make_tokenizer())

    def test_a_model_whose_layers_all_slide(self):
        with pytest.raises(KVzipError, match=r"slides \(window 16 tokens\)"):
            make_model("mistral", sliding_window=16)

    def test_a_window_beyond_the_positions_is_full_attention(self):
        model = make_model("mistral", sliding_window=4096)
        assert [layer.window for layer in model.geometry.layers] == [None] * 3

    @pytest.mark.parametrize(
        ("kind", "rope", "changes", "positions"),
        [
            ("llama", {"rope_type": "dynamic", "factor": 2.0}, {}, 1024),
            ("llama", {"rope_type": "linear", "factor": 2.0}, {}, 1024),
            (
                "phi3",
                {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
                {"original_max_position_embeddings": 256},
                256,
            ),
        ],
        ids=["dynamic", "linear", "longrope"],
    )
    def test_positions_end_where_cached_keys_would_turn(self, kind, rope, changes, positions):
        model = make_model(kind, rope_parameters={"rope_theta": 10000.0, **rope}, **changes)
        assert model.geometry.max_positions == positions
        with pytest.raises(KVzipError, match=f"the model has {positions}"):
            model.read(random_ids(positions))

    def test_mixed_windows_of_a_qwen3(self):
        shape = {**SHAPE, "head_dim": 16, "use_sliding_window": True, "sliding_window": 8}
        config = Qwen3Config(**shape, max_window_layers=1)
        model = ModelKVzip(AutoModelForCausalLM.from_config(config), make_tokenizer())
        assert [layer.window for layer in model.geometry.layers] == [None, 8, 8]

    def test_dropout(self):
        model = make_model(attention_dropout=0.1)
        kv = model.read(TEXT)
        model.hf_model.train()
        with pytest.raises(KVzipError, match="dropout"):
            model.generate(QUESTIONS[0], kv=kv)
        assert kv.tail_length == 0

    def test_padding(self):
        model = shared_model()
        kv = model.read(TEXT)
        ids = torch.cat([kv.token_ids, question(model)])[None].repeat(2, 1)
        mask = torch.ones_like(ids)
        mask[0, len(kv.token_ids)] = 0
        with pytest.raises(KVzipError, match="padded input"):
            model.hf_model.generate(
                ids, attention_mask=mask, past_key_values=kv.fork(), max_new_tokens=4
            )

    @pytest.mark.parametrize(
        ("settings", "cause"),
        [
            ({"num_beams": 2}, "beam search"),
            ({"prompt_lookup_num_tokens": 4}, "speculative decoding"),
        ],
        ids=["beams", "prompt-lookup"],
    )
    def test_ways_of_generating(self, settings, cause):
        model = shared_model()
        kv = model.read(TEXT)
        with pytest.raises(KVzipError, match=f"{next(iter(settings))} must be"):
            model.generate(TEXT, kv=kv, max_new_tokens=8, **settings)
        assert kv.tail_length == 0
        ids = torch.cat([kv.token_ids, model.apply_template(TEXT)])
        with pytest.raises(KVzipError, match=cause):
            greedy(model.hf_model, ids, past_key_values=kv.fork(), **settings)

    def test_a_model_without_its_tokenizer(self):
        with pytest.raises(KVzipError, match="needs its tokenizer"):
            ModelKVzip(make_hf_model())

    def test_an_unknown_kv_type(self):
        with pytest.raises(
            KVzipError, match=r"unknown kv_type 'keep': choose one of evict, retain"
        ):
            make_model(kv_type="keep")

    def test_text_that_spells_special_tokens_is_no_end(self):
        model = shared_model()
        kv = model.read(f"{TEXT}{SPECIAL[END]}")
        assert END not in kv.token_ids[kv.document.prefix_length :]
