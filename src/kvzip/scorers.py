"""From the name of a scorer to what scores, for one model."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvzip import surrogates
from kvzip.cache import ContextCache, Origin, Scores
from kvzip.errors import KVzipError, KVzipWarning
from kvzip.geometry import Geometry
from kvzip.parallel import Division
from kvzip.prompts import Prompts
from kvzip.scoring import REPEATING, get_scorer, heads, is_surrogate, reconstruction
from kvzip.scoring.chunks import ChunkScorer
from kvzip.scoring.repeated_chunks import RepeatedChunks
from kvzip.surrogates.predicting import PredictedChunks, Surrogate

RECONSTRUCTION = "reconstruction"


class Scorers:
    """The scorers of a model. What is wrong whatever the context is said when one is asked for.

    Args:
        model: the model.
        prompts: its prompts.
        geometry: its layers.
        division: how its KV heads are divided among processes.
        origin: tells what caches of the model are tied to; it may take a while.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        geometry: Geometry,
        division: Division,
        origin: Callable[[], Origin],
    ) -> None:
        self._model = model
        self._prompts = prompts
        self._geometry = geometry
        self._division = division
        self._origin = origin
        self._surrogates: dict[str, Surrogate] = {}

    def of_context(
        self, scorer: str, reach: str, load_score: bool | str | Path, score_chunk: int
    ) -> Callable[..., Scores]:
        """What scores a whole context: called with its cache and `progress`.

        Args:
            scorer: its name.
            reach: of those that repeat the context.
            load_score: a file of head scores in the place of a scorer, True for the model's own.
            score_chunk: tokens of one pass.

        Raises:
            KVzipError: for what is unknown, cannot be loaded or does not go together.
        """
        if load_score is not False and scorer != RECONSTRUCTION:
            raise KVzipError(
                f"load_score takes the place of a scorer, here {scorer!r}: leave out one of them"
            )
        if load_score is True:
            scorer = "heads"
        elif load_score is not False:
            path = Path(load_score)
            heads.read(path)  # to say now what is wrong with it
            return lambda kv, progress: heads.load(path, kv)
        if scorer == "heads":
            heads.read(heads.own_file(self._model))
        if score_chunk < 1:
            raise KVzipError(f"score_chunk is {score_chunk}: score at least one token at a time")
        return partial(
            get_scorer(scorer),
            self._model,
            self._prompts,
            max_positions=self._geometry.max_positions,
            chunk_size=score_chunk,
            **self._settings(scorer, reach),
        )

    def of_chunks(self, kv: ContextCache, scorer: str | None, score_chunk: int) -> ChunkScorer:
        """What scores a context that goes on, chunk after chunk.

        Args:
            kv: the context so far.
            scorer: its name; None for that of the context.
            score_chunk: tokens of one pass that repeats.

        Raises:
            KVzipError: for a scorer that cannot, or whose scores cannot be compared with those that
                the context has.
        """
        if scorer is None:
            surrogate = next(filter(is_surrogate, kv.scorers), None)
            scorer = surrogate or RECONSTRUCTION
        allowed = {reconstruction.scorer_name(reach) for reach in reconstruction.REACHES}
        if is_surrogate(scorer):
            allowed = {self.surrogate(scorer).scorer}
        if others := sorted(kv.scorers - allowed):
            raise KVzipError(
                f"this context was scored by {others[0]!r}, whose scores are no measure for those "
                f"of {scorer!r}: read the context anew, or go on with the scorer that it has"
            )
        if is_surrogate(scorer):
            return PredictedChunks(self._model, self.surrogate(scorer))
        if scorer != RECONSTRUCTION:
            get_scorer(scorer)
            raise KVzipError(
                f"streaming scores by {RECONSTRUCTION!r} or a surrogate, not by {scorer!r}: read "
                "the context in two passes"
            )
        return RepeatedChunks(self._model, self._prompts, score_chunk)

    def surrogate(self, scorer: str, without: str = f"score by {RECONSTRUCTION!r}") -> Surrogate:
        """A surrogate, loaded once.

        Args:
            scorer: its name.
            without: what to do where none can be used.

        Raises:
            KVzipError: if there is none, it does not fit, or heads are divided among processes.

        Warns:
            KVzipWarning: if it says that it was trained on another model.
        """
        if self._division.size > 1:
            raise KVzipError(f"scorer {scorer!r} needs all heads in one process: {without}")
        if scorer not in self._surrogates:
            kv_heads = {i: self._geometry.layers[i].kv_heads for i in self._geometry.prunable}
            surrogate = surrogates.load(scorer, self._model, kv_heads)
            self._warn_of_another_model(scorer, surrogate)
            self._surrogates[scorer] = surrogate
        return self._surrogates[scorer]

    def _warn_of_another_model(self, scorer: str, surrogate: Surrogate) -> None:
        """Quantised weights have a fingerprint of their own, and the surrogates of plain ones."""
        if surrogate.fingerprint is None:
            return
        here = self._origin()
        if here.quantization is None and surrogate.fingerprint != here.fingerprint:
            warnings.warn(
                f"the surrogate {scorer} was trained on a model with fingerprint "
                f"{surrogate.fingerprint}, that of {here.model_id} is {here.fingerprint}: its "
                "scores may mean nothing here",
                KVzipWarning,
                stacklevel=4,
            )

    def _settings(self, scorer: str, reach: str) -> dict[str, Any]:
        """What a scorer takes beside what all of them take."""
        if scorer in REPEATING:
            return {"reach": reach}
        if reach != "context":
            names = " and ".join(map(repr, REPEATING))
            raise KVzipError(f"reach belongs to the scorers {names}, not to {scorer!r}")
        return {"surrogate": self.surrogate(scorer)} if is_surrogate(scorer) else {}
