"""Layers that accelerate runs, offloads or spreads over devices."""

import pytest
import torch

from kvzip import KVzipError, ModelKVzip, geometry, weights
from kvzip.fingerprint import model_fingerprint
from models import (
    QUESTIONS,
    TEXT,
    assert_same,
    make_hf_model,
    make_model,
    make_tokenizer,
    shared_model,
    snapshot,
)

accelerate = pytest.importorskip("accelerate")

KINDS = ["llama", "gemma3"]


def hooked(kind: str) -> ModelKVzip:
    """A model whose modules are called as those of a model on several devices are."""
    hf_model = make_hf_model(kind)
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    layers = [f"model.layers.{i}" for i in range(hf_model.config.num_hidden_layers)]
    device_map = dict.fromkeys([*parts, *layers], "cpu")
    accelerate.dispatch_model(hf_model, device_map, main_device="cpu", force_hooks=True)
    return ModelKVzip(hf_model, make_tokenizer())


def offloaded(kind: str) -> ModelKVzip:
    """A model whose last layers' weights are fetched for each forward pass."""
    hf_model = make_hf_model(kind)
    for layer in hf_model.model.layers[1:]:
        accelerate.cpu_offload(layer, execution_device=torch.device("cpu"))
    return ModelKVzip(hf_model, make_tokenizer())


@pytest.mark.parametrize("make", [hooked, offloaded])
@pytest.mark.parametrize("kind", KINDS)
def test_a_dispatched_model_gives_the_same_cache_and_answers(kind, make, tmp_path):
    model, plain = make(kind), shared_model(kind)
    assert model.origin.fingerprint == plain.origin.fingerprint
    kv, expected = (one.prefill(TEXT, ratio=0.4) for one in (model, plain))
    assert_same(snapshot(kv), snapshot(expected))
    assert model.ask(kv, QUESTIONS, max_new_tokens=8) == plain.ask(
        expected, QUESTIONS, max_new_tokens=8
    )
    again = model.load(plain.prefill(TEXT, ratio=0.4).save(tmp_path / "a.kvz"))
    assert model.generate(QUESTIONS[0], kv=again, max_new_tokens=8) == plain.generate(
        QUESTIONS[0], kv=expected, max_new_tokens=8
    )


@pytest.mark.parametrize("make", [hooked, offloaded])
def test_a_dispatched_model_compresses_while_reading(make):
    how = {"ratio": 0.4, "streaming": True, "chunk_size": 17}
    kv, expected = (one.prefill(TEXT, **how) for one in (make("llama"), shared_model("llama")))
    assert_same(snapshot(kv), snapshot(expected))


def test_every_layer_is_loaded_to_its_own_device(tmp_path):
    model = make_model()
    path = model.prefill(TEXT, ratio=0.4).save(tmp_path / "a.kvz")
    assert model.geometry.devices == [torch.device("cpu")] * 3
    layers = tuple(
        geometry.LayerGeometry(layer.kv_heads, layer.window, device=torch.device(device))
        for layer, device in zip(model.geometry.layers, ["cpu", "meta", "cpu"], strict=True)
    )
    model.geometry = geometry.Geometry(layers, model.geometry.max_positions)
    kv = model.load(path)
    places = [[t.device.type for t in layer.context_tensors()] for layer in kv.layers]
    assert [set(of_layer) for of_layer in places] == [{"cpu"}, {"meta"}, {"cpu"}]


def test_a_model_on_one_device_is_told_from_others():
    model = make_hf_model()
    assert weights.on_one_device(model)
    accelerate.cpu_offload(model.model.layers[1], execution_device=torch.device("cpu"))
    assert not weights.on_one_device(model)


def test_offloaded_weights_count_for_the_fingerprint():
    one, other = make_hf_model(), make_hf_model()
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.weight += 1
    for model in (one, other):
        accelerate.cpu_offload(model.model.layers[1], execution_device=torch.device("cpu"))
    assert model_fingerprint(one) == model_fingerprint(make_hf_model())
    assert model_fingerprint(other) != model_fingerprint(one)


def test_offloaded_embeddings_are_refused():
    model = make_hf_model()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(KVzipError, match=r"first weights of LlamaForCausalLM are offloaded"):
        ModelKVzip(model, make_tokenizer())


def test_a_device_map_loads_the_bundled_model():
    model = ModelKVzip(device_map={"": "cpu"}, dtype="float32")
    assert model.origin.fingerprint == ModelKVzip(device="cpu").origin.fingerprint


def test_device_and_device_map_are_not_both_taken():
    with pytest.raises(KVzipError, match="device and device_map do not go together"):
        ModelKVzip(device="cpu", device_map="auto")
