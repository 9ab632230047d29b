"""`kvzip bench`: what kvzip costs on this machine's GPU, beside what people use today."""

import sys
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console

from kvzip.errors import KVzipError

EXAMPLES = (
    "Examples:\n\n"
    "kvzip bench -o results.jsonl\n\n"
    "kvzip bench --only zipped_attention,compact --geometry qwen2.5-7b --context 32768"
)

Number = TypeVar("Number", int, float)

WIDTH = 200
"""Columns of the tables where the output is no terminal."""


def bench(
    only: Annotated[
        str | None,
        typer.Option(
            help="Sections, with commas between: ceilings, zipped_attention, quantized_attention, "
            "chunk_attention, reconstruction_score, compact, matvec, decode_step, shared_batch, "
            "read_context, stream, surrogate, growth, sliding_layers.",
            show_default="all but the last two: one takes longest, one is about other models",
        ),
    ] = None,
    geometry: Annotated[
        str | None,
        typer.Option(
            help="Shapes of models, with commas between: llama3.1-8b, qwen2.5-7b, qwen3-8b, and "
            "with sliding layers gemma3-4b, gemma3-12b; tiny and tiny-gemma3 try everything out on "
            "a CPU.",
            show_default="the first three for operations, llama3.1-8b for whole models, both of "
            "Gemma 3 for sliding_layers",
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            help="Context tokens, with commas between.",
            show_default="8192,32768,131072 for decode attention, 131072 for the rest",
        ),
    ] = None,
    ratio: Annotated[
        str | None,
        typer.Option(
            help="Shares of the pairs to keep, with commas between.",
            show_default="1.0,0.5,0.3,0.1 for decode attention, 0.3 for the rest",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer figures and rounds.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Append each figure to this file, a JSON line each."),
    ] = None,
) -> None:
    """Measure kvzip on a CUDA device beside what people use today. Downloads nothing."""
    contexts = _numbers("--context", context, int)
    ratios = _numbers("--ratio", ratio, float)
    if output is not None and not output.parent.is_dir():
        raise KVzipError(f"the folder {output.parent} does not exist: create it first")
    from kvzip.benchmarks import suite
    from kvzip.benchmarks.workbench import Plan
    from kvzip.budget import check_ratio

    for share in ratios or ():
        check_ratio(share)
    plan = Plan(_names(geometry), contexts, ratios, quick)
    workbench = suite.make_workbench(plan)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    suite.run(
        workbench,
        _names(only) or suite.USUAL,
        console,
        command=["kvzip", *sys.argv[1:]],
        output=output,
    )


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(","))


def _numbers(option: str, text: str | None, kind: type[Number]) -> tuple[Number, ...] | None:
    try:
        numbers = None if text is None else tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise KVzipError(f"{option} takes numbers with commas between: got {text!r}") from error
    if numbers is not None and min(numbers) <= 0:
        raise KVzipError(f"{option} takes positive numbers: got {text!r}")
    return numbers
