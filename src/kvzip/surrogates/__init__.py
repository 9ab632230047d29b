"""Surrogates: small networks that predict scores from hidden states while a context is read.

A surrogate costs no second pass. It was trained on scores of one model, by reconstruction, and
predicts them for that model only. One file a published format:

- `kvzap`: Jegou and Jeblick, "KVzap: Fast, Adaptive, and Faithful KV Cache Pruning",
  arXiv 2601.07891; one that is trained here (`training`) is written in this format, too;
- `fast_kvzip`: Kim et al., "Fast KVzip: Efficient and Accurate LLM Inference with Gated KV
  Eviction", arXiv 2601.17668.
"""

from collections.abc import Mapping
from importlib import import_module

from transformers import PreTrainedModel

from kvzip.surrogates.predicting import Surrogate
from kvzip.surrogates.shape import shape_of

FORMATS = {"kvzap": "kvzip.surrogates.kvzap", "fastkvzip": "kvzip.surrogates.fast_kvzip"}


def load(scorer: str, model: PreTrainedModel, kv_heads: Mapping[int, int]) -> Surrogate:
    """The surrogate of a model.

    Args:
        scorer: a format, and behind a colon where to find the surrogate: `"kvzap:linear"` and
            `"kvzap:mlp"` (in the model's own folder, or else as published for it), `"kvzap:PATH"`,
            `"kvzap:owner/name"`, `"fastkvzip"` (as published for the model), `"fastkvzip:PATH"`.
        model: the model.
        kv_heads: KV heads of each layer with full attention, by its index.

    Raises:
        KVzipError: if there is no such surrogate, it is damaged, or it does not fit the model.
    """
    name, _, where = scorer.partition(":")
    surrogate: Surrogate = import_module(FORMATS[name]).load(
        where, shape_of(model, kv_heads), model.device, model.dtype
    )
    return surrogate
