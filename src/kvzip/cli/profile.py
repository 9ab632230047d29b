"""`kvzip profile`: one sample of a task, full cache against zipped cache."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import ROUNDED
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvzip.cli.eval import DataDir, Scorer, Seed
from kvzip.cli.facts import durations, facts, shrinking
from kvzip.cli.load_model import load_model
from kvzip.cli.options import Device, Dtype, Json, KvDtype, Level, Model, Quantization, Ratio
from kvzip.errors import KVzipError

if TYPE_CHECKING:
    from kvzip import ModelKVzip
    from kvzip.evaluation import Sample
    from kvzip.evaluation.asking import Answer
    from kvzip.evaluation.likelihood import Likelihood

EXAMPLES = (
    "Examples:\n\n"
    "kvzip profile -d synthetic_key_values -r 0.1\n\n"
    "kvzip profile -m qwen2.5-7b -d squad --index 3 -r 0.3"
)


@dataclass(frozen=True)
class Asked:
    """The questions of a sample, asked of one cache.

    Attributes:
        answers: an entry for each question.
        scores: the metric's verdict on each.
        likelihoods: of the full cache's answers.
        kv_bytes: bytes of keys and values held.
        device_bytes: most bytes that tensors took on the GPU meanwhile; None on a CPU.
    """

    answers: "Sequence[Answer]"
    scores: Sequence[float]
    likelihoods: "Sequence[Likelihood]"
    kv_bytes: int
    device_bytes: int | None


@dataclass(frozen=True)
class Profile:
    """What came out.

    Attributes:
        sample: what was read and asked.
        context_tokens: tokens of the context.
        realised_ratio: share of its pairs that was kept.
        kv_dtype: what they were quantised to, None if they were not.
        seconds: of each stage.
        full: before eviction.
        zipped: after.
    """

    sample: "Sample"
    context_tokens: int
    realised_ratio: float
    kv_dtype: str | None
    seconds: dict[str, float]
    full: Asked
    zipped: Asked


def profile(
    task: Annotated[
        str, typer.Option("--data", "-d", metavar="TASK", help="Task to take a sample from.")
    ] = "synthetic_profiles",
    model: Model = None,
    index: Annotated[int, typer.Option(min=0, help="Which sample of the task, from 0.")] = 0,
    ratio: Ratio = 0.3,
    level: Annotated[Level, typer.Option(help="What is compared with what.")] = Level.pair,
    scorer: Scorer = "reconstruction",
    data_dir: DataDir = None,
    length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Context length in tokens, for tasks that are generated.",
            show_default="the first of the task",
        ),
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    quantization: Quantization = None,
    kv_dtype: KvDtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Show for one sample what eviction does to time, memory, answers and their likelihood."""
    from kvzip.evaluation.asking import UnfitError
    from kvzip.evaluation.runner import Job, Settings, jobs, with_instructions
    from kvzip.loading import resolve

    settings = Settings(
        tasks=(task,),
        ratios=(ratio,),
        num=index + 1,
        level=level.value,
        scorer=scorer,
        lengths=None if length is None else (length,),
        seed=seed,
        data_dir=data_dir,
    )
    resolve(model)
    loaded = load_model(
        model,
        device=device,
        dtype=dtype and dtype.value,
        quantization=quantization and quantization.value,
    )
    models = with_instructions(loaded, kv_type="evict")
    found: Job | None = next(islice(jobs(settings, models), index, None), None)
    if found is None:
        raise KVzipError(f"{task} has no sample {index}: choose a smaller --index")
    try:
        shown = measure(
            models(found.instruction),
            found.sample,
            ratio,
            level.value,
            scorer,
            kv_dtype and kv_dtype.value,
        )
    except UnfitError as error:
        raise KVzipError(f"{found.sample.id} does not fit: {error}") from error
    if as_json:
        print(json.dumps(_report(loaded.model_id, task, settings.asked(), ratio, shown), indent=2))
    else:
        _show(loaded.model_id, ratio, shown)


def measure(
    model: "ModelKVzip",
    sample: "Sample",
    ratio: float,
    level: str,
    scorer: str,
    kv_dtype: str | None = None,
) -> Profile:
    """Read, score and ask, evict and ask again.

    Raises:
        UnfitError: if the model has too few positions.
    """
    from kvzip.cli.timing import timed
    from kvzip.evaluation.asking import ask, check_fit, score_context

    check_fit(model, sample)
    seconds: dict[str, float] = {}
    with timed(seconds, "prefill"):
        kv = model.read(sample.context)
    with timed(seconds, "score"):
        score_context(model, kv, scorer)
    _reset_peak()
    with timed(seconds, "answer"):
        answers = ask(model, kv, sample.questions)
    full = _asked(model, kv, sample, answers, answers)
    with timed(seconds, "compact"):
        kv.prune(ratio, level, kv_dtype=kv_dtype)
    _reset_peak()
    with timed(seconds, "answer zipped"):
        zipped = ask(model, kv, sample.questions)
    return Profile(
        sample=sample,
        context_tokens=kv.document.context_length,
        realised_ratio=kv.realised_ratio,
        kv_dtype=kv_dtype,
        seconds=seconds,
        full=full,
        zipped=_asked(model, kv, sample, zipped, answers),
    )


def _asked(
    model: "ModelKVzip",
    kv: Any,
    sample: "Sample",
    given: "Sequence[Answer]",
    full: "Sequence[Answer]",
) -> Asked:
    from kvzip.evaluation import score
    from kvzip.evaluation.asking import compare, packed_bytes

    device_bytes = _peak()
    return Asked(
        answers=given,
        scores=[
            score(question, answer.text)
            for question, answer in zip(sample.questions, given, strict=True)
        ],
        likelihoods=compare(model, kv, sample.questions, full),
        kv_bytes=packed_bytes(kv),
        device_bytes=device_bytes,
    )


def _reset_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak() -> int | None:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def _report(
    model_id: str, task: str, asked: dict[str, Any], ratio: float, shown: Profile
) -> dict[str, Any]:
    full, zipped = shown.full, shown.zipped
    return {
        "model": model_id,
        "task": task,
        "sample": shown.sample.id,
        "scorer": asked["scorer"],
        "level": asked["level"],
        "seed": asked["seed"],
        "context_tokens": shown.context_tokens,
        "ratio_requested": ratio,
        "ratio_realised": shown.realised_ratio,
        "kv_dtype": shown.kv_dtype,
        "kv_bytes_full": full.kv_bytes,
        "kv_bytes_zipped": zipped.kv_bytes,
        "device_bytes_full": full.device_bytes,
        "device_bytes_zipped": zipped.device_bytes,
        "seconds": shown.seconds,
        "questions": [
            {
                "question": question.text,
                "expected": list(question.answers),
                "metric": question.metric,
                **{
                    name: {
                        "answer": part.answers[row].text,
                        "score": part.scores[row],
                        "likelihood": asdict(part.likelihoods[row]),
                    }
                    for name, part in (("full", full), ("zipped", zipped))
                },
            }
            for row, question in enumerate(shown.sample.questions)
        ],
    }


def _show(model_id: str, ratio: float, shown: Profile) -> None:
    console = Console(highlight=False)
    full, zipped = shown.full, shown.zipped
    tokens = sum(one.tokens for one in full.likelihoods)
    console.print(_answers(shown))
    console.print()
    console.print(_likelihoods(shown))
    console.print()
    rows = {
        "model": model_id,
        "sample": f"{shown.sample.id}, {shown.context_tokens:,} tokens",
        "kept": f"{shown.realised_ratio:.2%} of the context's pairs, {ratio:.2%} asked"
        + (f", as {shown.kv_dtype}" if shown.kv_dtype else ""),
        "cache": shrinking(full.kv_bytes, zipped.kv_bytes),
        "time": durations(shown.seconds),
        "score": f"{_mean(full.scores):.3f} → {_mean(zipped.scores):.3f}",
        "flipped": f"{_flipped(full)} → {_flipped(zipped)} of {tokens} tokens",
    }
    if full.device_bytes is not None and zipped.device_bytes is not None:
        rows["on the GPU"] = shrinking(full.device_bytes, zipped.device_bytes)
    console.print(facts(rows), soft_wrap=True)


def _answers(shown: Profile) -> Table:
    """Each question with both answers."""
    table = Table(box=ROUNDED, header_style="bold", border_style="dim")
    table.add_column("", justify="right")
    table.add_column("Question", overflow="fold")
    table.add_column("Expected", overflow="fold")
    table.add_column("Full cache", overflow="fold")
    table.add_column("", justify="center")
    table.add_column("Zipped cache", overflow="fold")
    for row, question in enumerate(shown.sample.questions):
        before, after = (part.answers[row].text.strip() for part in (shown.full, shown.zipped))
        table.add_row(
            str(row + 1),
            Text(question.text),
            Text(question.answers[0]),
            _marked(before, shown.full.scores[row]),
            Text("=", "green") if before == after else Text("≠", "yellow"),
            _marked(after, shown.zipped.scores[row]),
        )
    return table


def _marked(answer: str, score: float) -> Text:
    """An answer and what the metric says: right, wrong, or a share."""
    if score == 1:
        return Text(f"✓ {answer}", "green")
    return Text(f"✗ {answer}", "red") if score == 0 else Text(f"{score:.2f} {answer}", "yellow")


def _likelihoods(shown: Profile) -> Table:
    """The full cache's answers under both caches."""
    table = Table(
        box=ROUNDED,
        header_style="bold",
        border_style="dim",
        title="The full cache's answers, token by token, under the full → the zipped cache",
        title_justify="left",
        title_style="dim",
    )
    for name in ("", "Tokens", "Log-probability", "Margin", "Smallest margin", "Flipped"):
        table.add_column(name, justify="right")
    pairs = zip(shown.full.likelihoods, shown.zipped.likelihoods, strict=True)
    for number, (before, after) in enumerate(pairs, start=1):
        table.add_row(
            str(number),
            str(before.tokens),
            f"{before.log_probability:.3f} → {after.log_probability:.3f}",
            f"{before.margin:.2f} → {after.margin:.2f}",
            f"{before.smallest_margin:.2f} → {after.smallest_margin:.2f}",
            Text(f"{before.flipped} → {after.flipped}", "yellow" if after.flipped else ""),
        )
    return table


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores)


def _flipped(asked: Asked) -> str:
    return str(sum(one.flipped for one in asked.likelihoods))
