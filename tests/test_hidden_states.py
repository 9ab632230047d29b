"""The attention inputs that hooks see are those of the stock model, and the hooks go."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from kvzip import KVzipError
from kvzip.hidden_states import attention_modules, observed_hidden_states, output_weight
from models import KINDS, SHAPE, make_hf_model, random_ids, shared_hf_model

EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
OTHERS = {
    "qwen3_moe": {"head_dim": 32, "moe_intermediate_size": 32, **EXPERTS},
    "gemma2": {"head_dim": 32},
    "gpt_oss": {"head_dim": 32, **EXPERTS},
    "olmo2": {},
    "granite": {},
    "smollm3": {},
    "phi": {},
}


def other_model(kind: str, **changes) -> nn.Module:
    config = AutoConfig.for_model(kind, **{**SHAPE, **OTHERS.get(kind, {}), **changes})
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@torch.no_grad()
def observed(model: nn.Module, ids: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    seen = []
    with observed_hidden_states(model, lambda index, hidden: seen.append((index, hidden.clone()))):
        model(ids[None], use_cache=False)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_the_normalised_hidden_states(kind):
    model, ids = shared_hf_model(kind), random_ids(9)
    seen = observed(model, ids)
    with torch.no_grad():
        states = model(ids[None], use_cache=False, output_hidden_states=True).hidden_states
        expected = [
            layer.input_layernorm(state)
            for layer, state in zip(model.model.layers, states[:-1], strict=True)
        ]
    assert [index for index, _ in seen] == [0, 1, 2]
    for (_, hidden), normalised in zip(seen, expected, strict=True):
        torch.testing.assert_close(hidden, normalised)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_model_types(kind):
    model = other_model(kind)
    heads, dim = SHAPE["num_attention_heads"], OTHERS[kind].get("head_dim", 16)
    assert [hidden.shape for _, hidden in observed(model, random_ids(9))] == [(1, 9, 64)] * 3
    weights = [output_weight(module) for module in attention_modules(model).values()]
    assert [weight.shape for weight in weights] == [(64, heads * dim)] * 3


def test_linear_attention_is_not_seen():
    layers = ["linear_attention", "full_attention", "linear_attention"]
    model = other_model("qwen3_next", layer_types=layers, moe_intermediate_size=32, **EXPERTS)
    assert [index for index, _ in observed(model, random_ids(9))] == [1]


def test_a_vision_tower_is_not_seen():
    config = AutoConfig.for_model(
        "gemma3",
        text_config={**SHAPE, "head_dim": 32},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
    )
    from transformers import Gemma3ForConditionalGeneration

    model = Gemma3ForConditionalGeneration(config)
    names = [type(module).__name__ for module in attention_modules(model).values()]
    assert names == ["Gemma3Attention"] * 3


def test_a_bare_decoder_is_enough():
    model = shared_hf_model("llama")
    assert attention_modules(model.model) == attention_modules(model)


def test_hooks_go_also_after_an_exception():
    model = make_hf_model()
    modules = attention_modules(model).values()

    def fail(index: int, hidden: torch.Tensor) -> None:
        raise RuntimeError("observer failed")

    def run() -> None:
        with observed_hidden_states(model, fail):
            assert all(module._forward_pre_hooks for module in modules)
            model(random_ids(3)[None])

    with pytest.raises(RuntimeError, match="observer failed"):
        run()
    assert not any(module._forward_pre_hooks for module in modules)
    assert model(random_ids(3)[None]).logits.isfinite().all()


def test_two_models_are_observed_at_a_time():
    one, other = make_hf_model("llama"), make_hf_model("qwen3", num_hidden_layers=2)
    seen = {"one": [], "other": []}
    with (
        observed_hidden_states(one, lambda index, hidden: seen["one"].append(index)),
        observed_hidden_states(other, lambda index, hidden: seen["other"].append(index)),
    ):
        one(random_ids(3)[None])
        other(random_ids(3)[None])
    assert seen == {"one": [0, 1, 2], "other": [0, 1]}


def test_a_model_without_such_modules_is_refused():
    config = AutoConfig.for_model(
        "gptj", n_embd=32, n_layer=1, n_head=2, vocab_size=9, rotary_dim=8
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(KVzipError, match="GPTJForCausalLM has no attention modules with"):
        attention_modules(model)


def test_two_modules_of_one_layer_are_refused():
    model = make_hf_model()
    model.model.layers[2].self_attn.layer_idx = 1
    with pytest.raises(KVzipError, match="two attention modules in layer 1"):
        attention_modules(model)


def test_weights_must_be_in_memory():
    module = attention_modules(make_hf_model())[0]
    module.o_proj.to("meta")
    with pytest.raises(KVzipError, match="LlamaAttention is not in memory"):
        output_weight(module)
