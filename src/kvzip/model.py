"""ModelKVzip: read once, evict, ask anything. Each method is one stage, in order."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from kvzip import (
    attention,
    decoding,
    fingerprint,
    loading,
    parallel,
    shrinking,
    spans,
    storage,
    streaming,
    weights,
)
from kvzip.budget import Budget, Span
from kvzip.cache import KV_TYPES, ContextCache, Document, Origin
from kvzip.errors import KVzipError, KVzipWarning
from kvzip.geometry import probe
from kvzip.kernels import operations
from kvzip.kernels.quantization import Quantization
from kvzip.prefill import Progress, prefill, silent
from kvzip.prompts import INSTRUCTIONS, Prompts, split_chat_template
from kvzip.room import make_decoder
from kvzip.scorers import RECONSTRUCTION, Scorers
from kvzip.scoring import is_surrogate, reconstruction
from kvzip.shrinking import Shrinker, Shrinking
from kvzip.surrogates.predicting import predicting

PREFILL_CHUNK = 16384

Text = str | Tensor
"""Text, or its token ids `[n]`."""


class ModelKVzip:
    """A language model that reads a context once, keeps what it needs and answers questions.

    Args:
        model: a short name (`"qwen2.5-7b"`), a Hugging Face name, a local folder, a loaded
            transformers model (its attention implementation is set to `"kvzip"`), or None for the
            small bundled model.
        tokenizer: needed with a loaded model only.
        kv_type: `"evict"` frees what is pruned; `"retain"` keeps it beside, so that one cache can
            be pruned to any ratio again and again.
        backend: `"triton"`, `"reference"` (plain PyTorch, slow on a GPU), or `"auto"`: Triton where
            it can run.
        compile: compile decoding steps with `torch.compile`: faster answers on a GPU after a first
            one that takes up to a minute longer.
        instruction: what stands in front of the context; `"default"`, `"gsm"` or any text.
        dtype: dtype of the weights; the checkpoint's on a GPU and float32 on a CPU if None.
        device: where to put the model; the first GPU or else the CPU if None.
        quantization: quantise the weights while they are loaded: `"int8"`, `"w8a8"` or `"fp8"`
            (activations, too) or `"int4"` (see `quantized_weights`). A model that is published
            quantised needs nothing.
        kwargs: passed on to transformers' `from_pretrained` (`revision`, `token`, ...); with
            `device_map="auto"` layers are spread over all GPUs, and their pairs with them; with
            `tp_plan="auto"` under torchrun heads are divided among processes (see `parallel`).

    Raises:
        KVzipError: if the model cannot be loaded or its layers cannot be cached.

    Example:
        >>> model = ModelKVzip()
        >>> kv = model.prefill("My name is Kim living in Seoul. My major is computer science.")
        >>> answer = model.generate(model.apply_template("What is my name?"), kv=kv.prune(0.3))
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        kv_type: str = "evict",
        backend: str = "auto",
        compile: bool = False,
        instruction: str = "default",
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        quantization: str | None = None,
        **kwargs: Any,
    ) -> None:
        if kv_type not in KV_TYPES:
            raise KVzipError(f"unknown kv_type {kv_type!r}: choose one of {', '.join(KV_TYPES)}")
        if isinstance(model, PreTrainedModel):
            if tokenizer is None:
                raise KVzipError("a loaded model needs its tokenizer: ModelKVzip(model, tokenizer)")
            if quantization is not None:
                raise KVzipError("a loaded model is quantised or not: leave out quantization")
            self.hf_model, self.tokenizer = model.eval(), tokenizer
            self.hf_model.set_attn_implementation(attention.IMPLEMENTATION)
            self.model_id = model.name_or_path or type(model).__name__
        else:
            name = None if model is None else str(model)
            self.hf_model, self.tokenizer = loading.load(
                name, dtype=dtype, device=device, quantization=quantization, **kwargs
            )
            self.model_id = name or loading.BUNDLED
        self.quantization = quantization
        self.retain = kv_type == "retain"
        parts = split_chat_template(self.tokenizer, INSTRUCTIONS.get(instruction, instruction))
        self.prompts = Prompts(self.tokenizer, parts)
        weights.refuse_offloaded_input(self.hf_model)
        self.division = parallel.division(self.hf_model)
        self.geometry = probe(self.hf_model)
        parallel.check_divided(self.hf_model, self.division, self.geometry)
        self._scorers = Scorers(
            self.hf_model, self.prompts, self.geometry, self.division, lambda: self.origin
        )
        where = torch.device(self.hf_model.device)
        self.operations = operations(backend, where, self.hf_model.dtype)
        # a recorded step runs ahead by one token, which a state cannot take back
        records = (
            self.operations.name == "triton"
            and not self.geometry.stateful
            and all(device.type == "cuda" for device in weights.devices(self.hf_model))
        )
        compiled = compile and records and weights.on_one_device(self.hf_model)
        if compile and not compiled:
            warnings.warn(
                "compile=True changes nothing here: steps are compiled where they are recorded as "
                "CUDA graphs, on one NVIDIA device and without layers of linear attention",
                KVzipWarning,
                stacklevel=2,
            )
        self.decoder = make_decoder(self.hf_model, records=records, compiled=compiled)
        if self.division.size > 1:
            self.origin  # noqa: B018  weights are gathered for it, by all processes together

    @cached_property
    def origin(self) -> Origin:
        """What ties a cache to this model."""
        return Origin(
            model_id=self.model_id,
            fingerprint=fingerprint.model_fingerprint(self.hf_model),
            tokenizer_hash=fingerprint.tokenizer_hash(self.tokenizer),
            dtype=str(self.hf_model.dtype).removeprefix("torch."),
            quantization=self.quantization,
        )

    def prefill(
        self,
        context: Text | Iterable[Text],
        *,
        ratio: float | Budget | None = None,
        streaming: bool = False,
        chunk_size: int | None = None,
        budget: str | None = None,
        scorer: str = RECONSTRUCTION,
        reach: str | None = None,
        load_score: bool | str | Path = False,
        score_chunk: int = reconstruction.CHUNK_SIZE,
        kv_dtype: str | Quantization | None = None,
        progress: Progress = silent,
    ) -> ContextCache:
        """Read a context and score its pairs, and prune if told to.

        Args:
            context: text, or its token ids `[n]`; while streaming, pieces of either, too.
            ratio: share of the context's pairs to keep, or a `Budget`; None leaves pruning to
                `kv.prune`.
            streaming: compress while reading, in bounded memory: see `streaming`. Needs a ratio.
            chunk_size: tokens of one forward pass while reading (16,384 if None); while streaming,
                tokens that are read, scored and compacted at once (8,000).
            budget: while streaming, `"chunk"` (if None) or `"context"`: see `streaming.Streaming`.
            scorer: how to score pairs: by reconstruction; by a surrogate, which scores while the
                context is read and needs no second pass (`"kvzap:mlp"`, `"fastkvzip"`, ...; see
                `surrogates.load`); others (see `scoring.SCORERS`) are there to be compared with.
            reach: what a pass of the scorers `"reconstruction"` and `"reconstruction+"` attends
                to, `"context"` as published, or `"chunk"`, which is cheaper and what streaming
                does; None for what goes with the rest.
            load_score: score whole heads from a file, without a scorer: True for the one in the
                model's local folder, or a path (see `scoring.heads`).
            score_chunk: tokens that one scoring pass makes the model repeat.
            kv_dtype: quantise what is kept, all pairs without a ratio: see `ContextCache.prune`;
                while streaming, when all is read, so that until then pairs are held as the model
                made them.
            progress: called with the stage, the tokens done and the tokens in all.

        Returns:
            The cache: full without a ratio, zipped with one.

        Raises:
            KVzipError: if the context is empty or too long for the model, for a scorer that is
                unknown or cannot be loaded, or if budget or quantisation make no sense for the
                context, which is known when it is read, and said before a pass that scores it.
        """
        how = None if kv_dtype is None else Quantization.of(kv_dtype)
        if streaming:
            self._check_streaming(ratio, scorer, reach, load_score)
            return self.extend(
                self.begin(),
                context,
                ratio=ratio,
                chunk_size=chunk_size,
                budget=budget,
                scorer=scorer,
                score_chunk=score_chunk,
                kv_dtype=how,
                progress=progress,
            )
        if not isinstance(context, (str, Tensor)):
            raise KVzipError("a context in pieces is read with streaming=True")
        if budget is not None:
            raise KVzipError("budget belongs to streaming: add streaming=True")
        if ratio is None and how is not None:
            ratio = 1.0  # quantised, and nothing evicted
        kept = None if ratio is None else Budget.of(ratio)
        reach = "context" if reach is None else reach
        reconstruction.check_reach(reach)
        read_chunk = PREFILL_CHUNK if chunk_size is None else chunk_size
        scoring = self._scorers.of_context(scorer, reach, load_score, score_chunk)
        if is_surrogate(scorer):
            kv = self._read_and_predict(scorer, context, read_chunk, progress)
        else:
            kv = self.read(context, chunk_size=read_chunk, progress=progress)
            if kept is not None:
                kv.check(kept, kv_dtype=how)
            kv.scores = scoring(kv, progress=progress)
        return kv if kept is None else kv.prune(kept, kv_dtype=how)

    def _check_streaming(
        self,
        ratio: float | Budget | None,
        scorer: str,
        reach: str | None,
        load_score: bool | str | Path,
    ) -> None:
        """Raise KVzipError for arguments of `prefill` that do not go with streaming."""
        if ratio is None:
            raise KVzipError(
                "streaming evicts as it reads: say how much to keep (ratio=0.3, or "
                "ratio=Budget(threshold=-4))"
            )
        if load_score is not False:
            raise KVzipError("streaming scores what it reads: leave out load_score")
        reconstruction.check_reach(reach or "chunk")
        if reach == "context" or (reach and scorer != RECONSTRUCTION):
            raise KVzipError(f"streaming scores with reach 'chunk', not {reach!r}")

    def extend(
        self,
        kv: ContextCache,
        context: Text | Iterable[Text],
        *,
        ratio: float | Budget | None = None,
        chunk_size: int | None = None,
        budget: str | None = None,
        scorer: str | None = None,
        score_chunk: int = reconstruction.CHUNK_SIZE,
        kv_dtype: str | Quantization | None = None,
        progress: Progress = silent,
    ) -> ContextCache:
        """Read further into a context, compressing while reading; also `kv.extend(context)`.

        The result is that of one pass if the context ended with a whole chunk so far. If reading
        is interrupted, the cache holds the last whole chunk.

        Args:
            kv: the cache; it grows.
            context: what comes behind: text or token ids `[n]`, or pieces of either.
            ratio: share to keep of the pairs that are new, that of the cache if None.
            chunk_size: tokens that are read, scored and compacted at once (8,000).
            budget: as in `prefill`.
            scorer: `"reconstruction"` or a surrogate; that of the cache if None.
            score_chunk: as in `prefill`.
            kv_dtype: quantise all of the cache when the context is read. One that is quantised
                already stays so, and what is new is quantised like the rest as it is read.
            progress: as in `prefill`.

        Returns:
            The same cache.

        Raises:
            KVzipError: if there is nothing to read, positions run out, or the cache holds a
                conversation, has no scores, retains evicted pairs or cannot be quantised so; and
                if it kept nothing so far, and no ratio is given.
        """
        self._check(kv)
        how = streaming.Streaming(
            Budget.as_before(kv.ratio) if ratio is None else Budget.of(ratio),
            chunk_size=streaming.CHUNK_SIZE if chunk_size is None else chunk_size,
            budget=streaming.BUDGET if budget is None else budget,
        )
        kv.check(how.amount, kv_dtype=kv_dtype)
        if isinstance(context, (str, Tensor)):
            pieces: Iterable[Tensor] = [self._context_ids(context)]
            total = sum(map(len, pieces))
        else:
            pieces, total = self._pieces(context), None
        streaming.extend(
            kv,
            pieces,
            self._scorers.of_chunks(kv, scorer, score_chunk),
            how,
            total=total,
            max_positions=self.geometry.max_positions,
            progress=progress,
        )
        return kv if kv_dtype is None else kv.quantize(kv_dtype)

    def read(
        self,
        context: Text,
        *,
        chunk_size: int = PREFILL_CHUNK,
        progress: Progress = silent,
    ) -> ContextCache:
        """Stage 1: read prefix and context and hold every pair, without scores.

        Raises:
            KVzipError: if the context is empty or too long for the model.
        """
        if chunk_size < 1:
            raise KVzipError(f"chunk_size is {chunk_size}: read at least one token at a time")
        prefix, ids = self.prompts.prefix_ids(), self._context_ids(context)
        if len(prefix) + len(ids) >= self.geometry.max_positions:
            raise KVzipError(
                f"the context takes {len(prefix) + len(ids)} positions with its prefix, the model "
                f"has {self.geometry.max_positions}: shorten it or choose another model"
            )
        return self._read(Document(torch.cat([prefix, ids]), len(prefix)), chunk_size, progress)

    def begin(self) -> ContextCache:
        """A cache of the prefix alone, to be extended: what an interruption leaves is in it."""
        prefix = self.prompts.prefix_ids()
        return self._read(Document(prefix, len(prefix)), PREFILL_CHUNK, silent)

    def _read(self, document: Document, chunk_size: int, progress: Progress) -> ContextCache:
        layers = prefill(
            self.hf_model,
            self.geometry,
            self.operations,
            document.token_ids,
            chunk_size=chunk_size,
            retain=self.retain,
            progress=progress,
        )
        return self._bind(ContextCache(layers, document, self.origin, division=self.division))

    def _bind(self, kv: ContextCache) -> ContextCache:
        kv.reader = self.extend
        return kv

    def _pieces(self, context: Iterable[Text]) -> Iterator[Tensor]:
        """Token ids of each piece that is not empty."""
        if not isinstance(context, Iterable):
            raise KVzipError(f"a context is text or token ids [n], or pieces: got {context!r}")
        for piece in context:
            if not isinstance(piece, (str, Tensor)) or len(piece):
                yield self._context_ids(piece)

    def _context_ids(self, context: Text) -> Tensor:
        """`[n]`, int64, on the CPU, checked."""
        if isinstance(context, str):
            return self.prompts.context_ids(context)
        if not isinstance(context, Tensor):
            raise KVzipError(f"a context is text or token ids [n]: got {type(context).__name__}")
        ids = context.cpu().long()
        if ids.ndim != 1 or not len(ids):
            raise KVzipError(f"a context is text or token ids [n], n > 0: got shape {[*ids.shape]}")
        vocabulary = self.hf_model.get_input_embeddings().num_embeddings
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise KVzipError(
                f"token ids run from {ids.min()} to {ids.max()}, the model knows 0 to "
                f"{vocabulary - 1}"
            )
        image = getattr(self.hf_model.config, "image_token_id", None)
        if image is not None and bool((ids == image).any()):
            raise KVzipError(
                f"the context holds token {image}, which stands for an image: only text can be read"
            )
        return ids

    def score(
        self,
        kv: ContextCache,
        *,
        scorer: str = RECONSTRUCTION,
        reach: str = "context",
        load_score: bool | str | Path = False,
        score_chunk: int = reconstruction.CHUNK_SIZE,
        progress: Progress = silent,
    ) -> ContextCache:
        """Stage 2: score the context's pairs; arguments as in `prefill`. Returns the same cache."""
        self._check(kv)
        scoring = self._scorers.of_context(scorer, reach, load_score, score_chunk)
        kv.scores = scoring(kv, progress=progress)
        return kv

    def _read_and_predict(
        self, scorer: str, context: Text, chunk_size: int, progress: Progress
    ) -> ContextCache:
        """Stages 1 and 2 at once."""
        scored = self.geometry.prunable
        with predicting(self.hf_model, self._scorers.surrogate(scorer), scored) as predictions:
            kv = self.read(context, chunk_size=chunk_size, progress=progress)
        kv.scores = predictions.whole(kv.document.context_length)
        return kv

    def spans(self, context: str, parts: Iterable[str | Span]) -> list[Span]:
        """Tokens of parts of a context, for `kv.prune(keep=...)` and `Budget`.

        Args:
            context: the text, as it is given to `prefill`.
            parts: texts, each of which stands for every place where it occurs, or (start, end) in
                characters.

        Returns:
            (start, end) in tokens, those included that hold a part only in part.

        Raises:
            KVzipError: if a text does not occur, characters are outside the context, or the
                tokenizer does not say which characters its tokens hold.

        Example:
            >>> model = ModelKVzip()
            >>> context = "The code is 417. The weather was fine. Ada keeps bees."
            >>> kept = model.spans(context, ["The code is 417."])
            >>> kv = model.prefill(context).prune(0.5, keep=kept)
        """
        if not isinstance(context, str):
            raise KVzipError(
                "the parts of a context are found in its text: of token ids, name those to keep by "
                "number"
            )
        return spans.tokens(self.prompts.context_offsets(context), spans.characters(context, parts))

    def apply_template(self, query: str, *, kv: ContextCache | None = None) -> Tensor:
        """Token ids `[t]` of a question: right behind the context, or behind the answers in `kv`.

        Args:
            query: the question.
            kv: a cache whose conversation goes on with this question.

        Raises:
            KVzipError: if the question is empty.
        """
        if kv is None or not len(kv.history):
            return self.prompts.query_ids(query)
        ids = self.prompts.turn_ids(query)
        return ids[1:] if kv.history[-1] == ids[0] else ids

    def generate(
        self,
        query: str | Tensor,
        *,
        kv: ContextCache,
        update_cache: bool = False,
        streamer: BaseStreamer | None = None,
        shrink: float | Budget | Shrinking | None = None,
        **settings: Any,
    ) -> str:
        """Stage 5: answer a question, greedily unless told otherwise.

        Args:
            query: token ids `[t]` from `apply_template`, or the question itself.
            kv: the cache, pruned or not.
            update_cache: keep question and answer in the cache, for a conversation.
            streamer: a transformers streamer that gets the question, which its `skip_prompt=True`
                leaves out, and then each new token.
            shrink: evict of question and answer, too, and of the conversation before them, while
                the answer is generated, so that a long one stays bounded: the share to keep, a
                `Budget`, or `Shrinking`, which tells more. What is kept becomes a part of the
                context, of the cache's own only with `update_cache`.
            settings: of transformers' `GenerationConfig`: `max_new_tokens` (512 if there is room),
                `do_sample`, `temperature`, `stop_strings`, ...

        Raises:
            KVzipError: if the cache belongs to another model or positions run out, or for a
                scorer to shrink by that is no surrogate.

        Warns:
            KVzipWarning: if `shrink` keeps nothing.
        """
        self._check(kv)
        query_ids = self.apply_template(query, kv=kv) if isinstance(query, str) else query
        if query_ids.numel() != query_ids.shape[-1]:
            raise KVzipError(f"a question is one row of token ids: got shape {[*query_ids.shape]}")
        answer = decoding.generate(
            self.decoder,
            self.tokenizer,
            kv,
            query_ids.view(-1),
            max_positions=self.geometry.max_positions,
            update_cache=update_cache,
            streamer=streamer,
            shrinker=None if shrink is None else self._shrinker(kv, Shrinking.of(shrink)),
            **settings,
        )
        return self.prompts.decode(answer)

    def shrink(
        self, kv: ContextCache, how: float | Budget | Shrinking, *, scorer: str | None = None
    ) -> ContextCache:
        """Evict of a conversation: all but its last tokens become a part of the context.

        From then on they are forgotten neither by `kv.reset()` nor by `kv.truncate`, and are saved
        with the context. Forks keep what they share. Where the context was scored by another scorer
        its scores are given up, since they are no measure for those of a surrogate: it can then be
        asked, but neither pruned nor extended.

        Args:
            kv: the cache; a conversation of no more than `window` tokens is left as it is.
            how: as in `generate`.
            scorer: the surrogate, unless `how` names it.

        Returns:
            The same cache.

        Raises:
            KVzipError: if the cache belongs to another model, retains evicted pairs or holds a tail
                that only other code knows, or for a scorer that is no surrogate.

        Warns:
            KVzipWarning: if nothing is kept.
        """
        self._check(kv)
        decoding.refuse_unknown_tail(kv)
        settings = Shrinking.of(how)
        if scorer is not None:
            settings = replace(settings, scorer=scorer)
        self._shrinker(kv, settings).shrink_conversation(kv)
        return kv

    def _shrinker(self, kv: ContextCache, how: Shrinking) -> Shrinker:
        before = kv.scores.scorer.split(" + ")[-1] if kv.scores else RECONSTRUCTION
        scorer = how.scorer or (before if is_surrogate(before) else shrinking.SCORER)
        return Shrinker(self.hf_model, self._scorers.surrogate(scorer, "leave out shrink"), how)

    def check_shrinking(self, kv: ContextCache, how: float | Budget | Shrinking) -> None:
        """Raise KVzipError if a conversation with this cache cannot shrink so, for good."""
        self._check(kv)
        self._shrinker(kv, Shrinking.of(how)).check(kv)

    def ask(
        self,
        kv: ContextCache,
        queries: Sequence[str],
        *,
        shrink: float | Budget | Shrinking | None = None,
        **settings: Any,
    ) -> list[str]:
        """Answer a batch of questions on one context in one go; each answer as if asked alone.

        Args:
            kv: the cache; it is not changed.
            queries: the questions.
            shrink: as in `generate`; questions are then answered one after the other, since what is
                kept of an answer becomes context, which the rows of a batch share.
            settings: as in `generate`.
        """
        self._check(kv)
        if isinstance(queries, str):
            raise KVzipError("ask takes a list of questions: put the question in brackets")
        if not queries:
            return []
        if shrink is not None:
            return [self.generate(one, kv=kv, shrink=shrink, **settings) for one in queries]
        answers = decoding.generate_batch(
            self.decoder,
            self.tokenizer,
            kv,
            [self.apply_template(query, kv=kv) for query in queries],
            max_positions=self.geometry.max_positions,
            **settings,
        )
        return [self.prompts.decode(answer) for answer in answers]

    def load(self, path: str | Path) -> ContextCache:
        """Open a cache that was saved with `kv.save(path)` from the same model.

        Raises:
            KVzipError: if the file is missing, damaged, or was made with another model.
        """
        kv = storage.load(
            path,
            self.origin,
            operations=self.operations,
            devices=self.geometry.devices,
            dtype=self.hf_model.dtype,
            retain=self.retain,
            division=self.division,
        )
        return self._bind(kv)

    def _check(self, kv: ContextCache) -> None:
        if kv.origin.fingerprint != self.origin.fingerprint:
            raise KVzipError(
                f"this cache was made with model {kv.origin} (fingerprint "
                f"{kv.origin.fingerprint}), not with {self.origin} ({self.origin.fingerprint}): "
                "ask the model that read the context"
            )
