"""Stage 2: how important is each context pair? One file a scorer; all return `Scores`.

Surrogates (`kvzip.surrogates`) are scorers, too. They score while a context is read.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from kvzip.errors import KVzipError

if TYPE_CHECKING:
    from kvzip.cache import Scores

SCORERS = {
    "reconstruction": "kvzip.scoring.reconstruction",
    "reconstruction+": "kvzip.scoring.contribution",
    "heads": "kvzip.scoring.heads",
    "prefill-attention": "kvzip.scoring.prefill_attention",
    "last-window": "kvzip.scoring.last_window",
    "expected-attention": "kvzip.scoring.expected_attention",
    "key-norm": "kvzip.scoring.key_norm",
    "sink-recent": "kvzip.scoring.sink_recent",
    "random": "kvzip.scoring.at_random",
}
"""By name, the module whose `score` scores a context; imported when it is asked for."""

REPEATING = ("reconstruction", "reconstruction+")
"""Those that repeat the context; their `score` takes a `reach`, too."""

SURROGATES = ("kvzap", "fastkvzip")
"""What stands in front of the colon in the name of a surrogate."""

EXAMPLES = ("kvzap:linear", "kvzap:mlp", "fastkvzip")


def get_scorer(name: str) -> Callable[..., Scores]:
    """The function `score(model, prompts, kv, *, max_positions, chunk_size, progress)` of a scorer.

    Args:
        name: a key of `SCORERS`, or the name of a surrogate (see `kvzip.surrogates.load`), whose
            function takes the loaded `surrogate`, too.

    Raises:
        KVzipError: for an unknown name, with the names that look like it or else all of them.
    """
    if not isinstance(name, str):
        raise KVzipError(f"a scorer is known by its name: got {name!r}")
    if name not in SCORERS and not is_surrogate(name):
        known = [*SCORERS, *EXAMPLES]
        close = difflib.get_close_matches(name.lower(), known)
        hint = " or ".join(repr(one) for one in close)
        remedy = f"did you mean {hint}?" if close else f"choose one of {', '.join(known)}"
        raise KVzipError(f"unknown scorer {name!r}: {remedy}")
    module = SCORERS.get(name, "kvzip.surrogates.predicting")
    score: Callable[..., Scores] = import_module(module).score
    return score


def is_surrogate(name: str) -> bool:
    """Whether a scorer is a surrogate, which predicts scores while a context is read."""
    return isinstance(name, str) and name.partition(":")[0] in SURROGATES
