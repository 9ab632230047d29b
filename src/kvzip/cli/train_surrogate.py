"""`kvzip train-surrogate`: a small network that predicts scores, for compressing in one pass."""

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import ROUNDED
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from kvzip.cli.facts import duration, facts
from kvzip.cli.load_model import load_model
from kvzip.cli.options import Device, Dtype, Json, Model, Quantization, read_document
from kvzip.cli.progress import progress_bar
from kvzip.errors import KVzipError

if TYPE_CHECKING:
    from kvzip import ModelKVzip
    from kvzip.surrogates.training import Trained

EXAMPLES = (
    "Examples:\n\n"
    "kvzip train-surrogate -m qwen3-8b --kind mlp --text books/*.txt -o kvzap-mlp\n\n"
    "kvzip eval -m qwen3-8b -d squad --scorer kvzap:kvzap-mlp -o results"
)
HIDDEN_SHARE = 8
"""Hidden states are this many times as wide as the inner layer of an MLP, as published."""


class Kind(StrEnum):
    """Kinds of `surrogates.kvzap`."""

    linear = "linear"
    mlp = "mlp"


def train_surrogate(
    text: Annotated[
        list[Path],
        typer.Option("--text", metavar="FILE", help="UTF-8 texts to learn from, in any number."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write, a new one.")
    ],
    more: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE...]", help="Further files of --text.", show_default=False),
    ] = None,
    model: Model = None,
    kind: Annotated[
        Kind, typer.Option(help="One linear map a layer, or an MLP with one inner layer.")
    ] = Kind.linear,
    hidden_dim: Annotated[
        int | None,
        typer.Option(
            min=1, help="Width of an MLP's inner layer.", show_default="an eighth of the model's"
        ),
    ] = None,
    piece: Annotated[
        int, typer.Option(min=100, help="Tokens that are read and scored together.")
    ] = 1000,
    drawn: Annotated[
        int, typer.Option(min=1, help="Tokens to learn from in each piece, drawn at random.")
    ] = 500,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn at random.")] = 0,
    dtype: Dtype = None,
    quantization: Quantization = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train a surrogate of a model: scores without a second pass, in the format of KVzap.

    A tenth of the text is held out, and tells how much of the scores' variance is explained (R²).
    """
    if hidden_dim is not None and kind is not Kind.mlp:
        raise KVzipError("--hidden-dim is for an MLP: add --kind mlp, or leave it out")
    documents = [read_document(file) for file in (*text, *(more or ()))]
    from kvzip.loading import resolve
    from kvzip.surrogates import kvzap
    from kvzip.surrogates.training import cut, train

    kvzap.check_output(output)
    resolve(model)
    start = perf_counter()
    loaded = load_model(
        model,
        device=device,
        dtype=dtype and dtype.value,
        quantization=quantization and quantization.value,
    )
    width = loaded.hf_model.config.get_text_config(decoder=True).hidden_size
    inner = (hidden_dim or max(1, width // HIDDEN_SHARE)) if kind is Kind.mlp else None
    pieces = cut(map(loaded.prompts.context_ids, documents), piece)
    with progress_bar(("score", "fit", "check")) as progress:
        trained = train(loaded, pieces, hidden_dim=inner, drawn=drawn, seed=seed, progress=progress)
    kvzap.save(trained.modules, output, _notes(loaded, trained, seed))
    seconds = perf_counter() - start
    if as_json:
        print(json.dumps(_report(output, loaded, kind, inner, trained, seconds), indent=2))
    else:
        _show(output, loaded, kind, inner, trained, seconds)


def _notes(model: "ModelKVzip", trained: "Trained", seed: int) -> dict[str, object]:
    """What the surrogate's config says about how it was made."""
    from kvzip import __version__
    from kvzip.surrogates.training import TARGET

    return {
        "base_model": Path(model.model_id).name,
        "kvzip": {
            "version": __version__,
            "fingerprint": model.origin.fingerprint,
            "target": f"log {TARGET}",
            "pieces": trained.pieces,
            "held_out_pieces": trained.held_out,
            "tokens": trained.tokens,
            "seed": seed,
            "r2": [round(share, 4) for share in trained.r2],
        },
    }


def _report(
    output: Path,
    model: "ModelKVzip",
    kind: Kind,
    hidden_dim: int | None,
    trained: "Trained",
    seconds: float,
) -> dict[str, object]:
    return {
        "folder": str(output),
        "model": model.model_id,
        "kind": kind.value,
        "hidden_dim": hidden_dim,
        "pieces": trained.pieces,
        "held_out_pieces": trained.held_out,
        "tokens": trained.tokens,
        "layers": list(model.geometry.prunable),
        "r2": trained.r2,
        "r2_mean": _mean(trained.r2),
        "bytes": _size(output),
        "seconds": seconds,
    }


def _show(
    output: Path,
    model: "ModelKVzip",
    kind: Kind,
    hidden_dim: int | None,
    trained: "Trained",
    seconds: float,
) -> None:
    table = Table(box=ROUNDED, header_style="bold", border_style="dim")
    table.add_column("Layer", justify="right")
    table.add_column("R²", justify="right")
    for layer, share in zip(model.geometry.prunable, trained.r2, strict=True):
        table.add_row(str(layer), f"{share:.3f}")
    console = Console(highlight=False)
    console.print(table)
    inner = "" if hidden_dim is None else f", {hidden_dim} wide inside"
    rows = {
        "surrogate": f"{output}, {kind.value}{inner}, {decimal(_size(output))}",
        "model": model.model_id,
        "learnt from": f"{trained.tokens:,} tokens of {trained.pieces:,} pieces",
        "R²": f"{_mean(trained.r2):.3f} on average, on {trained.held_out:,} held out",
        "use": f"scorer kvzap:{output}",
        "time": duration(seconds),
    }
    console.print(facts(rows), soft_wrap=True)


def _mean(shares: Sequence[float]) -> float:
    return sum(shares) / len(shares)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
