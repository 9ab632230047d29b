"""The benchmark suite at tiny sizes: every section runs, and no figure outlives wrong outputs."""

import json
from dataclasses import replace
from io import StringIO
from math import floor
from pathlib import Path

import pytest
import torch
from rich.console import Console

from kvzip import KVzipError
from kvzip.benchmarks import (
    compact,
    decode_step,
    geometries,
    published,
    suite,
    tokens,
    zipped_attention,
)
from kvzip.benchmarks.lengths import SPREAD, head_lengths
from kvzip.benchmarks.records import Record, Result, Subject, compare
from kvzip.benchmarks.report import print_targets
from kvzip.benchmarks.targets import TARGETS
from kvzip.benchmarks.timing import Contender, Spread, cold
from kvzip.benchmarks.workbench import LONGEST_CONTEXT, Plan, Workbench
from kvzip.cli import main
from kvzip.kernels import reference
from kvzip.kernels.logits import Logits

TINY = Plan(geometries=("tiny",), contexts=(96,), ratios=(0.5,))
SUBJECT = Subject("section", "tiny")
CPU = torch.device("cpu")


def run(
    section: str, output: Path | None = None, bench: Workbench | None = None
) -> tuple[list[Record], str]:
    text = StringIO()
    records = suite.run(
        bench or suite.make_workbench(TINY),
        [section],
        Console(file=text, width=200),
        command=["kvzip", "bench"],
        output=output,
    )
    return records, text.getvalue()


@pytest.mark.parametrize("section", suite.SECTIONS)
def test_every_section_measures(section: str) -> None:
    records, text = run(section)
    assert section in text
    assert records
    for record in records:
        assert record.unit != "error", record.note
        assert record.median is not None, record.note
        assert record.outputs_error is None or record.outputs_error < 1e-5


@pytest.mark.parametrize("contexts", [None, (96,)])
def test_random_models_read_the_longest_context(contexts: tuple[int, ...] | None) -> None:
    bench = suite.make_workbench(replace(TINY, contexts=contexts))
    assert bench.hf_model("tiny").config.max_position_embeddings >= LONGEST_CONTEXT


def test_contenders_stand_beside_each_other() -> None:
    records, _ = run("zipped_attention")
    step = [r for r in records if r.subject.case == zipped_attention.decode_case()]
    beside = {r.compared_with for r in step if r.contender == "kvzip"}
    assert beside == {
        zipped_attention.CEILING,
        zipped_attention.DENSE,
        zipped_attention.PUBLISHED,
        zipped_attention.PUBLISHED_COPYING,
    }
    own = {r.contender: r.median for r in step}
    for record in step:
        if record.contender == "kvzip":
            assert record.ratio_to == own[record.compared_with] / record.median


def test_lines_say_where_they_come_from(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    records, _ = run("compact", file)
    run("compact", file)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 2 * len(records)
    expected = {"benchmark": "compact", "geometry": "tiny", "context": 96, "ratio": 0.5}
    for line in lines:
        assert line.items() >= expected.items()
        assert line.keys() >= {"device", "torch", "transformers", "triton", "commit", "command"}
        assert line["command"] == "kvzip bench"
    origin = {name: lines[0][name] for name in suite.SAME_RUN}
    assert suite._read(file, origin)[: len(records)] == records
    assert suite._read(file, {**origin, "commit": "another"}) == []


def test_wrong_outputs_have_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(suite.make_workbench(TINY).ours, compact=lambda k, v, rows: (-k[rows], v[rows]))
    monkeypatch.setattr(Workbench, "ours", wrong)
    records, _ = run("compact")
    (own,) = (r for r in records if r.contender == "kvzip")
    assert own.median is None
    assert own.note.startswith("outputs differ")
    assert any(r.contender == compact.INDEXING and r.median for r in records)


def test_a_failure_is_a_line_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no such kernel")

    good = suite.make_workbench(TINY).ours
    monkeypatch.setattr(Workbench, "ours", replace(good, zipped_attention=broken))
    records, _ = run("zipped_attention")
    assert {r.unit for r in records} == {"error"}
    assert all(r.note == "error: RuntimeError: no such kernel" for r in records)
    assert len(records) == 3

    monkeypatch.undo()
    monkeypatch.setattr(decode_step, "StaticCache", broken)
    records, _ = run("decode_step")
    assert [r.contender for r in records if r.unit == "error"] == [decode_step.STATIC]
    beside = {r.compared_with for r in records if r.contender == "kvzip"}
    assert decode_step.DYNAMIC in beside
    assert decode_step.STATIC not in beside


def test_nan_is_no_agreement() -> None:
    spread = Spread.of([1.0])
    records = list(compare(SUBJECT, [Result("other", spread), Result("kvzip", spread, torch.nan)]))
    assert [r.median for r in records] == [1.0, None]


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.3, 0.1, 0.29])
def test_head_lengths(heads: int, ratio: float) -> None:
    context = 10_001
    lengths = head_lengths(context, heads, ratio, seed=3)
    assert len(lengths) == heads
    assert sum(lengths) == floor(round(ratio * 100) * heads * context / 100)
    assert 0 < min(lengths) <= max(lengths) <= context
    assert lengths == head_lengths(context, heads, ratio, seed=3)
    if heads == 8 and ratio <= 0.3:
        assert max(lengths) / min(lengths) == pytest.approx(SPREAD, rel=0.01)
        assert lengths != head_lengths(context, heads, ratio, seed=4)
    if ratio == 1.0:
        assert lengths == [context] * heads


def test_the_published_scores_are_those_of_the_definition() -> None:
    query, prefix, chunk, repeat = (
        torch.randn(heads, length, 16) for heads, length in ((6, 9), (2, 3), (2, 5), (2, 9))
    )
    logits = Logits(0.3)
    expected = reference.reconstruction_score(query, prefix, chunk, repeat, logits)
    got = published.materialised_score(query, prefix, chunk, repeat, logits)
    torch.testing.assert_close(got, expected)


def test_inserting_a_token_moves_every_head() -> None:
    lengths = [2, 0, 3]
    indptr = torch.tensor([0, *lengths]).cumsum(0)
    keys, values = torch.randn(2, 5, 4)
    tail_keys, tail_values = torch.randn(2, 1, 3, 1, 4)
    flattened = published.Flattened.of(keys, values, indptr, tail_keys, tail_values)
    assert flattened.ends.tolist() == [0, 3, 4, 8]
    new = [torch.full((1, 1, 4), float(head)) for head in range(3)]
    grown, _ = published.insert(flattened, new, new)
    assert len(grown) == 11
    for head, end in enumerate([3, 5, 10]):
        assert torch.equal(grown[end], new[head][0])


def test_a_wrong_token_is_noticed() -> None:
    bench = suite.make_workbench(TINY)
    model = bench.model("tiny")
    kv = model.read(bench.tokens(50))
    query = bench.tokens(5, seed=1)
    answered = tokens.answer(model, kv, query, 6).tokens
    assert len(answered) == 6
    assert tokens.distance(model.hf_model, kv.fork(), query, answered) < 1e-4
    answered[3] = (answered[3] + 7) % 2048
    assert tokens.distance(model.hf_model, kv.fork(), query, answered) > tokens.TOLERANCE


def test_twins_share_weights_and_nothing_else() -> None:
    model = geometries.random_model("tiny", 128, CPU, torch.float32)
    other = geometries.twin(model, "eager")
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert mine is theirs
    assert model.config._attn_implementation == "sdpa"
    assert all(bool((p != 0).any()) for p in model.parameters())


@pytest.mark.parametrize("name", geometries.GEOMETRIES)
def test_published_shapes(name: str) -> None:
    geometry = geometries.find(name)
    with torch.device("meta"):
        model = geometries.AutoModelForCausalLM.from_config(geometry.config(4096))
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    expected = {"llama3.1-8b": 8.03, "qwen2.5-7b": 7.62, "qwen3-8b": 8.19, "tiny": 0.0}
    assert billions == pytest.approx(expected[name], abs=0.01)
    read, held = decode_step.weight_bytes(model)
    embeddings = geometry.vocabulary * geometry.hidden * model.dtype.itemsize
    assert held - read == embeddings


def test_contenders_take_turns() -> None:
    order: list[str] = []
    contenders = [Contender(name, [lambda name=name: order.append(name)] * 2) for name in "ab"]
    assert cold(contenders, CPU, rounds=3).keys() == {"a", "b"}
    assert "".join(order) == "aabb" + 3 * "aabb"


def test_targets_are_read_from_the_lines() -> None:
    target = TARGETS[0]
    subject = Subject(target.benchmark, "llama3.1-8b", target.context, 0.3, target.case or "")
    line = Record(subject, target.contender, 1.0, 1.0, 1.0, "s", target.compared_with, 0.9)
    assert target.value([line]) == 0.9
    assert target.reached(0.9)
    assert target.value([replace(line, subject=replace(subject, ratio=0.5))]) is None
    text = StringIO()
    print_targets(Console(file=text, width=200), [line])
    assert "90.0%" in text.getvalue()
    assert text.getvalue().count("not measured") == len(TARGETS) - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--geometry", "gpt-2"], "unknown geometry 'gpt-2': choose among llama3.1-8b"),
        (["--geometry", "tiny", "--only", "speed"], "unknown benchmark 'speed': choose among"),
        (["--context", "many"], "--context takes numbers with commas between: got 'many'"),
        (["--context", "-5"], "--context takes positive numbers: got '-5'"),
        (["--ratio", "2"], "ratio is the share of pairs to keep, in (0, 1]: got 2.0"),
        (["-o", "nowhere/results.jsonl"], "the folder nowhere does not exist"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 2
    assert "the benchmarks need a CUDA device" in capsys.readouterr().err
    with pytest.raises(KVzipError, match="need a CUDA device"):
        suite.make_workbench(Plan())


def test_the_command_runs_a_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.jsonl"
    arguments = ["bench", "--geometry", "tiny", "--only", "ceilings", "-o", str(file)]
    assert main(arguments) == 0
    assert "read bandwidth" in capsys.readouterr().out
    assert len(file.read_text().splitlines()) == 4
