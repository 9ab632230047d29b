"""Room for answers on one context, and the decoding step that runs in it.

An answer never touches the cache that it is given: it is written into tails of its own, which share
the context. On a CUDA device they stay with the cache, and so does the CUDA graph of a decoding
step that was recorded over them, so that the next question starts at once. Only where heads are
divided among processes, each answer records its own.
"""

import warnings
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from kvzip import weights
from kvzip.cache import ContextCache
from kvzip.graphs import Forward, Step, logits_of, plain_forward, record
from kvzip.layers import Tail
from kvzip.shrinking import Shrinker
from kvzip.step_compiler import compile_forward

ROUNDING = 256
"""Columns of a recorded tail are a multiple of this, so that most questions find room."""


@dataclass
class Decoder:
    """Runs a model on the cache of a room.

    Attributes:
        model: the model.
        forward: its forward pass for decoding steps that are recorded, compiled or not.
        records: whether decoding steps are recorded as CUDA graphs.
    """

    model: PreTrainedModel
    forward: Forward
    records: bool

    def room(
        self, kv: ContextCache, *, columns: int, batch: int = 1, starts: Tensor | None = None
    ) -> "Room":
        """Tails with room for `columns` tokens behind the context of `kv`.

        Args:
            kv: the cache; a single row starts with a copy of its tail.
            columns: question and answer, and the tail that is copied.
            batch: number of rows.
            starts: `[batch]`, int64: first column of each row that is no padding, or None.
        """
        room = kv.room
        if not (
            self.records and isinstance(room, Room) and room.fits(self, columns, batch, starts)
        ):
            kv.room = room = None  # its memory is free before more is taken
            columns = -(-columns // ROUNDING) * ROUNDING if self.records else columns
            room = Room(self, kv, columns, batch, starts)
            # processes that talk cannot part while a graph holds what they say to each other
            room.stays = self.records and kv.division.size == 1
            kv.room = room if room.stays else None
        room.refill(kv, starts)
        return room

    def private_room(self, kv: ContextCache, *, columns: int) -> "Room":
        """Tails for one answer, which may come to have another context: the cache keeps nothing.

        Args:
            kv: the cache; a copy of its tail is in the room from the start.
            columns: tokens behind the context that are held at a time; a tail or a question that
                is longer takes more until it has shrunk.
        """
        kv.room = None  # its memory is free before more is taken
        room = Room(self, kv, columns, 1, None)
        room.refill(kv, None)
        return room


class Room:
    """See `Decoder.room`.

    Attributes:
        cache: shares the context; its tails are what is written to.
        columns: tokens behind the context that steps find space for.
        stays: whether the room, and what was recorded in it, outlives an answer.
    """

    def __init__(
        self, decoder: Decoder, kv: ContextCache, columns: int, batch: int, starts: Tensor | None
    ) -> None:
        self.decoder = decoder
        self.columns = columns
        self.batch = batch
        self.starts = None if starts is None else starts.clone()
        self.cache = kv.fork([Tail(self.starts, columns) for _ in kv.layers])
        self.stays = False
        self._recorded: Step | None = None

    def fits(self, decoder: Decoder, columns: int, batch: int, starts: Tensor | None) -> bool:
        """Whether what was recorded here serves such a request, too."""
        return (
            self.decoder is decoder
            and self.columns >= columns
            and self.batch == batch
            and (self.starts is None) == (starts is None)
        )

    def refill(self, kv: ContextCache, starts: Tensor | None) -> None:
        """Start again: with the tail of `kv` if this is a single row without padding."""
        if self.starts is not None and starts is not None:
            self.starts.copy_(starts)
        for mine, theirs in zip(self.cache.layers, kv.layers, strict=True):
            mine.restart(theirs if self.starts is None else None)

    def read(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Run `[B, t]` tokens at `[B, t]` positions; logits `[B, V]` behind the last."""
        return logits_of(self.decoder.model, tokens, positions, self.cache)

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The same for one token a row, `[B, 1]`, as fast as it goes."""
        if self._recorded is None and self.decoder.records:
            self._recorded = self._record()
        return (self._recorded or self.read)(tokens, positions)

    @property
    def recorded(self) -> bool:
        """Whether a step has been recorded, so that it costs the host next to nothing."""
        return self._recorded is not None

    def end(self) -> None:
        """An answer has ended, well or not: forget what was recorded for it alone."""
        if not self.stays:
            self._recorded = None

    @property
    def full(self) -> bool:
        """Whether there is no space for a step."""
        return self.cache.tail_length >= self.columns

    def shrink(self, shrinker: Shrinker, input_ids: Tensor) -> None:
        """Make the tokens that have left the window context, so that there is space again.

        The step is recorded anew after that: it reads another context, at other addresses.

        Args:
            shrinker: evicts.
            input_ids: `[1, s]`, int64: the sequence, of which the room has seen a part.
        """
        self._recorded = None  # it holds on to what is freed
        context = len(self.cache.document.token_ids)
        shrinker.shrink(self.cache, input_ids[0, context : self.cache.seen_tokens].cpu())

    def take_back(self) -> None:
        """Forget the last column of every tail."""
        for layer in self.cache.layers:
            layer.tail.length -= 1

    def _record(self) -> Step | None:
        """The step, recorded; None if that cannot be done here, or in another process."""
        recorded, failure = None, "another process could not do it"
        try:
            devices = weights.devices(self.decoder.model)
            recorded = record(self.decoder.forward, self.cache, self.batch, devices)
        except RuntimeError as error:
            failure = str(error).splitlines()[0]
        if self.cache.division.all(recorded is not None):
            return recorded
        self.decoder.records = False
        warnings.warn(
            "this model's decoding step cannot be recorded as a CUDA graph, answers take longer: "
            f"{failure}",
            stacklevel=2,
        )
        return None


def make_decoder(model: PreTrainedModel, *, records: bool, compiled: bool) -> Decoder:
    """How a model decodes.

    Args:
        model: the model.
        records: whether to record decoding steps as CUDA graphs.
        compiled: whether to compile what is recorded with `torch.compile`.
    """
    forward = compile_forward(model) if compiled else plain_forward(model)
    return Decoder(model, forward, records)
