"""Shrinking: eviction of what stands behind the context, at rest and while it is generated."""

from math import floor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache

from kvzip import Budget, ContextCache, KVzipError, ModelKVzip, Shrinking, checks
from kvzip.errors import KVzipWarning
from kvzip.graphs import logits_of as step_of
from kvzip.model_types import TESTED
from kvzip.selection import select
from models import (
    GEMMA3_LAYERS,
    QUESTIONS,
    TEXT,
    VOCABULARY,
    Oracle,
    assert_same,
    logits_of,
    make_hf_model,
    make_model,
    make_tokenizer,
    random_ids,
    shared_hf_model,
    shared_model,
    snapshot,
)
from test_decoding import Recorder
from test_surrogates import oracle_kvzap, write_gates, write_kvzap

KINDS = ["llama", "qwen3", "gemma3"]
WINDOW, BLOCK = 8, 12
NEW = {"max_new_tokens": 70, "eos_token_id": None}
ALL = Budget(1.0)


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A surrogate that fits every model of `models`."""
    folder = tmp_path_factory.mktemp("kvzap")
    write_kvzap(folder)
    return f"kvzap:{folder}"


def shrinking(amount: Budget, scorer: str, window: int = WINDOW, block: int = BLOCK) -> Shrinking:
    return Shrinking(amount, scorer, window, block)


def tokens(model: ModelKVzip, kv: ContextCache, question: Any, **settings: Any) -> list[int]:
    """The new tokens of an answer."""
    streamer = Recorder()
    model.generate(question, kv=kv, streamer=streamer, **{**NEW, **settings})
    assert streamer.ended
    return [token for part in streamer.parts[1:] for token in part]


@torch.no_grad()
def tell(model: ModelKVzip, kv: ContextCache, ids: Tensor) -> None:
    """Put tokens `[t]` into the tail of a cache, as a conversation does."""
    model.hf_model(ids[None], past_key_values=kv)
    kv.history = torch.cat([kv.history, ids])


@torch.no_grad()
def behind_tail(model: ModelKVzip, kv: ContextCache, ids: Tensor) -> Tensor:
    """`[t, V]`: logits behind each of the tokens that come next; the tail grows."""
    return model.hf_model(ids[None], past_key_values=kv).logits[0]


def full_layers(kind: str) -> list[int]:
    return [i for i in range(3) if kind != "gemma3" or GEMMA3_LAYERS[i] == "full_attention"]


def attention_inputs(kind: str, ids: Tensor) -> Tensor:
    """`[L, s, d]`, float64: what attention is given of a sequence, by stock transformers."""
    model = shared_hf_model(kind, dtype=torch.float64)
    with torch.no_grad():
        states = model(ids[None], output_hidden_states=True, use_cache=False).hidden_states
        norms = [layer.input_layernorm for layer in model.model.layers]
        inputs = [norm(state[0]) for norm, state in zip(norms, states, strict=False)]
    return torch.stack([inputs[i] for i in full_layers(kind)])


class TestAtRest:
    """`model.shrink`: of a conversation that stands still."""

    @pytest.mark.parametrize("amount", [Budget(0.4), Budget(threshold=0.5)], ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    def test_scores_are_those_of_plain_arithmetic(self, kind, amount, tmp_path):
        tensors = write_kvzap(tmp_path)
        model, said = shared_model(kind), random_ids(61, seed=3)
        kv = model.prefill(random_ids(40), scorer=f"kvzap:{tmp_path}")
        tell(model, kv, said)
        model.shrink(kv, shrinking(amount, f"kvzap:{tmp_path}"))
        inputs = attention_inputs(kind, kv.token_ids)[:, -61:-WINDOW]
        expected = oracle_kvzap(tensors, inputs, full_layers(kind))
        got = kv.scores.values[..., 40:]
        torch.testing.assert_close(got.double(), expected, atol=2e-4, rtol=1e-4)
        assert torch.equal(kv.kept[..., 40:], select(got, amount))
        if amount.ratio:
            assert kv.kept[..., 40:].sum() == floor(0.4 * got.numel())
        assert kv.kept[..., :40].all()
        assert kv.tail_length == len(kv.history) == WINDOW
        assert kv.seen_tokens == len(kv.token_ids) == kv.document.prefix_length + 40 + 61

    @pytest.mark.parametrize("kind", KINDS)
    def test_answers_are_those_of_attention_without_the_evicted_pairs(self, kind, scorer):
        """Stock attention in float64, with the pairs masked that are gone."""
        model, said, query = shared_model(kind), random_ids(61, seed=3), random_ids(9, seed=4)
        kv = model.prefill(random_ids(40), scorer=scorer)
        tell(model, kv, said)
        model.shrink(kv, shrinking(Budget(0.3), scorer))
        p, length = kv.document.prefix_length, kv.seen_tokens
        oracle = Oracle()
        for place, layer in enumerate(full_layers(kind)):
            gone = torch.zeros(2, length, dtype=torch.bool)
            gone[:, p : p + kv.kept.shape[-1]] = ~kv.kept[place]
            oracle.evicted[layer] = gone
        ids = torch.cat([kv.token_ids, query])
        got = behind_tail(model, kv, query)
        torch.testing.assert_close(got, oracle.logits(kind, ids)[length:], atol=2e-4, rtol=1e-3)
        full = shared_hf_model(kind)(ids[None]).logits[0, length:]
        assert not torch.allclose(got, full, atol=1e-2)

    @pytest.mark.parametrize("kind", KINDS)
    def test_scores_are_made_in_parts_of_any_length(self, kind, scorer, monkeypatch):
        model = shared_model(kind)
        kv = model.prefill(random_ids(40), scorer=scorer)
        tell(model, kv, random_ids(61, seed=3))
        scores = []
        for size in (13, 8000):
            monkeypatch.setattr("kvzip.shrinking.READ_AT_ONCE", size)
            fork = kv.fork()
            tell(model, fork, kv.history)
            scores.append(model.shrink(fork, shrinking(ALL, scorer)).scores.values)
        torch.testing.assert_close(*scores, atol=2e-4, rtol=1e-4)

    def test_memory_is_freed(self, scorer):
        model = make_model()
        kv = model.prefill(random_ids(40), scorer=scorer)
        tell(model, kv, random_ids(200, seed=3))
        context = kv.fork().nbytes
        model.shrink(kv, shrinking(Budget(0.25), scorer, window=64))
        pair = 2 * 16 * 4  # a key and a value of 16 float32 numbers
        kept = floor(0.25 * 6 * (200 - 64))
        assert kv.nbytes == context + kept * pair + 64 * 6 * pair

    @pytest.mark.parametrize("said", [0, 1, WINDOW])
    def test_a_conversation_within_the_window_stays_as_it_is(self, said, scorer):
        model = shared_model()
        kv = model.prefill(random_ids(40), ratio=0.5)
        if said:
            tell(model, kv, random_ids(said))
        before = snapshot(kv)
        assert model.shrink(kv, shrinking(Budget(0.1), scorer)) is kv
        assert_same(snapshot(kv), before)
        assert kv.scores.scorer == "reconstruction"

    def test_forks_and_what_they_share_stay(self, scorer):
        model = shared_model()
        kv = model.prefill(random_ids(40), scorer=scorer)
        fork = kv.fork()
        tell(model, fork, random_ids(30, seed=1))
        before, others = snapshot(fork), fork.fork()
        tell(model, kv, random_ids(50, seed=2))
        model.shrink(kv, shrinking(Budget(0.2), scorer))
        assert_same(snapshot(fork), before)
        assert others.seen_tokens == fork.document.prefix_length + 40

    def test_what_became_context_outlives_a_reset_and_a_file(self, scorer, tmp_path):
        model = shared_model()
        kv = model.prefill(random_ids(40), scorer=scorer)
        tell(model, kv, random_ids(50, seed=2))
        model.shrink(kv, shrinking(Budget(0.5), scorer))
        kv.reset()
        assert kv.seen_tokens == len(kv.token_ids) == kv.document.prefix_length + 40 + 42
        kv.save(tmp_path / "said.kvz")
        loaded = model.load(tmp_path / "said.kvz")
        query = random_ids(5, seed=9)
        assert torch.equal(logits_of(model, loaded, query), logits_of(model, kv, query))

    def test_quantised_contexts(self, scorer):
        model = shared_model()
        kv = model.prefill(random_ids(40), scorer=scorer).quantize("int8")
        tell(model, kv, random_ids(50, seed=2))
        model.shrink(kv, shrinking(Budget(0.5), scorer))
        assert kv.kv_dtype == "int8"
        assert kv.kept[..., 40:].sum() == floor(0.5 * 6 * 42)

    def test_an_interruption_changes_nothing(self, scorer, monkeypatch):
        model = make_model()
        kv = model.prefill(random_ids(40), scorer=scorer)
        tell(model, kv, random_ids(50, seed=2))
        before = snapshot(kv)
        monkeypatch.setattr("kvzip.shrinking.select", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.shrink(kv, shrinking(Budget(0.5), scorer))
        assert_same(snapshot(kv), before)


def interrupt(*args: object) -> None:
    raise KeyboardInterrupt


class TestScoresOfTheContext:
    def test_of_the_same_scorer_are_kept_and_pruned_by(self, scorer):
        model = shared_model()
        kv = model.prefill(random_ids(40), scorer=scorer)
        tell(model, kv, random_ids(50, seed=2))
        model.shrink(kv, shrinking(Budget(0.5), scorer))
        assert kv.scores.scorer == scorer
        assert kv.scores.values.shape == (3, 2, 82)
        kv.prune(0.2)
        assert kv.kept.sum() == floor(0.2 * 6 * 82)

    def test_that_are_no_measure_are_given_up(self, scorer):
        model = shared_model()
        kv = model.prefill(random_ids(40), ratio=0.5)
        tell(model, kv, random_ids(50, seed=2))
        for _ in range(2):
            model.shrink(kv, shrinking(Budget(0.5), scorer, window=3))
            assert kv.scores is None
            with pytest.raises(KVzipError, match="no scores to prune by"):
                kv.prune(0.1)
            tell(model, kv, random_ids(20, seed=3))


@pytest.mark.parametrize("kind", KINDS)
class TestNothingEvictedIsNothingChanged:
    @pytest.mark.parametrize("amount", [ALL, Budget(threshold=-1e9)], ids=str)
    @pytest.mark.parametrize("update_cache", [False, True])
    def test_tokens(self, kind, amount, update_cache, scorer):
        model, how = shared_model(kind), shrinking(amount, scorer)
        kv, plain = (model.prefill(TEXT, ratio=0.5) for _ in range(2))
        for question in QUESTIONS:
            expected = tokens(model, plain, question, update_cache=update_cache)
            assert len(set(expected)) > 2
            assert tokens(model, kv, question, update_cache=update_cache, shrink=how) == expected
            assert torch.equal(kv.token_ids, plain.token_ids)
            assert kv.seen_tokens == plain.seen_tokens

    @pytest.mark.parametrize(
        "settings",
        [{"do_sample": True}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}],
        ids=lambda settings: next(iter(settings)),
    )
    def test_settings_see_the_whole_sequence(self, kind, settings, scorer):
        model = shared_model(kind)
        kv = model.prefill(TEXT, ratio=0.5)
        answers = []
        for how in ({}, {"shrink": shrinking(ALL, scorer)}):
            torch.manual_seed(5)
            answers.append(tokens(model, kv, QUESTIONS[0], **settings, **how))
        assert answers[0] == answers[1]

    def test_a_stop_string_across_two_blocks(self, kind, scorer):
        model = shared_model(kind)
        kv = model.prefill(TEXT, ratio=0.5)
        query = model.apply_template(QUESTIONS[1])
        long = tokens(model, kv, query)
        first = WINDOW + BLOCK - len(query) % BLOCK  # any place will do, behind a block or two
        text = make_tokenizer().decode(long[first + BLOCK : first + BLOCK + 4])
        stop = {"stop_strings": [text]}
        expected = tokens(model, kv, query, **stop)
        assert tokens(model, kv, query, **stop, shrink=shrinking(ALL, scorer)) == expected

    def test_a_window_longer_than_what_is_said(self, kind, scorer):
        model = shared_model(kind)
        kv, plain = (model.prefill(TEXT, ratio=0.5) for _ in range(2))
        how = shrinking(Budget(0.1), scorer, window=200)
        expected = tokens(model, plain, QUESTIONS[0], update_cache=True)
        assert tokens(model, kv, QUESTIONS[0], update_cache=True, shrink=how) == expected
        assert_same(snapshot(kv), snapshot(plain))


@pytest.mark.parametrize("amount", [Budget(0.3), Budget(threshold=0.2)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
class TestWhileGenerating:
    def replayed(self, model, kv, query, said, how):
        """The same in slow motion: token after token, and `model.shrink` when it is time."""
        twin = kv.fork()
        tell(model, twin, query)
        for token in said[:-1]:
            if twin.tail_length >= how.window + how.block:
                model.shrink(twin, how)
            tell(model, twin, torch.tensor([token]))
        return twin

    def test_blocks_are_what_shrinking_at_rest_gives(self, kind, amount, scorer):
        model, how = shared_model(kind), shrinking(amount, scorer)
        kv = model.prefill(TEXT, scorer=scorer, ratio=0.5)
        query = model.apply_template(QUESTIONS[0])
        base = kv.fork()
        said = tokens(model, kv, query, update_cache=True, shrink=how)
        twin = self.replayed(model, base, query, said, how)
        assert torch.equal(kv.document.token_ids, twin.document.token_ids)
        assert torch.equal(kv.kept, twin.kept)
        assert 0 < kv.kept[..., base.document.context_length :].float().mean() < 1
        assert kv.tail_length == twin.tail_length
        torch.testing.assert_close(kv.scores.values, twin.scores.values, atol=2e-3, rtol=1e-3)
        for mine, theirs in zip(kv.layers, twin.layers, strict=True):
            for a, b in zip(mine.context_tensors(), theirs.context_tensors(), strict=True):
                torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
            for a, b in zip(mine.tail.view(), theirs.tail.view(), strict=True):
                torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)

    def test_what_follows_is_chosen_by_what_is_left(self, kind, amount, scorer):
        """Every token is the one that stands first behind what is held at its time."""
        model, how = shared_model(kind), shrinking(amount, scorer)
        kv = model.prefill(TEXT, scorer=scorer, ratio=0.5)
        query = model.apply_template(QUESTIONS[0])
        said = tokens(model, kv, query, shrink=how)
        twin = self.replayed(model, kv, query, said, how)
        best = behind_tail(model, twin, torch.tensor(said[-1:]))[0].argmax()
        longer = tokens(model, kv, query, shrink=how, max_new_tokens=len(said) + 1)
        assert longer == [*said, int(best)]

    @pytest.mark.parametrize("conversation", [False, True])
    def test_the_cache_is_left_as_it_was(self, kind, amount, conversation, scorer):
        model, how = shared_model(kind), shrinking(amount, scorer)
        kv = model.prefill(TEXT, ratio=0.5)
        if conversation:
            tokens(model, kv, QUESTIONS[1], update_cache=True, max_new_tokens=30)
        before = snapshot(kv)
        answers = [tokens(model, kv, QUESTIONS[0], shrink=how) for _ in range(2)]
        assert answers[0] == answers[1] != tokens(model, kv, QUESTIONS[0])
        assert_same(snapshot(kv), before)

    @pytest.mark.parametrize("update_cache", [False, True])
    @pytest.mark.parametrize("fail_at", [1, 40])
    def test_an_interruption_changes_nothing(self, kind, amount, update_cache, fail_at, scorer):
        model = shared_model(kind)
        kv = model.prefill(TEXT, ratio=0.5)
        tokens(model, kv, QUESTIONS[1], update_cache=True, max_new_tokens=5)
        before = snapshot(kv)
        with pytest.raises(RuntimeError, match="the reader went away"):
            model.generate(
                QUESTIONS[0],
                kv=kv,
                update_cache=update_cache,
                streamer=Recorder(fail_at),
                shrink=shrinking(amount, scorer),
                **NEW,
            )
        assert_same(snapshot(kv), before)
        assert kv.scores.scorer == "reconstruction"

    def test_a_conversation(self, kind, amount, scorer):
        model, how = shared_model(kind), shrinking(amount, scorer)
        kv = model.prefill(TEXT, scorer=scorer, ratio=0.5)
        told, start = [], kv.document.token_ids
        for question in QUESTIONS * 2:
            query = model.apply_template(question, kv=kv)
            assert (len(query) == len(model.apply_template(question))) == (not told)
            settings = {"update_cache": True, "shrink": how, "max_new_tokens": 25}
            told += [*query.tolist(), *tokens(model, kv, query, **settings)]
            assert kv.token_ids.tolist() == [*start.tolist(), *told]
            assert kv.seen_tokens == len(kv.token_ids) - 1
            assert 0 < kv.tail_length == len(kv.history) - 1 < WINDOW + BLOCK + 1
        at_once = model.ask(kv, QUESTIONS, max_new_tokens=10)
        for question, answer in zip(QUESTIONS, at_once, strict=True):  # the tail is read again
            query = torch.cat([kv.history, model.apply_template(question, kv=kv)])
            assert model.generate(query, kv=kv.fork(), max_new_tokens=10) == answer
        kv.reset()
        assert kv.seen_tokens == len(kv.document.token_ids)

    def test_several_questions(self, kind, amount, scorer):
        model, how = shared_model(kind), shrinking(amount, scorer)
        kv = model.prefill(TEXT, ratio=0.5)
        answers = model.ask(kv, QUESTIONS, shrink=how, **NEW)
        assert answers == [model.generate(one, kv=kv, shrink=how, **NEW) for one in QUESTIONS]


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_bounded(kind, scorer):
    """Live tensors of every step: context, share of what was said, window and block."""
    model, new, share = make_model(kind), 300, 0.25
    kv = model.prefill(random_ids(60), scorer=scorer, ratio=0.5)
    query = random_ids(6, seed=7)
    columns = WINDOW + BLOCK
    dim = kv.prunable[0].context.keys.shape[1]
    column, global_column = (2 * 2 * dim * 4 * many for many in (3, len(kv.prunable)))
    sliding_context = (column - global_column) * 15  # of the windows of 16 tokens
    held: list[tuple[int, int]] = []

    def note(module, arguments, named, output):
        cache = named["past_key_values"]
        if isinstance(cache, ContextCache) and named["input_ids"].shape[1] == 1:
            held.append((cache.seen_tokens - kv.seen_tokens, cache.nbytes))

    settings = {"max_new_tokens": new, "eos_token_id": None}
    hook = model.hf_model.base_model.register_forward_hook(note, with_kwargs=True)
    expected = tokens(model, kv, query, **settings)
    unbounded, held = held, []
    got = tokens(model, kv, query, **settings, shrink=shrinking(Budget(share), scorer))
    hook.remove()
    assert len(got) == len(expected) == new
    assert len(held) == new - 1
    for said, size in held:
        limit = kv.nbytes + sliding_context + share * said * global_column + columns * column
        assert size <= limit
    assert held[-1][1] < unbounded[-1][1] - (1 - share) * (new - columns) * global_column / 1.01
    assert max(size for _, size in held) < 0.75 * unbounded[-1][1]


def test_a_question_longer_than_window_and_block(scorer):
    """It shrinks before the first step, and its space is given back."""
    model = make_model()
    kv = model.prefill(random_ids(60), scorer=scorer, ratio=0.5)
    how, query = shrinking(Budget(0.5), scorer), random_ids(150, seed=7)
    said = tokens(model, kv, query, update_cache=True, shrink=how, max_new_tokens=3)
    assert kv.document.context_length == 60 + 150 - WINDOW
    assert kv.tail_length == WINDOW + len(said) - 1
    assert kv.kept[..., 60:].sum() == floor(0.5 * 6 * (150 - WINDOW))


def test_recorded_steps_are_recorded_anew(scorer, monkeypatch):
    """A recording goes on reading the context that was there when it was made."""
    made = []

    def record(forward, kv, batch, devices):
        layers = [layer.fork(layer.tail) for layer in kv.layers]
        space = [layer.tail.buffers[0].shape[2] for layer in kv.layers]
        made.append(space)

        def step(new, positions):
            logits = step_of(forward, new, positions, Cache(layers=layers))
            assert [layer.tail.buffers[0].shape[2] for layer in kv.layers] == space
            return logits

        return step

    model, how = make_model(), shrinking(Budget(0.3), scorer)
    kv = model.prefill(TEXT, scorer=scorer, ratio=0.5)
    expected = [tokens(model, kv, question, shrink=how) for question in QUESTIONS]
    twin = model.prefill(TEXT, scorer=scorer, ratio=0.5)
    plain = tokens(model, kv, QUESTIONS[0])
    monkeypatch.setattr("kvzip.room.record", record)
    model.decoder.records = True
    before = snapshot(twin)
    for question, answer in zip(QUESTIONS, expected, strict=True):
        assert tokens(model, twin, question, shrink=how) == answer
        assert twin.room is None
    assert len(made) > 2 * len(QUESTIONS)
    assert {size for space in made for size in space} == {WINDOW + BLOCK}
    assert_same(snapshot(twin), before)
    assert tokens(model, twin, QUESTIONS[0]) == plain  # in a room that stays
    assert twin.room is not None
    assert tokens(model, twin, QUESTIONS[1], shrink=how) == expected[1]
    assert twin.room is None
    said = tokens(model, twin, QUESTIONS[0], shrink=how, update_cache=True)
    assert said == expected[0]
    assert twin.tail_length == len(twin.history) - 1  # a step ahead was taken back
    assert twin.room is None


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_recorded_graphs(kind, scorer):
    """On a device the answer is that of single steps, and its memory is free afterwards."""
    hf_model = make_hf_model(kind).cuda()
    model = ModelKVzip(hf_model, make_tokenizer())
    eager = ModelKVzip(hf_model, make_tokenizer())
    eager.decoder.records = False
    how = shrinking(Budget(0.3), scorer, window=32, block=64)
    kv = model.prefill(TEXT, scorer=scorer, ratio=0.5)
    for question in QUESTIONS:
        for settings in ({}, {"shrink": how, "max_new_tokens": 300}):
            assert model.decoder.records
            expected = tokens(eager, kv.fork(), question, **settings)
            assert tokens(model, kv, question, **settings) == expected


class TestLinearAttention:
    """Their state goes on; the one behind the context is that of what became context."""

    @pytest.fixture
    def model(self):
        (model_type,) = [one for one in TESTED if one.id == "qwen3_next"]
        return ModelKVzip(checks.make_model(model_type, VOCABULARY), make_tokenizer())

    @pytest.fixture
    def surrogate(self, model, tmp_path):
        width, heads = model.hf_model.config.hidden_size, model.geometry.layers[1].kv_heads
        shape = {"input_dim": width, "output_dim": heads}
        from safetensors.torch import save_file

        write_kvzap(tmp_path, layers=1, mlp=False, **shape)
        torch.manual_seed(0)
        tensors = {"weight": torch.randn(heads, width), "bias": torch.randn(heads)}
        save_file({f"layers.0.{k}": v for k, v in tensors.items()}, tmp_path / "model.safetensors")
        return f"kvzap:{tmp_path}"

    def test_all_kept_is_nothing_changed(self, model, surrogate):
        how = shrinking(ALL, surrogate)
        kv, plain = (model.prefill(TEXT, ratio=0.5) for _ in range(2))
        for question in QUESTIONS:
            expected = tokens(model, plain, question, update_cache=True)
            assert tokens(model, kv, question, update_cache=True, shrink=how) == expected

    def test_a_reset_goes_back_to_where_the_context_ends(self, model, surrogate):
        said = random_ids(50, seed=2)
        kv = model.read(random_ids(40))
        tell(model, kv, said)
        model.shrink(kv, shrinking(ALL, surrogate))
        model.shrink(kv, shrinking(ALL, surrogate, window=3))
        kv.reset()
        other = model.read(random_ids(40))
        tell(model, other, said[:-3])
        query = random_ids(6, seed=1)
        assert kv.seen_tokens == other.seen_tokens
        expected = behind_tail(model, other, query)
        torch.testing.assert_close(behind_tail(model, kv, query), expected, atol=1e-3, rtol=1e-3)

    def test_a_reset_after_an_answer(self, model, surrogate):
        kv = model.read(random_ids(40))
        told = random_ids(30, seed=2)
        how = shrinking(ALL, surrogate)
        model.generate(told, kv=kv, shrink=how, update_cache=True, **NEW)
        kv.reset()
        other, query = model.read(random_ids(40)), random_ids(6, seed=1)
        tell(model, other, kv.document.token_ids[len(other.document.token_ids) :])
        assert kv.seen_tokens == other.seen_tokens > len(other.document.token_ids) + 30
        expected = behind_tail(model, other, query)
        torch.testing.assert_close(behind_tail(model, kv, query), expected, atol=1e-3, rtol=1e-3)


class TestWhatIsSaidOfBadInput:
    @pytest.mark.parametrize(
        ("wrong", "line"),
        [
            ({"window": 0}, "window is a number of tokens, 1 or more: got 0"),
            ({"window": 2.5}, "window is a number of tokens, 1 or more: got 2.5"),
            ({"block": 0}, "block is a number of tokens, 1 or more: got 0"),
            ({"amount": Budget(tokens=5)}, "ratio and threshold only: leave out tokens"),
            ({"amount": Budget(bytes="1GB")}, "ratio and threshold only: leave out bytes"),
            ({"amount": Budget(0.5, min_per_head=3)}, "leave out min_per_head"),
            ({"amount": 0.3}, r"amount is a Budget, such as Budget\(0.3\)"),
        ],
    )
    def test_settings(self, wrong, line):
        with pytest.raises(KVzipError, match=line):
            Shrinking(**{"amount": ALL, **wrong})

    @pytest.mark.parametrize(
        ("scorer", "line"),
        [
            ("reconstruction", "scored by a surrogate, not by 'reconstruction': choose 'kvzap:l"),
            ("random", "scored by a surrogate, not by 'random'"),
            ("kvsap:linear", "unknown scorer 'kvsap:linear': did you mean 'kvzap:linear'"),
        ],
    )
    def test_scorers(self, scorer, line):
        with pytest.raises(KVzipError, match=line):
            Shrinking(ALL, scorer)

    def test_a_surrogate_that_is_not_there(self):
        model = shared_model()
        kv = model.prefill(random_ids(40), ratio=0.5)
        before = snapshot(kv)
        how = Shrinking(ALL, "kvzap:/nowhere")
        for act in (
            lambda: model.generate("Who?", kv=kv, shrink=how),
            lambda: model.shrink(kv, how),
            lambda: model.ask(kv, ["Who?"], shrink=how),
        ):
            with pytest.raises(KVzipError, match="nowhere"):
                act()
        assert_same(snapshot(kv), before)

    @pytest.mark.parametrize("ratio", [0, 1.5, -0.1])
    def test_ratios(self, ratio):
        model = shared_model()
        with pytest.raises(KVzipError, match=r"in \(0, 1\]"):
            model.generate("Who?", kv=model.read(random_ids(40)), shrink=ratio)

    def test_retained_pairs(self, scorer):
        model = make_model(kv_type="retain")
        kv = model.prefill(TEXT, ratio=0.5)
        how = shrinking(Budget(0.3), scorer)
        for act in (
            lambda: model.generate(QUESTIONS[0], kv=kv, shrink=how, update_cache=True),
            lambda: model.shrink(kv, how),
        ):
            with pytest.raises(KVzipError, match="frees what it evicts: use kv_type='evict'"):
                act()
        evicting = shared_model().prefill(TEXT, ratio=0.5)
        expected = tokens(shared_model(), evicting, QUESTIONS[0], shrink=how)
        assert tokens(model, kv, QUESTIONS[0], shrink=how) == expected

    def test_a_tail_of_unknown_tokens(self, scorer):
        model = shared_model()
        kv = model.prefill(TEXT, ratio=0.5)
        with torch.no_grad():
            model.hf_model(random_ids(30)[None], past_key_values=kv)
        with pytest.raises(KVzipError, match="this cache was told of 0"):
            model.shrink(kv, shrinking(Budget(0.3), scorer))

    def test_a_threshold_that_nothing_reaches(self, scorer):
        """Prefix, context and window stay, and one line says so."""
        model = shared_model()
        kv = model.prefill(TEXT, ratio=0.5)
        n = kv.document.context_length
        how = shrinking(Budget(threshold=1e6), scorer)
        with pytest.warns(KVzipWarning, match="is kept by threshold 1000000.0, only") as said:
            tokens(model, kv, QUESTIONS[0], shrink=how, update_cache=True)
        assert len(said) == 1
        assert Path(said[0].filename) == Path(__file__)
        assert not kv.kept[..., n:].any()
        assert kv.kept[..., :n].any()
        tell(model, kv, random_ids(20))
        with pytest.warns(KVzipWarning, match="lower the threshold") as said:
            model.shrink(kv, how)
        assert Path(said[0].filename) == Path(__file__)


class TestWhatScoresByDefault:
    def test_the_surrogate_of_the_cache(self, tmp_path):
        write_gates(tmp_path / "gates.pt")
        gates = f"fastkvzip:{tmp_path / 'gates.pt'}"
        model = make_model()
        kv = model.prefill(random_ids(40), scorer=gates)
        tell(model, kv, random_ids(300, seed=2))
        model.shrink(kv, 0.5)
        assert kv.scores.scorer == gates
        assert kv.tail_length == 128

    def test_or_else_that_of_the_model(self):
        """The bundled model has one."""
        model = ModelKVzip()
        kv = model.prefill(random_ids(400) % 300, ratio=0.5)
        tell(model, kv, random_ids(300, seed=2) % 300)
        model.shrink(kv, 0.5)
        heads = sum(layer.kv_heads for layer in model.geometry.layers)
        assert kv.kept[..., 400:].sum() == floor(0.5 * heads * (300 - 128))
