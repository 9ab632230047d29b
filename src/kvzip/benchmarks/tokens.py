"""Greedy answers, the time of each of their tokens, and whether they are the model's own.

Two correct implementations round differently, and a random model's best tokens lie close together,
so that answers of equal worth part ways. What is compared is therefore each chosen token with the
best one: a second model reads question and answer in one pass, and the error is the largest
distance between the logit of its best token and that of the chosen one, in standard deviations of
the logits. Rounding costs a few hundredths; a token chosen at random, four.

Where input and output embeddings are one, a random model favours the token that it has just read,
whatever it attends to, and its tokens say little. There, logits are compared (`logits_error`).
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, LogitsProcessor, PreTrainedModel

from kvzip import ContextCache, ModelKVzip, decoding
from kvzip.cli.timing import TokenClock

TOLERANCE = 0.25
"""Standard deviations of the logits."""


class TokenRecorder(TokenClock):
    """A clock that keeps the tokens, too."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        """Note a token and its time; the first call brings the prompt."""
        if self._prompt_seen:
            self.tokens += value.flatten().tolist()
        super().put(value)


class LogitsRecorder(LogitsProcessor):
    """Keeps the logits that each token of an answer is chosen by, as a generation setting."""

    def __init__(self) -> None:
        self._steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Note the logits `[1, V]` of a step, and leave them as they are."""
        self._steps.append(scores.clone())
        return scores

    @property
    def logits(self) -> Tensor:
        """`[tokens, V]`, float32."""
        return torch.cat(self._steps)


def exactly(tokens: int) -> dict[str, Any]:
    """Generation settings for so many tokens."""
    return {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}


def answer(
    model: ModelKVzip, kv: ContextCache, query_ids: Tensor, tokens: int, **settings: Any
) -> TokenRecorder:
    """Answer with kvzip in exactly so many tokens, with what else is set for generation."""
    recorder = TokenRecorder()
    decoding.generate(
        model.decoder,
        model.tokenizer,
        kv,
        query_ids,
        max_positions=model.geometry.max_positions,
        streamer=recorder,
        **exactly(tokens),
        **settings,
    )
    return recorder


def answer_batch(
    model: ModelKVzip, kv: ContextCache, queries: list[Tensor], tokens: int
) -> list[list[int]]:
    """Answer a batch with kvzip in exactly so many tokens each."""
    answers = decoding.generate_batch(
        model.decoder,
        model.tokenizer,
        kv,
        queries,
        max_positions=model.geometry.max_positions,
        **exactly(tokens),
    )
    return [ids.tolist() for ids in answers]


def stock_answer(
    model: PreTrainedModel, cache: Cache, sequence: Tensor, tokens: int, **settings: Any
) -> TokenRecorder:
    """Answer with transformers' own loop in exactly so many tokens.

    Args:
        model: a model as transformers ships it.
        cache: holds all of the sequence but its question.
        sequence: `[s]`, on the CPU: context and question.
        tokens: of the answer.
        settings: what else is set for generation.
    """
    recorder = TokenRecorder()
    ids = sequence[None].to(model.device)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        streamer=recorder,
        **exactly(tokens),
        **settings,
    )
    return recorder


def distance(model: PreTrainedModel, cache: Cache, query_ids: Tensor, answered: list[int]) -> float:
    """How far an answer is from what a model finds best.

    Args:
        model: the model to ask.
        cache: the context; grows by question and answer.
        query_ids: `[t]`, on the CPU.
        answered: the tokens of an answer that was not allowed to end.
    """
    logits = logits_of_answer(model, cache, query_ids, answered)
    spread = logits.std(-1)
    logits[:, model.generation_config.eos_token_id] = -torch.inf
    chosen = torch.tensor(answered, device=logits.device)
    gap = logits.amax(-1) - logits.gather(1, chosen[:, None])[:, 0]
    return float((gap / spread).max())


@torch.no_grad()
def logits_of_answer(
    model: PreTrainedModel, cache: Cache, query_ids: Tensor, answered: list[int]
) -> Tensor:
    """The logits `[tokens, V]`, float32, by which a model judges each token of an answer.

    Args:
        model: the model to ask; it reads question and answer in one pass.
        cache: the context; grows by question and answer.
        query_ids: `[t]`, on the CPU.
        answered: the tokens.
    """
    ids = torch.cat([query_ids, torch.tensor(answered[:-1], dtype=query_ids.dtype)])
    ids = ids[None].to(model.device)
    start = cache.get_seq_length()
    positions = torch.arange(ids.shape[1], device=ids.device)[None] + start
    output = model(ids, position_ids=positions, past_key_values=cache, logits_to_keep=len(answered))
    logits: Tensor = output.logits[0].float()
    return logits


def logits_error(model: PreTrainedModel, got: Tensor, expected: Tensor) -> float:
    """The norm of the difference between logits over the norm, the end token aside.

    Args:
        model: that they are of.
        got: `[tokens, V]`, of an answer that was not allowed to end.
        expected: likewise.
    """
    end = torch.tensor([model.generation_config.eos_token_id], device=got.device)
    got, expected = (logits.index_fill(1, end, 0.0) for logits in (got, expected))
    return float((got - expected).norm() / expected.norm())
