"""Head scores from the contexts of tasks: read, score, keep the largest of each head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers

import kvzip
from kvzip.cache import Scores
from kvzip.errors import KVzipError
from kvzip.evaluation.asking import UnfitError, score_context
from kvzip.evaluation.runner import Job, Settings, jobs, with_instructions
from kvzip.model import ModelKVzip
from kvzip.prefill import Progress
from kvzip.scorers import RECONSTRUCTION
from kvzip.scoring import heads
from kvzip.selection import check_scores


@dataclass(frozen=True)
class Calibration:
    """Head scores, and how they came about.

    Attributes:
        head_scores: the scores, which know model, task and samples.
        skipped: why, by sample that has no room in the model's positions.
        context_tokens: that were read and scored.
    """

    head_scores: heads.HeadScores
    skipped: dict[str, str]
    context_tokens: int


def calibrate(
    settings: Settings, model: ModelKVzip, progress: Callable[[Job], Progress]
) -> Calibration:
    """Score the contexts of samples by reconstruction, and reduce them to a score for each head.

    At no time is more held than one cache with its scores.

    Args:
        settings: tasks and samples; its ratios, level and scorer have no effect.
        model: the model, whatever its instruction.
        progress: gives for a sample what its stages are reported to.

    Raises:
        KVzipError: if there is no sample, or none that fits.
    """
    models = with_instructions(model, kv_type="evict")
    largest, samples, skipped, tokens = [], [], {}, 0
    for job in jobs(settings, models):
        name = f"{job.task}/{job.sample.id}"
        try:
            scores = _score(models(job.instruction), job.sample.context, progress(job))
        except UnfitError as error:
            skipped[name] = str(error)
            continue
        samples.append(name)
        largest.append(heads.reduce([scores]))
        tokens += scores.values.shape[-1]
    if not largest:
        reason = next(iter(skipped.values()), "the tasks have no samples")
        raise KVzipError(f"there is nothing to calibrate with: {reason}")
    about = {
        "model_id": model.origin.model_id,
        "fingerprint": model.origin.fingerprint,
        "scorer": RECONSTRUCTION,
        "tasks": settings.tasks,
        "num": settings.num,
        "lengths": settings.lengths,
        "seed": settings.seed,
        "samples": samples,
        "context_tokens": tokens,
        "versions": {part.__name__: part.__version__ for part in (kvzip, torch, transformers)},
    }
    values = torch.stack(largest).amax(0)
    return Calibration(heads.HeadScores(values, about), skipped, tokens)


def _score(model: ModelKVzip, context: str, progress: Progress) -> Scores:
    """Scores of a context's pairs; nothing else is left of it."""
    positions = model.geometry.max_positions
    taken = len(model.prompts.prefix_ids()) + len(model.prompts.context_ids(context))
    if taken >= positions:
        raise UnfitError(
            f"the context takes {taken} positions with its prefix, the model has {positions}"
        )
    kv = model.read(context, progress=progress)
    scores = score_context(model, kv, RECONSTRUCTION, progress=progress).scores
    assert scores is not None
    check_scores(scores.values)
    return scores
