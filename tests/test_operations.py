"""Which implementation a model gets, and what is said when it cannot have the one it asks for."""

import sys

import pytest
import torch

from kvzip import KVzipError, ModelKVzip, kernels
from kvzip.errors import KVzipWarning
from kvzip.kernels import REFERENCE, operations
from models import QUESTIONS, TEXT, make_hf_model, make_tokenizer, shared_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def device(monkeypatch):
    """A CUDA device of a capability that can be chosen, on any machine."""

    def choose(*capability: int) -> torch.device:
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        monkeypatch.setattr(kernels, "find_spec", lambda name: object())
        return CUDA

    return choose


@pytest.mark.parametrize("backend", ["", "cuda", "Triton", "flash"])
def test_unknown_backend(backend):
    with pytest.raises(KVzipError, match="unknown backend") as caught:
        operations(backend, CPU, torch.float32)
    for name in (repr(backend), "auto", "triton", "reference"):
        assert name in str(caught.value)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_reference_on_a_cpu(backend):
    assert operations(backend, CPU, torch.float32) is REFERENCE


def refused(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """What is said about `"triton"`, in one line; `"auto"` takes the reference."""
    assert operations("auto", device, dtype) is REFERENCE
    assert operations("reference", device, dtype) is REFERENCE
    with pytest.raises(KVzipError, match="backend 'triton' cannot run here") as caught:
        operations("triton", device, dtype)
    message = str(caught.value)
    assert "'auto'" in message
    assert "'reference'" in message
    assert "\n" not in message
    return message


def test_triton_on_a_cpu_is_refused():
    assert "the model is on cpu" in refused(CPU)


def test_triton_for_float64_is_refused(device):
    assert "float64" in refused(device(9, 0), torch.float64)


def test_triton_without_the_package_is_refused(device, monkeypatch):
    gpu, asked = device(9, 0), []
    monkeypatch.setattr(kernels, "find_spec", asked.append)
    assert "triton is not installed" in refused(gpu)
    assert asked == ["triton"] * 2


@pytest.mark.parametrize("capability", [(7, 5), (7, 0), (6, 1)])
def test_an_old_device_is_refused(device, capability):
    message = refused(device(*capability))
    assert f"Some GPU has compute capability {capability[0]}.{capability[1]}" in message
    assert "8.0" in message


def test_an_amd_device_is_refused(device, monkeypatch):
    gpu = device(9, 4)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "NVIDIA" in refused(gpu)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_triton_where_it_can_run(device, capability, dtype, backend):
    chosen = operations(backend, device(*capability), dtype)
    assert chosen.name == "triton"
    for name in (
        "zipped_attention",
        "reconstruction_score",
        "repeat_attention",
        "compact",
        "chunk_attention",
    ):
        function = getattr(chosen, name)
        assert function.__module__ == f"kvzip.kernels.{name}"
        assert function.__module__ in sys.modules
    assert operations("reference", CUDA, dtype) is REFERENCE


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_model_answers_with_a_backend(backend):
    model = ModelKVzip(make_hf_model(), make_tokenizer(), backend=backend)
    kv = model.prefill(TEXT).prune(0.5)
    expected = shared_model()
    answer = model.generate(QUESTIONS[0], kv=kv, max_new_tokens=8)
    assert answer == expected.generate(
        QUESTIONS[0], kv=expected.prefill(TEXT).prune(0.5), max_new_tokens=8
    )
    assert model.operations is REFERENCE
    assert not model.decoder.records


def test_a_model_refuses_a_backend_that_cannot_run():
    with pytest.raises(KVzipError, match="the model is on cpu"):
        ModelKVzip(make_hf_model(), make_tokenizer(), backend="triton")
    with pytest.raises(KVzipError, match="unknown backend 'fast'"):
        ModelKVzip(make_hf_model(), make_tokenizer(), backend="fast")


def test_compiling_where_nothing_is_recorded_is_said():
    with pytest.warns(KVzipWarning, match="compile=True changes nothing here"):
        ModelKVzip(make_hf_model(), make_tokenizer(), compile=True)
