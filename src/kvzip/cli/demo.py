"""`kvzip demo`: the whole thing on a short document, full cache against zipped cache."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import ROUNDED
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvzip.cli.facts import duration, durations, facts, shrinking
from kvzip.cli.load_model import load_model
from kvzip.cli.options import Device, Json, Model, Ratio, check_questions, read_document
from kvzip.cli.progress import progress_bar
from kvzip.errors import KVzipError

if TYPE_CHECKING:
    from kvzip import ContextCache, ModelKVzip
    from kvzip.cli.timing import TokenClock
    from kvzip.prefill import Progress

EXAMPLES = (
    "Examples:\n\n"
    "kvzip demo\n\n"
    "kvzip demo -r 0.1 --map-lines 0\n\n"
    'kvzip demo -m qwen2.5-7b -f report.txt -q "Who signed the report?"'
)
LONGEST_ANSWER = 48


@dataclass(frozen=True)
class Question:
    """A question and, if it is known, its answer."""

    text: str
    expected: str | None = None


@dataclass(frozen=True)
class Answer:
    """Both answers to a question."""

    question: str
    full: str
    zipped: str
    expected: str | None


@dataclass(frozen=True)
class Demonstration:
    """What came out.

    Attributes:
        kv: the zipped cache.
        bytes_full: bytes of keys and values before.
        bytes_zipped: and after.
        answers: an entry for each question.
        seconds: of prefill, score and compact.
        decode_per_token_full: seconds of a decoding step; None if no answer had a second token.
        decode_per_token_zipped: likewise.
    """

    kv: "ContextCache"
    bytes_full: int
    bytes_zipped: int
    answers: Sequence[Answer]
    seconds: dict[str, float]
    decode_per_token_full: float | None
    decode_per_token_zipped: float | None


def demo(
    model: Model = None,
    ratio: Ratio = 0.3,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="Read this text.", show_default="a bundled document"),
    ] = None,
    question: Annotated[
        list[str] | None,
        typer.Option("--question", "-q", help="Ask this; may be repeated.", show_default=False),
    ] = None,
    map_lines: Annotated[
        int, typer.Option(min=0, help="Lines of the heat map to show, 0 for all.")
    ] = 16,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Read a document, evict, and compare answers, memory and time before and after."""
    check_questions(question or [])
    if file is not None and not question:
        raise KVzipError(f"nothing to ask about {file}: add a --question")
    document, questions = bundled_document() if file is None else (read_document(file), [])
    if question:
        questions = [Question(text) for text in question]
    from kvzip.budget import check_ratio

    check_ratio(ratio)
    kvzip_model = load_model(model, device=device)
    with progress_bar(("prefill", "score", "full", "zipped")) as progress:
        shown = demonstrate(kvzip_model, document, questions, ratio, progress)
    if as_json:
        print(json.dumps(_report(kvzip_model.model_id, ratio, shown), indent=2))
    else:
        _show(kvzip_model, ratio, shown, map_lines)


def bundled_document() -> tuple[str, list[Question]]:
    """The document that comes with this package, and questions about it."""
    folder = resources.files("kvzip") / "assets" / "demo"
    entries = json.loads((folder / "questions.json").read_text("utf-8"))
    questions = [Question(entry["question"], entry["answer"]) for entry in entries]
    return (folder / "document.txt").read_text("utf-8"), questions


def demonstrate(
    model: "ModelKVzip",
    document: str,
    questions: Sequence[Question],
    ratio: float,
    progress: "Progress",
) -> Demonstration:
    """Answer all questions from one cache, before and after it is pruned."""
    from kvzip.cli.timing import seconds_per_token, timed

    seconds: dict[str, float] = {}
    with timed(seconds, "prefill"):
        kv = model.read(document, progress=progress)
    with timed(seconds, "score"):
        model.score(kv, progress=progress)
    bytes_full = kv.nbytes
    full, full_clocks = _answer(model, kv, questions, "full", progress)
    with timed(seconds, "compact"):
        kv.prune(ratio)
    bytes_zipped = kv.nbytes
    zipped, zipped_clocks = _answer(model, kv, questions, "zipped", progress)
    return Demonstration(
        kv=kv,
        bytes_full=bytes_full,
        bytes_zipped=bytes_zipped,
        answers=[
            Answer(question.text, before, after, question.expected)
            for question, before, after in zip(questions, full, zipped, strict=True)
        ],
        seconds=seconds,
        decode_per_token_full=seconds_per_token(full_clocks),
        decode_per_token_zipped=seconds_per_token(zipped_clocks),
    )


def _answer(
    model: "ModelKVzip",
    kv: "ContextCache",
    questions: Sequence[Question],
    stage: str,
    progress: "Progress",
) -> tuple[list[str], list["TokenClock"]]:
    """Answers one after the other, and when their tokens came."""
    from kvzip.cli.timing import TokenClock

    answers, clocks = [], []
    for done, question in enumerate(questions, start=1):
        clock = TokenClock()
        answer = model.generate(question.text, kv=kv, streamer=clock, max_new_tokens=LONGEST_ANSWER)
        answers.append(answer.strip())
        clocks.append(clock)
        progress(stage, done, len(questions))
    return answers, clocks


def _report(model_id: str, ratio: float, shown: Demonstration) -> dict[str, Any]:
    return {
        "model": model_id,
        "context_tokens": shown.kv.document.context_length,
        "ratio_requested": ratio,
        "ratio_realised": shown.kv.realised_ratio,
        "kv_bytes_full": shown.bytes_full,
        "kv_bytes_zipped": shown.bytes_zipped,
        "answers": [asdict(answer) for answer in shown.answers],
        "seconds": {
            **shown.seconds,
            "decode_per_token_full": shown.decode_per_token_full,
            "decode_per_token_zipped": shown.decode_per_token_zipped,
        },
    }


def _show(model: "ModelKVzip", ratio: float, shown: Demonstration, map_lines: int) -> None:
    from kvzip.cli.heatmap import document_map, pieces

    kv, console = shown.kv, Console(highlight=False)
    tokens = kv.document.token_ids[kv.document.prefix_length :].tolist()
    shares = kv.kept.float().mean((0, 1)).tolist()
    document = pieces(
        tokens,
        shares,
        lambda ids: model.tokenizer.decode(ids, clean_up_tokenization_spaces=False),
    )
    console.print(document_map(document, console, map_lines))
    console.print()
    console.print(answer_table(shown.answers))
    console.print()
    times = shown.decode_per_token_full, shown.decode_per_token_zipped
    per_token = " → ".join("-" if time is None else duration(time) for time in times)
    rows = {
        "model": model.model_id,
        "tokens": f"{kv.document.context_length:,} + {kv.document.prefix_length} in front",
        "kept": f"{kv.realised_ratio:.2%} of the document's pairs, {ratio:.2%} asked",
        "cache": shrinking(shown.bytes_full, shown.bytes_zipped),
        "time": durations(shown.seconds),
        "per token": f"{per_token} to decode",
        "answers": _verdict(shown.answers),
    }
    console.print(facts(rows), soft_wrap=True)


def answer_table(answers: Sequence[Answer]) -> Table:
    """Each question with its answers, and how they compare."""
    table = Table(box=ROUNDED, header_style="bold", border_style="dim")
    known = any(answer.expected is not None for answer in answers)
    table.add_column("Question", overflow="fold")
    if known:
        table.add_column("Expected", overflow="fold")
    table.add_column("Full cache", overflow="fold")
    table.add_column("", justify="center")
    table.add_column("Zipped cache", overflow="fold")
    for answer in answers:
        same = answer.full == answer.zipped
        table.add_row(
            Text(answer.question),
            *([Text(answer.expected or "")] if known else []),
            _marked(answer.full, answer.expected),
            Text("=", "green") if same else Text("≠", "yellow"),
            _marked(answer.zipped, answer.expected),
        )
    return table


def _marked(answer: str, expected: str | None) -> Text:
    """An answer, and whether it holds the expected one."""
    if expected is None:
        return Text(answer)
    right = expected.casefold() in answer.casefold()
    return Text(f"✓ {answer}", "green") if right else Text(f"✗ {answer}", "red")


def _verdict(answers: Sequence[Answer]) -> str:
    same = sum(answer.full == answer.zipped for answer in answers)
    return f"{same} of {len(answers)} are the same with the zipped cache"
