"""`kvzip zip --streaming`: compress a document while it is read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvzip.budget import Budget
from kvzip.cli.budget import warnings_shown
from kvzip.cli.load_model import load_model
from kvzip.cli.options import DtypeName, QuantizationName
from kvzip.cli.pieces import Pieces
from kvzip.cli.progress import streaming_bar
from kvzip.cli.zip_report import Reading

if TYPE_CHECKING:
    from kvzip import ContextCache, ModelKVzip


def read_streaming(
    file: Path,
    model: str | None,
    *,
    device: str | None,
    dtype: DtypeName | None,
    quantization: QuantizationName | None,
    amount: Budget,
    chunk_size: int | None,
    budget: str,
    scorer: str | None,
    kv_dtype: str | None,
) -> Reading:
    """Load a model and read a document; the arguments are those of the command and of `stream`."""
    pieces = Pieces(file)
    loaded = load_model(
        model,
        device=device,
        dtype=dtype and dtype.value,
        quantization=quantization and quantization.value,
    )
    return stream(
        loaded,
        pieces,
        amount=amount,
        chunk_size=chunk_size,
        budget=budget,
        scorer=scorer,
        kv_dtype=kv_dtype,
    )


def stream(
    model: "ModelKVzip",
    pieces: Pieces,
    kv: "ContextCache | None" = None,
    *,
    amount: Budget,
    chunk_size: int | None,
    budget: str,
    scorer: str | None,
    kv_dtype: str | None,
) -> Reading:
    """Read a document into a cache, chunk after chunk.

    Args:
        model: the model.
        pieces: the document.
        kv: what to read further into, None for a new cache.
        amount: how much of the new pairs to keep.
        chunk_size: tokens that are read, scored and compacted at once, as the library if None.
        budget: see `kvzip.streaming.Streaming`.
        scorer: how to score them, None for as before, or else by reconstruction.
        kv_dtype: what to quantise all pairs to when the document is read, None to leave them.

    Raises:
        KVzipError: before anything is read, if they cannot be quantised so.
    """
    from kvzip.cli.timing import timed
    from kvzip.streaming import CHUNK_SIZE, chunks_of

    size = CHUNK_SIZE if chunk_size is None else chunk_size
    how: dict[str, Any] = {"ratio": amount, "chunk_size": size, "budget": budget}
    scored: dict[str, Any] = {} if scorer is None else {"scorer": scorer}
    ids = map(model.prompts.context_ids, pieces)
    tokens, seconds = 0, dict[str, float]()
    if kv_dtype is not None:
        (model.begin() if kv is None else kv).check(amount, kv_dtype=kv_dtype)
    shown = warnings_shown()
    timer = timed(seconds, "stream")
    with shown, timer, _peak(model) as held, streaming_bar(pieces.size) as report:
        for chunk in chunks_of(ids, size):
            if kv is None:
                kv = model.prefill(chunk, streaming=True, **how, **scored)
            else:
                model.extend(kv, chunk, **how, **scored)
            tokens += len(chunk)
            held.append(kv.nbytes)
            report(pieces.done, tokens, held[-1])
    assert kv is not None, "pieces hold some text"
    if kv_dtype is not None and kv_dtype != kv.kv_dtype:
        with timed(seconds, "quantise"):
            kv.quantize(kv_dtype)
    return Reading(model, kv, max(held), tokens, budget=amount, seconds=seconds)


@contextmanager
def _peak(model: "ModelKVzip") -> Iterator[list[int]]:
    """Note the bytes that a cache holds whenever the model has read into it."""
    from kvzip import ContextCache

    held: list[int] = []

    def note(module: Any, arguments: Any, named: dict[str, Any], output: Any) -> None:
        cache = named.get("past_key_values")
        if isinstance(cache, ContextCache):
            held.append(cache.nbytes)

    hook = model.hf_model.base_model.register_forward_hook(note, with_kwargs=True)
    try:
        yield held
    finally:
        hook.remove()
