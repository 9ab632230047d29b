"""`kvzip models`: which types of models work, and to find out with the installed transformers."""

import difflib
import json
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvzip.cli.load_model import check_device, silence
from kvzip.cli.options import Json
from kvzip.cli.progress import progress_bar
from kvzip.errors import KVzipError
from kvzip.model_types import EXPECTED, REFUSED, TESTED, ModelType

if TYPE_CHECKING:
    from kvzip.checks import Checked

EXAMPLES = "Examples:\n\nkvzip models\n\nkvzip models --check gemma2 gpt_oss"
STANDINGS = {"tested": TESTED, "expected": EXPECTED, "refused": REFUSED}
FAILED = 1


def models(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TYPE...]",
            help="Types of models as transformers names them, such as llama.",
            show_default="all",
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Make a small random model of each tested type and compare it with transformers; "
            "about a second each.",
        ),
    ] = False,
    device: Annotated[
        str, typer.Option(help="Where the small models run, such as cuda; with --check.")
    ] = "cpu",
    markdown: Annotated[
        bool, typer.Option("--markdown", help="With --check, print a table in Markdown.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the types of models that were tested, that should work, and that are refused."""
    if markdown and not check:
        raise KVzipError("--markdown prints what was checked: add --check")
    if markdown and as_json:
        raise KVzipError("--markdown and --json contradict each other: choose one")
    chosen = {standing: _choose(types, names) for standing, types in STANDINGS.items()}
    _refuse_unknown(names or (), chosen.values())
    if not check:
        print(json.dumps(_report(chosen), indent=2)) if as_json else _show(chosen)
        return
    if not chosen["tested"]:
        raise KVzipError(f"of {', '.join(names or ())} none is tested: there is nothing to check")
    checked = _check(chosen["tested"], device)
    if as_json:
        print(json.dumps({**_versions(), "checked": [_line(c) for c in checked]}, indent=2))
    elif markdown:
        print(table(checked))
    else:
        _show_checked(checked)
    if not all(all(one.passed.values()) for one in checked):
        raise typer.Exit(FAILED)


def table(checked: Sequence["Checked"]) -> str:
    """What was checked, as a table in Markdown."""
    columns = list(checked[0].passed)
    head = ["type", "models", *columns, "note"]
    lines = [head, ["---", "---", *[":-:"] * len(columns), "---"]]
    for one in checked:
        marks = ["✓" if one.passed[name] else "✗" for name in columns]
        lines.append([f"`{one.model_type.id}`", one.model_type.models, *marks, one.model_type.note])
    return _markdown(lines)


def refusals() -> str:
    """What is refused and why, as a table in Markdown."""
    rows = ([f"`{one.id}`", one.models, one.note] for one in REFUSED)
    return _markdown([["type", "models", "why"], ["---"] * 3, *rows])


def _markdown(lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


def _choose(types: Sequence[ModelType], names: Sequence[str] | None) -> list[ModelType]:
    return [one for one in types if not names or one.name in names or one.id in names]


def _refuse_unknown(names: Sequence[str], chosen: Iterable[Sequence[ModelType]]) -> None:
    found = {name for types in chosen for one in types for name in (one.name, one.id)}
    for name in names:
        if name not in found:
            known = sorted({one.id for types in STANDINGS.values() for one in types})
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise KVzipError(
                f"{name!r} is no type of model that kvzip was tried with: {hint}"
                "`kvzip models` lists them all; others are tried when they are loaded"
            )


def _check(types: Sequence[ModelType], device: str) -> list["Checked"]:
    import torch

    from kvzip import checks

    check_device(device)
    silence()
    checked = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are so small that threads only wait for each other
    try:
        with progress_bar(["check"]) as report:
            for done, one in enumerate(types, 1):
                checked.append(checks.check(one, device))
                report("check", done, len(types))
    finally:
        torch.set_num_threads(threads)
    return checked


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers")}


def _line(checked: "Checked") -> dict[str, Any]:
    return {**_facts(checked.model_type), "passed": checked.passed}


def _facts(one: ModelType) -> dict[str, str]:
    return {"type": one.name, "variant": one.variant, "models": one.models, "note": one.note}


def _report(chosen: dict[str, list[ModelType]]) -> dict[str, list[dict[str, str]]]:
    return {standing: [_facts(one) for one in types] for standing, types in chosen.items()}


def _show(chosen: dict[str, list[ModelType]]) -> None:
    titles = {
        "tested": "Tested against stock transformers, token for token, on small random models",
        "expected": "Expected to work, not tested",
        "refused": "Refused",
    }
    console = Console(highlight=False)
    for standing, types in chosen.items():
        if types:
            rows = Table("type", "models", "", title=titles[standing], title_justify="left")
            for one in types:
                rows.add_row(one.id, one.models, one.note)
            console.print(rows)
    console.print("Any other model is tried when it is loaded, and refused if it cannot work.")


def _show_checked(checked: Sequence["Checked"]) -> None:
    title = ", ".join(f"{name} {number}" for name, number in _versions().items())
    rows = Table("type", *checked[0].passed, title=title, title_justify="left")
    for one in checked:
        rows.add_row(one.model_type.id, *("✓" if ok else "✗" for ok in one.passed.values()))
    Console(highlight=False).print(rows)
