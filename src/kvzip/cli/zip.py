"""`kvzip zip`: read a document, evict, save."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal

from kvzip.cli.facts import durations, facts, shrinking
from kvzip.cli.load_model import load_model
from kvzip.cli.options import (
    STANDARD_INPUT,
    Device,
    Dtype,
    Json,
    Level,
    Model,
    Ratio,
    read_document,
)
from kvzip.cli.progress import progress_bar
from kvzip.errors import KVzipError

EXAMPLES = (
    "Examples:\n\n"
    "kvzip zip report.txt -m qwen2.5-7b -r 0.3 -o report.kvz\n\n"
    "pdftotext report.pdf - | kvzip zip - -o report.kvz"
)


def zip_file(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A UTF-8 text, - for the standard input.")
    ],
    model: Model = None,
    ratio: Ratio = 0.3,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write.", show_default="FILE, ending in .kvz"),
    ] = None,
    level: Annotated[
        Level,
        typer.Option(
            help="Choose among all pairs together, in each head by itself, or whole heads."
        ),
    ] = Level.pair,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output.")] = False,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Read a document once, evict most of its KV cache, and save the rest to a .kvz file."""
    output = _output(file, output)
    from kvzip.loading import resolve
    from kvzip.selection import check_ratio
    from kvzip.storage import check_output

    check_ratio(ratio)
    check_output(output, overwrite=force)
    resolve(model)
    text = read_document(file)
    from kvzip.cli.timing import timed

    kvzip_model = load_model(model, device=device, dtype=dtype and dtype.value)
    seconds: dict[str, float] = {}
    with progress_bar(("prefill", "score")) as progress:
        with timed(seconds, "prefill"):
            kv = kvzip_model.read(text, progress=progress)
        with timed(seconds, "score"):
            kvzip_model.score(kv, progress=progress)
    full = kv.nbytes
    with timed(seconds, "compact"):
        kv.prune(ratio, level.value)
    with timed(seconds, "save"):
        kv.save(output, overwrite=force)
    report = {
        "file": str(output),
        "file_bytes": output.stat().st_size,
        "model": kvzip_model.model_id,
        "context_tokens": kv.document.context_length,
        "prefix_tokens": kv.document.prefix_length,
        "level": level.value,
        "ratio_requested": ratio,
        "ratio_realised": kv.realised_ratio,
        "kv_bytes_full": full,
        "kv_bytes_zipped": kv.nbytes,
        "seconds": seconds,
    }
    if as_json:
        print(json.dumps(report, indent=2))
        return
    rows = {
        "file": f"{output}, {decimal(output.stat().st_size)}",
        "model": kvzip_model.model_id,
        "tokens": f"{kv.document.context_length:,} + {kv.document.prefix_length} in front",
        "cache": shrinking(full, kv.nbytes),
        "kept": f"{kv.realised_ratio:.2%} of the document's pairs",
        "time": durations(seconds),
    }
    Console(highlight=False).print(facts(rows), soft_wrap=True)


def _output(file: Path, output: Path | None) -> Path:
    """Where to write."""
    if output is None:
        if file == STANDARD_INPUT:
            raise KVzipError("the standard input has no name to go by: say where with --output")
        output = file.with_suffix(".kvz")
    if output.exists() and file.exists() and output.samefile(file):
        raise KVzipError(f"{file} would be overwritten: name another --output")
    return output
