"""Runs the sections one after the other and writes each line as soon as it is there."""

import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kvzip.benchmarks import (
    ceilings,
    chunk_attention,
    compact,
    decode_step,
    geometries,
    growth,
    matvec,
    quantized_attention,
    read_context,
    reconstruction_score,
    shared_batch,
    sliding_layers,
    stream,
    surrogate,
    zipped_attention,
)
from kvzip.benchmarks.provenance import provenance
from kvzip.benchmarks.records import Record, Subject, failure
from kvzip.benchmarks.report import print_section, print_targets
from kvzip.benchmarks.timing import settle
from kvzip.benchmarks.workbench import Case, Plan, Workbench
from kvzip.errors import KVzipError

SECTIONS: Mapping[str, Callable[[Workbench], Iterator[Case]]] = {
    section.NAME: section.cases
    for section in (
        ceilings,
        zipped_attention,
        quantized_attention,
        chunk_attention,
        reconstruction_score,
        compact,
        matvec,
        decode_step,
        shared_batch,
        read_context,
        stream,
        surrogate,
        growth,
        sliding_layers,
    )
}

ASKED_FOR = (growth.NAME, sliding_layers.NAME)
"""What runs only if it is asked for: `growth` alone takes longer than all others, and
`sliding_layers` is about other models."""

USUAL = tuple(name for name in SECTIONS if name not in ASKED_FOR)
"""What runs if no section is asked for."""

FULL_ATTENTION = (
    decode_step.NAME,
    shared_batch.NAME,
    read_context.NAME,
    stream.NAME,
    growth.NAME,
)
"""Sections whose caches or contenders have layers with full attention only."""

SAME_RUN = ("device", "commit", "kvzip", "torch", "transformers", "triton", "python")
"""What the lines of a file must share to be read together."""

TINY_CONTEXTS, TINY_RATIOS = (96,), (0.5,)
"""What tiny geometries are tried with, which show that everything runs and nothing more."""


def make_workbench(plan: Plan) -> Workbench:
    """The first CUDA device; a CPU for tiny geometries only.

    Raises:
        KVzipError: without a CUDA device, or for an unknown geometry.
    """
    for geometry in plan.geometries or ():
        geometries.find(geometry)
    if plan.geometries and set(plan.geometries) <= set(geometries.ON_CPU):
        plan = Plan(
            plan.geometries, plan.contexts or TINY_CONTEXTS, plan.ratios or TINY_RATIOS, plan.quick
        )
        return Workbench(torch.device("cpu"), torch.float32, plan)
    if not torch.cuda.is_available():
        raise KVzipError(
            "the benchmarks need a CUDA device, and there is none: `--geometry tiny` (or "
            f"`{geometries.TINY_GEMMA3}`) tries them out on a CPU"
        )
    return Workbench(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16, plan)


def run(
    bench: Workbench,
    sections: Sequence[str],
    console: Console,
    *,
    command: Sequence[str],
    output: Path | None = None,
) -> list[Record]:
    """Run sections, print what they measure, and append each line to a file.

    A figure that cannot be taken leaves a line that says why, and the others go on.

    Args:
        bench: what is measured.
        sections: names, in order.
        console: where tables are printed.
        command: how to repeat this run.
        output: a file of JSON lines; earlier lines stay.

    Returns:
        The lines of this run.

    Raises:
        KVzipError: for an unknown section, one that does not suit a geometry, or a file that
            cannot be written.
    """
    if unknown := [name for name in sections if name not in SECTIONS]:
        raise KVzipError(f"unknown benchmark {unknown[0]!r}: choose among {', '.join(SECTIONS)}")
    for geometry in bench.plan.geometries or ():
        _refuse_unsuited(sections, geometry)
    origin = {**provenance(bench.device, command), **_triton()}
    earlier = _read(output, origin)
    records: list[Record] = []
    for name in sections:
        first = len(records)
        for record in _section(bench, name):
            records.append(record)
            _append(output, record, origin)
        print_section(console, name, records[first:])
    if bench.on_gpu:
        print_targets(console, [*earlier, *records])
    return records


def _refuse_unsuited(sections: Sequence[str], geometry: str) -> None:
    """Raise KVzipError if a section cannot measure a geometry."""
    if not geometries.slides(geometry):
        if sliding_layers.NAME in sections:
            sliding = ", ".join(filter(geometries.slides, geometries.GEOMETRIES))
            raise KVzipError(
                f"{sliding_layers.NAME} measures models with sliding layers, and {geometry} has "
                f"none: choose among {sliding}"
            )
    elif unsuited := [name for name in sections if name in FULL_ATTENTION]:
        suited = ", ".join(name for name in SECTIONS if name not in FULL_ATTENTION)
        raise KVzipError(
            f"{unsuited[0]} measures models whose every layer has full attention, and most layers "
            f"of {geometry} slide: choose sections among {suited}"
        )


def _section(bench: Workbench, name: str) -> Iterator[Record]:
    try:
        for case in SECTIONS[name](bench):
            try:
                yield from case.run()
            except Exception as error:
                traceback.print_exc(file=sys.stderr)
                yield failure(case.subject, name, error)
            _forget(bench)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        yield failure(Subject(name, "any"), name, error)


def _forget(bench: Workbench) -> None:
    """Free what a case that failed has left; a device that is beyond that shows in the next."""
    try:
        settle(bench.device)
    except RuntimeError as error:
        print(f"kvzip bench: {error}", file=sys.stderr)


def _append(output: Path | None, record: Record, origin: Mapping[str, Any]) -> None:
    if output is None:
        return
    fields = asdict(record)
    line = json.dumps({**fields.pop("subject"), **fields, **origin})
    try:
        with output.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise KVzipError(f"cannot write {output}: {error}") from error


def _read(output: Path | None, origin: Mapping[str, Any]) -> list[Record]:
    """The lines of a file that come from the same device, versions and commit."""
    if output is None or not output.exists():
        return []
    records = []
    try:
        for line in output.read_text(encoding="utf-8").splitlines():
            fields = json.loads(line)
            if all(fields.get(name) == origin.get(name) for name in SAME_RUN):
                subject, record = (
                    {name: fields[name] for name in kind.__dataclass_fields__ if name in fields}
                    for kind in (Subject, Record)
                )
                records.append(Record(Subject(**subject), **record))
    except (OSError, ValueError, TypeError) as error:
        raise KVzipError(f"{output} holds no results of kvzip bench: {error}") from error
    return records


def _triton() -> dict[str, str | None]:
    try:
        import triton
    except ImportError:
        return {"triton": None}
    return {"triton": triton.__version__}
