"""Weights in 8 bits, with the cache as it is and evicted to int4."""

import json
import subprocess
import sys
from random import Random

import pytest
import torch

from kvzip import KVzipError, ModelKVzip, loading, quantized_weights, storage
from kvzip.cli import main
from kvzip.cli.options import QuantizationName
from kvzip.hidden_states import attention_modules, output_weight
from kvzip.single_token import SingleTokenLinear
from kvzip.synthetic import make_document
from kvzip.weights import is_int8_by_row, plain_weights
from models import make_hf_model, make_tokenizer

pytest.importorskip("torchao")

TOKENS = 600
QUESTIONS = 10
KINDS = ["int8", "w8a8"]


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return ModelKVzip(quantization=request.param, device="cpu")


@pytest.fixture(scope="module")
def plain():
    return ModelKVzip(device="cpu")


@pytest.fixture(scope="module")
def document(plain):
    """Profiles and key-value stores that training did not see, and some of their questions."""
    made = make_document(
        ["profiles", "key_values"],
        seed=1,
        split="eval",
        tokens=TOKENS,
        count_tokens=lambda text: len(plain.prompts.context_ids(text)),
    )
    return made.context, Random(0).sample(made.questions, QUESTIONS)


def correct(model, kv, questions):
    answers = model.ask(kv, [question.text for question in questions], max_new_tokens=32)
    return sum(a == q.answer for a, q in zip(answers, questions, strict=True))


def weight_bytes(model):
    """Of the layers' matrices."""
    return sum(
        part.nbytes
        for name, part in plain_weights(model.hf_model)
        if name.startswith("model.layers.") and "proj" in name
    )


def test_answers_stay_right_with_an_evicted_cache(model, document):
    context, questions = document
    kv = model.prefill(context)
    assert correct(model, kv, questions) >= QUESTIONS - 1
    assert correct(model, kv.prune(0.3), questions) >= QUESTIONS - 1


def test_answers_stay_right_with_a_quantised_cache(model, document):
    context, questions = document
    kv = model.prefill(context).prune(0.3, kv_dtype="int8")
    assert kv.kv_dtype == "int8"
    assert correct(model, kv, questions) >= QUESTIONS - 1


def test_weights_take_a_quarter_of_float32(model, plain):
    codes = weight_bytes(model)
    assert 0.25 < codes / weight_bytes(plain) < 0.29  # and their scales


def test_activations_are_rounded_too(plain):
    """What tells w8a8 from int8, whose codes are the same."""
    ids = torch.arange(40)[None]
    with torch.no_grad():
        int8, w8a8 = (ModelKVzip(quantization=q, device="cpu").hf_model(ids).logits for q in KINDS)
        full = plain.hf_model(ids).logits
    assert 0 < (int8 - full).norm() / full.norm() < 0.05
    assert (int8 - full).norm() < (w8a8 - full).norm() < 0.1 * full.norm()


def test_weights_are_codes_times_scales_of_rows(model):
    """Which is what recorded steps make of them."""
    found = [
        weight for weight in model.hf_model.parameters() if type(weight).__name__ != "Parameter"
    ]
    assert len(found) == 7 * model.hf_model.config.num_hidden_layers
    for weight in found:
        assert is_int8_by_row(weight)
        assert not weight.zero_point.any()
        assert torch.equal(weight.dequantize(), weight.qdata * weight.scale)


def test_recorded_steps_leave_activations_as_they_are(plain):
    """So w8a8 is int8 there, and nearer to the model than with rounded activations."""
    int8, w8a8 = (ModelKVzip(quantization=kind, device="cpu").hf_model for kind in KINDS)
    with torch.no_grad():
        for token in range(100, 104):
            ids = torch.tensor([[token]])
            full, expected, rounded = (one(ids).logits for one in (plain.hf_model, int8, w8a8))
            with SingleTokenLinear():
                for model in (int8, w8a8):
                    found = model(ids).logits
                    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            assert (found - full).norm() < (rounded - full).norm()


def test_caches_of_other_weights_are_refused(model, plain, document):
    kv = plain.prefill(document[0])
    with pytest.raises(
        KVzipError, match=rf"bundled, not quantised .* bundled, {model.quantization} "
    ):
        model.ask(kv, ["Who?"])


def test_files_say_what_weights_were_quantised_to(model, tmp_path, capsys):
    path = model.prefill("Anna likes tea.", ratio=0.5).save(tmp_path / "a.kvz")
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantization"] == model.quantization
    assert main(["inspect", str(path)]) == 0
    assert f"bundled, {model.quantization}" in capsys.readouterr().out


def test_answers_of_recorded_steps_stay_right(model, document):
    context, questions = document
    kv = model.prefill(context).prune(0.3)
    answers = []
    with SingleTokenLinear():
        for question in questions:
            answers += model.ask(kv, [question.text], max_new_tokens=32)
    assert sum(a == q.answer for a, q in zip(answers, questions, strict=True)) >= QUESTIONS - 1
    by_torchao = model.ask(kv, [question.text for question in questions], max_new_tokens=32)
    assert sum(a == b for a, b in zip(answers, by_torchao, strict=True)) >= QUESTIONS - 1


def test_a_file_opens_with_the_same_quantisation_only(model, plain, tmp_path):
    kv = model.prefill("My name is Kim living in Seoul.", ratio=0.5)
    path = kv.save(tmp_path / "a.kvz")
    assert storage.read_header(path).origin.quantization == model.quantization
    again = ModelKVzip(quantization=model.quantization, device="cpu")
    opened = again.load(path)
    assert torch.equal(opened.kept, kv.kept)
    assert again.generate("What is my name?", kv=opened) == model.generate(
        "What is my name?", kv=kv
    )
    with pytest.raises(KVzipError, match=f"{model.quantization}, the model's are not quantised"):
        plain.load(path)
    path = plain.prefill("My name is Kim.", ratio=0.5).save(tmp_path / "b.kvz")
    with pytest.raises(KVzipError, match="were not quantised, the model's are"):
        model.load(path)


def test_a_model_that_came_quantised_opens_the_same_files(model, tmp_path):
    path = model.prefill("My name is Kim living in Seoul.", ratio=0.5).save(tmp_path / "a.kvz")
    handed_over = ModelKVzip(model.hf_model, model.tokenizer)
    assert handed_over.load(path).origin.quantization is None


def test_every_quantisation_has_a_fingerprint_of_its_own(plain):
    models = [plain, *(ModelKVzip(quantization=kind, device="cpu") for kind in KINDS)]
    assert len({one.origin.fingerprint for one in models}) == 3


def test_the_fingerprint_sees_codes(tmp_path):
    folders = []
    for seed in (0, 1):
        hf_model = make_hf_model("llama")
        if seed:
            with torch.no_grad():
                hf_model.model.layers[1].mlp.up_proj.weight[:] = 0.5
        folders.append(tmp_path / str(seed))
        hf_model.save_pretrained(folders[-1])
        make_tokenizer().save_pretrained(folders[-1])
    one, other = (ModelKVzip(folder, quantization="int8", device="cpu") for folder in folders)
    assert one.origin.fingerprint != other.origin.fingerprint


def test_a_quantised_checkpoint_loads_as_it_is(model, tmp_path):
    model.hf_model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    loaded = ModelKVzip(tmp_path, device="cpu")
    assert loaded.origin.fingerprint == model.origin.fingerprint
    with pytest.raises(KVzipError, match="quantised already: leave out quantization"):
        ModelKVzip(tmp_path, quantization="int8", device="cpu")


def test_output_weights_are_not_read_from_codes(model):
    with pytest.raises(KVzipError, match="load the model without quantisation"):
        output_weight(attention_modules(model.hf_model)[0])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"quantization": "int3"}, "unknown quantization 'int3': choose one of int8, w8a8, fp8"),
        ({"quantization": "int4", "device": "cpu"}, "8.0 or later in bfloat16, not on cpu in flo"),
        ({"quantization": "fp8", "device": "cpu"}, "8.9 or later in bfloat16, not on cpu in float"),
        (
            {"quantization": "int8", "tp_plan": "auto"},
            "quantization and tp_plan do not go together",
        ),
        (
            {"quantization": "int8", "quantization_config": object()},
            "quantization and quantization_config do not go together",
        ),
    ],
)
def test_what_cannot_be_is_refused(how, message):
    with pytest.raises(KVzipError, match=message):
        ModelKVzip(**how)


@pytest.mark.parametrize(
    ("capability", "dtype", "said"),
    [
        ((8, 0), torch.bfloat16, r"8\.9 or later in bfloat16, not on cuda \(8\.0\) in bfloat16"),
        ((9, 0), torch.float16, r"not on cuda \(9\.0\) in float16"),
    ],
)
def test_devices_without_kernels_are_named(monkeypatch, capability, dtype, said):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(KVzipError, match=said):
        quantized_weights.config("fp8", torch.device("cuda"), dtype)


@pytest.mark.parametrize("quantization", quantized_weights.QUANTIZATIONS)
def test_every_quantisation_has_a_config(monkeypatch, quantization):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    config = quantized_weights.config(quantization, torch.device("cuda"), torch.bfloat16)
    assert not config.quant_type.set_inductor_config


def test_the_command_line_knows_every_quantisation():
    names = [name.value for name in QuantizationName]
    assert names == list(quantized_weights.QUANTIZATIONS)


def test_a_loaded_model_is_not_quantised():
    with pytest.raises(KVzipError, match="leave out quantization"):
        ModelKVzip(make_hf_model(), make_tokenizer(), quantization="int8")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(quantized_weights, "find_spec", lambda name: None)
    with pytest.raises(KVzipError, match=r"needs torchao and accelerate: pip install 'kvzip\[qua"):
        loading.load(None, quantization="int8")


def test_the_compiler_is_left_alone():
    code = """
import torch, torch._inductor.config as config
before = config.save_config_portable()
from kvzip import ModelKVzip
for kind in ("int8", "w8a8"):
    ModelKVzip(quantization=kind, device="cpu")
assert config.save_config_portable() == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_line_remembers_the_quantisation(tmp_path, capfd):
    text, file = tmp_path / "a.txt", tmp_path / "a.kvz"
    text.write_text("This is my basic profile. My name is Kim living in Seoul.")
    assert main(["zip", str(text), "-r", "0.5", "--quantization", "int8", "--device", "cpu"]) == 0
    assert capfd.readouterr().err == ""
    assert main(["ask", str(file), "What is my name?", "--device", "cpu", "--json"]) == 0
    output = capfd.readouterr()
    assert output.err == ""
    assert json.loads(output.out)["answers"][0]["answer"] == "Kim"
