"""Attention of a repeat input that reaches no further than its chunk, and the chunk's scores.

Both have the same softmax, over the columns [prefix ; chunk ; repeat input (causal)]: the dense
kernel that attends also says the log-sum-exp, so that scoring need not find it again.
"""

import torch
from torch import Tensor

from kvzip.kernels.chunk_attention import chunk_attention
from kvzip.kernels.dense import add_sinks, blend, fastest
from kvzip.kernels.logits import Logits
from kvzip.kernels.reconstruction_score import largest_probabilities, reconstruction_score
from kvzip.kernels.softcap import LOG2_E


def repeat_attention(
    query: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    chunk_keys: Tensor,
    chunk_values: Tensor,
    keys: Tensor,
    values: Tensor,
    logits: Logits,
    *,
    query_weights: Tensor | None = None,
    key_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.repeat_attention`."""
    seen_keys = torch.cat([prefix_keys, chunk_keys], dim=1)[None]
    seen_values = torch.cat([prefix_values, chunk_values], dim=1)[None]
    weights = {"query_weights": query_weights, "key_weights": key_weights}
    attend = fastest(query.device, query.dtype, query.shape[-1])
    if attend is None or logits.softcap is not None:
        scores = reconstruction_score(
            query[0], prefix_keys, chunk_keys, keys[0].contiguous(), logits, **weights
        )
        return chunk_attention(query, seen_keys, seen_values, keys, values, logits), scores
    own = attend(query, keys, values, logits.scale, True)
    out, lse = blend(*own, *attend(query, seen_keys, seen_values, logits.scale, False))
    total = (
        lse[0] if logits.sinks is None else torch.logaddexp(lse[0], logits.sinks.float()[:, None])
    )
    scores = largest_probabilities(query[0], chunk_keys, total * LOG2_E, logits, **weights)
    return add_sinks(out, lse, logits.sinks), scores
