"""Stage 5: answers. Transformers prepares, this loop decodes, in a tail beside the cache's own.

Generation settings, logits processors, stopping criteria and streamers are transformers' own:
`hf_model.generate` sets them up and calls `decode` in the place of its own loop.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from kvzip.cache import ContextCache
from kvzip.errors import KVzipError
from kvzip.room import Decoder, Room
from kvzip.shrinking import Shrinker

DEFAULT_NEW_TOKENS = 512

# Answers are greedy unless the caller samples; these neutral values silence the settings for
# sampling that many checkpoints bring along.
GREEDY = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}

# Settings that ask for another loop or another kind of result, with the one value that fits.
FIXED = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "assistant_model": None,
    "prompt_lookup_num_tokens": None,
    "guidance_scale": None,
}
# What `generate` takes and the cache decides.
NOT_SETTINGS = frozenset(
    {
        "attention_mask",
        "custom_generate",
        "input_ids",
        "inputs",
        "inputs_embeds",
        "max_length",
        "negative_prompt_ids",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "past_key_values",
        "position_ids",
    }
)


def generate(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    kv: ContextCache,
    query_ids: Tensor,
    *,
    max_positions: int,
    update_cache: bool = False,
    streamer: BaseStreamer | None = None,
    shrinker: Shrinker | None = None,
    **settings: Any,
) -> Tensor:
    """Answer one question.

    The cache is not changed, unless `update_cache` adds question and answer when all went well.

    Args:
        decoder: runs the model that made the cache.
        tokenizer: its tokenizer, for stop strings.
        kv: the cache.
        query_ids: `[t]`, int64: tokens behind everything the cache has seen.
        max_positions: positions that the model was made for.
        update_cache: whether to keep question and answer in the cache.
        streamer: gets the question and then each new token.
        shrinker: evicts of what stands behind the context whenever its space is full; None keeps
            all of it.
        settings: of transformers' `GenerationConfig`, such as `max_new_tokens`, `do_sample`,
            `temperature`, `stop_strings` or `eos_token_id`.

    Returns:
        `[tokens]`, int64, on the CPU: the answer with its end token, if it came to that.

    Warns:
        KVzipWarning: if the shrinker has kept nothing.
    """
    refuse_unknown_tail(kv)
    if not len(query_ids):
        raise KVzipError("the question is empty")
    sequence = torch.cat([kv.token_ids, query_ids.cpu()])
    settings = _settings(decoder.model, settings, len(sequence), max_positions)
    new_tokens = len(sequence) - kv.seen_tokens + settings["max_new_tokens"]
    columns = kv.tail_length + new_tokens
    if shrinker is not None and update_cache:
        shrinker.check(kv)
    if shrinker is None or columns <= shrinker.how.columns:  # nothing will leave the window
        room = decoder.room(kv, columns=columns)
    else:
        room = decoder.private_room(kv, columns=shrinker.how.columns)
    if streamer is not None:
        streamer.put(query_ids.cpu())
    run = _run(room, tokenizer, sequence[None], settings, streamer=streamer, shrinker=shrinker)
    answer = run[0]
    if shrinker is not None:
        shrinker.warn_if_all_gone(room.cache, kv.document.context_length)
    if update_cache:
        kv.adopt(room.cache, torch.cat([query_ids.cpu(), answer]))
    return answer


def generate_batch(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    kv: ContextCache,
    queries: Sequence[Tensor],
    *,
    max_positions: int,
    **settings: Any,
) -> list[Tensor]:
    """Answer several questions on one context in one go; the cache is not changed.

    Rows are padded on the left behind the context, which is shared; a row never sees its padding.
    Layers of linear attention would: with them, questions are answered one after the other.

    Args:
        decoder: runs the model that made the cache.
        tokenizer: its tokenizer, for stop strings.
        kv: the cache; whatever stands in its tail is read again in front of every question.
        queries: `[t_b]`, int64, for each row.
        max_positions: positions that the model was made for.
        settings: as in `generate`.

    Returns:
        `[tokens]`, int64, on the CPU, for each question.
    """
    refuse_unknown_tail(kv)
    if kv.stateful and len(queries) > 1:
        return [
            generate_batch(
                decoder, tokenizer, kv, [query], max_positions=max_positions, **settings
            )[0]
            for query in queries
        ]
    rows = [torch.cat([kv.history, query.cpu()]) for query in queries]
    longest = max(len(row) for row in rows)
    context = kv.document.token_ids
    settings = _settings(decoder.model, settings, len(context) + longest, max_positions)
    # Padding repeats the first token, so that penalties on seen tokens see nothing new.
    sequences = context[0].repeat(len(rows), len(context) + longest)
    sequences[:, : len(context)] = context
    for sequence, row in zip(sequences, rows, strict=True):
        sequence[-len(row) :] = row
    starts = torch.tensor([longest - len(row) for row in rows])
    columns = torch.arange(longest)
    positions = len(context) + (columns - starts[:, None]).clamp_min(0)
    context_positions = torch.arange(len(context)).expand(len(rows), -1)
    position_ids = torch.cat([context_positions, positions], dim=1)
    room = decoder.room(
        kv,
        columns=longest + settings["max_new_tokens"],
        batch=len(rows),
        starts=starts.to(decoder.model.device),
    )
    return _run(room, tokenizer, sequences, settings, position_ids=position_ids)


def _run(
    room: Room,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Tensor,
    settings: dict[str, Any],
    *,
    streamer: BaseStreamer | None = None,
    shrinker: Shrinker | None = None,
    position_ids: Tensor | None = None,
) -> list[Tensor]:
    """Continue `[B, s]` sequences, of which the room's cache has seen a part; their new tokens."""
    model = room.decoder.model
    input_ids = sequences.to(model.device)
    if position_ids is not None:
        settings = {**settings, "position_ids": position_ids.to(model.device)}
    # transformers hands no tokenizer to stopping criteria when another loop than its own decodes
    criteria = StoppingCriteriaList(settings.pop("stopping_criteria", None) or [])
    if strings := settings.pop("stop_strings"):
        criteria.append(StopStringCriteria(tokenizer, strings))
    try:
        output, lengths = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            past_key_values=room.cache,
            stopping_criteria=criteria,
            stop_strings=None,
            custom_generate=partial(decode, room=room, streamer=streamer, shrinker=shrinker),
            **settings,
        )
        rows = zip(output[:, sequences.shape[1] :].cpu(), lengths.tolist(), strict=True)
        return [row[:length] for row, length in rows]
    finally:
        room.end()


def decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    room: Room,
    streamer: BaseStreamer | None = None,
    shrinker: Shrinker | None = None,
    **prepared: Any,
) -> tuple[Tensor, Tensor]:
    """Read what the room has not seen, then decode token after token until every row has ended.

    Once a step is recorded, the device takes the next one while the host finds out whether it is
    needed; the last one is taken back.

    The signature is what transformers' `generate` calls (`custom_generate`).

    Args:
        model: the model, which the room runs.
        input_ids: `[B, s]`, int64: whole sequences, of which the room has seen a part.
        logits_processor: applied to the logits of every step.
        stopping_criteria: say after every step which rows have ended.
        generation_config: says whether to sample.
        room: where to decode; its tails grow by all but the last new token.
        streamer: gets each new token.
        shrinker: makes space in a room that is too small for all of an answer, of a single row.
        prepared: what else transformers prepared for the model: of it, `position_ids` `[B, s]` are
            needed.

    Returns:
        `[B, s + new]`, the sequences with their new tokens, rows that ended early filled up with
        their first token, and `[B]`, the number of new tokens in each row.
    """
    seen = room.cache.seen_tokens
    positions: Tensor = prepared["position_ids"][:, seen:]
    logits = room.read(input_ids[:, seen:], positions)
    unfinished = torch.ones_like(input_ids[:, 0], dtype=torch.bool)
    lengths = torch.zeros_like(input_ids[:, 0])
    while True:
        scores = logits_processor(input_ids, logits.float())
        if generation_config.do_sample:
            drawn = torch.multinomial(scores.softmax(-1), num_samples=1)
            chosen = room.cache.division.agreed(drawn)
        else:
            chosen = scores.argmax(-1, keepdim=True)
        tokens = torch.where(unfinished[:, None], chosen, input_ids[:, :1])
        positions = positions[:, -1:] + 1
        input_ids = torch.cat([input_ids, tokens], dim=1)
        lengths += unfinished
        unfinished = unfinished & ~stopping_criteria(input_ids, None)
        reported = _send_to_host(torch.cat([tokens.flatten(), unfinished]))
        more = input_ids.shape[1] < generation_config.max_length
        ahead = room.recorded and not room.full and more
        if ahead:
            logits = room.step(tokens, positions)
        said, going = reported().split(len(tokens))
        if streamer is not None:
            streamer.put(said)
        if not going.any():
            break
        if not ahead:
            if shrinker is not None and room.full:
                room.shrink(shrinker, input_ids)
            logits = room.step(tokens, positions)
    if ahead:
        room.take_back()
    if streamer is not None:
        streamer.end()
    return input_ids, lengths


def _send_to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Start copying; the function returned waits for this copy, not for what comes later."""
    if tensor.device.type != "cuda":
        return tensor.cpu
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(tensor.device))

    def wait() -> Tensor:
        arrived.synchronize()
        return copy

    return wait


def _settings(
    model: PreTrainedModel, settings: dict[str, Any], used: int, max_positions: int
) -> dict[str, Any]:
    """Greedy by default, and never beyond the model's positions."""
    left = max_positions - used
    if left < 1:
        raise KVzipError(
            f"context and question take {used} positions, the model has {max_positions}: shorten "
            "the question"
        )
    if given := sorted(settings.keys() & NOT_SETTINGS):
        raise KVzipError(
            f"{', '.join(given)} cannot be set here: say how long an answer may be with "
            "max_new_tokens, and use hf_model.generate with kv.fork() for the rest"
        )
    if images := sorted(name for name in settings if name.startswith(("image_", "pixel_values"))):
        raise KVzipError(
            f"{', '.join(images)} cannot be read: a kvzip cache holds text, ask about text only"
        )
    config = settings.get("generation_config")
    for name, value in FIXED.items():
        if (settings.get(name, getattr(config, name, None)) or value) != value:
            raise KVzipError(
                f"{name} must be {value}: each question gets one answer, decoded token by token"
            )
    asked = settings.get("max_new_tokens", config and config.max_new_tokens)
    if asked is None:
        asked = min(DEFAULT_NEW_TOKENS, left)
    if not 1 <= asked <= left:
        raise KVzipError(f"max_new_tokens is {asked}, there is room for 1 to {left} tokens")
    sampled = settings.get("do_sample", config and config.do_sample)
    strings = settings.get("stop_strings", (config or model.generation_config).stop_strings)
    fixed = {"max_new_tokens": asked, "stop_strings": strings}
    return {**({} if sampled else GREEDY), **settings, **fixed}


def refuse_unknown_tail(kv: ContextCache) -> None:
    """Raise KVzipError if the tail holds tokens that only whoever put them there knows."""
    if kv.seen_tokens > len(kv.token_ids):
        raise KVzipError(
            f"the tail holds {kv.tail_length} tokens, of which this cache was told of "
            f"{len(kv.history)}: hand kv.fork() to other code, or forget them with kv.truncate(0)"
        )
