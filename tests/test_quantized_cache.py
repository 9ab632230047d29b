"""Caches whose kept pairs are quantised: asked, pruned, saved, extended, and what they refuse."""

import json

import pytest
import torch
from safetensors import safe_open

from kvzip import KVzipError, storage
from kvzip.kernels.quantization import KV_DTYPES, Quantization
from kvzip.pairs import Pairs, QuantizedPairs
from models import (
    QUESTIONS,
    TEXT,
    assert_same,
    logits_of,
    make_model,
    random_ids,
    shared_model,
    snapshot,
)
from test_memory import held_bytes
from test_quantization import definition
from test_storage import rewrite, set_header

KINDS = ["llama", "gemma3"]
by_dtype = pytest.mark.parametrize("kv_dtype", KV_DTYPES)
by_kind = pytest.mark.parametrize("kind", KINDS)


def dequantized(kv):
    """A fork whose pairs are what those of a quantised cache stand for."""
    fork = kv.fork()
    for layer in fork.prunable:
        pairs = layer.context
        rows = (
            definition(part, pairs.counts.tolist()).float() for part in (pairs.keys, pairs.values)
        )
        layer.context = Pairs(*rows, pairs.kept)
    return fork


@by_kind
@by_dtype
def test_answers_are_those_of_what_the_codes_stand_for(kind, kv_dtype):
    model = shared_model(kind)
    kv = model.prefill(TEXT).prune(0.5, kv_dtype=kv_dtype)
    assert kv.kv_dtype == kv_dtype
    plain = dequantized(kv)
    for question in QUESTIONS:
        query = model.apply_template(question)
        torch.testing.assert_close(
            logits_of(model, kv, query), logits_of(model, plain, query), rtol=1e-4, atol=1e-4
        )
    assert model.ask(kv, QUESTIONS, max_new_tokens=8) == model.ask(
        plain, QUESTIONS, max_new_tokens=8
    )
    assert [model.generate(q, kv=kv, max_new_tokens=8) for q in QUESTIONS] == model.ask(
        kv, QUESTIONS, max_new_tokens=8
    )


@by_dtype
def test_logits_stay_near_those_of_the_cache_as_it_was_made(kv_dtype):
    """The same pairs are kept, and the finer the codes, the nearer the logits."""
    model = shared_model()
    kv = model.prefill(random_ids(300))
    plain, quantized = kv.fork().prune(0.5), kv.fork().prune(0.5, kv_dtype=kv_dtype)
    assert torch.equal(plain.kept, quantized.kept)
    query = model.apply_template(QUESTIONS[0])
    exact = logits_of(model, plain, query)
    off = (logits_of(model, quantized, query) - exact).norm() / exact.norm()
    assert 0 < off < {"int4": 0.3, "int8": 0.03, "fp8": 0.1}[kv_dtype]


@by_dtype
def test_answering_changes_nothing(kv_dtype):
    model = shared_model()
    kv = model.prefill(TEXT).prune(0.5, kv_dtype=kv_dtype)
    before = snapshot(kv)
    model.ask(kv, QUESTIONS, max_new_tokens=8)
    model.generate(QUESTIONS[0], kv=kv, max_new_tokens=8)
    assert_same(snapshot(kv), before)


@by_dtype
def test_conversations_and_forks(kv_dtype):
    model = shared_model()
    kv = model.prefill(TEXT).prune(0.5, kv_dtype=kv_dtype)
    plain, fork = dequantized(kv), kv.fork()
    for question in QUESTIONS:
        answers = [
            model.generate(question, kv=one, update_cache=True, max_new_tokens=8)
            for one in (kv, plain)
        ]
        assert answers[0] == answers[1]
    assert kv.tail_length > 0
    assert fork.tail_length == 0
    kv.reset()
    query = model.apply_template(QUESTIONS[1])
    assert torch.equal(logits_of(model, kv, query), logits_of(model, fork, query))


@by_kind
@by_dtype
def test_bytes_are_freed(kind, kv_dtype):
    model = shared_model(kind)
    kv = model.prefill(random_ids(300))
    sliding = sum(
        t.nbytes for layer in kv.layers if layer not in kv.prunable for t in layer.context_tensors()
    )
    kv.prune(0.3, kv_dtype=kv_dtype)
    pairs = [layer.context for layer in kv.prunable]
    head_dim = pairs[0].keys.center.shape[1]
    rows = sum(len(part.keys) for part in pairs)
    channels = sum(4 * part.keys.center.nbytes for part in pairs)
    expected = 2 * rows * Quantization(kv_dtype).row_bytes(head_dim) + channels + sliding
    assert kv.nbytes == expected
    codes = sum(part.codes.nbytes for pair in pairs for part in (pair.keys, pair.values))
    assert held_bytes(kv) == expected - codes  # which counts what is floating point


@by_dtype
def test_a_budget_in_bytes_is_that_of_the_codes(kv_dtype):
    model = shared_model()
    kv = model.prefill(random_ids(300))
    limit = kv.nbytes // 8
    plain = kv.fork().prune(bytes=limit)
    kv.prune(bytes=limit, kv_dtype=kv_dtype)
    assert limit - 200 < kv.nbytes <= limit
    assert kv.realised_ratio > 1.5 * plain.realised_ratio


@by_dtype
def test_pruning_further_takes_codes_as_they_are(kv_dtype):
    model = shared_model()
    kv = model.prefill(random_ids(200))
    once = kv.fork().prune(0.2)
    kv.prune(0.6, kv_dtype=kv_dtype)
    before = dequantized(kv)
    kv.prune(0.2)
    assert kv.kv_dtype == kv_dtype
    assert torch.equal(kv.kept, once.kept)
    before.prune(0.2)
    query = model.apply_template(QUESTIONS[0])
    torch.testing.assert_close(
        logits_of(model, kv, query), logits_of(model, before, query), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(KVzipError, match="already evicted"):
        kv.prune(0.6)


def test_codes_do_not_turn_into_others():
    kv = shared_model().prefill(random_ids(100)).prune(0.6, kv_dtype="int4")
    before = snapshot(kv)
    with pytest.raises(KVzipError, match=r"quantised as int4 .* does not turn into int8: prefill"):
        kv.prune(0.3, kv_dtype="int8")
    assert_same(snapshot(kv), before)
    kv.prune(0.3, kv_dtype="int4")
    assert kv.realised_ratio == pytest.approx(0.3, abs=0.01)


def test_what_is_retained_is_never_quantised():
    model = make_model(kv_type="retain")
    kv = model.prefill(random_ids(200))
    full = kv.nbytes
    plain = shared_model().prefill(random_ids(200))
    for ratio, kv_dtype in ((0.5, "int4"), (0.7, None), (0.3, "fp8"), (1.0, "int8"), (1.0, None)):
        kv.prune(ratio, kv_dtype=kv_dtype)
        assert kv.kv_dtype == kv_dtype
        assert all(isinstance(layer.held, Pairs) for layer in kv.prunable)
        assert torch.equal(kv.kept, plain.fork().prune(ratio).kept)
    assert kv.nbytes == full


@by_dtype
def test_quantising_alone_evicts_nothing(kv_dtype):
    model = shared_model()
    kv = model.read(TEXT)  # without scores
    kv.quantize(kv_dtype)
    assert kv.kept.all()
    query = model.apply_template(QUESTIONS[0])
    scored = model.prefill(TEXT).prune(1.0, kv_dtype=kv_dtype)
    assert torch.equal(logits_of(model, kv, query), logits_of(model, scored, query))
    with pytest.raises(KVzipError, match=f"holds {kv_dtype} codes, not the keys"):
        model.score(kv)


@by_dtype
def test_a_full_cache_of_codes_is_not_scored(kv_dtype):
    model = shared_model()
    kv = model.prefill(TEXT).prune(1.0, kv_dtype=kv_dtype)
    for scorer in ("reconstruction", "key-norm"):
        with pytest.raises(KVzipError, match=f"holds {kv_dtype} codes, not the keys"):
            model.score(kv, scorer=scorer)


@by_kind
@by_dtype
@pytest.mark.parametrize("budget", ["chunk", "context"])
def test_reading_further(budget, kv_dtype, kind):
    """What is new is quantised like the rest, and what was there stays as it was."""
    model = shared_model(kind)
    first, second = random_ids(200).split([120, 80])
    kv = model.prefill(first, ratio=0.5, streaming=True, chunk_size=60)
    kv.prune(0.5, kv_dtype=kv_dtype)
    before = dequantized(kv)
    kv.extend(second, chunk_size=40, budget=budget)
    assert kv.kv_dtype == kv_dtype
    assert kv.document.context_length == 200
    assert kv.realised_ratio == pytest.approx(0.5, abs=0.01)
    if budget == "chunk":
        for layer, old in zip(kv.prunable, before.prunable, strict=True):
            got = dequantized(kv).prunable[kv.prunable.index(layer)].context
            for h, count in enumerate(old.context.counts.tolist()):
                first_row, old_row = int(got.indptr[h]), int(old.context.indptr[h])
                assert torch.equal(
                    got.keys[first_row : first_row + count],
                    old.context.keys[old_row : old_row + count],
                )
    assert model.ask(kv, QUESTIONS, max_new_tokens=8) == model.ask(
        dequantized(kv), QUESTIONS, max_new_tokens=8
    )


class TestFiles:
    @by_kind
    @by_dtype
    def test_all_is_there_again(self, kind, kv_dtype, tmp_path):
        model = shared_model(kind)
        kv = model.prefill(TEXT).prune(0.5, kv_dtype=kv_dtype)
        path = kv.save(tmp_path / "context.kvz")
        assert storage.read_header(path).kv_dtype == kv_dtype
        again = model.load(path)
        assert again.kv_dtype == kv_dtype
        assert_same(snapshot(again), snapshot(kv))
        for one, other in zip(kv.prunable, again.prunable, strict=True):
            for name, tensor in one.context.tensors().items():
                assert torch.equal(tensor, other.context.tensors()[name])
        query = model.apply_template(QUESTIONS[0])
        assert torch.equal(logits_of(model, again, query), logits_of(model, kv, query))
        assert_same(snapshot(again.prune(0.2)), snapshot(kv.prune(0.2)))

    def test_groups_are_there_again(self, tmp_path):
        model = shared_model()
        head_dim = model.prefill(TEXT).prunable[0].context.keys.shape[1]
        how = Quantization("int4", head_dim // 4)
        kv = model.prefill(TEXT).prune(0.5, kv_dtype=how)
        again = model.load(kv.save(tmp_path / "context.kvz"))
        assert again.prunable[0].context.quantization == how
        with pytest.raises(KVzipError, match=f"int4 in groups of {head_dim // 4}"):
            again.prune(0.2, kv_dtype=Quantization("int4", head_dim // 2))

    def test_a_file_is_as_small_as_the_cache(self, tmp_path):
        kv = shared_model().prefill(random_ids(500)).prune(0.5)
        large = kv.save(tmp_path / "large.kvz").stat().st_size
        pairs = kv.nbytes
        small = kv.quantize("int4").save(tmp_path / "small.kvz").stat().st_size
        assert large - small == pytest.approx(pairs - kv.nbytes, abs=4000)

    def test_a_retaining_model_retains_the_codes(self, tmp_path):
        path = shared_model().prefill(TEXT).prune(0.6, kv_dtype="int8").save(tmp_path / "a.kvz")
        kv = make_model(kv_type="retain").load(path)
        for ratio in (0.2, 0.6, 0.4):
            assert kv.prune(ratio).kv_dtype == "int8"
        with pytest.raises(KVzipError, match="does not turn into int4"):
            kv.prune(0.2, kv_dtype="int4")

    def test_files_of_version_1(self, tmp_path):
        """They know of no quantisation."""
        model = shared_model()
        path = model.prefill(TEXT).prune(0.5).save(tmp_path / "context.kvz")

        def age(_, metadata):
            header = json.loads(metadata["kvzip"].partition(" ")[2])
            assert header.pop("kv_dtype") is None
            set_header(metadata, version=1)
            text = json.loads(metadata["kvzip"].partition(" ")[2])
            del text["kv_dtype"]
            metadata["kvzip"] = storage._text_checksum(json.dumps(text)) + " " + json.dumps(text)

        rewrite(path, age)
        assert storage.read_header(path).version == 1
        kv = model.load(path)
        assert kv.kv_dtype is None
        assert kv.realised_ratio == pytest.approx(0.5, abs=0.01)

    def test_codes_that_are_not_known(self, tmp_path):
        model = shared_model()
        path = model.prefill(TEXT).prune(0.5, kv_dtype="int8").save(tmp_path / "context.kvz")
        rewrite(path, lambda _, metadata: set_header(metadata, kv_dtype="int3"))
        with pytest.raises(KVzipError, match="holds int3 codes, this kvzip knows int4, int8, fp8"):
            model.load(path)

    @pytest.mark.parametrize("part", ["codes", "scales", "center", "gain"])
    def test_damage_is_found(self, part, tmp_path):
        model = shared_model()
        path = model.prefill(TEXT).prune(0.5, kv_dtype="int4").save(tmp_path / "context.kvz")

        def damage(tensors, _):
            tensors[f"layers.1.keys.{part}"].view(torch.uint8).view(-1)[0] ^= 1

        rewrite(path, damage)
        with pytest.raises(KVzipError, match=rf"checksum of layers\.1\.keys\.{part} is wrong"):
            model.load(path)

    def test_tensors_keep_their_dtype_in_a_model_of_another(self, tmp_path):
        path = shared_model().prefill(TEXT).prune(0.5, kv_dtype="int4").save(tmp_path / "a.kvz")
        with safe_open(path, framework="pt") as file:
            assert file.get_slice("layers.0.keys.codes").get_dtype() == "I16"
            assert file.get_slice("layers.0.keys.scales").get_dtype() == "F16"


@pytest.mark.parametrize("kv_dtype", ["int3", "bfloat16", ""])
def test_unknown_dtypes_leave_the_cache_as_it_was(kv_dtype):
    kv = shared_model().prefill(TEXT)
    before = snapshot(kv)
    for call in (lambda: kv.prune(0.5, kv_dtype=kv_dtype), lambda: kv.quantize(kv_dtype)):
        with pytest.raises(KVzipError, match=r"unknown kv_dtype .* choose one of int4, int8, fp8"):
            call()
    assert_same(snapshot(kv), before)
    assert kv.kept.all()


def test_a_group_that_does_not_suit_leaves_the_cache_as_it_was():
    kv = shared_model().prefill(TEXT)
    before = snapshot(kv)
    with pytest.raises(KVzipError, match="a group of 5 does not suit heads of dimension"):
        kv.prune(0.5, kv_dtype=Quantization("int4", 5))
    assert_same(snapshot(kv), before)
    assert all(isinstance(layer.context, Pairs) for layer in kv.prunable)


def test_sliding_layers_are_never_quantised():
    kv = shared_model("gemma3").prefill(random_ids(60)).prune(0.5, kv_dtype="int4")
    kinds = [type(layer.context) for layer in kv.layers]
    assert kinds == [QuantizedPairs if layer in kv.prunable else Pairs for layer in kv.layers]
    assert len(set(kinds)) == 2
