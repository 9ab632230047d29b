"""The scripts for a GPU in benchmarks/, tried on a CPU with a tiny model."""

import json
import sys
from pathlib import Path

import pytest
import torch

from kvzip.surrogates.kvzap import Module

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import long_generation_gpu
import quantized_weights
import surrogate_training
import two_gpus

TINY = ["--geometry", "tiny", "--device", "cpu"]


def lines(script, arguments: list[str], monkeypatch, capsys) -> list[dict]:
    """What a script prints."""
    monkeypatch.setattr(sys, "argv", [script.__name__, *TINY, *arguments])
    script.main()
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


PIECES = ["--piece", "120", "--drawn", "40"]


def test_training_is_timed_stage_by_stage(monkeypatch, capsys):
    said = lines(surrogate_training, ["--samples", "5", *PIECES], monkeypatch, capsys)
    stages = ["warm-up", "samples apart", "score", "fit", None]
    assert [line.get("done") for line in said] == ["model", *stages, *stages]
    assert said[0]["seconds_to_make_it"] > 0
    linear, mlp = said[5], said[10]
    assert (linear["kind"], linear["hidden_dim"]) == ("linear", None)
    assert (mlp["kind"], mlp["hidden_dim"]) == ("mlp", 64 // 8)
    for line in (linear, mlp):
        assert [*line["seconds"]] == ["score", "fit", "check"]
        assert min(line["seconds"].values()) > 0
        apart = line["seconds_a_sample_apart"]
        assert [*apart] == ["read", "score", "add", "projection_products_once"]
        assert min(apart.values()) > 0
        assert (line["samples_fitted"], line["samples_held_out"]) == (4, 1)
        assert line["tokens_fitted"] == 160
    known = {key: value for key, value in said[3].items() if key not in ("done", "seconds")}
    assert known.items() <= linear.items()
    assert said[3]["seconds"] == {"score": linear["seconds"]["score"]}


def test_training_that_stops_in_time_says_what_it_learnt_from(monkeypatch, capsys):
    arguments = ["--kind", "linear", "--samples", "40", "--seconds", "0", *PIECES]
    line = lines(surrogate_training, arguments, monkeypatch, capsys)[-1]
    assert (line["samples"], line["seconds_allowed"]) == (40, 0)
    assert (line["samples_fitted"], line["samples_held_out"]) == (1, 1)
    assert line["tokens_fitted"] == 40


def test_training_tells_on_the_way_how_far_it_came(monkeypatch, capsys):
    monkeypatch.setattr(surrogate_training, "TOLD", 2)
    arguments = ["--kind", "linear", "--samples", "6", *PIECES, *TINY]
    monkeypatch.setattr(sys, "argv", ["surrogate_training.py", *arguments])
    surrogate_training.main()
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert [json.loads(line)["samples"] for line in told] == [2, 4]


def test_long_answers_shrink_as_often_as_their_blocks_fill(monkeypatch, capsys):
    arguments = ["--context", "200", "--tokens", "1300"]
    whole, shrunk = lines(long_generation_gpu, arguments, monkeypatch, capsys)
    assert whole["first_tokens_that_agree"] == long_generation_gpu.CHECKED
    assert whole["new_tokens"] == shrunk["new_tokens"] == 1300
    assert (whole["shrink"], shrunk["shrink"]) == (None, 0.3)
    assert shrunk["blocks"] == 2  # when 640 and when 1,152 tokens stand behind the context
    first, second = shrunk["bytes_of_context_copy_and_kept"]
    assert second - first == int(0.3 * 2 * 2 * 512) * 2 * 16 * 4  # of 2 layers, 2 heads of 16


def test_what_a_block_took_is_taken_apart():
    class Cache:
        seen_tokens, nbytes = 100, 7

    gaps = [0.01] * 20
    gaps[9] = 0.31  # behind the new token number 9, counted from 0
    shrinker = long_generation_gpu.TimedShrinker(None, None, None, [0.2], [100 + 4 + 9], [5])
    found = long_generation_gpu.stalls(shrinker, Cache(), 4, gaps, 0.01)
    assert found["blocks"] == 1
    assert found["seconds_to_record"] == [pytest.approx(0.1)]


def test_nothing_is_printed_of_a_surrogate_that_is_not_finite():
    module = Module(torch.tensor([[torch.nan]]), torch.zeros(1))
    with pytest.raises(SystemExit, match="no figure"):
        surrogate_training.refuse_what_is_not_finite([module])


def test_quantised_weights_are_measured_beside_plain_ones(monkeypatch, capsys):
    pytest.importorskip("torchao")
    arguments = ["--layers", "2", "--context", "300", "--tokens", "5", "--kinds", "int8", "fp8"]
    plain, int8, fp8 = lines(quantized_weights, arguments, monkeypatch, capsys)
    assert (plain["weights"], plain["logits_changed"]) == ("bfloat16", 0)
    assert 0 < int8["logits_changed"] < 0.1
    assert int8["cache"] == plain["cache"] < 0.2 * plain["cache_full"]
    assert "runs on an NVIDIA device" in fp8["error"]


def test_two_gpus(tmp_path, monkeypatch, capsys):
    """One process of it."""
    arguments = ["--cpu", "--geometry", "tiny", "--context", "300", "--tokens", "4"]
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["two_gpus", *arguments, "--ways", "one", "--out", str(out)])
    assert two_gpus.main() == 0
    (way,) = json.loads(out.read_text())["ways"].values()
    assert way["same_answers"]
    assert way["answers"]["zipped"] == way["answers"]["opened"]
    assert way["pairs_kept_alike"] == {"bundled": 1.0, "large": 1.0}
    (process,) = way["processes"]
    assert 0.3 < process["cache_zipped"] / process["cache_full"] < 0.4  # the prefix is kept
    assert process["seconds_a_token"] > 0
    assert "one: same answers True" in capsys.readouterr().out
