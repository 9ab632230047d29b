"""`kvzip inspect`: what a .kvz file holds, without any model."""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal

from kvzip.cli.facts import facts
from kvzip.cli.options import Json, KvzFile
from kvzip.errors import KVzipError

if TYPE_CHECKING:
    from kvzip.storage import Header

EXAMPLES = "Example:\n\nkvzip inspect report.kvz"


def inspect(file: KvzFile, as_json: Json = False) -> None:
    """Show what a .kvz file holds. Loads no model."""
    from kvzip import storage

    header = storage.read_header(file)
    kept = (storage.read_lengths(file) - header.prefix_length) / header.context_tokens
    size = _size(file, header)
    if as_json:
        report = {
            "file": str(file),
            "file_bytes": file.stat().st_size,
            "format_version": header.version,
            "model": header.origin.model_id,
            "fingerprint": header.origin.fingerprint,
            "dtype": header.origin.dtype,
            "quantization": header.origin.quantization,
            "kv_dtype": header.kv_dtype,
            "context_tokens": header.context_tokens,
            "prefix_tokens": header.prefix_length,
            "key_bytes": size.keys,
            "value_bytes": size.values,
            "scorer": header.scorer,
            "ratio_requested": header.ratio,
            "ratio_realised": header.realised_ratio,
            "kept_by_layer_and_head": kept.tolist(),
        }
        print(json.dumps(report, indent=2))
        return
    from kvzip.cli.heatmap import head_map

    rows = {
        "file": f"{file}, {decimal(file.stat().st_size)}, format {header.version}",
        "model": str(header.origin),
        "fingerprint": header.origin.fingerprint,
        "tokens": f"{header.context_tokens:,} + {header.prefix_length} in front",
        "keys": f"{decimal(size.keys)}, {header.kv_dtype or header.origin.dtype}",
        "values": f"{decimal(size.values)}, {header.kv_dtype or header.origin.dtype}",
        "kept": f"{header.realised_ratio:.2%} of the document's pairs, {header.ratio:.2%} asked",
        "scorer": header.scorer or "none",
    }
    console = Console(highlight=False)
    console.print(facts(rows), soft_wrap=True)
    console.print()
    console.print(head_map(kept.tolist(), header.prunable, console))


ITEMSIZE = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I16": 2}
"""Bytes of an element, by the dtype's name in a safetensors file."""


@dataclass(frozen=True)
class Size:
    """Bytes of keys and of values in a file, scales included."""

    keys: int
    values: int


def _size(path: Path, header: "Header") -> Size:
    from safetensors import SafetensorError, safe_open

    numbers = {"keys": 0, "values": 0}
    try:
        with safe_open(path, framework="pt") as file:
            for name in header.checksums:
                kind = name.split(".")[2:3]  # layers.0.keys, layers.0.keys.scales
                if kind and kind[0] in numbers:
                    part = file.get_slice(name)
                    numbers[kind[0]] += prod(part.get_shape()) * ITEMSIZE[part.get_dtype()]
    except (OSError, LookupError, SafetensorError) as error:
        raise KVzipError(f"{path} is damaged: {error}") from error
    return Size(numbers["keys"], numbers["values"])
