"""Options that several commands share, and the checks that need no model."""

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kvzip.errors import KVzipError

STANDARD_INPUT = Path("-")

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Short name (qwen2.5-7b), Hugging Face name or folder.",
        show_default="the bundled model",
    ),
]
ModelOfFile = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="The model that read the document, if it is found elsewhere now.",
        show_default="as noted in the file",
    ),
]
Ratio = Annotated[
    float, typer.Option("--ratio", "-r", help="Share of the key-value pairs to keep, in (0, 1].")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
Device = Annotated[
    str | None,
    typer.Option(help="Where the model runs, such as cuda:1.", show_default="first GPU, or cpu"),
]
KvzFile = Annotated[Path, typer.Argument(metavar="FILE.kvz", help="A zipped document.")]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Longest answer, in tokens.", show_default="512, or what fits"),
]


class QuantizationName(StrEnum):
    """Quantisations of `quantized_weights`."""

    int8 = "int8"
    w8a8 = "w8a8"
    fp8 = "fp8"
    int4 = "int4"


class DtypeName(StrEnum):
    """Dtypes that a model can be loaded in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Level(StrEnum):
    """Granularities of `selection.select`."""

    pair = "pair"
    pair_uniform = "pair-uniform"
    head = "head"


Dtype = Annotated[
    DtypeName | None,
    typer.Option(
        help="Dtype of weights and cache.",
        show_default="float32 on a CPU, else the checkpoint's",
    ),
]


Quantization = Annotated[
    QuantizationName | None,
    typer.Option(
        help="Quantise the weights; w8a8 and fp8: activations, too; fp8 and int4: on a GPU.",
        show_default="as published",
    ),
]


class KvDtypeName(StrEnum):
    """Quantisations of `kernels.quantization`."""

    int8 = "int8"
    fp8 = "fp8"
    int4 = "int4"


KvDtype = Annotated[
    KvDtypeName | None,
    typer.Option(help="Quantise the pairs that are kept.", show_default="dtype of the cache"),
]


def read_document(path: Path) -> str:
    """Text of a UTF-8 file, or of the standard input for `-`.

    Raises:
        KVzipError: if there is no such file, it cannot be read, is not UTF-8 or holds no text.
    """
    name = "the standard input" if path == STANDARD_INPUT else str(path)
    if path.is_dir():
        raise KVzipError(f"{path} is a folder: name a text file")
    try:
        data = sys.stdin.buffer.read() if path == STANDARD_INPUT else path.read_bytes()
        text = data.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise KVzipError(f"there is no file {path}") from error
    except OSError as error:
        raise KVzipError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise KVzipError(
            f"{name} is not UTF-8 text (byte {error.start}): convert it first"
        ) from error
    if not text.strip():
        raise KVzipError(f"{name} is empty: there is nothing to read")
    return text


def check_questions(questions: Sequence[str]) -> None:
    """Raise KVzipError for a question without text."""
    for number, question in enumerate(questions, start=1):
        if not question.strip():
            raise KVzipError(f"question {number} is empty")
        if any("\ud800" <= character <= "\udfff" for character in question):
            raise KVzipError(f"question {number} is not UTF-8 text")
