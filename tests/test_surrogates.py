"""Surrogates: published formats against plain float64 arithmetic, reading, streaming, training."""

import json
import warnings
from collections import OrderedDict
from functools import lru_cache
from math import erf, exp, floor, sqrt
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvzip import KVzipError, ModelKVzip
from kvzip.budget import Budget
from kvzip.cli import main
from kvzip.errors import KVzipWarning
from kvzip.scoring import contribution, get_scorer, is_surrogate
from kvzip.storage import read_header
from kvzip.surrogates import fast_kvzip, fitting, kvzap, training
from models import (
    GEMMA3_LAYERS,
    assert_same,
    make_model,
    random_ids,
    shared_hf_model,
    shared_model,
    snapshot,
)

KINDS = ["llama", "qwen3", "gemma3"]
WIDTH, HEADS, GROUP, HIDDEN, SINKS, DIM = 64, 2, 2, 24, 3, 16
N, WINDOW = 90, kvzap.WINDOW


def full_layers(kind: str) -> list[int]:
    return [i for i in range(3) if kind != "gemma3" or GEMMA3_LAYERS[i] == "full_attention"]


@lru_cache
def attention_inputs(kind: str, n: int = N) -> Tensor:
    """`[L, n, d]`, float64: what attention is given of the context, by stock transformers."""
    ids = shared_model(kind).read(random_ids(n)).token_ids
    model = shared_hf_model(kind, dtype=torch.float64)
    with torch.no_grad():
        states = model(ids[None], output_hidden_states=True, use_cache=False).hidden_states
        norms = [layer.input_layernorm for layer in model.model.layers]
        inputs = [norm(state[0]) for norm, state in zip(norms, states, strict=False)]
    return torch.stack([inputs[i][-n:] for i in full_layers(kind)])


def write_kvzap(
    folder: Path, *, layers: int = 3, mlp: bool = True, seed: int = 0, **changes: object
) -> dict[str, Tensor]:
    """A folder in KVzap's published format; returns its tensors."""
    torch.manual_seed(seed)
    tensors = {}
    for i in range(layers):
        shapes = {"weight": (HEADS, WIDTH), "bias": (HEADS,)}
        if mlp:
            shapes = {
                "0.weight": (HIDDEN, WIDTH),
                "0.bias": (HIDDEN,),
                "2.weight": (HEADS, HIDDEN),
                "2.bias": (HEADS,),
            }
        tensors |= {f"layers.{i}.{name}": torch.randn(shape) for name, shape in shapes.items()}
    config = {
        "model_type": "kvzap",
        "input_dim": WIDTH,
        "output_dim": HEADS,
        "hidden_dim": HIDDEN if mlp else None,
        "n_modules": layers,
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return tensors


def oracle_kvzap(tensors: dict[str, Tensor], inputs: Tensor, modules: list[int]) -> Tensor:
    """`[L, H, n]`, float64."""
    scores = []
    for i, x in zip(modules, inputs, strict=True):
        own = {
            name.removeprefix(f"layers.{i}."): part.double()
            for name, part in tensors.items()
            if name.startswith(f"layers.{i}.")
        }
        if "weight" in own:
            scores.append(x @ own["weight"].T + own["bias"])
        else:
            inner = x @ own["0.weight"].T + own["0.bias"]
            gelu = inner.clone().apply_(lambda z: z * (1 + erf(z / sqrt(2))) / 2)
            scores.append(gelu @ own["2.weight"].T + own["2.bias"])
    return torch.stack(scores).transpose(1, 2)


def write_gates(path: Path, *, layers: int = 3, seed: int = 0) -> list[dict[str, Tensor]]:
    """A file in Fast KVzip's published format; returns what it holds."""
    torch.manual_seed(seed)
    gates = [
        OrderedDict(
            {
                "k_base": torch.randn(HEADS, 1, SINKS, DIM),
                "b": torch.randn(HEADS, 1, GROUP),
                "q_proj.weight": torch.randn(HEADS * GROUP * DIM, WIDTH),
                "q_proj.bias": torch.randn(HEADS * GROUP * DIM),
                "k_proj.weight": torch.randn(HEADS * DIM, WIDTH),
                "q_norm.weight": torch.rand(DIM) + 0.5,
                "k_norm.weight": torch.rand(DIM) + 0.5,
            }
        )
        for _ in range(layers)
    ]
    torch.save({"module": gates, "step": 7}, path)
    return gates


def oracle_gates(gates: list[dict[str, Tensor]], inputs: Tensor, modules: list[int]) -> Tensor:
    """`[L, H, n]`, float64, token by token, without the window."""

    def norm(vector: Tensor, gain: Tensor) -> Tensor:
        return vector / (vector.square().mean() + 1e-6).sqrt() * gain

    scores = torch.zeros(len(modules), HEADS, inputs.shape[1], dtype=torch.float64)
    for layer, i in enumerate(modules):
        gate = {name: part.double() for name, part in gates[i].items()}
        for token, x in enumerate(inputs[layer]):
            queries = gate["q_proj.weight"] @ x + gate["q_proj.bias"]
            keys = gate["k_proj.weight"] @ x
            for h in range(HEADS):
                k = norm(keys[h * DIM : (h + 1) * DIM], gate["k_norm.weight"])
                for g in range(GROUP):
                    place = (h * GROUP + g) * DIM
                    q = norm(queries[place : place + DIM], gate["q_norm.weight"])
                    own = float(k @ q) / 4 + float(gate["b"][h, 0, g])
                    rivals = sum(
                        exp(float(gate["k_base"][h, 0, s] @ q) / 4 - own) for s in range(SINKS)
                    )
                    scores[layer, h, token] += 1 / (1 + rivals) / GROUP
    return scores


def close(scores: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(scores.double(), expected, atol=2e-4, rtol=1e-4)


# Published formats


@pytest.mark.parametrize("mlp", [False, True], ids=["linear", "mlp"])
@pytest.mark.parametrize("kind", KINDS)
def test_kvzap_equals_plain_arithmetic(kind, mlp, tmp_path):
    tensors = write_kvzap(tmp_path, mlp=mlp)
    scorer = f"kvzap:{tmp_path}"
    kv = shared_model(kind).prefill(random_ids(N), scorer=scorer)
    close(kv.scores.values, oracle_kvzap(tensors, attention_inputs(kind), full_layers(kind)))
    assert kv.scores.values.dtype == torch.float32
    assert (kv.scores.scorer, kv.scores.window) == (scorer, 128)


@pytest.mark.parametrize("kind", KINDS)
def test_gates_equal_plain_arithmetic(kind, tmp_path):
    gates = write_gates(tmp_path / "gates.pt")
    kv = shared_model(kind).prefill(random_ids(N), scorer=f"fastkvzip:{tmp_path / 'gates.pt'}")
    window = floor(0.02 * N)
    expected = oracle_gates(gates, attention_inputs(kind), full_layers(kind))
    close(kv.scores.values[..., :-window], expected[..., :-window])
    marked = kv.scores.values[..., -window:]
    assert (marked > 1).all()  # above all gates
    assert (marked.diff() > 0).all()
    assert kv.scores.window == 0


def test_a_gate_window_is_two_percent_or_4096():
    gates = fast_kvzip.FastKVzip("fastkvzip", [])
    for n, window in ((40, 0), (50, 1), (1000, 20), (15_999, 319), (16_000, 4096), (50_000, 4096)):
        assert int((gates.complete(torch.rand(2, 2, n)) > 1).sum()) == 4 * window


def test_modules_of_full_layers_only(tmp_path):
    tensors = write_kvzap(tmp_path, layers=1)
    kv = shared_model("gemma3").prefill(random_ids(N), scorer=f"kvzap:{tmp_path}")
    close(kv.scores.values, oracle_kvzap(tensors, attention_inputs("gemma3"), [0]))


def test_half_precision_is_rounded_no_further(tmp_path):
    tensors = write_kvzap(tmp_path, mlp=False)
    module = kvzap.read(tmp_path)[0].to(torch.device("cpu"), torch.bfloat16)
    hidden = torch.randn(50, WIDTH).bfloat16()
    expected = hidden.double() @ tensors["layers.0.weight"].double().T
    expected += tensors["layers.0.bias"].double()
    torch.testing.assert_close(module(hidden).double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models(dtype, tmp_path):
    write_kvzap(tmp_path)
    write_gates(tmp_path / "gates.pt")
    model = make_model(dtype=dtype)
    for scorer in (f"kvzap:{tmp_path}", f"fastkvzip:{tmp_path / 'gates.pt'}"):
        kv = model.prefill(random_ids(N), scorer=scorer, ratio=0.5)
        assert kv.scores.values.dtype == torch.float32
        assert len(kv.scores.values[..., :-2].unique()) > 2 * N  # not rounded to a few values
        assert kv.realised_ratio == 0.5


def test_what_is_saved_is_what_was_there(tmp_path):
    for mlp in (False, True):
        source, copy = tmp_path / f"source-{mlp}", tmp_path / f"copy-{mlp}"
        tensors = write_kvzap(source, mlp=mlp)
        kvzap.save(kvzap.read(source), copy, {"base_model": "here"})
        written = load_file(copy / "model.safetensors")
        assert written.keys() == tensors.keys()
        assert all(torch.equal(written[name], tensors[name]) for name in tensors)
        config = json.loads((copy / "config.json").read_text())
        given = json.loads((source / "config.json").read_text())
        assert {**config, **given} == config
        assert config["base_model"] == "here"
        assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


# Reading


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_a_second_pass_change_nothing(kind, tmp_path):
    write_kvzap(tmp_path)
    model, ids, scorer = shared_model(kind), random_ids(N), f"kvzap:{tmp_path}"
    whole = model.prefill(ids, scorer=scorer)
    parts = model.prefill(ids, scorer=scorer, chunk_size=17)
    twice = model.score(model.read(ids), scorer=scorer, score_chunk=23)
    for other in (parts, twice):
        close(other.scores.values, whole.scores.values.double())
        assert other.scores.scorer == whole.scores.scorer
        assert other.scores.window == whole.scores.window


def test_scoring_leaves_the_cache_and_the_model_alone(tmp_path):
    write_kvzap(tmp_path)
    model, ids = shared_model(), random_ids(N)
    plain, scored = model.read(ids), model.prefill(ids, scorer=f"kvzap:{tmp_path}")
    assert_same(snapshot(scored), snapshot(plain))
    modules = model.hf_model.modules()
    assert not any(module._forward_pre_hooks for module in modules)


def test_a_ratio_and_a_threshold(tmp_path):
    write_kvzap(tmp_path)
    model, ids, scorer = shared_model(), random_ids(WINDOW + 60), f"kvzap:{tmp_path}"
    kv = model.prefill(ids, scorer=scorer, ratio=0.3)
    assert int(kv.kept.sum()) == floor(0.3 * kv.kept.numel())
    favoured = floor(0.3 * kv.kept.shape[-1] / 8)
    assert kv.kept[..., -favoured:].all()
    assert not kv.kept[..., -favoured - 1].all()
    kv = model.prefill(ids, scorer=scorer, ratio=Budget(threshold=0.5))
    early = kv.scores.values[..., :60] >= 0.5
    assert 0 < early.sum() < early.numel()
    assert torch.equal(kv.kept[..., :60], early)
    assert kv.kept[..., 60:].all()
    again = model.prefill(ids, scorer=scorer).prune(0.5)
    held = again.kept
    again.prune(threshold=0.5)  # the window's pairs that are gone stay gone
    expected = again.scores.values >= 0.5
    expected[..., 60:] = True
    assert torch.equal(again.kept, held & expected)


def test_a_window_longer_than_the_context_keeps_all_of_it(tmp_path):
    """So that there is nothing to warn of, streaming or not."""
    write_kvzap(tmp_path)
    how = {"scorer": f"kvzap:{tmp_path}", "ratio": Budget(threshold=1000)}
    with warnings.catch_warnings():
        warnings.simplefilter("error", KVzipWarning)
        for streaming in (False, True):
            kv = shared_model().prefill(random_ids(N), streaming=streaming, **how)
            assert kv.kept.all()


def test_a_surrogate_of_another_model_of_the_same_shape_is_told(tmp_path):
    model = make_model()
    for name, fingerprint in {"own": model.origin.fingerprint, "other": "0" * 16}.items():
        write_kvzap(tmp_path / name, kvzip={"fingerprint": fingerprint})
    with pytest.warns(KVzipWarning, match="trained on a model with fingerprint 0000"):
        model.prefill(random_ids(N), scorer=f"kvzap:{tmp_path / 'other'}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", KVzipWarning)
        model.prefill(random_ids(N), scorer=f"kvzap:{tmp_path / 'own'}")


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    tensors = write_kvzap(tmp_path)
    tensors["layers.1.0.bias"][3] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(KVzipError, match=r"layers.1.0.bias holds numbers that are not finite"):
        shared_model().prefill(random_ids(N), scorer=f"kvzap:{tmp_path}")


def test_a_threshold_that_evicts_everything_keeps_the_window(tmp_path):
    write_kvzap(tmp_path)
    model, ids = shared_model(), random_ids(WINDOW + 60)
    said = "only the prefix and the last 128 tokens"
    for streaming in (False, True):
        with pytest.warns(KVzipWarning, match=said):
            kv = model.prefill(
                ids,
                scorer=f"kvzap:{tmp_path}",
                ratio=Budget(threshold=1000),
                streaming=streaming,
                chunk_size=40,
            )
        assert not kv.kept[..., :60].any()
        assert kv.kept[..., 60:].all()
        assert model.ask(kv, ["a question"], max_new_tokens=3)


def test_a_surrogate_is_loaded_once(tmp_path, monkeypatch):
    write_kvzap(tmp_path)
    model, calls = make_model(), []
    read = kvzap.read
    monkeypatch.setattr(kvzap, "read", lambda folder: calls.append(folder) or read(folder))
    for _ in range(2):
        model.prefill(random_ids(20), scorer=f"kvzap:{tmp_path}")
    assert len(calls) == 1


# Streaming


@pytest.mark.parametrize("how", [0.3, Budget(threshold=0.5)], ids=["ratio", "threshold"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_chunk_equals_plain_reading(kind, how, tmp_path):
    write_kvzap(tmp_path)
    model, ids, scorer = shared_model(kind), random_ids(N), f"kvzap:{tmp_path}"
    plain = model.prefill(ids, scorer=scorer, ratio=how)
    kv = model.prefill(ids, scorer=scorer, ratio=how, streaming=True)
    close(kv.scores.values, plain.scores.values.double())
    assert torch.equal(kv.kept, plain.kept)
    assert (kv.ratio, kv.scores.scorer) == (plain.ratio, plain.scores.scorer)


@pytest.mark.parametrize("budget", ["chunk", "context"])
def test_streaming_keeps_exactly_a_ratio(budget, tmp_path):
    write_kvzap(tmp_path)
    model, scorer = shared_model(), f"kvzap:{tmp_path}"
    how = {"streaming": True, "chunk_size": 32, "budget": budget}
    kv = model.prefill(random_ids(N), scorer=scorer, ratio=0.3, **how)
    assert int(kv.kept.sum()) == floor(0.3 * kv.kept.numel())
    kv.extend(random_ids(50, seed=1), chunk_size=32, budget=budget)
    assert int(kv.kept.sum()) == floor(0.3 * kv.kept.numel())
    assert kv.scores.scorer == scorer


@pytest.mark.parametrize("scorer", ["kvzap", "reconstruction"])
def test_streaming_by_threshold_follows_the_scores(scorer, tmp_path):
    write_kvzap(tmp_path)
    model, size = shared_model(), 50
    name, least, window = "reconstruction", 0.02, 0
    if scorer == "kvzap":
        name, least, window = f"kvzap:{tmp_path}", 0.5, WINDOW
    ids = random_ids(WINDOW + 4 * size)
    amount = Budget(threshold=least)
    how = {"streaming": True, "chunk_size": size, "ratio": amount, "scorer": name}
    kv = model.prefill(ids[:size], **how)
    for end in range(size, len(ids) + 1, size):
        if end > size:
            kv.extend(ids[end - size : end], ratio=amount, chunk_size=size)
        expected = kv.scores.values >= torch.tensor(least)
        expected[..., max(0, end - window) :] = True
        kept_share = kv.kept.float().mean()
        assert torch.equal(kv.kept, expected) if scorer == "kvzap" else 0 < kept_share < 1
        assert kv.ratio == kv.realised_ratio
    assert 0 < int(kv.kept.sum()) < kv.kept.numel()
    alone = model.prefill(ids[: (len(ids) // size) * size], **how)
    assert torch.equal(alone.kept, kv.kept)


def test_a_context_goes_on_with_its_own_kind_of_scores(tmp_path):
    write_kvzap(tmp_path)
    model, scorer = shared_model(), f"kvzap:{tmp_path}"
    how = {"streaming": True, "ratio": 0.5}
    kv = model.prefill(random_ids(30), scorer=scorer, **how)
    with pytest.raises(KVzipError, match="no measure for those of 'reconstruction'"):
        model.extend(kv, random_ids(30), scorer="reconstruction")
    kv = model.prefill(random_ids(30), **how)
    with pytest.raises(KVzipError, match="was scored by 'reconstruction, reach chunk'"):
        model.extend(kv, random_ids(30), scorer=scorer)
    with pytest.raises(KVzipError, match="or a surrogate, not by 'random'"):
        model.prefill(random_ids(30), scorer="random", **how)
    with pytest.raises(KVzipError, match="streaming knows ratio and threshold only"):
        model.prefill(random_ids(30), ratio=Budget(tokens=5), streaming=True)


def test_positions_run_out(tmp_path):
    write_kvzap(tmp_path)
    model = make_model(max_position_embeddings=200)
    scorer = f"kvzap:{tmp_path}"
    p = len(model.prompts.prefix_ids())
    model.prefill(random_ids(200 - p), scorer=scorer, ratio=0.5, streaming=True)  # no repeat
    with pytest.raises(KVzipError, match="more tokens do not fit: leave out 1 tokens"):
        model.prefill(random_ids(201 - p), scorer=scorer, ratio=0.5, streaming=True)


# Files


def test_a_file_remembers_the_window(tmp_path):
    write_kvzap(tmp_path / "surrogate")
    model, ids = shared_model(), random_ids(WINDOW + 60)
    kv = model.prefill(ids, scorer=f"kvzap:{tmp_path / 'surrogate'}", ratio=0.9)
    opened = model.load(kv.save(tmp_path / "a.kvz"))
    assert opened.scores.window == WINDOW
    kv.prune(threshold=0.5)
    opened.prune(threshold=0.5)
    assert torch.equal(opened.kept, kv.kept)
    assert opened.kept[..., -20:].any()


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("scorer", ["kvzap:linear", "kvzap:mlp"])
def test_a_gpu_gives_the_same_scores(scorer):
    text = "Ada keeps bees in Lille. Bo sings at night. " * 60
    scores = [
        ModelKVzip(device=device, dtype=torch.float32).prefill(text, scorer=scorer).scores.values
        for device in ("cpu", "cuda")
    ]
    torch.testing.assert_close(*scores, atol=0.02, rtol=0)
    model = ModelKVzip(device="cuda")
    for amount in (0.3, Budget(threshold=-4)):
        kv = model.prefill(text, scorer=scorer, ratio=amount, streaming=True, chunk_size=200)
        assert 0 < kv.realised_ratio < 1
        assert model.ask(kv, ["Where does Ada keep bees?"], max_new_tokens=8)


# Names


@pytest.mark.parametrize("name", ["kvzap:linear", "kvzap:mlp"])
def test_the_bundled_model_has_surrogates(name):
    model = ModelKVzip(device="cpu")
    kv = model.prefill("Ada keeps bees in Lille. " * 8, scorer=name)
    assert kv.scores.scorer == name
    assert kv.scores.values.isfinite().all()


def test_published_names_follow_from_the_model(tmp_path):
    model = make_model()
    model.hf_model.config._name_or_path = model.hf_model.name_or_path = "Qwen/Qwen3-8B"
    for scorer, said in (
        ("kvzap:mlp", "nvidia/KVzap-mlp-Qwen3-8B cannot be had"),
        ("kvzap:linear", "nvidia/KVzap-linear-Qwen3-8B cannot be had"),
        ("kvzap:someone/else", "someone/else cannot be had"),
        ("fastkvzip", "qwen3-8b/q2_dim16_sink16.pt of Jang-Hyun/Fast-KVzip cannot be had"),
        ("fastkvzip:Qwen2.5-7B", "qwen2.5-7b/q2_dim16_sink16.pt of Jang-Hyun/Fast-KVzip"),
    ):
        with pytest.raises(KVzipError, match=said):
            model.prefill(random_ids(20), scorer=scorer)


def test_scorers_by_name():
    assert all(map(is_surrogate, ["kvzap:mlp", "fastkvzip", "fastkvzip:a.pt", "kvzap:a:b"]))
    assert not any(map(is_surrogate, ["reconstruction", "kvzip:mlp", "KVzap"]))
    assert get_scorer("kvzap:anything").__module__ == "kvzip.surrogates.predicting"
    with pytest.raises(KVzipError, match="unknown scorer 'kvzop:mlp': did you mean 'kvzap:mlp'"):
        get_scorer("kvzop:mlp")


# Bad input


def refused(scorer: str, said: str, model: ModelKVzip | None = None) -> None:
    with pytest.raises(KVzipError, match=said):
        (model or shared_model()).prefill(random_ids(20), scorer=scorer)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": 2}, "2 layers, hidden states 64 wide and 2 KV heads, .* has 3 layers"),
        ({"model_type": "llama"}, "model_type is 'llama', not 'kvzap'"),
        ({"hidden_dim": None}, r"layers\.0\.weight is missing"),
        ({"input_dim": 65}, r"0\.weight is torch.float32 \[24, 64\], \[24, 65\] are expected"),
        ({"n_modules": 4}, r"layers\.3\.2\.weight is missing"),
        ({"output_dim": "two"}, "gives no sizes"),
        ({"n_modules": 0}, "gives no sizes"),
    ],
)
def test_kvzap_folders_that_do_not_fit(changes, said, tmp_path):
    write_kvzap(tmp_path, **changes)
    refused(f"kvzap:{tmp_path}", said)


def test_a_surrogate_of_another_model_names_both(tmp_path):
    write_kvzap(tmp_path)
    model = make_model(num_key_value_heads=4)
    refused(
        f"kvzap:{tmp_path}", "wide and 2 KV heads, LlamaForCausalLM has .* and 4 KV heads", model
    )
    model = make_model(hidden_size=32, head_dim=16)
    refused(f"kvzap:{tmp_path}", "hidden states 64 wide .* hidden states 32 wide", model)
    write_gates(tmp_path / "gates.pt")
    refused(f"fastkvzip:{tmp_path / 'gates.pt'}", "64 wide .* hidden states 32 wide", model)
    model = make_model(num_attention_heads=8)
    said = "2 query heads for each KV head, LlamaForCausalLM has 4"
    refused(f"fastkvzip:{tmp_path / 'gates.pt'}", said, model)


def test_kvzap_folders_that_are_damaged(tmp_path):
    refused(f"kvzap:{tmp_path}", "holds no KVzap surrogate")
    write_kvzap(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-50])
    refused(f"kvzap:{tmp_path}", "holds no KVzap surrogate")
    (tmp_path / "config.json").write_text("[1]")
    (tmp_path / "model.safetensors").write_bytes(whole)
    refused(f"kvzap:{tmp_path}", "model_type is None")
    (tmp_path / "config.json").write_text("{")
    refused(f"kvzap:{tmp_path}", "holds no KVzap surrogate")
    refused("kvzap:", "name kvzap:linear, kvzap:mlp, a folder")
    refused("kvzap:/nowhere", "there is no KVzap surrogate '/nowhere'")
    refused("kvzap:nowhere", "there is no KVzap surrogate 'nowhere'")


class Code:
    """What a pickle must not bring."""


def test_gate_files_that_are_refused(tmp_path):
    path = tmp_path / "gates.pt"
    scorer = f"fastkvzip:{path}"
    refused(scorer, "there is no file")
    gates = write_gates(path)
    whole = path.read_bytes()
    for left in (len(whole) // 2, 10, 0):
        path.write_bytes(whole[:left])
        refused(scorer, "is damaged, or holds")
    for held, said in (
        ({"module": gates, "extra": Code()}, "more than tensors, which could run code"),
        ({"module": []}, "no list under 'module'"),
        ({"weights": gates}, "no list under 'module'"),
        (gates, "no list under 'module'"),
        ({"module": [torch.zeros(3)]}, "layer 0 lacks"),
        ({"module": [*gates[:2], {}]}, "layer 2 lacks q_proj.weight"),
        ({"module": [{**gates[0], "b": torch.zeros(2, 1, 3)}]}, "shapes of layer 0 do not agree"),
        ({"module": [{**gates[0], "b": torch.zeros(4)}]}, "shapes of layer 0 do not agree"),
        ({"module": gates[:2]}, "2 layers, .* has 3 layers"),
    ):
        torch.save(held, path)
        refused(scorer, said)


def test_settings_that_do_not_go_together(tmp_path):
    write_kvzap(tmp_path)
    model, ids, scorer = shared_model(), random_ids(20), f"kvzap:{tmp_path}"
    with pytest.raises(KVzipError, match="reach belongs to the scorers"):
        model.prefill(ids, scorer=scorer, reach="chunk")
    with pytest.raises(KVzipError, match="reach 'chunk', not 'context'"):
        model.prefill(ids, scorer=scorer, reach="context", streaming=True, ratio=0.5)
    with pytest.raises(KVzipError, match="ratio is the share"):
        model.prefill(ids, scorer=scorer, ratio=1.5)
    kv = model.prefill(ids, scorer=scorer, ratio=0.5)
    with pytest.raises(KVzipError, match="an evicted cache cannot be scored again"):
        model.score(kv, scorer=scorer)


# Training


def synthetic(pieces: int, function, layers: int = 2, seed: int = 0) -> list[fitting.Drawn]:
    torch.manual_seed(seed)
    drawn = []
    for _ in range(pieces):
        hidden = [torch.randn(200, 8) * 2 + 1 for _ in range(layers)]
        drawn.append(fitting.Drawn(hidden, torch.stack([function(part) for part in hidden])))
    return drawn


def noisy_linear(hidden: Tensor) -> Tensor:
    weight = torch.arange(24).view(8, 3) / 10 - 1
    return hidden @ weight - 4 + torch.randn(len(hidden), 3)


def bump(hidden: Tensor) -> Tensor:
    return torch.stack([hidden[:, 0].square(), (hidden[:, 1] - 1).square() - 3], dim=1)


def unheard(done: int, total: int) -> None: ...


def test_ridge_equals_the_textbook():
    drawn = synthetic(7, noisy_linear)
    ridge = fitting.Ridge()
    for tokens in drawn:
        ridge.add(tokens)
    for layer, module in enumerate(ridge.modules(unheard)):
        x = torch.cat([tokens.hidden[layer] for tokens in drawn]).double()
        y = torch.cat([tokens.log_scores[layer] for tokens in drawn]).double()
        centred = x - x.mean(0)
        gram = centred.T @ centred + torch.eye(8, dtype=torch.float64)
        weight = torch.linalg.inv(gram) @ centred.T @ (y - y.mean(0))
        bias = y.mean(0) - x.mean(0) @ weight
        torch.testing.assert_close(module.weight.double(), weight.T, atol=1e-6, rtol=0)
        torch.testing.assert_close(module.bias.double(), bias, atol=1e-5, rtol=0)


def test_ridge_holds_sums_only():
    ridge, sizes = fitting.Ridge(), []
    for tokens in synthetic(5, noisy_linear):
        ridge.add(tokens)
        sizes.append([part.shape for sums in ridge._sums for part in sums])
    assert sizes == [[(9, 9), (9, 3)] * 2] * 5


def test_explained_variance_equals_the_textbook():
    drawn, unseen = synthetic(5, noisy_linear), synthetic(3, noisy_linear, seed=1)
    ridge = fitting.Ridge()
    for tokens in drawn:
        ridge.add(tokens)
    modules = ridge.modules(unheard)
    for layer, share in enumerate(fitting.explained(modules, unseen)):
        x = torch.cat([tokens.hidden[layer] for tokens in unseen]).double()
        y = torch.cat([tokens.log_scores[layer] for tokens in unseen]).double()
        module = modules[layer]
        missed = y - x @ module.weight.double().T - module.bias.double()
        expected = 1 - missed.square().sum() / (y - y.mean(0)).square().sum()
        assert share == pytest.approx(expected.item(), abs=1e-6)
        assert 0.3 < share < 1


def test_an_mlp_learns_what_a_line_cannot():
    drawn, unseen = synthetic(80, bump), synthetic(3, bump, seed=1)
    shares = []
    for fit in (fitting.Ridge(), fitting.Perceptrons(16, torch.Generator().manual_seed(0))):
        for tokens in drawn:
            fit.add(tokens)
        shares.append(min(fitting.explained(fit.modules(unheard), unseen)))
    assert shares[0] < 0.5
    assert shares[1] > 0.85


def test_layers_that_are_fitted_together_learn_as_if_alone(monkeypatch):
    modules, groups = [], []
    for room in (fitting.GROUP_BYTES, 2 * 5 * 200 * 8 * 4, 1):
        monkeypatch.setattr(fitting, "GROUP_BYTES", room)
        fit = fitting.Perceptrons(4, torch.Generator().manual_seed(0))
        for tokens in synthetic(5, bump, layers=3):
            fit.add(tokens)
        done: list[int] = []
        modules.append(fit.modules(lambda layers, total, done=done: done.append(layers)))
        groups.append(done)
    assert groups == [[3], [2, 3], [1, 2, 3]]
    for together, pairs, alone in zip(*modules, strict=True):
        parts = zip(together.tensors(), pairs.tensors(), alone.tensors(), strict=True)
        for one, other, expected in parts:
            torch.testing.assert_close(one, expected, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(other, expected, atol=1e-3, rtol=1e-3)


def test_gradients_are_cut_layer_by_layer():
    parts = [torch.zeros(2, 3, 4), torch.zeros(2, 1, 3)]
    for part in parts:
        part.grad = torch.randn(part.shape)
        part.grad[1] *= 1e-3
    before = [part.grad.clone() for part in parts]
    fitting._clip_gradients(parts)
    norm = torch.cat([part[0].flatten() for part in before]).norm()
    assert norm > 1
    for part, old in zip(parts, before, strict=True):
        torch.testing.assert_close(part.grad[0], old[0] / norm)
        assert torch.equal(part.grad[1], old[1])


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_tokens_are_drawn_with_their_own_scores(kind):
    model, pieces = shared_model(kind), [random_ids(40), random_ids(25, seed=1)]
    generator = torch.Generator().manual_seed(3)
    done: list[int] = []
    drawn = list(training.draw(model, pieces, 30, generator, done.append))
    assert done == [1, 2]
    generator = torch.Generator().manual_seed(3)
    for piece, tokens in zip(pieces, drawn, strict=True):
        rows = torch.randperm(len(piece), generator=generator)[:30]
        scores = model.prefill(piece, scorer="reconstruction+").scores.values
        expected = scores[..., rows].transpose(1, 2).log()
        torch.testing.assert_close(tokens.log_scores, expected, atol=1e-4, rtol=0)
        inputs = attention_inputs_of(kind, model, piece)
        for hidden, every in zip(tokens.hidden, inputs, strict=True):
            torch.testing.assert_close(hidden.double(), every[rows], atol=1e-4, rtol=0)


def attention_inputs_of(kind: str, model: ModelKVzip, piece: Tensor) -> list[Tensor]:
    ids = model.read(piece).token_ids
    stock = shared_hf_model(kind, dtype=torch.float64)
    with torch.no_grad():
        states = stock(ids[None], output_hidden_states=True, use_cache=False).hidden_states
        return [
            stock.model.layers[i].input_layernorm(states[i][0])[-len(piece) :]
            for i in full_layers(kind)
        ]


@pytest.mark.parametrize("hidden_dim", [None, 8])
def test_training_is_reproducible_and_its_result_is_used(hidden_dim, tmp_path):
    model = shared_model()
    pieces = training.cut([random_ids(330)], 50)
    stages: list[tuple[str, int, int]] = []

    def train() -> training.Trained:
        return training.train(
            model,
            pieces,
            hidden_dim=hidden_dim,
            drawn=40,
            seed=5,
            progress=lambda *call: stages.append(call),
        )

    one = train()
    assert (one.pieces, one.held_out, one.tokens) == (5, 1, 200)
    assert [stage for stage in stages if stage[1] == stage[2]] == [
        ("score", 5, 5),
        ("fit", 3, 3),
        ("check", 1, 1),
    ]
    other = train()
    assert one.r2 == other.r2
    for module, same in zip(one.modules, other.modules, strict=True):
        pairs = zip(module.tensors(), same.tensors(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
    kvzap.save(one.modules, tmp_path / "surrogate", {})
    ids = random_ids(N)
    kv = model.prefill(ids, scorer=f"kvzap:{tmp_path / 'surrogate'}")
    tensors = load_file(tmp_path / "surrogate" / "model.safetensors")
    close(kv.scores.values, oracle_kvzap(tensors, attention_inputs("llama"), [0, 1, 2]))


def test_pieces():
    sizes = [len(piece) for piece in training.cut([random_ids(250), random_ids(99)], 120)]
    assert sizes == [120, 120]  # rests of 10 and 99 are too short
    assert [len(piece) for piece in training.cut([random_ids(130)], 60)] == [60, 60]


@pytest.mark.parametrize("count", [0, 1])
def test_too_little_text(count):
    with pytest.raises(KVzipError, match=f"{count} piece.*give more text"):
        training.train(shared_model(), [random_ids(50)] * count, hidden_dim=None)


def test_output_projections_are_multiplied_once_for_all_pieces(monkeypatch):
    made: list[int] = []
    products = contribution.projection_products

    def counted(*arguments):
        made.append(1)
        return products(*arguments)

    monkeypatch.setattr(contribution, "projection_products", counted)
    pieces = [random_ids(30, seed=seed) for seed in range(3)]
    generator = torch.Generator().manual_seed(0)
    assert len(list(training.draw(shared_model(), pieces, 10, generator, lambda done: None))) == 3
    assert len(made) == 1


def test_an_mlp_whose_tokens_do_not_fit_into_memory_is_refused(monkeypatch):
    model, pieces = shared_model(), training.cut([random_ids(330)], 50)
    weights = sum(parameter.nbytes for parameter in model.hf_model.parameters())
    layers, heads = len(model.geometry.layers), model.geometry.layers[0].kv_heads
    width = model.hf_model.config.hidden_size
    needed = 5 * 40 * layers * (width * 4 + heads * 4)  # 5 of 6 pieces, 40 tokens each, float32
    calls: list[str] = []

    def train(memory: int | None, hidden_dim: int | None = 4) -> training.Trained:
        monkeypatch.setattr(training, "host_memory", lambda: memory)
        return training.train(
            model,
            pieces,
            hidden_dim=hidden_dim,
            drawn=40,
            progress=lambda stage, done, total: calls.append(stage),
        )

    with pytest.raises(KVzipError, match=r"at once: 200 of them .* draw fewer .* linear surrogate"):
        train(weights + needed - 1)
    assert calls == []  # before anything is read
    assert train(weights + needed).tokens == 200
    assert train(None).tokens == 200
    assert train(0, hidden_dim=None).tokens == 200  # sums only


def test_folders_that_cannot_be_written(tmp_path):
    write_kvzap(tmp_path / "there")
    (tmp_path / "file").touch()
    for place, said in (("there", "is not empty"), ("file", "is a file"), ("no/way", "not exist")):
        with pytest.raises(KVzipError, match=said):
            kvzap.check_output(tmp_path / place)


# The command line


def test_zip_by_a_surrogate(tmp_path, capsys):
    document = tmp_path / "document.txt"
    document.write_text("Ada keeps bees in Lille. Bo sings at night. " * 30)
    reports = []
    for more in ((), ("--streaming", "--chunk-size", 200)):
        for amount in (("-r", 0.4), ("--threshold", -4)):
            output = tmp_path / f"{len(reports)}.kvz"
            arguments = ["zip", document, "-o", output, "--scorer", "kvzap:linear", *amount, *more]
            status = main([*map(str, arguments), "--device", "cpu", "--json"])
            out, err = capsys.readouterr()
            assert (status, err) == (0, "")
            reports.append(json.loads(out))
            header = read_header(output)
            assert (header.scorer, header.score_window) == ("kvzap:linear", WINDOW)
    assert ["score" in report["seconds"] for report in reports] == [False] * 4
    assert [list(report["budget"]) for report in reports] == [["ratio"], ["threshold"]] * 2
    for report in reports[::2]:
        assert report["ratio_realised"] == pytest.approx(0.4, abs=1e-3)
    for report in reports[1::2]:
        assert WINDOW / report["context_tokens"] < report["ratio_realised"] < 1
    annex = tmp_path / "annex.txt"
    annex.write_text("Cleo mends clocks. " * 20)
    assert main(["zip", "--append", str(tmp_path / "0.kvz"), str(annex), "--device", "cpu"]) == 0
    assert read_header(tmp_path / "0.kvz").scorer == "kvzap:linear"
    capsys.readouterr()
    assert main(["zip", str(document), "--scorer", "kvzop:linear"]) == 2
    assert "unknown scorer 'kvzop:linear': did you mean" in capsys.readouterr().err
