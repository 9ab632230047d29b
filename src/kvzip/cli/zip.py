"""`kvzip zip`: read a document, evict, save."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from kvzip.budget import Budget, Span
from kvzip.cli.append import append
from kvzip.cli.budget import (
    Bytes,
    Keep,
    KeepText,
    MinPerHead,
    Threshold,
    Tokens,
    parts_to_keep,
    warnings_shown,
)
from kvzip.cli.load_model import load_model
from kvzip.cli.options import (
    STANDARD_INPUT,
    Device,
    Dtype,
    DtypeName,
    Json,
    KvDtype,
    Level,
    Model,
    Quantization,
    QuantizationName,
    read_document,
)
from kvzip.cli.progress import progress_bar
from kvzip.cli.streaming import read_streaming
from kvzip.cli.zip_report import Reading, print_report
from kvzip.errors import KVzipError

EXAMPLES = (
    "Examples:\n\n"
    "kvzip zip report.txt -m qwen2.5-7b -r 0.3 -o report.kvz\n\n"
    'kvzip zip report.txt --bytes 2GB --keep-text "Table 1"\n\n'
    "pdftotext report.pdf - | kvzip zip - --streaming -o report.kvz\n\n"
    "kvzip zip --append report.kvz annex.txt"
)
RATIO = 0.3
SCORER = "reconstruction"
STREAMING_OPTIONS = ("--chunk-size", "--budget")


class StreamingBudget(StrEnum):
    """Budgets of `streaming.Streaming`."""

    chunk = "chunk"
    context = "context"


class Reach(StrEnum):
    """Reaches of `scoring.reconstruction`."""

    context = "context"
    chunk = "chunk"


def zip_file(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A UTF-8 text, - for the standard input.")
    ],
    model: Model = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            "--ratio",
            "-r",
            help="Share of the key-value pairs to keep, in (0, 1].",
            show_default="0.3, or that of the file appended to",
        ),
    ] = None,
    tokens: Tokens = None,
    bytes: Bytes = None,
    threshold: Threshold = None,
    min_per_head: MinPerHead = 0,
    keep: Keep = None,
    keep_text: KeepText = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File to write.",
            show_default="FILE, ending in .kvz, or the file appended to",
        ),
    ] = None,
    level: Annotated[
        Level,
        typer.Option(
            help="Choose among all pairs together, in each head by itself, or whole heads."
        ),
    ] = Level.pair,
    scorer: Annotated[
        str | None,
        typer.Option(
            help="How pairs are scored; a surrogate, such as kvzap:mlp, needs no second pass.",
            show_default="reconstruction, or that of the file appended to",
        ),
    ] = None,
    reach: Annotated[
        Reach | None,
        typer.Option(
            help="What a scoring pass attends to; chunk is cheaper.", show_default="context"
        ),
    ] = None,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Compress while reading, in bounded memory.")
    ] = False,
    append_to: Annotated[
        Path | None,
        typer.Option(
            "--append",
            metavar="FILE.kvz",
            help="Read FILE behind the document in this file, streaming.",
            show_default=False,
        ),
    ] = None,
    chunk_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Streaming: tokens compressed at once.", show_default="as the library"
        ),
    ] = None,
    budget: Annotated[
        StreamingBudget | None,
        typer.Option(
            help="Streaming: a share of every chunk, or the best pairs of all so far.",
            show_default="chunk",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output.")] = False,
    dtype: Dtype = None,
    quantization: Quantization = None,
    kv_dtype: KvDtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Read a document once, evict most of its KV cache, and save the rest to a .kvz file."""
    limits: dict[str, Any] = {"tokens": tokens, "bytes": bytes, "threshold": threshold}
    _check_options(
        "--append" if append_to else "--streaming" if streaming else None,
        {
            "--tokens": tokens is not None,
            "--bytes": bytes is not None,
            "--threshold": append_to is not None and threshold is not None,
            "--min-per-head": min_per_head > 0,
            "--keep": bool(keep),
            "--keep-text": bool(keep_text),
            "--level": level is not Level.pair,
            "--reach": reach is not None,
            "--chunk-size": chunk_size is not None,
            "--budget": budget is not None,
            "--dtype": append_to is not None and dtype is not None,
            "--quantization": append_to is not None and quantization is not None,
        },
    )
    given = [limit for limit in (ratio, *limits.values()) if limit is not None]
    asked = Budget(ratio if given else RATIO, **limits, min_per_head=min_per_head)
    parts = parts_to_keep(keep or (), keep_text or ())
    output = _output(file, output, append_to)
    overwrite = force or output == append_to
    from kvzip.loading import resolve
    from kvzip.scoring import get_scorer
    from kvzip.selection import check_level
    from kvzip.storage import check_output

    check_level(level.value, asked)
    get_scorer(scorer or SCORER)
    check_output(output, overwrite=overwrite)
    if append_to is None or model is not None:
        resolve(model)
    codes = kv_dtype and kv_dtype.value
    how: dict[str, Any] = {
        "chunk_size": chunk_size,
        "budget": (budget or StreamingBudget.chunk).value,
        "scorer": scorer,
        "kv_dtype": codes,
    }
    if append_to is not None:
        read = append(append_to, file, model=model, device=device, ratio=ratio, **how)
    elif streaming:
        read = read_streaming(
            file,
            model,
            device=device,
            dtype=dtype,
            quantization=quantization,
            amount=asked,
            **how,
        )
    else:
        read = _read_twice(
            file,
            model,
            device=device,
            dtype=dtype,
            quantization=quantization,
            budget=asked,
            parts=parts,
            level=level,
            scorer=scorer or SCORER,
            reach=reach or Reach.context,
            kv_dtype=codes,
        )
    from kvzip.cli.timing import timed

    with timed(read.seconds, "save"):
        read.kv.save(output.resolve(), overwrite=overwrite)  # a link to a file stays one
    print_report(output, read, as_json=as_json)


def _read_twice(
    file: Path,
    model: str | None,
    *,
    device: str | None,
    dtype: DtypeName | None,
    quantization: QuantizationName | None,
    budget: Budget,
    parts: Sequence[str | Span],
    level: Level,
    scorer: str,
    reach: Reach,
    kv_dtype: str | None,
) -> Reading:
    """Read a document, score all of it, and evict."""
    text = read_document(file)
    from kvzip.cli.timing import timed
    from kvzip.scoring import is_surrogate
    from kvzip.spans import characters

    places = characters(text, parts)
    kvzip_model = load_model(
        model,
        device=device,
        dtype=dtype and dtype.value,
        quantization=quantization and quantization.value,
    )
    if places:
        budget = replace(budget, keep=kvzip_model.spans(text, places))
    seconds: dict[str, float] = {}
    with progress_bar(("prefill", "score")) as progress:
        with timed(seconds, "prefill"):
            if is_surrogate(scorer):
                kv = kvzip_model.prefill(text, scorer=scorer, reach=reach.value, progress=progress)
            else:
                kv = kvzip_model.read(text, progress=progress)
        kv.check(budget, level.value, kv_dtype)
        if not is_surrogate(scorer):
            with timed(seconds, "score"):
                kvzip_model.score(kv, scorer=scorer, reach=reach.value, progress=progress)
    full = kv.nbytes
    with warnings_shown(), timed(seconds, "compact"):
        kv.prune(budget, level.value, kv_dtype=kv_dtype)
    tokens = kv.document.context_length
    return Reading(
        kvzip_model,
        kv,
        full,
        tokens,
        budget=budget,
        level=level.value,
        full=full,
        seconds=seconds,
    )


def _check_options(streams: str | None, given: Mapping[str, bool]) -> None:
    """Raise KVzipError for options that do not go together.

    Args:
        streams: the option that makes this a streaming one, None if it is not.
        given: whether the option was given, for those that depend on it.
    """
    for option in (option for option, is_given in given.items() if is_given):
        if streams and option not in STREAMING_OPTIONS:
            raise KVzipError(f"{option} does not go with {streams}: leave it out")
        if not streams and option in STREAMING_OPTIONS:
            raise KVzipError(f"{option} is for streaming: add --streaming, or leave it out")


def _output(file: Path, output: Path | None, append_to: Path | None) -> Path:
    """Where to write."""
    output = output or append_to
    if output is None:
        if file == STANDARD_INPUT:
            raise KVzipError("the standard input has no name to go by: say where with --output")
        output = file.with_suffix(".kvz")
    if output.exists() and file.exists() and output.samefile(file):
        raise KVzipError(f"{file} would be overwritten: name another --output")
    return output
