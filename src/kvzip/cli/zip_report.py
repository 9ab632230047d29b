"""What `kvzip zip` says at the end."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal

from kvzip.budget import Budget
from kvzip.cli.facts import durations, facts, shrinking

if TYPE_CHECKING:
    from kvzip import ContextCache, ModelKVzip


@dataclass
class Reading:
    """A document that was read.

    Attributes:
        model: the model.
        kv: the zipped cache.
        peak: the most bytes of keys and values that it held.
        tokens: tokens that were read just now.
        budget: what was asked for, None for the cache's ratio.
        level: granularity of the selection.
        full: bytes of the full cache, None if there never was one.
        seconds: how long each stage took.
    """

    model: "ModelKVzip"
    kv: "ContextCache"
    peak: int
    tokens: int
    budget: Budget | None = None
    level: str = "pair"
    full: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def print_report(output: Path, read: Reading, *, as_json: bool) -> None:
    """Say what was read and what was written.

    Args:
        output: the file that was written, as the last stage.
        read: the document.
        as_json: whether to print a JSON object.
    """
    kv, document = read.kv, read.kv.document
    speed = read.tokens / sum(time for stage, time in read.seconds.items() if stage != "save")
    if as_json:
        report = {
            "file": str(output),
            "file_bytes": output.stat().st_size,
            "model": read.model.model_id,
            "context_tokens": document.context_length,
            "prefix_tokens": document.prefix_length,
            "tokens_read": read.tokens,
            "level": read.level,
            "budget": (read.budget or Budget(kv.ratio)).asked(),
            "ratio_requested": kv.ratio,
            "ratio_realised": kv.realised_ratio,
            "kv_dtype": kv.kv_dtype,
            "kv_bytes_full": read.full,
            "kv_bytes_peak": read.peak,
            "kv_bytes_zipped": kv.nbytes,
            "seconds": read.seconds,
            "tokens_per_second": speed,
        }
        print(json.dumps(report, indent=2))
        return
    earlier = document.context_length - read.tokens
    rows = {
        "file": f"{output}, {decimal(output.stat().st_size)}",
        "model": read.model.model_id,
        "tokens": f"{document.context_length:,} + {document.prefix_length} in front"
        + (f", {read.tokens:,} of them new" if earlier else ""),
        "cache": f"{decimal(kv.nbytes)}, at most {decimal(read.peak)} while reading"
        if read.full is None
        else shrinking(read.full, kv.nbytes),
        "kept": f"{kv.realised_ratio:.2%} of the document's pairs"
        + (f", as {kv.kv_dtype}" if kv.kv_dtype else ""),
        "time": f"{durations(read.seconds)}; {speed:,.0f} tokens/s",
    }
    Console(highlight=False).print(facts(rows), soft_wrap=True)
