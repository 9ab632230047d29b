"""The seam with transformers: the only file that touches its attention.

Models call `key, value = past_key_values.update(key, value, layer_idx)` and hand both, untouched,
to the attention function that their config names. A kvzip cache returns the *layer itself* in the
place of the key tensor; the function registered here asks that layer for the result. Nothing is
patched and no forward is copied: every decoder that uses transformers' attention interface works.

Importing this module registers the implementation `"kvzip"`. With any other cache, or none, it does
exactly what `"sdpa"` does.
"""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvzip.errors import KVzipError
from kvzip.kernels.logits import Logits

IMPLEMENTATION = "kvzip"

# Arguments that models pass along to every attention function and that change nothing here.
HARMLESS = frozenset({"cache_position", "logits_to_keep", "position_ids", "tokenizer", "use_cache"})


@runtime_checkable
class AttendingLayer(Protocol):
    """What a cache layer must offer to stand in for the key tensor."""

    def attend(self, query: Tensor, logits: Logits, window: int | None) -> Tensor:
        """Attend from `[B, Hq, t, D]` to everything the layer holds; same shape back."""
        ...


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | AttendingLayer,
    value: Tensor | AttendingLayer,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function in transformers' interface.

    Args:
        module: the calling attention module.
        query: `[B, Hq, t, D]`.
        key: a kvzip cache layer, or a tensor `[B, H, s, D]` from any other cache.
        value: as `key`.
        attention_mask: None with a kvzip cache, which is causal by construction.
        scaling: factor on the logits, `D ** -0.5` if None.
        dropout: must be 0 with a kvzip cache.
        sliding_window: window of this layer in tokens, or None.
        softcap: bound of the logits, or None (see `kernels.logits.Logits`).
        s_aux: `[Hq]`, sinks, or None (see the same).
        kwargs: whatever else the model passes; anything that would change the result is refused.

    Returns:
        `[B, t, Hq, D]`, and None for the weights.

    Raises:
        KVzipError: if the model asks for something that the kvzip cache does not implement.
    """
    if isinstance(key, Tensor):
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    # `is_causal=True` says what is done anyway; False would change it.
    asked = {**kwargs, "is_causal": kwargs.get("is_causal") is False}
    asked.update(attention_mask=attention_mask, dropout=dropout)
    refused = [name for name in asked if name not in HARMLESS and _is_set(asked[name])]
    if refused:
        raise KVzipError(
            f"{type(module).__name__} asks for {', '.join(sorted(refused))}, which attention over "
            "a kvzip cache does not implement: use this model without a kvzip cache"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = _attend(key, query, scale, softcap, s_aux, sliding_window)
    return out.transpose(1, 2).contiguous(), None  # some models take a view of it


@torch.compiler.disable  # what happens here is in-place, and no matter for a compiler
def _attend(
    layer: AttendingLayer,
    query: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    window: int | None,
) -> Tensor:
    return layer.attend(query, Logits(scale, softcap or None, sinks), window)


def _is_set(argument: Any) -> bool:
    return isinstance(argument, Tensor) or bool(argument)


def mask(*args: Any, kv_length: int, **kwargs: Any) -> Tensor | None:
    """Mask function in transformers' interface: None for kvzip caches, as `"sdpa"` otherwise.

    A kvzip cache reports no key columns (`kv_length == 0`): its layers are causal, and slide where
    the model's do, by construction.

    Raises:
        KVzipError: for a padding mask or a mask other than causal or sliding causal.
    """
    if kv_length != 0:
        result: Tensor | None = sdpa_mask(*args, kv_length=kv_length, **kwargs)
        return result
    padding = kwargs.get("attention_mask")
    if padding is not None and not bool(torch.all(padding)):
        raise KVzipError(
            "a kvzip cache takes no padded input: pass rows of equal length, or ask questions of "
            "different lengths with ModelKVzip.ask"
        )
    if kwargs.get("use_vmap") or not kwargs.get("allow_is_causal_skip"):
        raise KVzipError(
            "a kvzip cache supports causal text only, this model asks for another mask"
        )
    return None


AttentionInterface.register(IMPLEMENTATION, attention)
AttentionMaskInterface.register(IMPLEMENTATION, mask)
