"""What small models are compared with: plain attention over whole sequences, in float64.

It is registered with transformers, as any attention implementation is. Text and question are read
at once, without a cache: what one evicted is masked, and what its codes stand for replaces what the
model made.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from kvzip.cache import ContextCache
from kvzip.kernels.quantization import QuantizedRows, dequantize
from kvzip.pairs import QuantizedPairs

MASKED = "kvzip-masked"
"""The attention implementation that `masked_attention` registers."""


@contextmanager
def masked_attention(kv: ContextCache) -> Iterator[None]:
    """Register attention over whole sequences, in float64, that a cache's evicted pairs are not in.

    Args:
        kv: the cache; what is behind its context sees the pairs that it holds, or what their codes
            stand for, and no more.
    """
    held = {index: layer.context for index, layer in enumerate(kv.layers) if layer in kv.prunable}

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        group = query.shape[1] // key.shape[1]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling

        def attend(queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
            keys, values = (part.repeat_interleave(group, dim=1) for part in (keys, values))
            logits = queries @ keys.mT * scale
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            logits = logits.masked_fill(hidden, -torch.inf)
            if s_aux is not None:
                column = s_aux.double().view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
                logits = torch.cat([logits, column], dim=-1)
            return logits.softmax(-1)[..., : keys.shape[2]] @ values

        queries, keys, values = (part.double() for part in (query, key, value))
        i, j = (torch.arange(part.shape[2], device=query.device) for part in (query, key))
        i = i[:, None]
        hidden = j > i
        if sliding_window is not None:
            hidden = hidden | (j <= i - sliding_window)
        output = attend(queries, keys, values, hidden)
        if module.layer_idx in held:
            context = held[module.layer_idx]  # type: ignore[index]
            seen = context.kept.shape[1]
            gone = ~context.kept.to(query.device).repeat_interleave(group, dim=0)
            hidden = hidden[seen:].repeat(query.shape[1], 1, 1)
            hidden[:, :, :seen] |= gone[:, None]
            if isinstance(context, QuantizedPairs):
                keys[0, :, :seen] = _dense(context.keys, context.kept)
                values[0, :, :seen] = _dense(context.values, context.kept)
            output[:, :, seen:] = attend(queries[:, :, seen:], keys, values, hidden)
        return output.to(query.dtype).transpose(1, 2).contiguous(), None

    AttentionInterface.register(MASKED, attention)
    try:
        yield
    finally:
        AttentionInterface._global_mapping.pop(MASKED, None)


def _dense(rows: QuantizedRows, kept: Tensor) -> Tensor:
    """What rows stand for, `[H, s, D]`, float64; 0 where there is none."""
    dense = rows.center.new_zeros((*kept.shape, rows.center.shape[1]), dtype=torch.float64)
    heads = dequantize(rows, kept.sum(1).tolist(), torch.float64)
    dense[kept.to(rows.device)] = torch.cat([*heads])
    return dense
