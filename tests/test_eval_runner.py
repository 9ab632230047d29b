"""A run of tasks: what its lines say, and that nothing is lost or doubled when it is stopped."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvzip import KVzipError, ModelKVzip
from kvzip.evaluation import Question, Sample, likelihood, results, runner, tasks
from kvzip.evaluation.asking import UnfitError, ask, check_fit, score_context, token_counter
from kvzip.evaluation.likelihood import likelihoods
from kvzip.evaluation.results import Shard, open_results
from kvzip.evaluation.runner import Settings, evaluate, jobs, run, with_instructions
from models import TEXT, logits_of, make_hf_model, make_model, make_tokenizer

RATIOS = (1.0, 0.5, 0.2)
QUESTIONS = (
    Question("what jumps?", ("fox",), "substring", 6),
    Question("who is the lazy one here, tell me", ("the dog", "dog"), "token_f1", 9),
    Question("a dog?", ("yes",), "verbatim", 6),
)


def stub(name: str, count: int, instruction: str = "default", words: int = 1) -> SimpleNamespace:
    """A task of `count` short documents with the same three questions."""

    def samples(num: int | None, *, seed: int, **rest: object) -> Iterator[Sample]:
        documents = (
            Sample(f"{name}-{seed}-{i}", f"{i}: {TEXT * words}", QUESTIONS, group=f"i={i}")
            for i in range(count)
        )
        return islice(documents, num)

    return SimpleNamespace(name=name, instruction=instruction, samples=samples)


FEW = stub("few", 3)
SUMS = stub("sums", 2, instruction="gsm")
LONG = stub("long", 2, words=40)


@pytest.fixture(autouse=True)
def _tasks(monkeypatch):
    for name in ("few", "sums", "long"):
        monkeypatch.setitem(tasks.TASKS, name, f"{__name__}:{name.upper()}")


@lru_cache
def models():
    return with_instructions(make_model())


def settings(*names: str, **changes) -> Settings:
    return Settings(tasks=names or ("few", "sums"), **{"ratios": RATIOS, **changes})


def run_in(folder: Path, asked: Settings) -> list[dict]:
    """Run, and return what the results file says."""
    command = ["kvzip", "eval"]
    results.begin(folder, runner.run_record(asked, models()("default"), command))
    with open_results(folder, asked.shard, ratios=len(asked.ratios)) as written:
        run(asked, models(), written)
        lines = lines_of(folder / asked.shard.file("results"))
        assert written.lines == lines
    return lines


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def timeless(lines: list[dict]) -> list[dict]:
    """Lines without what differs from run to run."""
    return [
        {name: value for name, value in line.items() if not name.endswith("seconds")}
        for line in lines
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with a run that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("few", "sums"):
            patch.setitem(tasks.TASKS, name, f"{__name__}:{name.upper()}")
        folder = tmp_path_factory.mktemp("whole")
        run_in(folder, settings())
    return folder


# What lines say


def test_a_line_for_each_question_and_ratio(whole):
    lines = lines_of(whole / "results.jsonl")
    keys = [(line["sample"], line["ratio"], line["question"]) for line in lines]
    assert keys == [
        (f"{task}-0-{i}", ratio, question)
        for task, count in (("few", 3), ("sums", 2))
        for i in range(count)
        for ratio in RATIOS
        for question in range(3)
    ]
    for line in lines:
        question = QUESTIONS[line["question"]]
        assert line["prompt"] == question.text
        assert tuple(line["answers"]) == question.answers
        assert line["metric"] == question.metric
        assert line["group"] == f"i={line['sample'][-1]}"
        assert (line["scorer"], line["level"]) == ("reconstruction", "pair")
        assert len(line["context_sha256"]) == 64


def test_answers_are_those_of_the_library(whole):
    model = make_model(kv_type="retain")
    sample = next(FEW.samples(1, seed=0))
    kv = model.prefill(sample.context)
    lines = [line for line in lines_of(whole / "results.jsonl") if line["sample"] == sample.id]
    for ratio in RATIOS:
        kv.prune(ratio)
        answers = [
            model.generate(question.text, kv=kv, max_new_tokens=question.max_new_tokens)
            for question in QUESTIONS
        ]
        assert [line["prediction"] for line in lines if line["ratio"] == ratio] == answers


def test_the_instruction_is_the_task_s():
    model = ModelKVzip(make_hf_model(), make_tokenizer(), instruction="gsm")
    kv = model.read(next(SUMS.samples(1, seed=0)).context)
    ours = models()("gsm").read(next(SUMS.samples(1, seed=0)).context)
    assert torch.equal(ours.token_ids, kv.token_ids)
    assert models()("gsm").hf_model is models()("default").hf_model


@pytest.mark.parametrize("level", ["pair", "pair-uniform", "head"])
def test_realised_ratio_and_bytes_are_those_of_an_evicted_cache(level):
    job = next(jobs(settings("few"), models()))
    lines = evaluate(models()("default"), job, settings("few", level=level))
    for ratio in RATIOS:
        kv = make_model().prefill(job.sample.context).prune(ratio, level)
        for line in lines:
            if line["ratio"] == ratio:
                assert line["realised_ratio"] == kv.realised_ratio
                assert line["kv_bytes"] == kv.nbytes
        full = make_model().read(job.sample.context)
        assert {line["kv_bytes_full"] for line in lines} == {full.nbytes}
        assert {line["context_tokens"] for line in lines} == {full.document.context_length}


def test_a_context_is_read_and_scored_once(monkeypatch, tmp_path):
    calls = []
    for stage in ("read", "score"):
        plain = getattr(ModelKVzip, stage)

        def counted(self, *args, plain=plain, stage=stage, **kwargs):
            calls.append(stage)
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(ModelKVzip, stage, counted)
    run_in(tmp_path, settings("few", num=2))
    assert calls == ["read", "score"] * 2


def test_the_full_cache_is_always_asked():
    assert settings("few", ratios=(0.2, 0.5, 0.2)).ratios == (1.0, 0.5, 0.2)


def test_the_scorer_is_the_one_asked_for(monkeypatch):
    told, plain = [], ModelKVzip.score

    def score(self, kv, *, scorer="reconstruction", **rest):
        told.append(scorer)
        return plain(self, kv, **rest)

    monkeypatch.setattr(ModelKVzip, "score", score)
    asked = settings("few", scorer="random")
    lines = evaluate(models()("default"), next(jobs(asked, models())), asked)
    assert told == ["random"]
    assert {line["scorer"] for line in lines} == {"random"}


# Likelihood


def asked_of(model: ModelKVzip):
    sample = next(FEW.samples(1, seed=0))
    kv = score_context(model, model.read(sample.context), "reconstruction")
    answers = ask(model, kv, QUESTIONS)
    queries = [model.apply_template(question.text) for question in QUESTIONS]
    return kv, queries, [answer.tokens for answer in answers]


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("ratio", [1.0, 0.2])
@pytest.mark.parametrize("at_once", [1, 1 << 28])
def test_likelihood_against_one_answer_at_a_time(monkeypatch, kind, ratio, at_once):
    monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", at_once)
    model = make_model(kind)
    kv, queries, answers = asked_of(model)
    kv.prune(ratio)
    found = likelihoods(model.hf_model, kv, queries, answers)
    for query, answer, own in zip(queries, answers, found, strict=True):
        logits = logits_of(model, kv, torch.cat([query, answer[:-1]]))[len(query) - 1 :]
        probabilities = logits.double().log_softmax(-1)
        chosen = probabilities[torch.arange(len(answer)), answer]
        others = probabilities.clone()
        others[torch.arange(len(answer)), answer] = -torch.inf
        margins = chosen - others.amax(-1)
        assert own.tokens == len(answer)
        assert own.log_probability == pytest.approx(chosen.mean().item(), abs=1e-3)
        assert own.margin == pytest.approx(margins.mean().item(), abs=1e-3)
        assert own.smallest_margin == pytest.approx(margins.min().item(), abs=1e-3)
        assert own.flipped == (margins < 0).sum()
    assert kv.tail_length == 0


def test_the_full_cache_agrees_with_itself(whole):
    lines = lines_of(whole / "results.jsonl")
    full = [line["likelihood"] for line in lines if line["ratio"] == 1]
    assert {line["flipped"] for line in full} == {0}
    assert all(line["smallest_margin"] > 0 for line in full)
    kv, queries, answers = asked_of(models()("default"))
    own = likelihoods(models()("default").hf_model, kv, queries, answers)
    assert [line["log_probability"] for line in full[:3]] == [one.log_probability for one in own]
    zipped = [line["likelihood"] for line in lines if line["ratio"] == RATIOS[-1]]
    assert sum(line["flipped"] for line in zipped) > 0
    assert [line["tokens"] for line in zipped] == [line["tokens"] for line in full]


def test_a_tail_is_refused():
    model = make_model()
    kv, queries, answers = asked_of(model)
    model.generate("a dog?", kv=kv, update_cache=True, max_new_tokens=3)
    with pytest.raises(KVzipError, match=r"kv\.reset"):
        likelihoods(model.hf_model, kv, queries, answers)


# What does not fit


def test_a_context_beyond_the_positions_is_skipped(tmp_path):
    lines = run_in(tmp_path, settings("long", "few", num=1))
    assert {line["task"] for line in lines} == {"few"}
    (skipped,) = lines_of(tmp_path / "skipped.jsonl")
    assert (skipped["task"], skipped["sample"]) == ("long", "long-0-0")
    assert "1024" in skipped["reason"]
    run_in(tmp_path, settings("long", "few", num=1))
    assert lines_of(tmp_path / "skipped.jsonl") == [skipped]


def test_a_context_that_cannot_be_repeated_is_skipped():
    model = make_model()
    context = TEXT * 11
    free = 1024 - len(model.prompts.context_ids(context))
    assert 150 < free < 300
    sample = Sample("tight", context, QUESTIONS)
    check_fit(model, sample)
    with pytest.raises(UnfitError, match="repeat"):
        score_context(model, model.read(context), "reconstruction")


def test_fit_is_what_answering_needs():
    model = make_model()
    sample = Sample("exact", TEXT, (replace(QUESTIONS[0], max_new_tokens=1),))
    used = len(model.read(TEXT).token_ids) + len(model.apply_template(QUESTIONS[0].text))
    longest = replace(QUESTIONS[0], max_new_tokens=1024 - used)
    check_fit(model, replace(sample, questions=(longest,)))
    longer = replace(longest, max_new_tokens=longest.max_new_tokens + 1)
    with pytest.raises(UnfitError, match="1024"):
        check_fit(model, replace(sample, questions=(longer,)))
    ask(model, model.read(TEXT), [longest])
    with pytest.raises(KVzipError):
        ask(model, model.read(TEXT), [longer])


def test_another_error_while_scoring_is_no_skip():
    model = make_model()
    kv = model.prefill(TEXT, ratio=0.5)
    with pytest.raises(KVzipError, match="evicted"):
        score_context(model, kv, "reconstruction")


# Stopped and started again


@pytest.mark.parametrize("calls", [0, 1, 4, 7])
def test_killed_and_started_again(monkeypatch, tmp_path, whole, calls):
    plain, left = runner.ask, [calls]

    def killed(*args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return plain(*args)

    monkeypatch.setattr(runner, "ask", killed)
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path, settings())
    before = (tmp_path / "results.jsonl").read_bytes()
    assert len(before.splitlines()) == calls // len(RATIOS) * 9
    monkeypatch.setattr(runner, "ask", plain)
    lines = run_in(tmp_path, settings())
    assert timeless(lines) == timeless(lines_of(whole / "results.jsonl"))
    assert (tmp_path / "results.jsonl").read_bytes().startswith(before)
    assert len(lines_of(tmp_path / "starts.jsonl")) == 2


CUTS = {
    "within the first line": (0, 40),
    "behind the first line": (1, 0),
    "within a sample": (13, 17),
    "between samples": (18, 0),
    "first byte of a sample": (18, 1),
    "last line without its end": (18, -1),
    "all": (45, 0),
}


@pytest.mark.parametrize("cut", CUTS)
def test_torn_files(tmp_path, whole, cut):
    lines, extra = CUTS[cut]
    data = (whole / "results.jsonl").read_bytes()
    rows = data.splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_bytes(data[: sum(map(len, rows[:lines])) + extra])
    (tmp_path / "skipped.jsonl").write_bytes(b'{"task": "fe')
    (tmp_path / "run.json").write_bytes((whole / "run.json").read_bytes())
    kept = max(0, lines + min(0, extra)) // 9 * 9
    found = run_in(tmp_path, settings())
    assert timeless(found) == timeless(lines_of(whole / "results.jsonl"))
    again = (tmp_path / "results.jsonl").read_bytes()
    assert again.startswith(b"".join(rows[:kept]))
    assert (tmp_path / "skipped.jsonl").read_bytes() == b""


def test_a_complete_run_is_not_run_again(monkeypatch, whole):
    monkeypatch.setattr(runner, "ask", None)
    before = (whole / "results.jsonl").read_bytes()
    run_in(whole, settings())
    assert (whole / "results.jsonl").read_bytes() == before


def test_damage_within_a_file_is_refused(tmp_path, whole):
    data = (whole / "results.jsonl").read_bytes().replace(b'{"task', b'{task"', 3)
    (tmp_path / "results.jsonl").write_bytes(data)
    (tmp_path / "run.json").write_bytes((whole / "run.json").read_bytes())
    with pytest.raises(KVzipError, match=r"results\.jsonl, line 1 is damaged"):
        run_in(tmp_path, settings())
    assert (tmp_path / "results.jsonl").read_bytes() == data


def test_data_that_changed_are_refused(monkeypatch, tmp_path):
    run_in(tmp_path, settings("few"))
    changed = stub("few", 3, words=2)
    monkeypatch.setattr(f"{__name__}.FEW", changed)
    with pytest.raises(KVzipError, match="few-0-0 was another one"):
        run_in(tmp_path, settings("few"))


def test_two_processes_cannot_write_one_file(tmp_path):
    with (
        open_results(tmp_path, Shard(), ratios=1),
        pytest.raises(KVzipError, match="another process"),
        open_results(tmp_path, Shard(), ratios=1),
    ):
        pass


# Shards


def test_shards_are_the_whole(tmp_path, whole):
    found = []
    for index in range(3):
        found += run_in(tmp_path, settings(shard=Shard(index, 3)))
    names = {path.name for path in tmp_path.glob("results*")}
    assert names == {f"results-{index}-of-3.jsonl" for index in range(3)}

    def key(line: dict) -> tuple:
        return line["task"], line["sample"], -line["ratio"], line["question"]

    expected = timeless(lines_of(whole / "results.jsonl"))
    assert sorted(timeless(found), key=key) == sorted(expected, key=key)
    assert [line["shard"] for line in lines_of(tmp_path / "starts.jsonl")] == ["0/3", "1/3", "2/3"]


@pytest.mark.parametrize("text", ["", "1", "2/2", "-1/2", "a/b", "1/2/3", "0/0", "1/"])
def test_bad_shard(text):
    with pytest.raises(KVzipError, match="shard"):
        Shard.parse(text)


# One folder, one run


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ratios": (0.5,)}, "ratios is 1.0,0.5,0.2 there and 1.0,0.5 here"),
        ({"level": "head"}, "level is pair there and head here"),
        ({"num": 1}, "num is not given there and 1 here"),
        ({"lengths": (512, 64)}, "lengths is not given there and 512,64 here"),
        ({"seed": 3}, "seed is 0 there and 3 here"),
        ({"tasks": ("sums", "few")}, "tasks is few,sums there and sums,few here"),
        ({"shard": Shard(0, 2)}, "number of shards is 1 there and 2 here"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_are_refused(whole, changes, said):
    with pytest.raises(KVzipError, match=said):
        results.check_run(whole, replace(settings(), **changes).asked())


def test_another_model_is_refused(whole):
    other = ModelKVzip(make_hf_model(seed=3), make_tokenizer())
    record = runner.run_record(settings(), other, ["kvzip"])
    with pytest.raises(KVzipError, match=r"model \(fingerprint of LlamaForCausalLM\) is"):
        results.begin(whole, record)


def test_results_without_a_run_are_refused(tmp_path):
    (tmp_path / "results.jsonl").touch()
    with pytest.raises(KVzipError, match=r"no run\.json"):
        results.check_run(tmp_path, settings().asked())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"shard": "x"}', "\x00"])
def test_a_damaged_run_file_is_refused(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(KVzipError, match="does not describe a run"):
        results.check_run(tmp_path, settings().asked())


def test_the_run_file_says_what_was_run(whole):
    record = json.loads((whole / "run.json").read_text())
    origin = models()("default").origin
    assert record["fingerprint"] == origin.fingerprint
    assert record["tokenizer_hash"] == origin.tokenizer_hash
    assert record["dtype"] == "float32"
    assert record["ratios"] == list(RATIOS)
    assert {*record} == {
        *("model_id", "fingerprint", "tokenizer_hash", "dtype", "device", "seed", "tasks"),
        *("ratios", "level", "scorer", "num", "lengths", "data_dir", "shard", "versions"),
        *("commit", "command", "started", "quantization"),
    }
    assert {*record["versions"]} == {"kvzip", "torch", "transformers", "python"}


# Settings


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": ("fewer",)}, "did you mean 'few'"),
        ({"tasks": ()}, "no task"),
        ({"ratios": (0.5, 0.0)}, "ratio"),
        ({"ratios": (1.5,)}, "ratio"),
        ({"level": "pears"}, "pair-uniform"),
        ({"scorer": "recollection"}, "unknown scorer"),
        ({"data_dir": Path("/nowhere")}, "/nowhere does not exist"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings(changes, said):
    with pytest.raises(KVzipError, match=said):
        Settings(**{"tasks": ("few",), **changes})


def test_tokens_are_counted_as_contexts_are():
    model = models()("default")
    assert token_counter(model)(TEXT) == len(model.prompts.context_ids(TEXT))
    assert token_counter(model)("") == 0
