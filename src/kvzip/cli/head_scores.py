"""`kvzip head-scores`: make, take over and hand on scores of whole heads."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from kvzip.cli.eval import DataDir, Seed, number_list, task_list
from kvzip.cli.facts import duration, facts
from kvzip.cli.load_model import load_model
from kvzip.cli.options import Device, Dtype, DtypeName, Json, Quantization, QuantizationName
from kvzip.cli.progress import LABELS
from kvzip.errors import KVzipError

if TYPE_CHECKING:
    from kvzip import ModelKVzip
    from kvzip.evaluation.calibration import Calibration
    from kvzip.evaluation.runner import Job, Settings
    from kvzip.scoring.head_formats import Streaming
    from kvzip.scoring.heads import HeadScores

EXAMPLES = (
    "Examples:\n\n"
    "kvzip head-scores -m qwen2.5-7b -d scbench_qa_eng -o heads.safetensors\n\n"
    "kvzip head-scores --import qa_eng.pt repoqa.pt -m qwen2.5-7b -o heads.safetensors\n\n"
    "kvzip head-scores --import heads.safetensors --export pattern/"
)
CALIBRATION_ONLY = ("--data", "--num", "--lengths", "--data-dir")


def head_scores(
    more: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE...]", help="Further files to --import.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Short name (qwen2.5-7b), Hugging Face name or folder; with --import, the model "
            "that the scores must fit.",
            show_default="the bundled model; with --import, any",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            metavar="TASK[,TASK...]",
            help="Tasks to calibrate on, with commas between; * stands for anything.",
            show_default=False,
        ),
    ] = None,
    import_from: Annotated[
        list[Path] | None,
        typer.Option(
            "--import",
            metavar="FILE",
            help="Take scores from files instead, the largest of each head: tensors (.pt), "
            "DuoAttention patterns (folders), files of this command.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE.safetensors", help="File to write."),
    ] = None,
    export_to: Annotated[
        Path | None,
        typer.Option("--export", metavar="DIR", help="Folder to write a DuoAttention pattern to."),
    ] = None,
    num: Annotated[
        int | None, typer.Option(min=1, help="Samples of each task.", show_default="1")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Context lengths in tokens, with commas between, for tasks that are generated.",
            show_default="those of the task",
        ),
    ] = None,
    data_dir: DataDir = None,
    seed: Seed = 0,
    sink_size: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="For --export: first tokens that the other heads see.",
            show_default="as imported, or 128",
        ),
    ] = None,
    recent_size: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="For --export: last tokens that they see.",
            show_default="as imported, or 256",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
    dtype: Dtype = None,
    quantization: Quantization = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Score whole heads once for a model, for zipping without a scoring pass (level head)."""
    files = [*(import_from or ()), *(more or ())]
    given = (tasks, num, lengths, data_dir)
    _check_options(
        importing=bool(import_from),
        files=files,
        calibrating=[
            name for name, value in zip(CALIBRATION_ONLY, given, strict=True) if value is not None
        ],
        exporting=export_to is not None,
        streaming=sink_size is not None or recent_size is not None,
        writing=output is not None or export_to is not None,
    )
    from kvzip import storage
    from kvzip.scoring import head_formats, heads

    if output is not None:
        storage.check_output(output, overwrite=force)
    if export_to is not None:
        head_formats.check_pattern_folder(export_to, overwrite=force)
    start = perf_counter()
    if files:
        scores, calibration = _imported(files, model, dtype, quantization, device), None
    else:
        from kvzip.evaluation.runner import Settings

        settings = Settings(
            tasks=task_list(tasks or ""),
            num=num or 1,
            lengths=None if lengths is None else number_list("--lengths", lengths, int),
            seed=seed,
            data_dir=data_dir,
        )
        loaded = load_model(
            model,
            device=device,
            dtype=dtype and dtype.value,
            quantization=quantization and quantization.value,
        )
        calibration = _calibrate(settings, loaded)
        scores = calibration.head_scores
    if output is not None:
        heads.save(scores.values, output, scores.about)
    if export_to is not None:
        streaming = _streaming(scores, sink_size, recent_size)
        head_formats.export_pattern(scores, export_to, streaming)
    report = _report(scores, calibration, output, export_to, perf_counter() - start)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        Console(highlight=False).print(_facts(report), soft_wrap=True)


def _check_options(
    *,
    importing: bool,
    files: list[Path],
    calibrating: list[str],
    exporting: bool,
    streaming: bool,
    writing: bool,
) -> None:
    """Raise KVzipError for options that do not go together."""
    if files and not importing:
        raise KVzipError(f"{files[0]}: files are read with --import")
    if importing and calibrating:
        raise KVzipError(f"{calibrating[0]} is for calibration: leave it out, or --import")
    if not importing and "--data" not in calibrating:
        raise KVzipError(
            "say what to make head scores from: tasks to calibrate on (--data), or files (--import)"
        )
    if not writing:
        raise KVzipError("say where the scores go: a file (--output) or a folder (--export)")
    if streaming and not exporting:
        raise KVzipError(
            "--sink-size and --recent-size are for --export: add it, or leave them out"
        )


def _imported(
    files: list[Path],
    model: str | None,
    dtype: DtypeName | None,
    quantization: QuantizationName | None,
    device: str | None,
) -> "HeadScores":
    """Scores from files; those of one model if it is named, and checked against it."""
    from kvzip.scoring.head_formats import import_scores
    from kvzip.scoring.heads import HeadScores, check_model

    scores = import_scores(files)
    if model is None:
        return scores
    loaded = load_model(
        model,
        device=device,
        dtype=dtype and dtype.value,
        quantization=quantization and quantization.value,
    )
    layers = [loaded.geometry.layers[index] for index in loaded.geometry.prunable]
    shape = len(layers), layers[0].kv_heads
    check_model(scores, shape, loaded.origin, " and ".join(map(str, files)))
    origin = loaded.origin
    known = {"model_id": origin.model_id, "fingerprint": origin.fingerprint}
    return HeadScores(scores.values, {**scores.about, **known})


def _calibrate(settings: "Settings", model: "ModelKVzip") -> "Calibration":
    from kvzip.evaluation.calibration import calibrate

    with _bar() as progress:
        return calibrate(settings, model, progress)


@contextmanager
def _bar() -> Iterator[Callable[["Job"], Callable[[str, int, int], None]]]:
    """Show sample, stage and tokens on the standard error, when that is a terminal."""
    console = Console(stderr=True)
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bars:
        bar = bars.add_task("reading", total=None)

        def of_sample(job: "Job") -> Callable[[str, int, int], None]:
            def report(stage: str, done: int, total: int) -> None:
                description = f"{job.task} {job.sample.id}: {LABELS[stage]}"
                bars.update(bar, description=description, completed=done, total=total)

            return report

        yield of_sample


def _streaming(scores: "HeadScores", sink_size: int | None, recent_size: int | None) -> "Streaming":
    from kvzip.scoring.head_formats import RECENT_SIZE, SINK_SIZE, Streaming

    if sink_size is None:
        sink_size = scores.about.get("sink_size", SINK_SIZE)
    if recent_size is None:
        recent_size = scores.about.get("recent_size", RECENT_SIZE)
    return Streaming(sink_size, recent_size)


def _report(
    scores: "HeadScores",
    calibration: "Calibration | None",
    output: Path | None,
    export_to: Path | None,
    seconds: float,
) -> dict[str, Any]:
    layers, kv_heads = scores.values.shape
    return {
        "file": None if output is None else str(output),
        "pattern": None if export_to is None else str(export_to),
        "model": scores.about.get("model_id"),
        "fingerprint": scores.about.get("fingerprint"),
        "layers": layers,
        "kv_heads": kv_heads,
        "scores": scores.values.tolist(),
        "imported": scores.about.get("imported", []),
        "samples": scores.about.get("samples", []),
        "skipped": calibration.skipped if calibration else {},
        "context_tokens": calibration.context_tokens if calibration else 0,
        "seconds": seconds,
    }


def _facts(report: dict[str, Any]) -> Any:
    flat = sorted(score for layer in report["scores"] for score in layer)
    rows = {"model": report["model"] or "not said"}
    if report["imported"]:
        rows["from"] = ", ".join(report["imported"])
    else:
        count, tokens = len(report["samples"]), report["context_tokens"]
        skipped = f", {len(report['skipped'])} skipped" if report["skipped"] else ""
        rows["from"] = f"{count:,} samples{skipped}, {tokens:,} tokens"
    rows["heads"] = f"{report['layers']} layers x {report['kv_heads']} KV heads"
    rows["scores"] = f"{flat[0]:.3f} to {flat[-1]:.3f}, median {flat[len(flat) // 2]:.3f}"
    for name in ("file", "pattern"):
        if report[name]:
            rows[name] = report[name]
    rows["time"] = duration(report["seconds"])
    return facts(rows)
