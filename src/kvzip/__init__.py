"""KVzip: read a long context once, evict most of its KV cache for real, ask it anything.

    from kvzip import ModelKVzip

    model = ModelKVzip()                        # a name, a folder, or the bundled model
    kv = model.prefill(context).prune(ratio=0.3)
    print(model.generate(model.apply_template("What is my name?"), kv=kv))

Importing this package imports neither torch nor transformers; names are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvzip.budget import Budget
    from kvzip.cache import ContextCache, Scores
    from kvzip.errors import KVzipError
    from kvzip.model import ModelKVzip
    from kvzip.shrinking import Shrinking

__version__ = "0.1.0"
__all__ = [
    "Budget",
    "ContextCache",
    "KVzipError",
    "ModelKVzip",
    "Scores",
    "Shrinking",
    "__version__",
]

_HOMES = {
    "Budget": "kvzip.budget",
    "ContextCache": "kvzip.cache",
    "KVzipError": "kvzip.errors",
    "ModelKVzip": "kvzip.model",
    "Scores": "kvzip.cache",
    "Shrinking": "kvzip.shrinking",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
