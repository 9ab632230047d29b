"""A run: every sample is read and scored once, then asked at one ratio after the other.

tasks ─ jobs ─► job ─ fits? ─► full cache ─ prune to a ratio ─► answers, likelihoods ─► lines
                                    └──────────── next ratio ◄──────────────┘
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from time import perf_counter

from kvzip.benchmarks.provenance import provenance
from kvzip.budget import check_ratio
from kvzip.errors import KVzipError
from kvzip.evaluation.asking import (
    Answer,
    UnfitError,
    ask,
    check_fit,
    compare,
    packed_bytes,
    score_context,
    token_counter,
)
from kvzip.evaluation.likelihood import Likelihood
from kvzip.evaluation.metrics import score
from kvzip.evaluation.results import Line, Results, Shard, context_digest
from kvzip.evaluation.samples import Instruction, Question, Sample
from kvzip.evaluation.tasks import get_task
from kvzip.model import ModelKVzip
from kvzip.scorers import RECONSTRUCTION
from kvzip.scoring import get_scorer
from kvzip.selection import LEVELS

Models = Callable[[Instruction], ModelKVzip]
"""The model with an instruction in front of the context."""


@dataclass(frozen=True)
class Settings:
    """What a run does.

    Attributes:
        tasks: names of tasks.
        ratios: shares of the pairs to keep, in (0, 1], the largest first. 1.0 is the full cache
            and always among them, for the others are compared with it.
        num: samples of each task, None for as many as the task has.
        level: `pair`, `pair-uniform` or `head`.
        scorer: name of the scorer.
        lengths: context lengths in tokens, None for those of the task.
        seed: of what tasks draw at random.
        data_dir: folder with local copies of data sets.
        shard: which part of the samples.

    Raises:
        KVzipError: for anything unknown.
    """

    tasks: tuple[str, ...]
    ratios: tuple[float, ...] = (1.0, 0.5, 0.3)
    num: int | None = None
    level: str = "pair"
    scorer: str = RECONSTRUCTION
    lengths: tuple[int, ...] | None = None
    seed: int = 0
    data_dir: Path | None = None
    shard: Shard = field(default_factory=Shard)

    def __post_init__(self) -> None:
        for ratio in self.ratios:
            check_ratio(ratio)
        ordered = tuple(sorted({1.0, *map(float, self.ratios)}, reverse=True))
        object.__setattr__(self, "ratios", ordered)
        object.__setattr__(self, "tasks", tuple(dict.fromkeys(self.tasks)))
        for task in self.tasks:
            get_task(task)
        if not self.tasks:
            raise KVzipError("there is no task to run")
        if self.level not in LEVELS:
            raise KVzipError(f"unknown level {self.level!r}: choose one of {', '.join(LEVELS)}")
        get_scorer(self.scorer)
        if self.data_dir is not None and not self.data_dir.is_dir():
            raise KVzipError(f"the data folder {self.data_dir} does not exist")

    def asked(self) -> Line:
        """The part of `run.json` that is known before a model is loaded."""
        return {
            "seed": self.seed,
            "tasks": list(self.tasks),
            "ratios": list(self.ratios),
            "level": self.level,
            "scorer": self.scorer,
            "num": self.num,
            "lengths": None if self.lengths is None else list(self.lengths),
            "data_dir": None if self.data_dir is None else str(self.data_dir.resolve()),
            "shard": str(self.shard),
        }


@dataclass(frozen=True)
class Job:
    """A sample of a task."""

    task: str
    instruction: Instruction
    sample: Sample


def run_record(settings: Settings, model: ModelKVzip, command: Sequence[str]) -> Line:
    """What `run.json` says.

    Args:
        settings: what is run.
        model: on which model.
        command: the command line.
    """
    origin = model.origin
    where = provenance(model.hf_model.device, command)
    return {
        "model_id": origin.model_id,
        "fingerprint": origin.fingerprint,
        "tokenizer_hash": origin.tokenizer_hash,
        "dtype": origin.dtype,
        "quantization": origin.quantization,
        "device": where["device"],
        **settings.asked(),
        "versions": {
            **{name: where[name] for name in ("kvzip", "torch", "transformers")},
            "python": platform.python_version(),
        },
        "commit": where["commit"],
        "command": where["command"],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def with_instructions(model: ModelKVzip, *, kv_type: str = "retain") -> Models:
    """Share one model's weights between instructions; pruned pairs are retained unless told so."""

    @cache
    def instructed(instruction: Instruction) -> ModelKVzip:
        return ModelKVzip(model.hf_model, model.tokenizer, kv_type=kv_type, instruction=instruction)

    return instructed


def jobs(settings: Settings, models: Models) -> Iterator[Job]:
    """The samples of this shard, in an order that never changes."""
    place = 0
    for name in settings.tasks:
        task = get_task(name)
        samples = task.samples(
            settings.num,
            seed=settings.seed,
            data_dir=settings.data_dir,
            count_tokens=token_counter(models(task.instruction)),
            lengths=settings.lengths,
        )
        for sample in samples:
            if place % settings.shard.count == settings.shard.index:
                yield Job(name, task.instruction, sample)
            place += 1


def run(
    settings: Settings,
    models: Models,
    results: Results,
    progress: Callable[[str], None] = lambda task: None,
) -> None:
    """Run what is not done yet.

    Args:
        settings: what to run.
        models: the model.
        results: what is done, and where to write.
        progress: called with the task's name behind every sample.
    """
    for job in jobs(settings, models):
        sample = job.sample
        if not results.done(job.task, sample.id, context_digest(sample.context)):
            try:
                results.add(evaluate(models(job.instruction), job, settings))
            except UnfitError as error:
                results.skip(job.task, sample.id, str(error))
        progress(job.task)


def evaluate(model: ModelKVzip, job: Job, settings: Settings) -> list[Line]:
    """All lines of one sample, ratio by ratio.

    Args:
        model: retains what it evicts.
        job: the sample.
        settings: ratios, level and scorer.

    Raises:
        UnfitError: if the model has too few positions.
    """
    sample = job.sample
    check_fit(model, sample)
    start = perf_counter()
    kv = score_context(model, model.read(sample.context), settings.scorer)
    common = {
        "task": job.task,
        "sample": sample.id,
        "group": sample.group,
        "questions": len(sample.questions),
        "context_sha256": context_digest(sample.context),
        "scorer": settings.scorer,
        "level": settings.level,
        "context_tokens": kv.document.context_length,
        "context_seconds": perf_counter() - start,
        "kv_bytes_full": packed_bytes(kv),
    }
    full = ask(model, kv, sample.questions)
    lines: list[Line] = []
    for ratio in settings.ratios:
        if ratio < 1:
            kv.prune(ratio, settings.level)
        given = full if ratio == 1 else ask(model, kv, sample.questions)
        likelihood = compare(model, kv, sample.questions, full)
        cell = {**common, "ratio": ratio, "realised_ratio": kv.realised_ratio}
        cell["kv_bytes"] = packed_bytes(kv)
        rows = zip(sample.questions, given, likelihood, strict=True)
        lines += [
            {**cell, "question": index, **_question_line(*row)} for index, row in enumerate(rows)
        ]
    return lines


def _question_line(question: Question, answer: Answer, likelihood: Likelihood) -> Line:
    return {
        "prompt": question.text,
        "prediction": answer.text,
        "answers": list(question.answers),
        "metric": question.metric,
        "score": score(question, answer.text),
        "seconds": answer.seconds,
        "likelihood": asdict(likelihood),
    }
