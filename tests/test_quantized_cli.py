"""`--kv-dtype` on the command line."""

import json
from pathlib import Path

import pytest

import test_cli
from kvzip import ModelKVzip, storage
from kvzip.kernels.quantization import KV_DTYPES, Quantization, channel_bytes
from models import assert_same, snapshot
from test_cli import HEAD_DIM, HEADS, LAYERS
from test_storage import rewrite, set_header

document, kvzip, model = test_cli.document, test_cli.kvzip, test_cli.model
no_model, refused = test_cli.no_model, test_cli.refused

by_dtype = pytest.mark.parametrize("kv_dtype", KV_DTYPES)


def kv_bytes(path: Path, kv_dtype: str) -> int:
    """What keys and values of a file take, from the rows that it holds."""
    rows = int(storage.read_lengths(path).sum())
    channels = LAYERS * channel_bytes(HEADS, HEAD_DIM)
    return 2 * (rows * Quantization(kv_dtype).row_bytes(HEAD_DIM) + channels)


@by_dtype
def test_zip_ask_and_inspect(kvzip, document, model, kv_dtype):
    arguments = ["zip", document, "-m", model, "-r", "0.4", "--kv-dtype", kv_dtype]
    status, out, _ = kvzip(*arguments, "--json")
    assert status == 0
    path = document.with_suffix(".kvz")
    reported = json.loads(out)
    assert reported["kv_dtype"] == kv_dtype
    assert reported["kv_bytes_zipped"] == kv_bytes(path, kv_dtype)
    seen = json.loads(kvzip("inspect", path, "--json")[1])
    assert seen["kv_dtype"] == kv_dtype
    assert seen["key_bytes"] + seen["value_bytes"] == kv_bytes(path, kv_dtype)
    assert f", {kv_dtype}\n" in kvzip("inspect", path)[1]
    assert kvzip("ask", path, "what?", "--max-new-tokens", 4)[0] == 0
    assert f"pairs, as {kv_dtype}" in kvzip(*arguments, "--force")[1]


def test_files_that_are_not_quantised(kvzip, document, model):
    out = kvzip("zip", document, "-m", model, "--json")[1]
    assert json.loads(out)["kv_dtype"] is None
    path = document.with_suffix(".kvz")
    seen = json.loads(kvzip("inspect", path, "--json")[1])
    assert seen["kv_dtype"] is None
    rows = int(storage.read_lengths(path).sum())
    assert seen["key_bytes"] == seen["value_bytes"] == rows * HEAD_DIM * 4
    assert "float32\n" in kvzip("inspect", path)[1]


@by_dtype
def test_a_budget_in_bytes(kvzip, document, model, kv_dtype):
    limit = 60_000
    arguments = ["zip", document, "-m", model, "--bytes", limit, "--kv-dtype", kv_dtype, "--json"]
    reported = json.loads(kvzip(*arguments)[1])
    pair = 2 * Quantization(kv_dtype).row_bytes(HEAD_DIM)
    assert limit - pair < reported["kv_bytes_zipped"] <= limit


@by_dtype
def test_streaming_and_appending(kvzip, document, model, kv_dtype):
    streaming = ["--streaming", "--chunk-size", 100]
    arguments = ["zip", document, "-m", model, *streaming, "--kv-dtype", kv_dtype, "--json"]
    assert json.loads(kvzip(*arguments)[1])["kv_dtype"] == kv_dtype
    path = document.with_suffix(".kvz")
    before = int(storage.read_lengths(path).sum())
    for more in ([], ["--kv-dtype", kv_dtype]):
        assert json.loads(kvzip("zip", "--append", path, document, *more, "--json")[1])["kv_dtype"]
    assert storage.read_header(path).kv_dtype == kv_dtype
    assert int(storage.read_lengths(path).sum()) > 2 * before


def test_streaming_agrees_with_the_library(kvzip, document, model, tmp_path):
    arguments = ["--streaming", "--chunk-size", 100, "-r", "0.4", "--kv-dtype", "int4", "--json"]
    seconds = json.loads(kvzip("zip", document, "-m", model, *arguments)[1])["seconds"]
    assert [*seconds] == ["stream", "quantise", "save"]
    library = ModelKVzip(model)
    how = {"ratio": 0.4, "streaming": True, "chunk_size": 100, "kv_dtype": "int4"}
    kv = library.prefill(document.read_text("utf-8"), **how)
    again = library.load(document.with_suffix(".kvz"))
    assert_same(snapshot(again), snapshot(kv))


def test_appending_to_a_file_quantises_all_of_it(kvzip, document, model):
    assert kvzip("zip", document, "-m", model)[0] == 0
    path = document.with_suffix(".kvz")
    assert kvzip("zip", "--append", path, document, "--kv-dtype", "int4")[0] == 0
    assert storage.read_header(path).kv_dtype == "int4"


def test_codes_do_not_turn_into_others(kvzip, refused, document, model, monkeypatch):
    assert kvzip("zip", document, "-m", model, "--kv-dtype", "int8")[0] == 0
    path = document.with_suffix(".kvz")
    before = path.read_bytes()
    monkeypatch.setattr("kvzip.model.ModelKVzip.__init__", lambda *_, **__: 1 / 0)
    said = refused("zip", "--append", path, document, "--kv-dtype", "int4")
    assert "holds int8 codes, which do not turn into int4: leave out --kv-dtype" in said
    assert path.read_bytes() == before


@pytest.mark.filterwarnings("ignore:no score reaches")
def test_appending_to_a_file_that_kept_nothing(kvzip, refused, document, model, monkeypatch):
    status, _, err = kvzip("zip", document, "-m", model, "--threshold", 2, "--kv-dtype", "int8")
    assert status == 0
    assert "nothing of the context is kept" in err
    path = document.with_suffix(".kvz")
    before = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("kvzip.model.ModelKVzip.__init__", lambda *_, **__: 1 / 0)
        said = refused("zip", "--append", path, document)
    assert "nothing of the context was kept (ratio 0.0)" in said
    assert "by a ratio in (0, 1], such as 0.3" in said
    assert path.read_bytes() == before
    assert kvzip("zip", "--append", path, document, "-r", 0.5)[0] == 0
    assert storage.read_header(path).realised_ratio == pytest.approx(0.25, abs=0.01)


def test_appending_to_codes_without_scores(refused, document, model):
    path = document.with_suffix(".kvz")
    loaded = ModelKVzip(model)
    loaded.read("My name is Kim.").quantize("int8").save(path)
    said = refused("zip", "--append", path, document)
    assert "holds no scores to go on by: zip the document again, or save a cache that was" in said


def test_weights_that_cannot_be_had_here_are_told_with_the_way_out(
    refused, document, model, tmp_path
):
    path = ModelKVzip(model).prefill("My name is Kim.", ratio=0.5).save(tmp_path / "a.kvz")

    def quantised(_, metadata):
        header = json.loads(metadata["kvzip"].partition(" ")[2])
        set_header(metadata, origin={**header["origin"], "quantization": "fp8"})

    rewrite(path, quantised)
    for arguments in (["ask", path, "Who?"], ["zip", "--append", path, document]):
        said = refused(*arguments, "--device", "cpu")
        assert f"{path} opens with weights in fp8 only, which cannot be had here: open it" in said
        assert "or zip the document again with others (quantization 'fp8' runs on an NVIDIA" in said


def test_unknown_dtypes(refused, no_model, document):
    said = refused("zip", document, "--kv-dtype", "int3")
    assert "'int3' is not one of" in said
    assert not document.with_suffix(".kvz").exists()


@pytest.mark.parametrize("more", [[], ["--streaming"]], ids=["two-passes", "streaming"])
def test_heads_that_cannot_be_packed_are_found_before_scoring(
    refused, document, tmp_path, monkeypatch, more
):
    model = test_cli.save_model(tmp_path / "model", head_dim=30)
    for scoring in ("model.ModelKVzip.score", "scoring.repeated_chunks.RepeatedChunks.read"):
        monkeypatch.setattr(f"kvzip.{scoring}", lambda *_, **__: 1 / 0)
    said = refused("zip", document, "-m", model, "--kv-dtype", "int4", *more)
    assert "whose dimension is 30: it must be a multiple of 4" in said


@by_dtype
def test_profile(kvzip, kv_dtype):
    arguments = ["profile", "--length", 300, "--kv-dtype", kv_dtype, "--json"]
    seen = json.loads(kvzip(*arguments)[1])
    assert seen["kv_dtype"] == kv_dtype
    assert 0 < seen["kv_bytes_zipped"] < 0.12 * seen["kv_bytes_full"]
