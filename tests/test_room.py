"""Answers are decoded in a room beside the cache; on a GPU, steps are recorded CUDA graphs."""

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from kvzip import ContextCache, ModelKVzip, room
from kvzip.graphs import logits_of
from kvzip.layers import Tail
from kvzip.parallel import Division
from kvzip.room import ROUNDING, Room, make_decoder
from models import (
    KINDS,
    QUESTIONS,
    TEXT,
    assert_same,
    make_hf_model,
    make_tokenizer,
    random_ids,
    shared_model,
    snapshot,
)

NEW = {"max_new_tokens": 40, "eos_token_id": None}


class Recorder(BaseStreamer):
    """Notes the tokens of an answer, and fails at the token asked for."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.parts: list[list[int]] = []
        self.fail_at = fail_at

    def put(self, value):
        if len(self.parts) == self.fail_at:
            raise RuntimeError("the reader went away")
        self.parts.append(value.flatten().tolist())

    def end(self):
        pass


def tokens(model: ModelKVzip, kv: ContextCache, question: Any, **settings: Any) -> list[int]:
    """The new tokens of an answer."""
    streamer = Recorder()
    model.generate(question, kv=kv, streamer=streamer, **{**NEW, **settings})
    return [token for part in streamer.parts[1:] for token in part]


class TestOnAnyDevice:
    @pytest.mark.parametrize("update_cache", [False, True])
    @pytest.mark.parametrize("fail_at", [0, 1, 5])
    @pytest.mark.parametrize("kind", ["llama", "gemma3"])
    def test_a_failure_midway_changes_nothing(self, kind, fail_at, update_cache):
        model = shared_model(kind)
        kv = model.prefill(TEXT).prune(0.5)
        model.generate(QUESTIONS[0], kv=kv, update_cache=True, max_new_tokens=5)
        expected = tokens(model, kv, QUESTIONS[1])
        before = snapshot(kv)
        settings = {"streamer": Recorder(fail_at), "update_cache": update_cache, **NEW}
        with pytest.raises(RuntimeError, match="the reader went away"):
            model.generate(QUESTIONS[1], kv=kv, **settings)
        assert_same(snapshot(kv), before)
        assert tokens(model, kv, QUESTIONS[1]) == expected

    @pytest.mark.parametrize("kind", ["llama", "gemma3"])
    def test_a_kept_answer_is_added_exactly(self, kind):
        """Question and answer, each token's pairs as one forward pass over them makes them."""
        model = shared_model(kind)
        kv = model.prefill(TEXT).prune(0.5)
        before, query = snapshot(kv), model.apply_template(QUESTIONS[1])
        new = tokens(model, kv, query, update_cache=True)
        told = torch.cat([query, torch.tensor(new)])
        assert torch.equal(kv.history, told)
        assert kv.tail_length == len(told) - 1  # the last token is read with the next question
        other = kv.fork()
        with torch.no_grad():
            model.hf_model(told[None, :-1], past_key_values=other)
        for mine, theirs in zip(kv.layers, other.layers, strict=True):
            for got, expected in zip(mine.tail.view(), theirs.tail.view(), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
        kv.truncate(0)
        assert_same(snapshot(kv), before)

    def test_a_second_kept_answer_leaves_the_first_as_it_was(self):
        model = shared_model()
        kv = model.prefill(TEXT)
        tokens(model, kv, QUESTIONS[0], update_cache=True)
        first, length = snapshot(kv)["tail"], kv.tail_length
        tokens(model, kv, QUESTIONS[1], update_cache=True)
        second = [part[:, :, :length] for layer in kv.layers for part in layer.tail.view()]
        assert kv.tail_length == len(kv.history) - 1 > length
        assert all(map(torch.equal, first, second))

    def test_pruning_drops_the_room(self):
        kv = shared_model().prefill(TEXT)
        kv.room = object()
        kv.prune(0.5)
        assert kv.room is None

    def test_a_fork_has_no_room(self):
        kv = shared_model().read(TEXT)
        kv.room = object()
        assert kv.fork().room is None

    def test_nothing_is_recorded_and_no_room_stays_on_a_cpu(self):
        model = ModelKVzip(make_hf_model(), make_tokenizer())
        kv = model.read(TEXT)
        tokens(model, kv, QUESTIONS[0])
        assert kv.room is None or model.hf_model.device.type == "cuda"
        assert model.decoder.records == (kv.room is not None)

    def test_tails_have_their_final_size_from_the_start(self):
        """What a recorded step reads must not move."""
        model = shared_model()
        decoder = make_decoder(model.hf_model, records=False, compiled=False)
        room = decoder.room(model.read(TEXT), columns=300)
        room.read(random_ids(3)[None], torch.arange(3)[None])
        places = [part.data_ptr() for layer in room.cache.layers for part in layer.tail.buffers]
        for i in range(3, 300):
            room.cache.layers[0].tail.append(*(torch.zeros(1, 2, 1, 16),) * 2)
            assert room.cache.layers[0].tail.length == i + 1
        after = [part.data_ptr() for layer in room.cache.layers for part in layer.tail.buffers]
        assert places == after


class FakeStep:
    """Stands for a recorded step on a CPU."""

    def __init__(self, forward, kv, batch, devices):
        self.forward, self.kv = forward, kv

    def __call__(self, tokens, positions):
        return logits_of(self.forward, tokens, positions, self.kv)


class TestWhatAnAnswerLeavesBehind:
    @pytest.fixture
    def made(self, monkeypatch):
        """Weak references to all rooms."""
        rooms: list[weakref.ref[Room]] = []
        refill = Room.refill

        def noted(room, *args):
            rooms.append(weakref.ref(room))
            refill(room, *args)

        monkeypatch.setattr(Room, "refill", noted)
        gc.disable()
        yield rooms
        gc.enable()

    @pytest.fixture
    def divided(self, monkeypatch):
        """A model and a cache that record, and that seem to share heads with another process."""
        model = ModelKVzip(make_hf_model(), make_tokenizer())
        model.decoder.records = True
        monkeypatch.setattr(room, "record", FakeStep)
        monkeypatch.setattr(Division, "all", lambda self, fact: fact)
        kv = model.prefill(TEXT)
        kv.division = Division(0, 2)
        return model, kv

    def test_its_room_is_freed_at_once(self, made):
        model = shared_model()
        kv = model.prefill(TEXT)
        model.generate(QUESTIONS[0], kv=kv, **NEW)
        model.ask(kv, QUESTIONS, **NEW)
        model.generate(QUESTIONS[0], kv=kv, update_cache=True, **NEW)
        assert [made_room() for made_room in made] == [None] * 3

    def test_a_room_of_several_processes_goes_with_its_answer(self, made, divided):
        model, kv = divided
        expected = tokens(shared_model(), shared_model().prefill(TEXT), QUESTIONS[0])
        assert tokens(model, kv, QUESTIONS[0]) == expected
        assert model.decoder.records
        assert kv.room is None
        assert made[-1]() is None

    def test_so_does_its_recording_after_a_failure(self, made, divided):
        model, kv = divided
        with pytest.raises(RuntimeError, match="the reader went away") as failure:
            model.generate(QUESTIONS[0], kv=kv, streamer=Recorder(3), **NEW)
        held = made[-1]()  # by the traceback
        assert held is not None
        assert not held.recorded
        assert failure.tb is not None


class TestWhichRoomServes:
    @pytest.fixture
    def decoder(self):
        return make_decoder(shared_model().hf_model, records=True, compiled=False)

    @pytest.fixture
    def kv(self):
        return shared_model().read(TEXT)

    def test_the_same_for_shorter_answers(self, decoder, kv):
        room = decoder.room(kv, columns=100)
        assert room.columns == ROUNDING
        assert decoder.room(kv, columns=5) is room is kv.room
        assert decoder.room(kv, columns=ROUNDING) is room

    def test_another_for_longer_answers(self, decoder, kv):
        room = decoder.room(kv, columns=100)
        larger = decoder.room(kv, columns=ROUNDING + 1)
        assert larger is not room
        assert larger.columns == 2 * ROUNDING
        assert kv.room is larger

    def test_another_for_other_numbers_of_rows(self, decoder, kv):
        starts = torch.tensor([0, 1, 2])
        room = decoder.room(kv, columns=9, batch=3, starts=starts)
        assert decoder.room(kv, columns=9, batch=3, starts=starts + 1) is room
        assert room.starts.tolist() == [1, 2, 3]
        assert decoder.room(kv, columns=9, batch=2, starts=starts[:2]) is not room

    def test_another_without_padding(self, decoder, kv):
        padded = decoder.room(kv, columns=9, batch=1, starts=torch.tensor([0]))
        assert decoder.room(kv, columns=9) is not padded

    def test_another_for_another_decoder(self, decoder, kv):
        room = decoder.room(kv, columns=9)
        other = make_decoder(shared_model().hf_model, records=True, compiled=False)
        assert other.room(kv, columns=9) is not room

    def test_starts_belong_to_the_room(self, decoder, kv):
        """They are read by a recorded step: the caller's may go."""
        starts = torch.tensor([0, 1])
        room = decoder.room(kv, columns=9, batch=2, starts=starts)
        starts.fill_(7)
        assert room.starts.tolist() == [0, 1]
        assert all(layer.tail.starts is room.starts for layer in room.cache.layers)

    def test_begins_with_a_copy_of_the_tail(self, decoder):
        model = shared_model()
        kv = model.read(TEXT)
        model.generate(QUESTIONS[0], kv=kv, update_cache=True, max_new_tokens=5)
        room = decoder.room(kv, columns=100)
        for _ in range(2):
            assert room.cache.seen_tokens == kv.seen_tokens
            for mine, theirs in zip(room.cache.layers, kv.layers, strict=True):
                pairs = list(zip(mine.tail.view(), theirs.tail.view(), strict=True))
                assert all(torch.equal(*pair) for pair in pairs)
                assert not any(a.data_ptr() == b.data_ptr() for a, b in pairs)
                for part in mine.tail.buffers:
                    part.fill_(torch.nan)  # an answer
                mine.tail.length += 9
            assert decoder.room(kv, columns=100) is room

    def test_a_batch_begins_empty(self, decoder, kv):
        """What stands in the tail is read again in front of every question."""
        model = shared_model()
        model.generate(QUESTIONS[0], kv=kv, update_cache=True, max_new_tokens=5)
        room = decoder.room(kv, columns=9, batch=1, starts=torch.tensor([0]))
        assert room.cache.tail_length == 0


def on_gpu(kind: str = "llama", *, eager: bool = False, **kwargs: Any) -> ModelKVzip:
    """A model whose steps are recorded, or the same model without that."""
    settings = {name: kwargs.pop(name) for name in ("backend", "compile") if name in kwargs}
    model = ModelKVzip(make_hf_model(kind, **kwargs).cuda(), make_tokenizer(), **settings)
    if eager:
        model.decoder.records = False
    return model


def recorded(kv: ContextCache) -> bool:
    """Whether the last answer's steps were recorded ones."""
    room = kv.room
    assert isinstance(room, Room)
    return room.recorded


@pytest.fixture
def no_warnings():
    """A step that cannot be recorded warns: nothing would be tested then."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cannot be recorded")
        yield


QUESTION_TEXTS = [*QUESTIONS, "why " * 90, QUESTIONS[0]]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("no_warnings")
class TestRecordedStepsEqualEagerOnes:
    """Token for token in float32; tails cross tiles of 64 and 128 columns, and parts of 256."""

    def both(self, kind: str, run: Any, **settings: Any) -> Any:
        """What `run` returns with recorded steps, once it is known to equal the eager result."""
        model, plain = on_gpu(kind, **settings), on_gpu(kind, eager=True)
        assert model.decoder.records
        kv, plain_kv = (m.prefill(TEXT).prune(0.5) for m in (model, plain))
        got, expected = run(model, kv), run(plain, plain_kv)
        assert got == expected
        assert recorded(kv)
        assert model.decoder.records
        assert plain_kv.room is None
        return got

    def test_questions_in_a_row(self, kind):
        """Each is answered as if it were the first."""

        def run(model, kv):
            return [tokens(model, kv, question) for question in QUESTION_TEXTS]

        answers = self.both(kind, run)
        assert answers[0] == answers[-1]
        assert len({tuple(answer) for answer in answers}) > 2

    def test_an_answer_longer_than_the_first_room(self, kind):
        def run(model, kv):
            lengths = (20, 300, 20)
            return [tokens(model, kv, QUESTIONS[1], max_new_tokens=length) for length in lengths]

        short, long, again = self.both(kind, run)
        assert len(long) == 300
        assert short == again == long[:20]

    def test_forks(self, kind):
        def run(model, kv):
            first = tokens(model, kv, QUESTIONS[0])
            fork = kv.fork()
            return first, tokens(model, fork, QUESTIONS[1]), tokens(model, kv, QUESTIONS[0])

        self.both(kind, run)

    def test_conversations(self, kind):
        def run(model, kv):
            turns = []
            for question in QUESTIONS:
                turns.append(tokens(model, kv, question, update_cache=True))
                turns.append(tokens(model, kv, QUESTIONS[0]))
                turns.append(kv.tail_length)
            turns.append(tokens(model, kv.fork(), QUESTIONS[0]))
            kv.reset()
            return [*turns, tokens(model, kv, QUESTIONS[0])]

        self.both(kind, run)

    def test_batches_of_different_sizes(self, kind):
        def run(model, kv):
            answers = [model.ask(kv, questions, **NEW) for questions in batches]
            return [*answers, tokens(model, kv, QUESTIONS[0])]

        batches = [QUESTIONS[:1], QUESTIONS, QUESTIONS[::-1], QUESTIONS[2:], [QUESTION_TEXTS[3]]]
        self.both(kind, run)

    def test_batches_in_a_conversation(self, kind):
        def run(model, kv):
            tokens(model, kv, QUESTIONS[0], update_cache=True)
            return model.ask(kv, QUESTIONS, **NEW), tokens(model, kv, QUESTIONS[1])

        self.both(kind, run)

    def test_pruning_between_answers(self, kind):
        def run(model, kv):
            answers = [tokens(model, kv, QUESTIONS[0])]
            for ratio in (0.4, 0.1):
                kv.prune(ratio)
                answers.append(tokens(model, kv, QUESTIONS[0]))
            return answers

        answers = self.both(kind, run)
        assert len({tuple(answer) for answer in answers}) > 1

    def test_sampling_follows_the_seed(self, kind):
        def run(model, kv):
            answers = []
            for seed in (1, 2, 1):
                torch.manual_seed(seed)
                settings = {"do_sample": True, "temperature": 1.5, "top_k": 0}
                answers.append(tokens(model, kv, QUESTIONS[0], **settings))
            return answers

        one, two, again = self.both(kind, run)
        assert one == again != two

    def test_after_a_failure_midway(self, kind):
        def run(model, kv):
            before = snapshot(kv)
            for fail_at in (1, 2, 9):
                with pytest.raises(RuntimeError, match="the reader went away"):
                    model.generate(QUESTIONS[1], kv=kv, streamer=Recorder(fail_at), **NEW)
            assert_same(snapshot(kv), before)
            return tokens(model, kv, QUESTIONS[0])

        self.both(kind, run)

    def test_two_models_in_turns(self, kind):
        models = [on_gpu(kind), on_gpu("qwen3", seed=1)]
        plain = [on_gpu(kind, eager=True), on_gpu("qwen3", seed=1, eager=True)]

        def run(pair):
            caches = [model.prefill(TEXT).prune(0.5) for model in pair]
            turns = [
                tokens(model, kv, question)
                for question in QUESTIONS
                for model, kv in zip(pair, caches, strict=True)
            ]
            return turns, caches

        got, caches = run(models)
        assert got == run(plain)[0]
        assert all(map(recorded, caches))

    def test_two_models_on_one_cache(self, kind):
        """Equal models may ask the same cache; each needs a room of its own."""
        model, twin = on_gpu(kind), on_gpu(kind)
        kv = model.read(TEXT)
        expected = tokens(on_gpu(kind, eager=True), kv.fork(), QUESTIONS[0])
        for asked in (model, twin, model):
            assert tokens(asked, kv, QUESTIONS[0]) == expected

    def test_backends_agree(self, kind):
        """A cache that is not pruned, so that both attend to the same pairs."""
        triton, plain = on_gpu(kind, backend="triton"), on_gpu(kind, backend="reference")
        assert not plain.decoder.records
        kv, plain_kv = triton.read(TEXT), plain.read(TEXT)
        for question in QUESTION_TEXTS:
            assert tokens(triton, kv, question) == tokens(plain, plain_kv, question)
        assert triton.ask(kv, QUESTIONS, **NEW) == plain.ask(plain_kv, QUESTIONS, **NEW)


@pytest.mark.gpu
class TestOnAGPU:
    def test_an_answer_of_one_token_records_nothing(self):
        model = on_gpu()
        kv = model.read(TEXT)
        expected = tokens(on_gpu(eager=True), kv.fork(), QUESTIONS[0], max_new_tokens=2)
        assert tokens(model, kv, QUESTIONS[0], max_new_tokens=1) == expected[:1]
        assert not recorded(kv)
        assert tokens(model, kv, QUESTIONS[0], max_new_tokens=2) == expected
        assert recorded(kv)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision(self, dtype):
        """The same kernels on the same numbers: equal to the last bit, recorded or not."""
        model, plain = on_gpu(dtype=dtype), on_gpu(dtype=dtype, eager=True)
        kv = model.prefill(TEXT).prune(0.5)
        for question in QUESTIONS:
            assert len(tokens(model, kv, question)) == 40
        plain_kv = plain.prefill(TEXT).prune(0.5)
        assert tokens(model, kv, QUESTIONS[0])[:4] == tokens(plain, plain_kv, QUESTIONS[0])[:4]

    def test_compiled_steps_give_the_same_tokens(self, no_warnings):
        model, plain = on_gpu(compile=True), on_gpu(eager=True)
        kv, plain_kv = model.read(TEXT), plain.read(TEXT)
        for question in QUESTIONS:
            assert tokens(model, kv, question) == tokens(plain, plain_kv, question)
        assert recorded(kv)

    def test_a_step_that_cannot_be_recorded_warns_once(self, monkeypatch):
        model, plain = on_gpu(), on_gpu(eager=True)
        kv, plain_kv = model.read(TEXT), plain.read(TEXT)
        layer = model.hf_model.model.layers[1]
        forward = layer.forward

        def waits(hidden, *args, **kwargs):
            assert hidden.sum().item() is not None
            return forward(hidden, *args, **kwargs)

        monkeypatch.setattr(layer, "forward", waits)
        with pytest.warns(UserWarning, match="cannot be recorded") as caught:
            answer = tokens(model, kv, QUESTIONS[0])
        assert len([w for w in caught if "cannot be recorded" in str(w.message)]) == 1
        assert answer == tokens(plain, plain_kv, QUESTIONS[0])
        settings = {"do_sample": True, "temperature": 1.5, "top_k": 0}
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*cannot be recorded")
            for question in QUESTIONS:
                assert tokens(model, kv, question) == tokens(plain, plain_kv, question)
            assert model.ask(kv, QUESTIONS, **NEW) == plain.ask(plain_kv, QUESTIONS, **NEW)
            sampled = []
            for asked, cache in ((model, kv), (plain, plain_kv)):
                torch.manual_seed(3)
                sampled.append(tokens(asked, cache, QUESTIONS[0], **settings))
            assert sampled[0] == sampled[1]
        assert kv.room is None  # what a failed recording took is not held on to

    def test_the_room_is_freed_with_its_cache(self):
        shape = {"num_hidden_layers": 8, "max_position_embeddings": 20_000}
        model = on_gpu(**shape)
        tokens(model, model.read(TEXT), QUESTIONS[0])  # libraries take their memory once
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        kv = model.read(TEXT)
        tokens(model, kv, QUESTIONS[0], max_new_tokens=9000)
        room_bytes = sum(p.nbytes for layer in kv.room.cache.layers for p in layer.tail.buffers)
        assert room_bytes > 8 * 2 * 2 * 9000 * 16 * 4
        assert torch.cuda.memory_allocated() - before > room_bytes
        del kv
        assert torch.cuda.memory_allocated() - before < 2**16

    def test_rooms_come_and_go(self):
        """Recording again and again takes no more memory than recording once."""
        model = on_gpu()
        held = []
        for _ in range(12):
            tokens(model, model.read(TEXT), QUESTIONS[0])
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
        assert held[-1] == held[1], held

    def test_pruning_frees_the_room(self):
        model = on_gpu(num_hidden_layers=8)
        kv = model.prefill(TEXT)
        tokens(model, kv, QUESTIONS[0])
        kv.prune(0.5)
        gc.collect()
        held = torch.cuda.memory_allocated()
        tokens(model, kv, QUESTIONS[0], max_new_tokens=500)
        kv.prune(0.4)
        assert torch.cuda.memory_allocated() <= held + 2**16

    def test_the_room_does_not_count_as_the_cache(self):
        model = on_gpu()
        kv = model.read(TEXT)
        before = kv.nbytes
        tokens(model, kv, QUESTIONS[0])
        assert kv.nbytes == before
        assert isinstance(kv.layers[0].tail, Tail)
        assert kv.tail_length == 0
