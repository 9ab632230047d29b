"""Small random models, a tokenizer, and plain attention to compare with."""

from functools import lru_cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from kvzip import ContextCache, ModelKVzip
from kvzip.layers import AnsweringLayer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>"]
BEGIN, END = 0, 1
VOCABULARY = 400
CORPUS = [
    "You are a helpful assistant. Given the context, answer to the following question or request "
    "without explanation.",
    "Repeat the part of the previous context exactly, starting with system user assistant",
]

KINDS = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma3"]
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
    "pad_token_id": END,
    "tie_word_embeddings": False,
}
SHARPNESS = 7
GEMMA3_WINDOW = 16
GEMMA3_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]

TEXT = "The quick brown fox jumps over the lazy dog. " * 2
QUESTIONS = ["what jumps?", "who is the lazy one here, tell me", "a dog?"]


@lru_cache
def make_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that can spell everything."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet)
    )
    tokenizer.train_from_iterator(CORPUS * 2, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[END])
    fast.chat_template = chat_template
    return fast


def make_config(kind: str, **changes: Any) -> PreTrainedConfig:
    """A small config of a model type."""
    shape = {**SHAPE, **changes}
    if kind == "gemma3":
        sliding = {"sliding_window": GEMMA3_WINDOW, "layer_types": GEMMA3_LAYERS}
        return Gemma3TextConfig(**{"head_dim": 32, "query_pre_attn_scalar": 32, **sliding, **shape})
    if kind == "qwen3":
        return Qwen3Config(**{"head_dim": 32, **shape})
    if kind == "mistral":
        return MistralConfig(**{"sliding_window": None, **shape})
    return {"llama": LlamaConfig, "qwen2": Qwen2Config, "phi3": Phi3Config}[kind](**shape)


def make_hf_model(
    kind: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    **changes: Any,
) -> PreTrainedModel:
    """A random model; the same for the same arguments.

    Weights are larger than at the start of training, so that attention is sharp and greedy tokens
    depend on the context instead of repeating the last token.
    """
    torch.manual_seed(seed)
    config = make_config(kind, **changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(SHARPNESS)
    return model.requires_grad_(False).to(dtype)


def make_model(
    kind: str = "llama",
    *,
    kv_type: str = "evict",
    chat_template: str | None = CHATML,
    **kwargs: Any,
) -> ModelKVzip:
    """A ModelKVzip around a random model."""
    return ModelKVzip(make_hf_model(kind, **kwargs), make_tokenizer(chat_template), kv_type=kv_type)


shared_model = lru_cache(make_model)
shared_hf_model = lru_cache(make_hf_model)


def random_ids(n: int, seed: int = 0) -> Tensor:
    """`[n]` token ids without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL), VOCABULARY, (n,), generator=generator)


@torch.no_grad()
def logits_of(model: ModelKVzip, kv: ContextCache, query_ids: Tensor) -> Tensor:
    """`[t, V]`: logits behind each token of a question."""
    return model.hf_model(query_ids[None], past_key_values=kv.fork()).logits[0]


def greedy(model: PreTrainedModel, ids: Tensor, new_tokens: int = 12, **settings: Any) -> Tensor:
    """The tokens that transformers' own generate adds to `ids`."""
    settings = {"do_sample": False, "max_new_tokens": new_tokens, **settings}
    mask = torch.ones_like(ids[None])
    return model.generate(ids[None], attention_mask=mask, **settings)[0, len(ids) :]


def snapshot(kv: ContextCache) -> dict[str, Any]:
    """Copies of everything that a cache holds."""
    return {
        "context": [t.clone() for layer in kv.layers for t in layer.context_tensors()],
        "kept": [kv.kept],
        "tail": [
            part.clone()
            for layer in kv.layers
            if kv.tail_length
            for part in (
                layer.tail.view()
                if isinstance(layer, AnsweringLayer)
                else layer.state.tensors().values()
            )
        ],
        "tokens": [kv.token_ids, kv.history],
        "numbers": (kv.tail_length, kv.seen_tokens, kv.nbytes, kv.ratio, kv.realised_ratio),
    }


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two snapshots are equal bit for bit."""
    assert one["numbers"] == other["numbers"]
    for name in ("context", "kept", "tail", "tokens"):
        assert len(one[name]) == len(other[name]), name
        for a, b in zip(one[name], other[name], strict=True):
            assert torch.equal(a, b), name


class Oracle:
    """Plain attention over whole sequences, in float64, that records queries and keys.

    Attributes:
        queries: `[Hq, s, D]` of each layer.
        keys: `[H, s, D]` of each layer.
        evicted: `[H, c]`, bool, by layer: pairs hidden from every query behind the first c tokens.
        hidden: `[H, s, s]`, bool, by layer: keys (last) that a query does not see, if it could.
    """

    def __init__(self) -> None:
        self.queries: dict[int, Tensor] = {}
        self.keys: dict[int, Tensor] = {}
        self.evicted: dict[int, Tensor] = {}
        self.hidden: dict[int, Tensor] = {}

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        layer = module.layer_idx
        self.queries[layer], self.keys[layer] = query[0].double(), key[0].double()
        out = torch.empty_like(query)
        group = query.shape[1] // key.shape[1]
        i = torch.arange(query.shape[2])[:, None]
        j = torch.arange(key.shape[2])
        for head in range(query.shape[1]):
            hidden = j > i
            if sliding_window is not None:
                hidden = hidden | (j <= i - sliding_window)
            if layer in self.evicted:
                gone = self.evicted[layer][head // group]
                hidden = hidden.clone()
                hidden[len(gone) :, : len(gone)] |= gone
            if layer in self.hidden:
                hidden = hidden | self.hidden[layer][head // group]
            logits = query[0, head].double() @ key[0, head // group].double().T * scaling
            weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
            out[0, head] = (weights @ value[0, head // group].double()).to(out.dtype)
        return out.transpose(1, 2), None

    @torch.no_grad()
    def logits(self, kind: str, ids: Tensor, **kwargs: Any) -> Tensor:
        """`[s, V]`: logits of a model that attends like this."""
        AttentionInterface.register("oracle", self)
        return shared_hf_model(kind, attention="oracle", **kwargs)(
            ids[None], use_cache=False
        ).logits[0]
