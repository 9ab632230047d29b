"""The types of models that kvzip is tested with, those it should work with, and those it refuses.

`TESTED` is what `kvzip models` lists, what `checks` builds small models of, and what the tests run
over: a new type is one line here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
"""Of every small model, unless its type says otherwise."""

_SLIDING = {"sliding_window": 16, "layer_types": [SLIDING, FULL, SLIDING]}
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, **_SLIDING}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_HYBRID = {
    "layer_types": [LINEAR, FULL, LINEAR],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
_SHARED_EXPERT = {**_EXPERTS, "shared_expert_intermediate_size": 32}


def _rope(rope_type: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **settings}}


@dataclass(frozen=True, eq=False)
class ModelType:
    """A type of model, as transformers names it.

    Attributes:
        name: `model_type` of its config.
        models: what is published of it, in words.
        note: what is particular about it here, or why it is refused.
        variant: tells apart lines of the same type.
        small: settings of a small model, beside or instead of `SHAPE`.
    """

    name: str
    models: str
    note: str = ""
    variant: str = ""
    small: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Name and variant."""
        return f"{self.name}-{self.variant}" if self.variant else self.name


_KEPT = "sliding layers are kept, the others pruned"
_STATES = "linear-attention layers keep their state, the others are pruned; one question at a time"

TESTED = (
    ModelType("llama", "Llama 2, Llama 3.0"),
    ModelType(
        "llama",
        "Llama 3.1 to 3.3",
        variant="llama3",
        small=_rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=256,
        ),
    ),
    ModelType("llama", "Llama, stretched", variant="linear", small=_rope("linear", factor=2.0)),
    ModelType(
        "llama",
        "Llama, stretched",
        "up to the original length",
        variant="dynamic",
        small=_rope("dynamic", factor=2.0),
    ),
    ModelType("qwen2", "Qwen2, Qwen2.5"),
    ModelType("qwen2_moe", "Qwen1.5-MoE, Qwen2-57B-A14B", small=_SHARED_EXPERT),
    ModelType("qwen3", "Qwen3", small={"head_dim": 32}),
    ModelType(
        "qwen3",
        "Qwen3 beyond 32,768 positions",
        variant="yarn",
        small={
            "head_dim": 32,
            **_rope("yarn", factor=4.0, original_max_position_embeddings=256),
        },
    ),
    ModelType("qwen3_moe", "Qwen3-30B-A3B, Qwen3-235B-A22B", small={"head_dim": 32, **_EXPERTS}),
    ModelType(
        "qwen3_next", "Qwen3-Next", _STATES, small={"head_dim": 32, **_HYBRID, **_SHARED_EXPERT}
    ),
    ModelType(
        "qwen3_5",
        "Qwen3.5",
        f"text only; {_STATES}",
        small={
            "text_config": {"head_dim": 32, **_HYBRID},
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "depth": 1,
                "num_heads": 2,
                "out_hidden_size": 64,
            },
        },
    ),
    ModelType(
        "qwen3_5_moe_text",
        "Qwen3.5 MoE",
        _STATES,
        small={"head_dim": 32, **_HYBRID, **_SHARED_EXPERT},
    ),
    ModelType("mistral", "Mistral 7B from v0.2 on, Nemo", small={"sliding_window": None}),
    ModelType("mixtral", "Mixtral", small={**_LOCAL_EXPERTS, "sliding_window": None}),
    ModelType("ministral", "Ministral 8B", _KEPT, small={"head_dim": 32, **_SLIDING}),
    ModelType(
        "ministral3",
        "Ministral 3",
        small={
            "head_dim": 32,
            **_rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=256,
                llama_4_scaling_beta=0.1,
            ),
        },
    ),
    ModelType("phi3", "Phi-4", small={"sliding_window": None}),
    ModelType(
        "phi3",
        "Phi-4-mini up to its original length",
        "rotary embeddings of a part of each head",
        variant="partial",
        small={"sliding_window": None, **_rope("default", partial_rotary_factor=0.75)},
    ),
    ModelType(
        "phi3",
        "Phi-3 128k, Phi-3.5-mini, Phi-4-mini",
        "up to the original length",
        variant="longrope",
        small={
            "sliding_window": None,
            "original_max_position_embeddings": 768,
            **_rope("longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8),
        },
    ),
    ModelType("gemma", "Gemma", small={"head_dim": 32}),
    ModelType(
        "gemma2",
        "Gemma 2",
        f"capped logits; {_KEPT}",
        small={**_GEMMA, "attn_logit_softcapping": 5.0},
    ),
    ModelType("gemma3_text", "Gemma 3 1B", _KEPT, small=_GEMMA),
    ModelType(
        "gemma3",
        "Gemma 3 4B, 12B, 27B",
        f"text only, images are refused; {_KEPT}",
        small={
            "text_config": _GEMMA,
            "vision_config": _VISION,
            "mm_tokens_per_image": 4,
        },
    ),
    ModelType(
        "gemma4",
        "Gemma 4 whose layers do not share pairs",
        f"text only; {_KEPT}",
        small={
            "text_config": {
                "head_dim": 32,
                "global_head_dim": 64,
                "num_kv_shared_layers": 0,
                "hidden_size_per_layer_input": 0,
                "sliding_window": 16,
                "layer_types": [SLIDING, SLIDING, FULL],
            },
            "vision_config": _VISION,
            "audio_config": None,
        },
    ),
    ModelType(
        "gpt_oss",
        "gpt-oss 20B, 120B",
        f"sinks; {_KEPT}",
        small={
            "head_dim": 32,
            **_LOCAL_EXPERTS,
            **_SLIDING,
            **_rope("yarn", factor=4.0, original_max_position_embeddings=256),
        },
    ),
    ModelType("olmo", "OLMo"),
    ModelType("olmo2", "OLMo 2"),
    ModelType("olmo3", "OLMo 3", _KEPT, small=_SLIDING),
    ModelType("olmo_hybrid", "OLMo Hybrid", _STATES, small=_HYBRID),
    ModelType("olmoe", "OLMoE", small=_EXPERTS),
    ModelType(
        "smollm3", "SmolLM3", "with layers without rotary", small={"no_rope_layers": [1, 0, 1]}
    ),
    ModelType(
        "granite",
        "Granite 3",
        small={
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.5,
            "embedding_multiplier": 2.0,
            "logits_scaling": 2.0,
        },
    ),
    ModelType("granitemoe", "Granite 3 MoE", small=_LOCAL_EXPERTS),
    ModelType(
        "granitemoehybrid",
        "Granite 4",
        _STATES,
        small={
            **_LOCAL_EXPERTS,
            "layer_types": ["mamba", "attention", "mamba"],
            "shared_intermediate_size": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "mamba_expand": 2,
        },
    ),
    ModelType("cohere", "Command R"),
    ModelType("cohere2", "Command R7B, Command A", _KEPT, small=_SLIDING),
    ModelType("glm4", "GLM-4-0414", small={"head_dim": 32}),
    ModelType("glm4_moe", "GLM-4.5", small={"head_dim": 32, **_ROUTED_EXPERTS}),
    ModelType("exaone4", "EXAONE 4.0", _KEPT, small=_SLIDING),
    ModelType("exaone_moe", "K-EXAONE", _KEPT, small={"head_dim": 32, **_EXPERTS, **_SLIDING}),
    ModelType("seed_oss", "Seed-OSS", small={"head_dim": 32}),
    ModelType("ernie4_5", "ERNIE 4.5", small={"head_dim": 32}),
    ModelType("dots1", "dots.llm1", small={**_ROUTED_EXPERTS, "n_shared_experts": 1}),
    ModelType("phimoe", "Phi-3.5-MoE", small={**_LOCAL_EXPERTS, "sliding_window": None}),
    ModelType(
        "afmoe",
        "Trinity",
        _KEPT,
        small={"head_dim": 32, "num_dense_layers": 1, **_EXPERTS, **_SLIDING},
    ),
    ModelType("hunyuan_v1_dense", "Hunyuan dense", small={"head_dim": 32}),
    ModelType("minimax_m2", "MiniMax-M2", small={"head_dim": 32, **_LOCAL_EXPERTS}),
    ModelType("starcoder2", "StarCoder2", small={"sliding_window": None}),
)

EXPECTED = (
    ModelType("glm", "GLM-4-9B", "attention as in glm4"),
    ModelType("stablelm", "StableLM", "attention as in phi3"),
    ModelType("arcee", "AFM-4.5B", "attention as in llama"),
    ModelType("nemotron", "Nemotron 4, Minitron", "attention as in llama"),
    ModelType("apertus", "Apertus", "attention as in qwen3"),
    ModelType("ernie4_5_moe", "ERNIE 4.5 MoE", "attention as in ernie4_5"),
    ModelType("hunyuan_v1_moe", "Hunyuan MoE", "attention as in hunyuan_v1_dense"),
    ModelType("flex_olmo", "FlexOlmo", "attention as in olmo2"),
    ModelType("solar_open", "Solar Open", "attention as in glm4_moe"),
)
"""Types whose attention is that of a tested one. Any other decoder works, too, if its layers have
full, sliding or linear attention, and if they hand the pairs of their cache, untouched, to
transformers' attention interface; if not, it is refused when it is loaded."""

REFUSED = (
    ModelType(
        "deepseek_v3",
        "DeepSeek-V3, R1 and what is built like them",
        "multi-head latent attention changes keys and values behind the cache",
        small={
            **_ROUTED_EXPERTS,
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "first_k_dense_replace": 1,
        },
    ),
    ModelType(
        "llama4_text",
        "Llama 4",
        "chunked attention, whose window does not slide",
        small={"head_dim": 32, "num_local_experts": 2},
    ),
    ModelType(
        "mimo_v2_flash",
        "MiMo-V2-Flash",
        "keys and values differ in size",
        small={"head_dim": 48, "v_head_dim": 32, **_ROUTED_EXPERTS},
    ),
    ModelType(
        "jamba",
        "Jamba",
        "transformers' linear-attention layers begin anew when a question follows a context",
        small={
            **_LOCAL_EXPERTS,
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 8,
        },
    ),
    ModelType(
        "lfm2",
        "LFM2",
        "convolution layers, which hold neither pairs nor a recurrent state",
        small={"layer_types": ["conv", FULL, "conv"]},
    ),
    ModelType("falcon_h1", "Falcon-H1", "layers hold pairs and a state at once"),
    ModelType(
        "mistral",
        "Mistral 7B v0.1",
        "every layer slides: there is nothing to evict",
        variant="sliding",
        small={"sliding_window": 16},
    ),
    ModelType("mamba", "Mamba", "no layer holds keys and values", small={"state_size": 4}),
    ModelType("falcon", "Falcon", "does not use transformers' attention interface"),
    ModelType("bloom", "BLOOM", "does not use transformers' attention interface"),
)
