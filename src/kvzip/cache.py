"""Stage 4: the zipped cache, what a model remembers of a context.

Two numbers that never share a name: `seen_tokens` counts positions, rows count stored pairs.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from kvzip.budget import Budget, Footprint, Span
from kvzip.errors import KVzipError, KVzipWarning
from kvzip.interrupts import uninterrupted
from kvzip.kernels.quantization import Quantization
from kvzip.layers import AnsweringLayer, ContextLayer, Tail
from kvzip.parallel import WHOLE, Division
from kvzip.selection import check, select, with_last
from kvzip.states import State, StateLayer


@dataclass(frozen=True)
class Scores:
    """Importance of every context pair of the layers that can be pruned.

    Attributes:
        values: `[L, H, n]`, float32, on the CPU; meaningless where a pair is no longer held.
        scorer: name of the scorer that made them.
        window: last tokens whose pairs a threshold leaves alone, and other budgets favour.
    """

    values: Tensor
    scorer: str
    window: int = 0


@dataclass(frozen=True)
class Origin:
    """The model that a cache belongs to.

    Attributes:
        model_id: name or folder that it was loaded from.
        fingerprint: digest of its config and of a sample of its weights.
        tokenizer_hash: digest of its tokenizer.
        dtype: dtype of keys and values, such as `"bfloat16"`.
        quantization: what its weights were quantised to when it was loaded, None if they were not.
    """

    model_id: str
    fingerprint: str
    tokenizer_hash: str
    dtype: str
    quantization: str | None = None

    def __str__(self) -> str:
        return f"{self.model_id}, {self.quantization or 'not quantised'}"


@dataclass(frozen=True)
class Document:
    """The tokens that a context segment stands for.

    Attributes:
        token_ids: `[p + n]`, int64, on the CPU: prefix and context.
        prefix_length: p, tokens that are never evicted.
    """

    token_ids: Tensor
    prefix_length: int

    @property
    def context_length(self) -> int:
        """Number of context tokens, n."""
        return len(self.token_ids) - self.prefix_length


KV_TYPES = ("evict", "retain")


def _joined(parts: Sequence[Scores]) -> Scores:
    """Scores of tokens that were read one part behind the other."""
    scorers = dict.fromkeys(name for part in parts for name in part.scorer.split(" + "))
    values = torch.cat([part.values for part in parts], dim=-1)
    return Scores(values, " + ".join(scorers), parts[-1].window)


def warn_all_below(budget: Budget, largest: float, window: int) -> None:
    """Warn that no score reaches a threshold; for the caller of the caller."""
    last = f" and the last {window} tokens" if window else ""
    warnings.warn(
        f"no score reaches {budget}, the largest is {largest:.6g}: nothing of the context is kept, "
        f"only the prefix{last}",
        KVzipWarning,
        stacklevel=3,
    )


class ContextCache(Cache):
    """A context that was read once and can be asked any number of times.

    Made by `ModelKVzip.prefill` or `ModelKVzip.load`. It is a transformers `Cache`: stock
    `hf_model.generate(ids, past_key_values=kv.fork())` works too, where `ids` is the whole
    sequence, `torch.cat([kv.token_ids, query_ids])[None]`, as transformers expects of any cache.

    Args:
        layers: one layer of the cache per layer of the model.
        document: the tokens behind the context segment.
        origin: the model that it belongs to.
        scores: importance of the context's pairs, or None if they were not scored.
        ratio: the keep ratio that was asked for last, or the share that another budget came to.
        division: how heads are divided among processes; layers, scores and everything that is told
            of pairs are then those of this process, and what selects pairs is done by all together.
    """

    def __init__(
        self,
        layers: Sequence[AnsweringLayer | StateLayer],
        document: Document,
        origin: Origin,
        *,
        scores: Scores | None = None,
        ratio: float = 1.0,
        division: Division = WHOLE,
    ) -> None:
        super().__init__(layers=list(layers))
        self.document = document
        self.origin = origin
        self._scores: tuple[Scores, ...] = () if scores is None else (scores,)
        self.ratio = ratio
        self.division = division
        self.history = document.token_ids[:0]
        self.room: object | None = None  # what `room.Decoder` keeps here for the next answer
        self.reader: Callable[..., ContextCache] | None = None  # of the model that it belongs to

    @property
    def scores(self) -> Scores | None:
        """Importance of the context's pairs, or None if they were not scored.

        Put together when asked for: a long context is streamed in many parts.
        """
        if len(self._scores) > 1:
            self._scores = (_joined(self._scores),)
        return self._scores[0] if self._scores else None

    @scores.setter
    def scores(self, scores: Scores | None) -> None:
        self._scores = () if scores is None else (scores,)

    @property
    def scorers(self) -> set[str]:
        """Names of what scored the context: several if it was read in parts."""
        return {name for part in self._scores for name in part.scorer.split(" + ")}

    @property
    def prunable(self) -> list[ContextLayer]:
        """The layers with full attention, in order."""
        return [layer for layer in self.layers if isinstance(layer, ContextLayer)]

    @property
    def attending(self) -> list[AnsweringLayer]:
        """The layers that hold pairs, in order."""
        return [layer for layer in self.layers if isinstance(layer, AnsweringLayer)]

    @property
    def stateful(self) -> bool:
        """Whether there are layers of linear attention, which cannot go back token by token."""
        return any(isinstance(layer, StateLayer) for layer in self.layers)

    @property
    def token_ids(self) -> Tensor:
        """`[p + n + tail]`, int64, on the CPU: all tokens so far.

        After an answer that was kept (`update_cache=True`) its last token is part of this but not
        yet of the tail: the next question's forward pass reads it.
        """
        return torch.cat([self.document.token_ids, self.history])

    @property
    def seen_tokens(self) -> int:
        """Positions that the cache has seen: prefix, context and tail."""
        return int(self.get_seq_length())

    @property
    def tail_length(self) -> int:
        """Tokens behind the context."""
        return self.attending[0].tail.length

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values of context and tail, read from the live tensors.

        The room that stays for the next answer on a GPU (`room`) is not counted.
        """
        held = [
            tensor
            for layer in self.layers
            for tensor in (*layer.context_tensors(), *layer.tail_tensors())
        ]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
        return sum(storages.values())

    @property
    def retained(self) -> bool:
        """Whether evicted pairs stay beside the kept ones (`kv_type="retain"`)."""
        return any(layer.retained is not None for layer in self.prunable)

    @property
    def kept(self) -> Tensor:
        """`[L, H, n]`, bool, on the CPU: context pairs held by the layers that can be pruned."""
        p = self.document.prefix_length
        return torch.stack([layer.context.kept[:, p:] for layer in self.prunable])

    @property
    def held(self) -> Tensor:
        """`[L, H, n]`, bool, on the CPU: pairs that `prune` can choose from.

        Those that are kept, and with `kv_type="retain"` those that were evicted, too.
        """
        p = self.document.prefix_length
        return torch.stack([layer.held.kept[:, p:] for layer in self.prunable])

    @property
    def kv_dtype(self) -> str | None:
        """What the context's pairs are quantised to, None if they are as the model made them."""
        how = self.prunable[0].context.quantization
        return None if how is None else how.dtype

    @property
    def realised_ratio(self) -> float:
        """Share of the context's pairs that is held, over the layers that can be pruned.

        Where heads are divided among processes, of those of this one, as `nbytes` is.
        """
        kept = self.kept
        return kept.sum().item() / kept.numel()

    def prune(
        self,
        ratio: float | Budget | None = None,
        level: str = "pair",
        *,
        tokens: float | None = None,
        bytes: int | str | None = None,
        threshold: float | None = None,
        min_per_head: int = 0,
        keep: Sequence[Span] = (),
        kv_dtype: str | Quantization | None = None,
    ) -> "ContextCache":
        """Keep the best of the context's pairs, as many as a budget allows, and free the others.

        Layer after layer is compacted and its former tensors are released, so that memory peaks at
        what was held plus one layer. The tail is left alone. Forks keep what they share.

        Args:
            ratio: share of the context's pairs to keep, in (0, 1], or a whole `Budget`.
            level: `pair`, `pair-uniform` or `head` (see `selection.select`).
            tokens: instead of a ratio, pairs of a head on average.
            bytes: instead of a ratio, bytes that `nbytes` is not to exceed (tail and retained pairs
                aside), such as `2_000_000_000`, `"2GB"` or `"1.5GiB"`.
            threshold: instead of a ratio, the least score to keep.
            min_per_head: pairs that every head keeps at least; see `Budget`.
            keep: tokens whose pairs every head keeps, as (start, end); see `Budget`.
            kv_dtype: quantise what stays, prefix included: `"int4"`, `"int8"` or `"fp8"`, or a
                `Quantization`. None leaves it as it is held, and where pairs are retained as the
                model made it. Sliding layers and pairs that are retained are never quantised, nor
                is the tail.

        Returns:
            This cache.

        Raises:
            KVzipError: for a bad budget or level, a cache without scores, a ratio above what an
                evicted cache still holds, or a quantisation that is unknown, does not suit the
                heads, or is not the one that the cache holds already.

        Warns:
            KVzipWarning: if no score reaches a threshold.
        """
        budget = Budget.of(
            ratio,
            tokens=tokens,
            bytes=bytes,
            threshold=threshold,
            min_per_head=min_per_head,
            keep=keep,
        )
        how = None if kv_dtype is None else Quantization.of(kv_dtype)
        if self.scores is None:
            raise self.unscored("prune")
        if how is not None:
            self._check_quantization(how)
        device = self.prunable[0].context.keys.device
        scores = self.scores.values.to(device)
        held = self.held
        if not held.all():
            scores = scores.masked_fill(~held.to(device), -torch.inf)
        scores = self.division.gather(scores)
        kept = select(scores, budget, level, self.footprint(how), self.scores.window)
        if budget.threshold is not None:
            if not kept.any() and kept.shape[-1] > self.scores.window:
                warn_all_below(budget, float(scores.max()), self.scores.window)
            kept = with_last(kept, scores, self.scores.window)
        del scores
        share = kept.sum().item() / kept.numel()
        self.ratio = share if budget.ratio is None else budget.ratio
        self.keep(self.division.own(kept), how)
        return self

    def quantize(self, kv_dtype: str | Quantization) -> "ContextCache":
        """Quantise the context's pairs, and evict none: as `prune` with the same `kv_dtype`.

        Returns:
            This cache.

        Raises:
            KVzipError: for a quantisation that is unknown, does not suit the heads, or is not the
                one that the cache holds already.
        """
        how = Quantization.of(kv_dtype)
        self._check_quantization(how)
        self.keep(self.kept, how)
        return self

    def unscored(self, purpose: str) -> KVzipError:
        """The error of a cache without scores, with the way to some.

        Args:
            purpose: what they are needed for, a verb.
        """
        whole = all(layer.held.kept.all() for layer in self.prunable)
        if whole and all(layer.held.quantization is None for layer in self.prunable):
            remedy = ": call model.score(kv) first"
        else:
            state = "quantised" if whole else "evicted"
            remedy = f", and what is {state} cannot be scored any more: prefill the context anew"
        return KVzipError(f"this cache has no scores to {purpose} by{remedy}")

    def _check_quantization(self, how: Quantization) -> None:
        """Raise KVzipError before anything is done if a layer cannot be quantised so."""
        for layer in self.prunable:
            layer.held.check(how)

    def check(
        self, budget: Budget, level: str = "pair", kv_dtype: str | Quantization | None = None
    ) -> None:
        """Raise KVzipError if `prune` could not keep within a budget, whatever the scores."""
        heads = self.division.size * sum(len(layer.context.kept) for layer in self.prunable)
        how = None if kv_dtype is None else Quantization.of(kv_dtype)
        if how is not None:
            self._check_quantization(how)
        check(budget, level, self.document.context_length, heads, self.footprint(how))

    def footprint(self, how: Quantization | None = None) -> Footprint:
        """What the context's keys and values take, or would take when quantised, in all processes.

        A pair of the largest layer, if they differ.
        """
        p = self.document.prefix_length
        parts = [layer.held.footprint(p, how) for layer in self.prunable]
        sliding = (
            tensor.numel() * tensor.element_size()
            for layer in self.layers
            if not isinstance(layer, ContextLayer)
            for tensor in layer.context_tensors()
        )
        fixed = sum(sliding) + sum(part.fixed for part in parts)
        return Footprint(fixed * self.division.size, max(part.pair for part in parts))

    def keep(self, kept: Tensor, how: Quantization | None = None) -> None:
        """Free the context's pairs that are not at `kept`, `[L, H, n]`, bool; the prefix stays.

        Args:
            kept: which pairs stay.
            how: quantise them so; None leaves them as they are held.
        """
        self.room = None  # it shares what is freed here
        prefix = kept.new_ones((kept.shape[1], self.document.prefix_length))
        with uninterrupted():
            for layer, layer_kept in zip(self.prunable, kept, strict=True):
                layer.prune(torch.cat([prefix, layer_kept], dim=1), how)

    def fork(self, tails: Sequence[Tail] | None = None) -> "ContextCache":
        """A cache that shares this context and has a tail of its own.

        Args:
            tails: one for each layer, empty ones if None.
        """
        tails = tails or [Tail() for _ in self.layers]
        layers = [layer.fork(tail) for layer, tail in zip(self.layers, tails, strict=True)]
        fork = ContextCache(
            layers,
            self.document,
            self.origin,
            ratio=self.ratio,
            division=self.division,
        )
        fork._scores = self._scores
        fork.reader = self.reader
        return fork

    def extend(self, context: Any, **how: Any) -> "ContextCache":
        """Read further into this context and compress while reading: see `ModelKVzip.extend`.

        Raises:
            KVzipError: as `ModelKVzip.extend`, and if this cache was not made by a `ModelKVzip`.
        """
        if self.reader is None:
            raise KVzipError("this cache does not know its model: call model.extend(kv, context)")
        return self.reader(self, context, **how)

    def absorb(
        self,
        token_ids: Tensor,
        scores: Scores | None,
        kept: Tensor,
        states: Mapping[int, State] | None = None,
    ) -> None:
        """Make the tail's first tokens a part of the context, and evict what is not kept of them.

        Args:
            token_ids: `[t]`, int64, on the CPU: the tokens.
            scores: their scores, `[L, H, t]`; None where they are no measure beside those of the
                context, which then has none, and is pruned no further.
            kept: `[L, H, t]`, bool: which of their pairs stay.
            states: by layer of linear attention, its state right behind these tokens, where the
                tail holds more.
        """
        self.room = None
        layer_kept = iter(kept)
        for index, layer in enumerate(self.layers):
            if isinstance(layer, StateLayer):
                layer.absorb(layer.state if states is None else states[index])
            else:
                layer.absorb(next(layer_kept) if isinstance(layer, ContextLayer) else kept[0])
        document = self.document
        self.document = replace(document, token_ids=torch.cat([document.token_ids, token_ids]))
        if scores is None:
            self._scores = ()
        else:
            self._scores = (*self._scores, replace(scores, values=scores.values.cpu()))
        self.history = self.history[len(token_ids) :]

    def adopt(self, answered: "ContextCache", token_ids: Tensor) -> None:
        """Take over what a fork's tail holds beyond this one's, and what its context does.

        Args:
            answered: a fork whose tail began as a copy of this one's; it may have made a part of
                it context.
            token_ids: `[t]`, int64, on the CPU: the tokens that are new.
        """
        absorbed = len(answered.document.token_ids) - len(self.document.token_ids)
        with uninterrupted():
            for mine, theirs in zip(self.layers, answered.layers, strict=True):
                mine.adopt(theirs)
            if absorbed:
                self.room = None  # it shares the context that was given up
                self.document, self._scores = answered.document, answered._scores
            self.history = torch.cat([self.history, token_ids])[absorbed:]

    def truncate(self, tail_length: int) -> None:
        """Forget all but the first `tail_length` tokens behind the context."""
        if self.stateful and 0 < tail_length < self.tail_length:
            raise KVzipError(
                "layers of linear attention cannot go back to the middle of a conversation: forget "
                "all of it with kv.reset(), or ask a kv.fork()"
            )
        for layer in self.layers:
            layer.truncate(tail_length)
        self.history = self.history[:tail_length]

    def reset(self) -> None:
        """Forget everything behind the context."""
        self.truncate(0)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the context to a `.kvz` file (see `storage`); the tail is not part of it.

        Raises:
            KVzipError: if the file exists and `overwrite` is False, or cannot be written.
        """
        from kvzip import storage

        return storage.save(self, path, overwrite=overwrite)
