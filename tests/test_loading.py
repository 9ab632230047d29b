"""From names to models, without a network."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kvzip import KVzipError, ModelKVzip, loading
from models import TEXT, make_config, make_hf_model, make_tokenizer

SHORT = {
    "llama3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3.0-8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct-1M",
    "qwen2.5-14b": "Qwen/Qwen2.5-14B-Instruct-1M",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-14b": "Qwen/Qwen3-14B",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "gemma3-1b": "google/gemma-3-1b-it",
    "gemma3-4b": "google/gemma-3-4b-it",
    "gemma3-12b": "google/gemma-3-12b-it",
    "gemma3-27b": "google/gemma-3-27b-it",
    "duo": "gradientai/Llama-3-8B-Instruct-Gradient-1048k",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small qwen3 checkpoint in bfloat16."""
    path = tmp_path_factory.mktemp("qwen3")
    make_hf_model("qwen3", dtype=torch.bfloat16).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def hub(monkeypatch, folder):
    """Let every repository be the small checkpoint; returns the names that were asked for."""
    asked = []

    def redirect(auto):
        load = auto.from_pretrained

        def from_pretrained(name, *args, **kwargs):
            asked.append(name)
            kwargs.pop("revision", None)
            return load(folder, *args, **kwargs)

        monkeypatch.setattr(auto, "from_pretrained", from_pretrained)

    for auto in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):
        redirect(auto)
    return asked


def test_short_names():
    assert {name: loading.resolve(name).repository for name in loading.SHORT_NAMES} == SHORT


@pytest.mark.parametrize("name", ["Qwen2.5-7B", "QWEN2.5-7b"])
def test_short_names_in_any_case(name):
    assert loading.resolve(name).repository == SHORT["qwen2.5-7b"]


@pytest.mark.parametrize("name", [None, "bundled"])
def test_the_bundled_model(name):
    assert loading.resolve(name).repository.endswith("tiny")


def test_hub_names_are_taken_as_they_are():
    assert loading.resolve("owner/Model-1B") == loading.Published("owner/Model-1B")


@pytest.mark.parametrize(
    ("name", "close"),
    [("qwen2.5-7bb", "qwen2.5-7b"), ("lama3.1-8b", "llama3.1-8b"), ("gemma-3-1b", "gemma3-1b")],
)
def test_did_you_mean(name, close):
    with pytest.raises(KVzipError, match=f"unknown model '{name}': did you mean '{close}'"):
        loading.resolve(name)


@pytest.mark.parametrize("device", ["xyz", "cuda:x"])
def test_unknown_devices(device):
    with pytest.raises(KVzipError, match=f"unknown device '{device}': 'cpu', 'cuda' or"):
        ModelKVzip(device=device)


def test_unknown_plans():
    with pytest.raises(KVzipError, match="unknown tp_plan 'rows'"):
        ModelKVzip(tp_plan="rows")


@pytest.mark.parametrize("name", ["", "zzz", "./nowhere", "/no/where", "~/model", "a/b/c"])
def test_unknown_names(name):
    with pytest.raises(KVzipError, match=r"unknown model .* one of bundled, llama3.1-8b"):
        loading.resolve(name)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(KVzipError, match=r"is no model folder: it has no config\.json"):
        ModelKVzip(str(tmp_path))


def test_a_folder_without_weights(tmp_path):
    make_config("llama").save_pretrained(tmp_path)
    with pytest.raises(KVzipError, match="cannot be loaded"):
        ModelKVzip(str(tmp_path))


def test_a_model_that_cannot_be_had():
    with pytest.raises(KVzipError, match="model 'owner/no-such-model' cannot be loaded"):
        ModelKVzip("owner/no-such-model")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(None, torch.float32), ("auto", torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
)
def test_a_folder(folder, dtype, expected):
    model = ModelKVzip(str(folder), dtype=dtype, device="cpu")
    assert model.hf_model.dtype == expected
    assert model.hf_model.config._attn_implementation == "kvzip"
    assert not model.hf_model.training
    kv = model.prefill(TEXT).prune(0.5)
    assert kv.origin.model_id == str(folder)
    assert isinstance(model.generate("why?", kv=kv, max_new_tokens=4), str)


def test_a_folder_answers_as_the_loaded_model(folder, tmp_path):
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = ModelKVzip(stock, make_tokenizer())
    model = ModelKVzip(str(folder), device="cpu")
    assert model.origin.fingerprint == loaded.origin.fingerprint
    path = model.prefill(TEXT).prune(0.5).save(tmp_path / "context.kvz")
    kv = loaded.load(path)
    assert loaded.generate("why?", kv=kv, max_new_tokens=8) == model.generate(
        "why?", kv=model.load(path), max_new_tokens=8
    )


def test_qwen3_reads_four_times_its_positions(hub, folder):
    model = ModelKVzip("qwen3-4b", device="cpu")
    assert set(hub) - {folder} == {"Qwen/Qwen3-4B"}
    config = model.hf_model.config
    assert config.max_position_embeddings == model.geometry.max_positions == 131072
    theta = make_config("qwen3").rope_parameters["rope_theta"]
    assert config.rope_parameters == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "rope_theta": theta,
    }
    rotary = model.hf_model.model.rotary_emb
    assert rotary.attention_scaling > 1
    assert rotary.inv_freq[-1] == pytest.approx(rotary.original_inv_freq[-1].item())
    slowest = theta ** -(1 - 2 / config.head_dim)
    assert rotary.inv_freq[-1].item() == pytest.approx(slowest / 4, rel=1e-4)


def test_other_short_names_keep_their_config(hub, folder):
    model = ModelKVzip("qwen2.5-7b", device="cpu")
    config = json.loads((folder / "config.json").read_text())
    assert model.geometry.max_positions == config["max_position_embeddings"]
    assert model.hf_model.config.rope_parameters == config["rope_parameters"]
