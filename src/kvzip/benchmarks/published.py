"""The published approach, written from its description (Kim et al., arXiv 2505.23416).

- Decoding: FlashAttention-2 with a sequence for each KV head of each batch row, whose queries are
  the query heads of its group. Heads lie one behind the other, so that each new token means copying
  the whole cache into a new one with a gap behind every head.
- Prefill: FlashAttention-2 in chunks, on a cache that is concatenated.
- Scoring: the softmax over [prefix ; chunk ; repeat input] as a matrix, in float32, of logits in
  the model's dtype.

FlashAttention-2 is the one that PyTorch brings along, called at the operator that both its
`scaled_dot_product_attention` and its `varlen_attn` call.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PreTrainedModel,
)

from kvzip.kernels import reference
from kvzip.kernels.logits import Logits
from kvzip.prompts import Prompts

IMPLEMENTATION = "kvzip-published"
"""The name that the attention function is registered under by `register`."""


def flash_attention(query: Tensor, keys: Tensor, values: Tensor, logits: Logits) -> Tensor:
    """Dense FlashAttention-2, causal and aligned at the bottom right.

    Args:
        query: `[B, Hq, t, D]`.
        keys: `[B, H, s, D]` with `s >= t`.
        values: `[B, H, s, D]`.
        logits: scaled products, and nothing else.
    """
    t, s = query.shape[2], keys.shape[2]
    if query.device.type != "cuda":
        parts = (keys[:, :, : s - t], values[:, :, : s - t])
        own = (keys[:, :, s - t :], values[:, :, s - t :])
        return reference.chunk_attention(query, *parts, *own, logits)
    q, k, v = (part.transpose(1, 2) for part in (query, keys, values))
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, t, s, 0.0, True, False, scale=logits.scale
    )[0]
    return out.transpose(1, 2)


@dataclass(frozen=True)
class Flattened:
    """Keys and values of all heads of all batch rows, sequence after sequence.

    Attributes:
        keys: `[rows, 1, D]`.
        values: `[rows, 1, D]`.
        ends: `[B * H + 1]`, int32: sequence `i` owns rows `ends[i]:ends[i + 1]`.
        lengths: rows of each sequence.
    """

    keys: Tensor
    values: Tensor
    ends: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(
        cls, keys: Tensor, values: Tensor, indptr: Tensor, tail_keys: Tensor, tail_values: Tensor
    ) -> "Flattened":
        """A packed context (`[rows, D]`) and its tail (`[B, H, s, D]`), for each batch row."""
        lengths = indptr.diff().tolist()
        parts: list[list[Tensor]] = [[], []]
        for into, packed, tails in zip(
            parts, (keys, values), (tail_keys, tail_values), strict=True
        ):
            for row in tails:
                for head, tail in zip(packed.split(lengths), row, strict=True):
                    into += [head, tail]
        tail = tail_keys.shape[2]
        sequences = tuple(length + tail for length in lengths) * len(tail_keys)
        ends = torch.tensor([0, *sequences]).cumsum(0).to(keys.device, torch.int32)
        return cls(torch.cat(parts[0])[:, None], torch.cat(parts[1])[:, None], ends, sequences)


def varlen_attention(
    query: Tensor, flattened: Flattened, query_ends: Tensor, logits: Logits
) -> Tensor:
    """FlashAttention-2 with heads as sequences, causal and aligned at the bottom right.

    Args:
        query: `[B, Hq, t, D]`.
        flattened: B * H sequences.
        query_ends: `[B * H + 1]`, int32: multiples of t.
        logits: scaled products, and nothing else.
    """
    batch, query_heads, t, dim = query.shape
    sequences = len(flattened.lengths)
    group = batch * query_heads // sequences
    q = query.reshape(sequences, group, t, dim).transpose(1, 2).reshape(-1, group, dim)
    if query.device.type != "cuda":
        parts = [
            flash_attention(one.transpose(0, 1)[None], k.mT[None].mT, v.mT[None].mT, logits)
            for one, k, v in zip(
                q.split(t),
                (k.transpose(0, 1) for k in flattened.keys.split(flattened.lengths)),
                (v.transpose(0, 1) for v in flattened.values.split(flattened.lengths)),
                strict=True,
            )
        ]
        return torch.cat(parts).reshape(batch, query_heads, t, dim)
    longest = max(flattened.lengths)
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q, flattened.keys, flattened.values, query_ends, flattened.ends, t, longest,
        0.0, True, False, scale=logits.scale,
    )[0]  # fmt: skip
    out = out.view(sequences, t, group, dim).transpose(1, 2)
    return out.reshape(batch, query_heads, t, dim)


def insert(
    flattened: Flattened, new_keys: Sequence[Tensor], new_values: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Copy all rows and put one new row (`[1, 1, D]`) behind each sequence."""
    copies = []
    for packed, new in ((flattened.keys, new_keys), (flattened.values, new_values)):
        heads = packed.split(flattened.lengths)
        copies.append(torch.cat([part for pair in zip(heads, new, strict=True) for part in pair]))
    return copies[0], copies[1]


def materialised_score(
    query: Tensor, prefix_keys: Tensor, chunk_keys: Tensor, repeat_keys: Tensor, logits: Logits
) -> Tensor:
    """Scores of a chunk from the whole matrix of probabilities; arguments as in `reference`."""
    kv_heads, p, _ = prefix_keys.shape
    m, t = chunk_keys.shape[1], query.shape[1]
    keys = torch.cat([prefix_keys, chunk_keys, repeat_keys], dim=1)
    found = torch.bmm(query.reshape(kv_heads, -1, query.shape[-1]), keys.mT) * logits.scale
    found = found.view(kv_heads, -1, t, p + m + t)
    hidden = torch.ones(t, t, dtype=torch.bool, device=query.device).triu_(1)
    found[..., p + m :].masked_fill_(hidden, -torch.inf)
    weights = found.softmax(-1, dtype=torch.float32)
    return weights[..., p : p + m].amax((1, 2))


@dataclass(frozen=True)
class Scoring:
    """What a repeat pass hands to the attention function, and gets back.

    Attributes:
        prefix_length: p.
        chunk: positions of the chunk that is repeated.
        scores: gets `[H, m]` of each layer.
    """

    prefix_length: int
    chunk: slice
    scores: list[Tensor] = field(default_factory=list)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    scoring: Scoring | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function in transformers' interface."""
    logits = Logits(scaling)
    if scoring is not None:
        scores = materialised_score(
            query[0],
            key[0, :, : scoring.prefix_length],
            key[0, :, scoring.chunk],
            key[0, :, -query.shape[2] :],
            logits,
        )
        scoring.scores.append(scores)
    return flash_attention(query, key, value, logits).transpose(1, 2), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """`attention` is causal by construction."""


def register() -> None:
    """Make `IMPLEMENTATION` known to transformers."""
    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)


@torch.no_grad()
def read(model: PreTrainedModel, token_ids: Tensor, chunk_size: int) -> DynamicCache:
    """Prefill: `[p + n]` token ids through a model whose attention is `IMPLEMENTATION`."""
    cache = DynamicCache(config=model.config)
    for chunk in token_ids.split(chunk_size):
        model.base_model(
            input_ids=chunk[None].to(model.device), past_key_values=cache, use_cache=True
        )
    return cache


@torch.no_grad()
def score(
    model: PreTrainedModel,
    prompts: Prompts,
    cache: DynamicCache,
    token_ids: Tensor,
    prefix_length: int,
    chunk_size: int,
) -> Tensor:
    """Scores `[L, H, n]` of every context pair, a repeat pass for each chunk."""
    total = len(token_ids)
    scores = []
    start, before = prefix_length, None
    for chunk in token_ids[prefix_length:].split(chunk_size):
        scoring = Scoring(prefix_length, slice(start, start + len(chunk)))
        model.base_model(
            input_ids=prompts.repeat_ids(before, chunk)[None].to(model.device),
            past_key_values=cache,
            use_cache=True,
            scoring=scoring,
        )
        truncate(cache, total)
        scores.append(torch.stack(scoring.scores).cpu())
        start, before = start + len(chunk), chunk
    return torch.cat(scores, dim=-1)


def truncate(cache: DynamicCache, length: int) -> None:
    """Forget all but the first `length` tokens of a cache that is concatenated."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
