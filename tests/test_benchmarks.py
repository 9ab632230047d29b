"""The benchmark suite at tiny sizes: every section runs, and no figure outlives wrong outputs."""

import json
from dataclasses import replace
from io import StringIO
from math import floor, isnan
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
    sliding_layers,
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
TINY_GEMMA3 = replace(TINY, geometries=("tiny-gemma3",))
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


@pytest.mark.parametrize(
    ("section", "plan"),
    [(name, TINY) for name in suite.SECTIONS if name != sliding_layers.NAME]
    + [(name, TINY_GEMMA3) for name in suite.SECTIONS if name not in suite.FULL_ATTENTION],
)
def test_every_section_measures(section: str, plan: Plan) -> None:
    records, text = run(section, bench=suite.make_workbench(plan))
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
    expected = {
        "llama3.1-8b": 8.03, "qwen2.5-7b": 7.62, "qwen3-8b": 8.19, "tiny": 0.0,
        "gemma3-4b": 3.88, "gemma3-12b": 11.77, "tiny-gemma3": 0.0,
    }  # fmt: skip
    assert billions == pytest.approx(expected[name], abs=0.01)
    read, held = decode_step.weight_bytes(model)
    embeddings = geometry.vocabulary * geometry.hidden * model.dtype.itemsize
    assert held - read == (0 if geometries.slides(name) else embeddings)


@pytest.mark.parametrize("name", [*geometries.SLIDING, geometries.TINY_GEMMA3])
def test_every_sixth_layer_has_full_attention(name: str) -> None:
    geometry = geometries.find(name)
    for _ in range(2):  # a config leaves the geometry as it is
        config = geometry.config(131_072)
        types = ["sliding_attention"] * 5 + ["full_attention"]
        assert config.layer_types == (types * 8)[: geometry.layers]
        assert config.rope_parameters["full_attention"]["factor"] == 8.0
        assert config.rope_parameters["sliding_attention"]["rope_theta"] == 10_000.0
        assert "factor" not in config.rope_parameters["sliding_attention"]
    with torch.device("meta"):
        model = geometries.AutoModelForCausalLM.from_config(config)
    layers = [layer.self_attn for layer in model.model.layers]
    assert {layer.scaling for layer in layers} == {geometry.head_dim**-0.5}
    windows = [layer.sliding_window for layer in layers[4:6]]
    assert windows == [32 if name == geometries.TINY_GEMMA3 else 1024, None]


def test_sections_measure_the_same_shapes_as_ever() -> None:
    assert geometries.MEASURED == ("llama3.1-8b", "qwen2.5-7b", "qwen3-8b")
    assert geometries.SLIDING == ("gemma3-4b", "gemma3-12b")
    assert sliding_layers.NAME not in suite.USUAL


def test_a_copy_for_transformers_holds_what_transformers_would() -> None:
    bench = suite.make_workbench(TINY_GEMMA3)
    model, stock = bench.model("tiny-gemma3"), bench.hf_model("tiny-gemma3")
    kv = model.read(bench.tokens(96))
    expected = sliding_layers.DynamicCache(config=stock.config)
    with torch.no_grad():
        stock(kv.document.token_ids[None], past_key_values=expected)
    cache = sliding_layers.dynamic_cache(stock, kv)
    lengths = {layer.keys.shape[2] for layer in cache.layers}
    assert lengths == {31, len(kv.document.token_ids)}
    for mine, theirs in zip(cache.layers, expected.layers, strict=True):
        assert mine.get_seq_length() == theirs.get_seq_length() == len(kv.document.token_ids)
        torch.testing.assert_close(mine.keys, theirs.keys)
        torch.testing.assert_close(mine.values, theirs.values)


def test_answers_of_transformers_begin_anew() -> None:
    bench = suite.make_workbench(TINY_GEMMA3)
    model = bench.model("tiny-gemma3")
    kv, query = model.read(bench.tokens(96)), bench.tokens(5, seed=1)
    stock = bench.hf_model("tiny-gemma3")
    way = sliding_layers._dynamic(stock, model, kv, query)
    first = way.decode(6).tokens
    assert way.decode(6).tokens == first
    assert len(first) == 6


def test_heads_keep_the_lengths_that_are_made_up() -> None:
    bench = suite.make_workbench(TINY_GEMMA3)
    kv = bench.model("tiny-gemma3").read(bench.tokens(97))
    kv.scores = sliding_layers.spread_scores(bench, kv, 0.3)
    kept = kv.prune(0.3).kept.sum(-1)
    lengths = torch.tensor([head_lengths(97, 2, 0.3, seed=layer) for layer in range(len(kept))])
    assert torch.equal(kept, lengths)


def test_what_the_allocator_holds_less_after_prune_is_freed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = suite.make_workbench(TINY_GEMMA3)
    kv = bench.model("tiny-gemma3").read(bench.tokens(96))
    kv.scores = sliding_layers.spread_scores(bench, kv, 0.5)
    full = kv.nbytes
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: kv.nbytes)
    subject = Subject(sliding_layers.NAME, "tiny-gemma3", 96, 0.5)
    before, after, freed = sliding_layers._prune(bench, subject, kv)
    assert before.median == full
    assert after.median == kv.nbytes
    pair = 2 * 16 * 4  # bytes: keys and values of 16 dimensions in float32
    assert freed.median == before.median - after.median == 96 * pair  # half of two heads
    assert freed.ratio_to == 0.5


def test_other_pairs_show_in_the_logits() -> None:
    bench = suite.make_workbench(TINY_GEMMA3)
    model, query = bench.model("tiny-gemma3"), bench.tokens(5, seed=1)
    kv = model.read(bench.tokens(96))
    kv.scores = sliding_layers.spread_scores(bench, kv, 0.3)
    own = sliding_layers._kvzip(model, kv, query, 0.0)
    assert own.error(model.hf_model, 4) < 1e-5
    nothing = replace(own, judge=lambda answered: torch.full((4, 2048), torch.nan))
    assert isnan(nothing.error(model.hf_model, 4))
    for other in (kv.fork().prune(0.3), model.read(bench.tokens(96, seed=2))):
        judge = sliding_layers._kvzip(model, other, query, 0.0).judge
        assert replace(own, judge=judge).error(model.hf_model, 4) > sliding_layers.TOLERANCE


@pytest.mark.parametrize("error", [0.5, torch.nan])
def test_a_context_that_is_read_wrongly_leaves_no_figure(
    error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sliding_layers, "reading_error", lambda *args: error)
    records, _ = run(sliding_layers.NAME, bench=suite.make_workbench(TINY_GEMMA3))
    figures = {r.contender: r.median for r in records if r.outputs_error is not None}
    assert figures[sliding_layers.ZIPPED] is figures[sliding_layers.FULL] is None
    assert figures[sliding_layers.DYNAMIC] is not None


def test_a_contender_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(sliding_layers, "dynamic_cache", broken)
    records, _ = run(sliding_layers.NAME, bench=suite.make_workbench(TINY_GEMMA3))
    failed = [r for r in records if r.unit == "error"]
    assert [r.contender for r in failed] == [sliding_layers.DYNAMIC]
    beside = {r.compared_with for r in records if r.contender == sliding_layers.ZIPPED}
    assert beside == {sliding_layers.CEILING_ZIPPED, sliding_layers.FULL}


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
        (
            ["--geometry", "tiny-gemma3"],
            "decode_step measures models whose every layer has full attention, and most layers of "
            "tiny-gemma3 slide: choose sections among ceilings, zipped_attention",
        ),
        (
            ["--geometry", "tiny", "--only", "sliding_layers"],
            "sliding_layers measures models with sliding layers, and tiny has none: choose among "
            "gemma3-4b, gemma3-12b, tiny-gemma3",
        ),
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
