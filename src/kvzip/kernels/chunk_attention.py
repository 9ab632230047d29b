"""Dense attention of a chunk of tokens, by the fastest kernel that there is for it.

PyTorch's kernels (`dense`) do not take two stretches of keys, and cuDNN's causal mask starts at the
top left: so the chunk attends to the context (no mask) and to itself (square and causal) one after
the other, and the two are blended by their log-sum-exp. Nothing is concatenated and no mask is
made. None of them caps logits: where a model does, the kernel for packed pairs attends.
"""

import torch
from torch import Tensor

from kvzip.kernels import reference
from kvzip.kernels.dense import add_sinks, blend, fastest
from kvzip.kernels.logits import Logits
from kvzip.kernels.zipped_attention import zipped_attention


def chunk_attention(
    query: Tensor,
    context_keys: Tensor,
    context_values: Tensor,
    keys: Tensor,
    values: Tensor,
    logits: Logits,
) -> Tensor:
    """See `reference.chunk_attention`."""
    if logits.softcap is not None:
        one_by_one = (part.split(1) for part in (query, context_keys, context_values, keys, values))
        return torch.cat([_capped(row, logits) for row in zip(*one_by_one, strict=True)])
    attend = fastest(query.device, query.dtype, query.shape[-1])
    if attend is None:
        return reference.chunk_attention(query, context_keys, context_values, keys, values, logits)
    out = attend(query, keys, values, logits.scale, True)
    if context_keys.shape[2]:
        out = blend(*out, *attend(query, context_keys, context_values, logits.scale, False))
    return add_sinks(*out, logits.sinks)


def _capped(row: tuple[Tensor, ...], logits: Logits) -> Tensor:
    """The same for a single row, `B` = 1, whose context is packed where it is not."""
    query, context_keys, context_values, keys, values = row
    heads, s, _ = context_keys.shape[1:]
    return zipped_attention(
        query,
        context_keys[0].flatten(0, 1),
        context_values[0].flatten(0, 1),
        torch.arange(heads + 1, device=query.device) * s,
        keys.contiguous(),
        values.contiguous(),
        logits,
    )
