"""The same promises on a CUDA device: results, memory really freed, files across devices.

Kernels have tests of their own, and so have answers from recorded steps (`test_room`).
"""

import gc
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvzip import Budget, ModelKVzip, checks
from kvzip.cli.demo import bundled_document
from kvzip.model_types import TESTED, ModelType
from kvzip.selection import LEVELS, select
from kvzip.weights import plain_weights
from models import KINDS, QUESTIONS, TEXT, greedy, make_hf_model, make_model, make_tokenizer
from tensor_parallel_worker import run_two_processes, work

pytestmark = pytest.mark.gpu

MEGABYTE = 2**20


def on_gpu(
    kind: str, dtype: torch.dtype = torch.float32, *, backend: str = "auto", **kwargs: object
) -> ModelKVzip:
    hf_model = make_hf_model(kind, dtype=dtype, **kwargs).cuda()
    return ModelKVzip(hf_model, make_tokenizer(), backend=backend)


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("kind", KINDS)
def test_answers_equal_those_of_stock_transformers(kind: str) -> None:
    model = on_gpu(kind)
    kv = model.prefill(TEXT, chunk_size=37)
    query = model.apply_template(QUESTIONS[0])
    ids = torch.cat([kv.token_ids, query]).cuda()
    stock = make_hf_model(kind).cuda()
    expected = greedy(stock, ids)
    assert len(set(expected.tolist())) > 2

    def answer() -> Tensor:
        return model.hf_model.generate(
            ids[None], past_key_values=kv.fork(), do_sample=False, max_new_tokens=12
        )[0, len(ids) :]

    assert torch.equal(answer(), expected)
    assert torch.equal((kv.prune(1.0), answer())[1], expected)


@pytest.mark.parametrize("model_type", TESTED, ids=attrgetter("id"))
def test_types_of_models(model_type: ModelType) -> None:
    passed = checks.check(model_type, "cuda").passed
    assert all(passed.values()), passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_answers_like_single_questions(kind: str, dtype: torch.dtype) -> None:
    model = on_gpu(kind, dtype)
    kv = model.prefill(TEXT).prune(0.4)
    together = model.ask(kv, QUESTIONS, max_new_tokens=8)
    alone = [model.generate(question, kv=kv, max_new_tokens=8) for question in QUESTIONS]
    if dtype == torch.float32:
        assert together == alone
    else:  # half precision rounds padded rows differently, which may turn a close call late
        assert [t[:1] for t in together] == [a[:1] for a in alone]


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_the_cpu_gives_the_same_scores_and_kept_pairs(kind: str) -> None:
    gpu, cpu = (
        on_gpu(kind).prefill(TEXT, score_chunk=20),
        make_model(kind).prefill(TEXT, score_chunk=20),
    )
    assert gpu.scores is not None
    assert cpu.scores is not None
    torch.testing.assert_close(gpu.scores.values, cpu.scores.values, rtol=1e-3, atol=1e-5)
    agree = gpu.prune(0.3).kept == cpu.prune(0.3).kept
    assert agree.float().mean() > 0.99


BUDGETS = [Budget(0.37), Budget(tokens=23.7, min_per_head=9, keep=[(2, 9)])]
SELECTIONS = [
    *((level, budget) for level in LEVELS for budget in BUDGETS),
    *((level, Budget(threshold=0.7)) for level in LEVELS if level != "pair-uniform"),
]


@pytest.mark.parametrize(("level", "budget"), SELECTIONS, ids=str)
def test_selection_is_the_same_on_every_device(level: str, budget: Budget) -> None:
    generator = torch.Generator().manual_seed(0)
    for scores in (
        torch.rand(5, 3, 10007, generator=generator),
        torch.randint(0, 3, (4, 2, 999), generator=generator).float(),
        torch.zeros(3, 3, 65),
    ):
        on_cpu = select(scores, budget, level)
        assert torch.equal(select(scores.cuda(), budget, level).cpu(), on_cpu)
        assert torch.equal(select(scores.cuda(), budget, level).cpu(), on_cpu)


def test_pruning_frees_device_memory_layer_by_layer() -> None:
    shape = {"num_hidden_layers": 8, "num_key_value_heads": 4, "max_position_embeddings": 40_000}
    model = on_gpu("llama", torch.bfloat16, **shape)
    context = torch.randint(2, 400, (20_000,))
    kv = model.read(context)
    generator = torch.Generator().manual_seed(0)
    from kvzip import Scores

    kv.scores = Scores(torch.rand(8, 4, 20_000, generator=generator), "random")
    dense = kv.nbytes
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kv.prune(0.3)
    after, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    prefix_share = kv.document.prefix_length / len(kv.document.token_ids)
    expected = dense * (0.3 * (1 - prefix_share) + prefix_share)
    assert kv.nbytes == pytest.approx(expected, rel=1e-3)
    assert before - after == pytest.approx(dense - kv.nbytes, rel=0.01)
    # selection works on 16 bytes a pair at most, before anything is compacted
    selection = 24 * kv.kept.numel()
    assert peak - before <= max(dense / 8, selection) + MEGABYTE


def test_files_move_between_devices(tmp_path: Path) -> None:
    gpu, cpu = on_gpu("qwen3"), make_model("qwen3")
    kv = gpu.prefill(TEXT).prune(0.5)
    kv.save(tmp_path / "gpu.kvz")
    loaded = cpu.load(tmp_path / "gpu.kvz")
    assert loaded.layers[0].context.keys.device.type == "cpu"
    assert torch.equal(loaded.layers[0].context.keys, kv.layers[0].context.keys.cpu())
    loaded.save(tmp_path / "cpu.kvz")
    again = gpu.load(tmp_path / "cpu.kvz")
    assert gpu.ask(again, QUESTIONS, max_new_tokens=8) == gpu.ask(kv, QUESTIONS, max_new_tokens=8)


def test_the_bundled_model_answers_on_a_gpu() -> None:
    model = ModelKVzip()
    assert model.hf_model.device.type == "cuda"
    assert model.hf_model.dtype == torch.bfloat16
    kv = model.prefill("My name is Kim living in Seoul. My major is computer science.")
    assert model.generate("What is my name?", kv=kv) == "Kim"


@pytest.mark.parametrize("kind", KINDS)
def test_both_backends_score_alike(kind: str) -> None:
    """Another order of sums turns few close calls, if any."""
    triton, plain = on_gpu(kind), on_gpu(kind, backend="reference")
    assert (triton.operations.name, plain.operations.name) == ("triton", "reference")
    one, other = (model.prefill(TEXT, chunk_size=37, score_chunk=20) for model in (triton, plain))
    assert one.scores is not None
    assert other.scores is not None
    torch.testing.assert_close(one.scores.values, other.scores.values, rtol=1e-3, atol=1e-5)
    for level in LEVELS:
        agree = select(one.scores.values, 0.3, level) == select(other.scores.values, 0.3, level)
        assert agree.float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_logits_are_near_those_of_float32(kind: str, dtype: torch.dtype) -> None:
    """Prefill in chunks by the fast kernels, then a question over the pruned context."""
    half, full = on_gpu(kind, dtype), on_gpu(kind, backend="reference")
    full.hf_model.load_state_dict(half.hf_model.state_dict())  # the rounded weights
    query = half.apply_template(QUESTIONS[1]).cuda()[None]
    errors, logits = [], []
    for model in (half, on_gpu(kind, dtype, backend="reference"), full):
        kv = model.read(TEXT, chunk_size=50)
        with torch.no_grad():
            logits.append(model.hf_model(query, past_key_values=kv.fork()).logits.double())
    errors = [((part - logits[2]).norm() / logits[2].norm()).item() for part in logits[:2]]
    # the models are sharp, so that rounding shows; the backends must not differ in how much
    assert errors[0] <= 2 * errors[1] + 1e-3


@pytest.mark.parametrize("quantization", ["int8", "w8a8", "fp8", "int4"])
def test_quantised_weights_answer_on_a_gpu(quantization: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    document, questions = bundled_document()
    asked = [question.text for question in questions]
    model = ModelKVzip(quantization=quantization, dtype=torch.bfloat16)
    kv = model.prefill(document, ratio=0.3)
    right = sum(
        answer == question.expected
        for answer, question in zip(model.ask(kv, asked, max_new_tokens=64), questions, strict=True)
    )
    assert right >= (len(asked) - 1 if quantization != "int4" else len(asked) // 2)
    again = model.load(kv.save(tmp_path / "a.kvz"))
    assert model.generate(asked[0], kv=again) == model.generate(asked[0], kv=kv)
    if quantization != "int4":  # which fills up rows of less than 1024 weights
        plain = ModelKVzip(dtype=torch.bfloat16)
        assert layer_bytes(model) < layer_bytes(plain) * 8.5 / 16


def layer_bytes(model: ModelKVzip) -> int:
    """Of the layers' matrices."""
    parts = plain_weights(model.hf_model)
    return sum(part.nbytes for name, part in parts if "_proj" in name)


def on_two_gpus(kind: str) -> ModelKVzip:
    """The first layer on one device, the others on another."""
    dispatch_model = pytest.importorskip("accelerate").dispatch_model
    hf_model = make_hf_model(kind)
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    for i in range(hf_model.config.num_hidden_layers):
        places[f"model.layers.{i}"] = min(i, 1)
    return ModelKVzip(dispatch_model(hf_model, places), make_tokenizer())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_layers_on_two_devices_answer_like_one(kind: str, tmp_path: Path) -> None:
    two, one = on_two_gpus(kind), on_gpu(kind)
    assert two.operations.name == "triton"
    assert [device.index for device in two.geometry.devices] == [0, 1, 1]
    for how in ({}, {"streaming": True, "chunk_size": 17}, {"scorer": "expected-attention"}):
        kv, expected = (model.prefill(TEXT, ratio=0.4, **how) for model in (two, one))
        assert [layer.context.keys.device.index for layer in kv.layers] == [0, 1, 1]
        assert torch.equal(kv.kept, expected.kept)
        settings = {"max_new_tokens": 8}
        assert two.ask(kv, QUESTIONS, **settings) == one.ask(expected, QUESTIONS, **settings)
        assert kv.room.recorded
        for question in QUESTIONS:
            long = {"max_new_tokens": 150, "eos_token_id": None}
            answer = two.generate(question, kv=kv, **long)
            assert answer == one.generate(question, kv=expected, **long)
        for model in (two, one):
            again = model.load(kv.save(tmp_path / "a.kvz", overwrite=True))
            devices = [layer.context.keys.device for layer in again.layers]
            assert devices == model.geometry.devices
            assert model.ask(again, QUESTIONS, **settings) == one.ask(
                expected, QUESTIONS, **settings
            )
    retained = ModelKVzip(two.hf_model, make_tokenizer(), kv_type="retain").prefill(TEXT)
    for ratio in (0.2, 0.6):
        assert torch.equal(retained.prune(ratio).kept, one.prefill(TEXT, ratio=ratio).kept)
    quantised = two.prefill(TEXT).prune(0.4, kv_dtype="int8")
    two.extend(quantised, TEXT)
    assert two.generate(QUESTIONS[0], kv=quantised, update_cache=True, max_new_tokens=8)
    assert two.decoder.records


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_recordings_on_two_devices_are_freed() -> None:
    model, held = on_two_gpus("llama"), []
    for _ in range(6):
        kv = model.read(TEXT)
        model.generate(QUESTIONS[0], kv=kv, max_new_tokens=8)
        assert kv.room.recorded
        del kv
        gc.collect()
        for gpu in (0, 1):
            torch.cuda.synchronize(gpu)
        torch.cuda.empty_cache()
        held.append([torch.cuda.memory_allocated(gpu) for gpu in (0, 1)])
        held[-1] += [torch.cuda.memory_reserved(gpu) for gpu in (0, 1)]
    assert held[-1] == held[1], held


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_an_interruption_while_two_devices_record(monkeypatch: pytest.MonkeyPatch) -> None:
    model, one = on_two_gpus("llama"), on_gpu("llama")
    kv, expected = model.read(TEXT), one.read(TEXT)
    layer = model.hf_model.model.layers[1]
    forward = layer.forward

    def interrupted(*args: object, **kwargs: object) -> object:
        if torch.cuda.is_current_stream_capturing():
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.generate(QUESTIONS[0], kv=kv, max_new_tokens=8)
    assert model.decoder.records
    for sampling in ({}, {"do_sample": True, "temperature": 2.0}):
        answers = []
        for asked, cache in ((model, kv), (one, expected)):
            torch.manual_seed(1)
            answers.append(asked.generate(QUESTIONS[0], kv=cache, max_new_tokens=20, **sampling))
        assert answers[0] == answers[1]
    assert kv.room.recorded


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_runs_on_a_device_that_is_not_the_current_one() -> None:
    hf_model = make_hf_model("llama").to("cuda:1")
    model, expected = ModelKVzip(hf_model, make_tokenizer()), on_gpu("llama")
    assert torch.cuda.current_device() == 0
    kv, same = (one.prefill(TEXT, ratio=0.4) for one in (model, expected))
    assert torch.equal(kv.kept, same.kept)
    for _ in range(2):
        assert model.generate(QUESTIONS[0], kv=kv, max_new_tokens=8) == expected.generate(
            QUESTIONS[0], kv=same, max_new_tokens=8
        )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_heads_on_two_devices_answer_like_one(tmp_path: Path) -> None:
    """Two processes that talk by NCCL; `test_tensor_parallel` tests the rest on a CPU."""
    shape = {"num_attention_heads": 8, "num_key_value_heads": 4}
    make_hf_model("llama", **shape).save_pretrained(tmp_path / "checkpoint")
    make_tokenizer().save_pretrained(tmp_path / "checkpoint")
    one = ModelKVzip(tmp_path / "checkpoint", dtype=torch.float32)
    one.prefill(TEXT, ratio=0.4).save(tmp_path / "one.kvz")
    run_two_processes(tmp_path / "checkpoint", tmp_path, "cuda")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    (tmp_path / "alone").mkdir()
    expected = work(one, tmp_path / "alone")
    for name in ("ratio answers", "bytes answers", "conversation"):
        assert first[name] == second[name] == expected[name]
    assert first["sampled"] == second["sampled"]
    assert first["records"]
    assert second["records"]
    for name in ("ratio", "file", "codes", "streamed chunk"):
        together = torch.cat([first[name]["kept"], second[name]["kept"]], dim=1)
        assert torch.equal(together, expected[name]["kept"])
