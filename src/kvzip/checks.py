"""Whether a type of model works here: small random models against stock transformers.

Each check reads a short text, asks a question and compares tokens and logits, with the versions of
torch and transformers that are installed. It takes about a second a type on one CPU core.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from kvzip.cache import ContextCache
from kvzip.kernels.quantization import KV_DTYPES, QuantizedRows, dequantize
from kvzip.loading import resolve
from kvzip.model import ModelKVzip
from kvzip.model_types import SHAPE, ModelType
from kvzip.oracle import MASKED, masked_attention

TEXT = "The quick brown fox jumps over the lazy dog. " * 2
QUESTIONS = ("what jumps?", "who is the lazy one here, tell me", "a dog?")
NEW_TOKENS = 12
RATIO = 0.4
CHUNK = 17
TOLERANCE = 1e-3
"""Largest difference of logits, which are sums of some tens."""

SHARPNESS = 7
"""Factor on random weights, so that attention is sharp and answers depend on the context."""

LEVEL = {"int4": 1 / 8, "int8": 1 / 127, "fp8": 32 / 448}
"""Largest distance of two neighbouring levels of a code, as a share of its scale."""


def make_config(model_type: ModelType, vocabulary: int) -> PreTrainedConfig:
    """The config of a small model; that of the text part too, where a model has others."""
    common = {**SHAPE, "vocab_size": vocabulary, "bos_token_id": 0, "pad_token_id": 0}
    settings = {"eos_token_id": None, **model_type.small}
    if "text_config" in settings:
        settings["text_config"] = {**common, **settings["text_config"]}
        return AutoConfig.for_model(model_type.name, **settings)
    return AutoConfig.for_model(model_type.name, **{**common, **settings})


def make_model(model_type: ModelType, vocabulary: int, **how: Any) -> PreTrainedModel:
    """A small random model in float32 on the CPU, the same for the same arguments.

    Args:
        model_type: its type.
        vocabulary: number of tokens.
        how: passed on to transformers' `from_config` (`attn_implementation`).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = make_config(model_type, vocabulary)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **how).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("sinks"):
                    parameter.uniform_(-1, 3)
                elif parameter.ndim > 1 and "embed" not in name:
                    parameter.mul_(SHARPNESS)
    return model.requires_grad_(False)


class Subject:
    """A small model of a type: as transformers has it, and as kvzip does.

    Args:
        model_type: its type.
        device: where to run it.
    """

    def __init__(self, model_type: ModelType, device: torch.device | str = "cpu") -> None:
        self.model_type = model_type
        self.device = torch.device(device)
        tokenizer = AutoTokenizer.from_pretrained(resolve(None).repository)
        self.vocabulary = len(tokenizer)
        # the only attention that does everything that any model asks for
        self.stock = self.make_model(attn_implementation="eager")
        self.model = ModelKVzip(self.make_model(), tokenizer)
        self.query = self.model.apply_template(QUESTIONS[0])

    def make_model(self, **how: Any) -> PreTrainedModel:
        """The same model anew; arguments as in `make_model`."""
        return make_model(self.model_type, self.vocabulary, **how).to(self.device)

    @cached_property
    def scored(self) -> ContextCache:
        """The text, read and scored."""
        return self.model.prefill(TEXT)

    def full(self) -> ContextCache:
        """The same anew, through the zipped path."""
        return self.scored.fork().prune(1.0)

    def evicted(self, kv_dtype: str | None = None) -> ContextCache:
        """The same, and evicted; quantised, if told to."""
        return self.scored.fork().prune(RATIO, kv_dtype=kv_dtype)

    def ids(self) -> Tensor:
        """Tokens of the text and a question."""
        return torch.cat([self.scored.token_ids, self.query])

    @torch.no_grad()
    def logits(self, kv: ContextCache) -> Tensor:
        """`[t, V]`, behind each token of the question."""
        ids = self.query[None].to(self.device)
        logits: Tensor = self.model.hf_model(ids, past_key_values=kv.fork()).logits[0]
        return logits.cpu()

    @torch.no_grad()
    def expected(self, model: PreTrainedModel) -> Tensor:
        """The same by a model that reads text and question at once, without a cache."""
        ids = self.ids()[None].to(self.device)
        logits: Tensor = model(ids, use_cache=False).logits[0, -len(self.query) :]
        return logits.cpu()


def _tokens(model: PreTrainedModel, ids: Tensor, **settings: Any) -> list[int]:
    """What transformers' own generate adds, greedily."""
    inputs = ids[None].to(model.device)
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        **settings,
    )
    return output[0, len(ids) :].tolist()  # type: ignore[no-any-return]


def _near(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= TOLERANCE)


def full_cache(subject: Subject) -> bool:
    """A cache that holds all pairs gives stock tokens and logits."""
    kv, ids = subject.full(), subject.ids()
    expected = _tokens(subject.stock, ids)
    got = _tokens(subject.model.hf_model, ids, past_key_values=kv.fork())
    text = subject.model.generate(subject.query, kv=kv, max_new_tokens=NEW_TOKENS)
    return (
        got == expected
        and text == subject.model.prompts.decode(torch.tensor(expected))
        and _near(subject.logits(kv), subject.expected(subject.stock))
    )


def _answers_as_masked(subject: Subject, kv: ContextCache, unlike: ContextCache) -> bool:
    """Whether a cache answers as plain attention to its pairs does, and unlike another cache.

    Its logits must be ten times nearer than those of the other one.
    """
    ids = subject.ids()
    with masked_attention(kv):
        model = subject.make_model(attn_implementation=MASKED)
        logits = subject.expected(model)
        expected = _tokens(model, ids, use_cache=False)
    got = _tokens(subject.model.hf_model, ids, past_key_values=kv.fork())
    off, others_off = ((subject.logits(one) - logits).abs().max() for one in (kv, unlike))
    return got == expected and bool(off <= TOLERANCE) and bool(10 * off < others_off)


def evicted_cache(subject: Subject) -> bool:
    """An evicted cache gives what plain attention gives with the evicted pairs masked."""
    return _answers_as_masked(subject, subject.evicted(), unlike=subject.full())


def saved_cache(subject: Subject) -> bool:
    """A cache that was saved and loaded gives the same logits, bit for bit."""
    kv = subject.evicted()
    return torch.equal(subject.logits(_saved_and_loaded(subject, kv)), subject.logits(kv))


def _saved_and_loaded(subject: Subject, kv: ContextCache) -> ContextCache:
    with tempfile.TemporaryDirectory() as folder:
        return subject.model.load(kv.save(Path(folder) / "context.kvz"))


def quantized_cache(subject: Subject) -> bool:
    """A quantised cache gives what plain attention gives to what its codes stand for.

    They stand for the pairs that they were made from, and are saved and loaded bit for bit.
    """
    plain = subject.evicted()
    for kv_dtype in KV_DTYPES:
        kv = subject.evicted(kv_dtype)
        again = _saved_and_loaded(subject, kv)
        if not (
            _codes_stand_for(kv, plain)
            and _answers_as_masked(subject, kv, unlike=plain)
            and _same_context(again, kv)
            and torch.equal(subject.logits(again), subject.logits(kv))
        ):
            return False
    return True


def _same_context(one: ContextCache, other: ContextCache) -> bool:
    held, others = (
        [t for layer in kv.layers for t in layer.context_tensors()] for kv in (one, other)
    )
    return len(held) == len(others) and all(map(torch.equal, held, others))


def _codes_stand_for(kv: ContextCache, plain: ContextCache) -> bool:
    """Whether the codes of a cache are no further than a level from the pairs of another."""
    return all(
        _within_a_level(codes, rows, made.context.counts.tolist())
        for coded, made in zip(kv.prunable, plain.prunable, strict=True)
        for codes, rows in (
            (coded.context.keys, made.context.keys),
            (coded.context.values, made.context.values),
        )
    )


def _within_a_level(
    codes: Tensor | QuantizedRows, rows: Tensor | QuantizedRows, counts: list[int]
) -> bool:
    if not isinstance(codes, QuantizedRows) or not isinstance(rows, Tensor):
        return False
    groups = codes.scales.shape[1]
    stand_for = dequantize(codes, counts, torch.float64)
    made = zip(rows.double().split(counts), codes.scales.double().split(counts), strict=True)
    for h, (found, (head, scales)) in enumerate(zip(stand_for, made, strict=True)):
        apart = ((found - head).abs() / codes.gain[h]).unflatten(1, (groups, -1)).amax(-1)
        level = scales.abs() * LEVEL[codes.dtype]  # scales are rounded themselves, hence 1.01
        if (apart > 1.01 * level + 1e-5).any():
            return False
    return True


def conversation(subject: Subject) -> bool:
    """Questions leave nothing behind; a conversation goes on where it stood, and is forgotten."""
    kv, model = subject.full(), subject.model
    before = subject.logits(kv)
    first = model.generate(QUESTIONS[1], kv=kv, max_new_tokens=NEW_TOKENS)
    untouched = torch.equal(subject.logits(kv), before)
    model.generate(QUESTIONS[1], kv=kv, max_new_tokens=NEW_TOKENS, update_cache=True)
    query = model.apply_template(QUESTIONS[2], kv=kv)
    expected = _tokens(subject.stock, torch.cat([kv.token_ids, query]))
    second = model.generate(query, kv=kv, max_new_tokens=NEW_TOKENS)
    kv.reset()
    again = model.generate(QUESTIONS[1], kv=kv, max_new_tokens=NEW_TOKENS)
    return untouched and second == model.prompts.decode(torch.tensor(expected)) and again == first


def batch(subject: Subject) -> bool:
    """Questions asked at once get the answers that they get one by one."""
    kv, model = subject.evicted(), subject.model
    questions = [*QUESTIONS, TEXT]  # so long that the others' padding outruns a window
    alone = [model.generate(text, kv=kv, max_new_tokens=NEW_TOKENS) for text in questions]
    return model.ask(kv, questions, max_new_tokens=NEW_TOKENS) == alone


def streaming(subject: Subject) -> bool:
    """Compression while reading: stock tokens if all is kept, else the number asked for."""
    model = subject.model
    kv = model.prefill(TEXT, ratio=1.0, streaming=True, chunk_size=CHUNK)
    expected = _tokens(subject.stock, subject.ids())
    got = _tokens(model.hf_model, subject.ids(), past_key_values=kv.fork())
    near = _near(subject.logits(kv), subject.expected(subject.stock))
    kv = model.prefill(TEXT, ratio=RATIO, streaming=True, chunk_size=CHUNK)
    right_number = int(kv.kept.sum()) == int(subject.evicted().kept.sum())
    return near and got == expected and right_number


CHECKS: dict[str, Callable[[Subject], bool]] = {
    "full": full_cache,
    "evicted": evicted_cache,
    "saved": saved_cache,
    "quantised": quantized_cache,
    "conversation": conversation,
    "batch": batch,
    "streaming": streaming,
}
"""By the name of their column in the table."""


@dataclass(frozen=True)
class Checked:
    """A type of model, and which checks it passed."""

    model_type: ModelType
    passed: dict[str, bool]


def check(model_type: ModelType, device: torch.device | str = "cpu") -> Checked:
    """Make a small model and check it.

    Args:
        model_type: its type.
        device: where to run it; on a GPU the kernels that run there are checked, too.

    Raises:
        KVzipError: if the type is refused.
    """
    subject = Subject(model_type, device)
    return Checked(model_type, {name: passes(subject) for name, passes in CHECKS.items()})
