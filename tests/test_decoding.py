"""Answers: what generation leaves behind, conversations, settings, and clear errors."""

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from kvzip import ContextCache, KVzipError, ModelKVzip
from models import (
    CHATML,
    END,
    QUESTIONS,
    TEXT,
    assert_same,
    greedy,
    make_model,
    make_tokenizer,
    random_ids,
    shared_hf_model,
    shared_model,
    snapshot,
)

KINDS = ["llama", "gemma3"]
FIRST, SECOND, THIRD = QUESTIONS


def decode(ids: torch.Tensor) -> str:
    return make_tokenizer().decode(ids, skip_special_tokens=True)


class Recorder(BaseStreamer):
    """Notes what it gets, and fails at the token asked for."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.parts: list[list[int]] = []
        self.ended = False
        self.fail_at = fail_at

    def put(self, value):
        if len(self.parts) == self.fail_at:
            raise RuntimeError("the reader went away")
        self.parts.append(value.flatten().tolist())

    def end(self):
        self.ended = True


class Force(LogitsProcessor):
    """Makes the model say certain tokens behind a sequence of a given length."""

    def __init__(self, start: int, tokens: list[int]) -> None:
        self.start, self.tokens = start, tokens

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self.start
        if step < len(self.tokens):
            scores = torch.full_like(scores, -torch.inf)
            scores[:, self.tokens[step]] = 0
        return scores


def force(kv: ContextCache, query: torch.Tensor, tokens: list[int]) -> LogitsProcessorList:
    return LogitsProcessorList([Force(len(kv.token_ids) + len(query), tokens)])


def cache(model: ModelKVzip, state: str) -> ContextCache:
    kv = model.prefill(TEXT)
    if state != "full":
        kv.prune(0.5)
    if state == "conversation":
        model.generate(FIRST, kv=kv, update_cache=True, max_new_tokens=6)
    return kv


STATES = ["full", "pruned", "conversation"]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", KINDS)
class TestNothingIsLeftBehind:
    """After an answer that is not kept, the cache is bit for bit what it was."""

    def test_after_an_answer(self, kind, state):
        model = shared_model(kind)
        kv = cache(model, state)
        before = snapshot(kv)
        answers = [model.generate(SECOND, kv=kv, max_new_tokens=80) for _ in range(2)]
        assert answers[0] == answers[1]
        assert_same(snapshot(kv), before)

    def test_after_a_batch(self, kind, state):
        model = shared_model(kind)
        kv = cache(model, state)
        before = snapshot(kv)
        model.ask(kv, QUESTIONS, max_new_tokens=10)
        assert_same(snapshot(kv), before)

    @pytest.mark.parametrize("update_cache", [False, True])
    @pytest.mark.parametrize("fail_at", [0, 1, 3])
    def test_after_an_exception(self, kind, state, update_cache, fail_at):
        model = shared_model(kind)
        kv = cache(model, state)
        before = snapshot(kv)
        with pytest.raises(RuntimeError, match="the reader went away"):
            model.generate(
                SECOND,
                kv=kv,
                update_cache=update_cache,
                streamer=Recorder(fail_at),
                max_new_tokens=80,
            )
        assert_same(snapshot(kv), before)


@pytest.mark.parametrize("ending", ["end-token", "cut"])
@pytest.mark.parametrize("kind", KINDS)
class TestConversation:
    def replay(self, kind, ending):
        """Two kept turns by kvzip and by stock transformers: caches, texts and tokens."""
        model, stock = shared_model(kind), shared_hf_model(kind)
        kv = model.prefill(TEXT)
        expected = kv.token_ids
        for text in (FIRST, SECOND):
            query = model.apply_template(text, kv=kv)
            forced = [40, 41, 42, END] if ending == "end-token" else [40, 41]
            processors = force(kv, query, forced)
            assert torch.equal(kv.token_ids, expected)
            expected = torch.cat([expected, query])
            new = greedy(stock, expected, 6, logits_processor=processors)
            expected = torch.cat([expected, new])
            answer = model.generate(
                query, kv=kv, update_cache=True, max_new_tokens=6, logits_processor=processors
            )
            assert answer == decode(new)
            assert (new[-1] == END) == (ending == "end-token")
        return model, stock, kv, expected

    def test_turns_equal_stock_transformers_on_the_whole_conversation(self, kind, ending):
        model, stock, kv, expected = self.replay(kind, ending)
        assert torch.equal(kv.token_ids, expected)
        assert kv.seen_tokens == len(expected) - 1  # the last token is read with the next question
        query = model.apply_template(THIRD, kv=kv)
        new = greedy(stock, torch.cat([expected, query]), 10)
        assert model.generate(THIRD, kv=kv, max_new_tokens=10) == decode(new)
        assert model.ask(kv, [FIRST, THIRD], max_new_tokens=10)[1] == decode(new)

    def test_tokens_are_those_of_the_chat_template(self, kind, ending):
        model, _, kv, _ = self.replay(kind, ending)
        query = model.apply_template(THIRD, kv=kv)
        said = make_tokenizer().decode(torch.cat([kv.token_ids, query]))
        turn = "<|im_end|>\n<|im_start|>"
        pieces = said.split(turn)
        assert [piece.split("\n")[0] for piece in pieces[1:]] == [
            "user",
            *["assistant", "user"] * 2,
            "assistant",
        ]
        assert pieces[-1] == "assistant\n"
        assert pieces[-2] == f"user\n{THIRD}"


def test_a_batch_in_a_conversation_equals_one_by_one():
    model = shared_model()
    kv = cache(model, "conversation")
    alone = [model.generate(text, kv=kv, max_new_tokens=12) for text in QUESTIONS]
    assert model.ask(kv, QUESTIONS, max_new_tokens=12) == alone
    assert model.ask(kv, [], max_new_tokens=12) == []


class TestSettings:
    @pytest.fixture
    def model(self):
        return shared_model("phi3")

    @pytest.fixture
    def kv(self, model):
        return model.prefill(TEXT).prune(0.5)

    def test_sampling_follows_the_seed(self, model, kv):
        def sampled(seed):
            torch.manual_seed(seed)
            settings = {"do_sample": True, "temperature": 1.5, "top_k": 0, "max_new_tokens": 12}
            return model.generate(FIRST, kv=kv, **settings)

        assert sampled(1) == sampled(1)
        assert len({sampled(seed) for seed in range(4)}) == 4
        assert sampled(1) != model.generate(FIRST, kv=kv, max_new_tokens=12)

    def test_greedy_by_default_whatever_the_checkpoint_says(self, kv):
        model = make_model("phi3")
        expected = model.generate(FIRST, kv=kv, max_new_tokens=12)
        model.hf_model.generation_config.update(do_sample=True, temperature=2.0, top_p=0.9)
        assert model.generate(FIRST, kv=kv, max_new_tokens=12) == expected

    def test_generation_config(self, model, kv):
        config = GenerationConfig(max_new_tokens=5, eos_token_id=END, pad_token_id=END)
        expected = model.generate(FIRST, kv=kv, max_new_tokens=5)
        assert model.generate(FIRST, kv=kv, generation_config=config) == expected
        assert model.ask(kv, [FIRST], generation_config=config) == [expected]

    def test_end_token(self, model, kv):
        query = model.apply_template(FIRST)
        new = greedy(
            model.hf_model, torch.cat([kv.token_ids, query]), 12, past_key_values=kv.fork()
        )
        end = new[4].item()
        first = new.tolist().index(end)
        text = model.generate(query, kv=kv, max_new_tokens=12, eos_token_id=end)
        assert text == decode(new[: first + 1])
        assert model.ask(kv, [FIRST], max_new_tokens=12, eos_token_id=[end, END]) == [text]

    def test_stop_strings(self, model, kv):
        query = model.apply_template(FIRST)
        settings = {"max_new_tokens": 12, "stop_strings": ["k l"]}
        words = make_tokenizer().encode("ok like that", add_special_tokens=False)
        processors = force(kv, query, words)
        text = model.generate(query, kv=kv, logits_processor=processors, **settings)
        assert text.startswith("ok l")
        assert len(text) < len("ok like that")

    @pytest.mark.parametrize("chat_template", [CHATML, None], ids=["special", "ordinary"])
    def test_a_batch_stops_at_stop_strings_row_by_row(self, chat_template):
        """Whatever the first token of the context is."""
        model = shared_model("phi3", chat_template=chat_template)
        kv = model.prefill(TEXT).prune(0.5)
        texts = [model.generate(text, kv=kv, max_new_tokens=12) for text in QUESTIONS]
        stops = [texts[0][3:5], texts[1][5:7]]
        alone = [
            model.generate(text, kv=kv, max_new_tokens=12, stop_strings=stops) for text in QUESTIONS
        ]
        assert len({len(text) for text in alone}) > 1
        assert model.ask(kv, QUESTIONS, max_new_tokens=12, stop_strings=stops) == alone

    def test_streamer_gets_the_question_and_then_each_token(self, model, kv):
        query, streamer = model.apply_template(FIRST), Recorder()
        text = model.generate(query, kv=kv, streamer=streamer, max_new_tokens=7)
        question, *answer = streamer.parts
        assert question == query.tolist()
        assert [len(part) for part in answer] == [1] * 7
        assert decode([token for part in answer for token in part]) == text
        assert streamer.ended

    def test_default_length(self, model, kv):
        answer = Recorder()
        model.generate(FIRST, kv=kv, streamer=answer, eos_token_id=None)
        assert len(answer.parts) == 1 + 512

    @pytest.mark.parametrize(
        "settings",
        [{"num_return_sequences": 2, "do_sample": True}, {"return_dict_in_generate": True}],
        ids=lambda settings: next(iter(settings)),
    )
    def test_settings_that_give_something_else_than_one_answer_are_refused(
        self, model, kv, settings
    ):
        with pytest.raises(KVzipError, match=next(iter(settings))):
            model.generate(FIRST, kv=kv, max_new_tokens=4, **settings)
        with pytest.raises(KVzipError, match=next(iter(settings))):
            model.ask(kv, [FIRST], max_new_tokens=4, **settings)

    def test_unknown_settings_are_refused(self, model, kv):
        with pytest.raises(ValueError, match="max_new_toks"):
            model.generate(FIRST, kv=kv, max_new_toks=4)
        assert kv.tail_length == 0


def test_a_batch_keeps_tokens_that_equal_the_first_of_the_context():
    model = shared_model(chat_template=None)
    kv = model.read(TEXT)
    query = model.apply_template(FIRST)
    first = kv.token_ids[0].item()
    processors = force(kv, query, [50, 60, first, first])
    settings = {"max_new_tokens": 4, "logits_processor": processors}
    alone = model.generate(query, kv=kv, **settings)
    assert alone == decode(torch.tensor([50, 60, first, first]))
    assert model.ask(kv, [FIRST], **settings) == [alone]


class TestPositions:
    LIMIT = 160

    @pytest.fixture
    def model(self):
        return make_model(max_position_embeddings=self.LIMIT)

    def test_answers_stop_where_positions_end(self, model):
        kv, answer = model.read(TEXT), Recorder()
        model.generate(FIRST, kv=kv, streamer=answer, eos_token_id=None)
        assert len(kv.token_ids) + sum(map(len, answer.parts)) == self.LIMIT

    @pytest.mark.parametrize("turns", [0, 1])
    def test_too_many_tokens_are_refused(self, model, turns):
        kv = model.read(random_ids(60))
        for _ in range(turns):
            model.generate(THIRD, kv=kv, update_cache=True, max_new_tokens=5)
        query = model.apply_template(THIRD, kv=kv)
        room = self.LIMIT - len(kv.token_ids) - len(query)
        assert room > 0
        message = f"there is room for 1 to {room} tokens"
        for asked in (room + 1, 0, -1):
            with pytest.raises(KVzipError, match=message):
                model.generate(query, kv=kv, max_new_tokens=asked)
            with pytest.raises(KVzipError, match=message):
                model.ask(kv, [THIRD], max_new_tokens=asked)
        model.generate(query, kv=kv, max_new_tokens=room)

    def test_a_long_question_is_refused(self, model):
        kv = model.read(random_ids(100))
        with pytest.raises(KVzipError, match=f"positions, the model has {self.LIMIT}"):
            model.generate(random_ids(30), kv=kv)
        with pytest.raises(KVzipError, match=f"positions, the model has {self.LIMIT}"):
            model.ask(kv, ["why? " * 30])


class TestQuestions:
    @pytest.fixture
    def kv(self):
        return shared_model().read(TEXT)

    @pytest.mark.parametrize("text", ["", " ", "\n\t"])
    def test_empty_text(self, kv, text):
        with pytest.raises(KVzipError, match="question is empty"):
            shared_model().generate(text, kv=kv)
        with pytest.raises(KVzipError, match="question is empty"):
            shared_model().ask(kv, [FIRST, text])

    def test_no_tokens(self, kv):
        with pytest.raises(KVzipError, match="question is empty"):
            shared_model().generate(random_ids(0), kv=kv)

    def test_one_row_of_tokens(self, kv):
        model, query = shared_model(), shared_model().apply_template(FIRST)
        expected = model.generate(query, kv=kv, max_new_tokens=5)
        assert model.generate(query[None], kv=kv, max_new_tokens=5) == expected

    def test_several_rows_of_tokens(self, kv):
        with pytest.raises(KVzipError, match=r"\[2, 9\]"):
            shared_model().generate(random_ids(18).view(2, 9), kv=kv)

    def test_a_text_for_a_batch(self, kv):
        with pytest.raises(KVzipError, match="ask takes a list"):
            shared_model().ask(kv, FIRST)


def test_tokens_that_the_cache_does_not_know_of_are_refused():
    """Stock generate on the cache itself leaves a tail whose tokens only the caller knows."""
    model = shared_model()
    kv, query = model.read(TEXT), shared_model().apply_template(FIRST)
    greedy(
        model.hf_model, torch.cat([kv.token_ids, query]), 8, past_key_values=kv, eos_token_id=None
    )
    assert kv.tail_length == len(query) + 7
    with pytest.raises(KVzipError, match="fork"):
        model.generate(SECOND, kv=kv, max_new_tokens=4)
    kv.truncate(0)
    assert model.generate(SECOND, kv=kv, max_new_tokens=4) == model.generate(
        SECOND, kv=model.read(TEXT), max_new_tokens=4
    )


@pytest.mark.parametrize("forget", [lambda kv: kv.truncate(0), lambda kv: kv.reset()])
def test_a_forgotten_conversation_is_gone(forget):
    model = shared_model()
    kv = model.read(TEXT)
    alone = model.generate(QUESTIONS[1], kv=kv, max_new_tokens=6)
    model.generate(QUESTIONS[0], kv=kv, update_cache=True, max_new_tokens=6)
    assert len(kv.history)
    forget(kv)
    assert kv.seen_tokens == len(kv.token_ids) == len(kv.document.token_ids)
    assert model.generate(QUESTIONS[1], kv=kv, max_new_tokens=6) == alone


@pytest.mark.parametrize(
    "settings",
    [{"max_length": 9}, {"attention_mask": torch.ones(1, 1)}, {"output_scores": True}],
    ids=lambda settings: next(iter(settings)),
)
def test_what_the_cache_decides_is_no_setting(settings):
    model = shared_model()
    kv = model.read(TEXT)
    with pytest.raises(KVzipError, match=f"{next(iter(settings))} cannot be set here"):
        model.generate(QUESTIONS[0], kv=kv, **settings)
