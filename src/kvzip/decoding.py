"""Stage 5: answers. Transformers' own generation loop on a cache whose tail is rolled back after.

Generation settings, logits processors, stopping criteria and streamers are transformers' own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from kvzip.cache import ContextCache
from kvzip.errors import KVzipError

DEFAULT_NEW_TOKENS = 512

# Answers are greedy unless the caller samples; these neutral values silence the settings for
# sampling that many checkpoints bring along.
GREEDY = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}

# Settings that change what transformers' generate returns, with the one value that fits.
RETURNED = {"num_return_sequences": 1, "return_dict_in_generate": False}


class AnswerStreamer(BaseStreamer):
    """Hands a streamer the question as its prompt instead of the whole context."""

    def __init__(self, streamer: BaseStreamer, query_ids: Tensor) -> None:
        self.streamer = streamer
        self.prompt: Tensor | None = query_ids

    def put(self, value: Tensor) -> None:
        """Pass tokens on; the first are the prompt."""
        self.streamer.put(value if self.prompt is None else self.prompt)
        self.prompt = None

    def end(self) -> None:
        """Pass the end on."""
        self.streamer.end()


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kv: ContextCache,
    query_ids: Tensor,
    *,
    max_positions: int,
    update_cache: bool = False,
    streamer: BaseStreamer | None = None,
    **settings: Any,
) -> Tensor:
    """Answer one question.

    The tail is as it was afterwards, unless `update_cache` keeps question and answer; if anything
    goes wrong it is as it was in any case.

    Args:
        model: the model that made the cache.
        tokenizer: its tokenizer, for stop strings.
        kv: the cache.
        query_ids: `[t]`, int64: tokens behind everything the cache has seen.
        max_positions: positions that the model was made for.
        update_cache: whether to keep question and answer in the cache.
        streamer: gets the question and then each new token.
        settings: of transformers' `GenerationConfig`, such as `max_new_tokens`, `do_sample`,
            `temperature`, `stop_strings` or `eos_token_id`.

    Returns:
        `[tokens]`, int64, on the CPU: the answer with its end token, if it came to that.
    """
    _refuse_unknown_tail(kv)
    if not len(query_ids):
        raise KVzipError("the question is empty")
    sequence = torch.cat([kv.token_ids, query_ids.cpu()])
    settings = _settings(settings, len(sequence), max_positions)
    before = kv.tail_length
    input_ids = sequence[None].to(model.device)
    try:
        output: Tensor = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            past_key_values=kv,
            tokenizer=tokenizer,
            streamer=AnswerStreamer(streamer, query_ids) if streamer else None,
            **settings,
        )[0].cpu()
    except BaseException:
        kv.truncate(before)
        raise
    if update_cache:
        kv.history = output[len(kv.document.token_ids) :]
    else:
        kv.truncate(before)
    return output[len(sequence) :]


def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kv: ContextCache,
    queries: Sequence[Tensor],
    *,
    max_positions: int,
    **settings: Any,
) -> list[Tensor]:
    """Answer several questions on one context in one go; the cache is not changed.

    Rows are padded on the left behind the context, which is shared; a row never sees its padding.

    Args:
        model: the model that made the cache.
        tokenizer: its tokenizer, for stop strings.
        kv: the cache; whatever stands in its tail is read again in front of every question.
        queries: `[t_b]`, int64, for each row.
        max_positions: positions that the model was made for.
        settings: as in `generate`.

    Returns:
        `[tokens]`, int64, on the CPU, for each question; special tokens behind an answer may differ
        from those of `generate`.
    """
    _refuse_unknown_tail(kv)
    rows = [torch.cat([kv.history, query.cpu()]) for query in queries]
    longest = max(len(row) for row in rows)
    context = kv.document.token_ids
    settings = _settings(settings, len(context) + longest, max_positions)
    # Padding repeats the first token, so that penalties on seen tokens see nothing new.
    sequences = context[0].repeat(len(rows), len(context) + longest)
    sequences[:, : len(context)] = context
    for sequence, row in zip(sequences, rows, strict=True):
        sequence[-len(row) :] = row
    starts = torch.tensor([longest - len(row) for row in rows])
    columns = torch.arange(longest)
    positions = len(context) + (columns - starts[:, None]).clamp_min(0)
    context_positions = torch.arange(len(context)).expand(len(rows), -1)
    # Finished rows are filled up with a special token, which adds nothing to an answer's text.
    filler = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else int(context[0])
    input_ids = sequences.to(model.device)
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        past_key_values=kv.fork(starts.to(model.device)),
        position_ids=torch.cat([context_positions, positions], dim=1).to(model.device),
        tokenizer=tokenizer,
        pad_token_id=filler,
        **settings,
    ).cpu()
    ends = _end_tokens(model, settings)
    return [_answer(row, ends, filler) for row in output[:, sequences.shape[1] :]]


def _settings(settings: dict[str, Any], used: int, max_positions: int) -> dict[str, Any]:
    """Greedy by default, and never beyond the model's positions."""
    left = max_positions - used
    if left < 1:
        raise KVzipError(
            f"context and question take {used} positions, the model has {max_positions}: shorten "
            "the question"
        )
    config = settings.get("generation_config")
    for name, value in RETURNED.items():
        if (settings.get(name, getattr(config, name, None)) or value) != value:
            raise KVzipError(f"{name} must be {value}: one answer is given to each question")
    asked = settings.get("max_new_tokens", config and config.max_new_tokens)
    if asked is None:
        asked = min(DEFAULT_NEW_TOKENS, left)
    if not 1 <= asked <= left:
        raise KVzipError(f"max_new_tokens is {asked}, there is room for 1 to {left} tokens")
    sampled = settings.get("do_sample", config and config.do_sample)
    return {**({} if sampled else GREEDY), **settings, "max_new_tokens": asked}


def _refuse_unknown_tail(kv: ContextCache) -> None:
    """Raise KVzipError if the tail holds tokens that only whoever put them there knows."""
    if kv.seen_tokens > len(kv.token_ids):
        raise KVzipError(
            f"the tail holds {kv.tail_length} tokens, of which this cache was told of "
            f"{len(kv.history)}: hand kv.fork() to other code, or forget them with kv.truncate(0)"
        )


def _end_tokens(model: PreTrainedModel, settings: dict[str, Any]) -> Tensor:
    """Tokens that end an answer."""
    config = settings.get("generation_config") or model.generation_config
    ends = settings.get("eos_token_id", config.eos_token_id)
    return torch.tensor([] if ends is None else ends).flatten()


def _answer(row: Tensor, ends: Tensor, filler: int) -> Tensor:
    """A row of a batch up to its end: its first end token, or where its filling begins."""
    found = torch.isin(row, ends).nonzero()
    if len(found):
        return row[: int(found[0]) + 1]
    tokens = (row != filler).nonzero()
    return row[: int(tokens[-1]) + 1] if len(tokens) else row[:0]
