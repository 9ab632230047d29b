"""`--kv-dtype` on the command line."""

import json
from pathlib import Path

import pytest

import test_cli
from kvzip import storage
from kvzip.kernels.quantization import KV_DTYPES, Quantization, channel_bytes
from test_cli import HEAD_DIM, HEADS, LAYERS

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


def test_unknown_dtypes(refused, no_model, document):
    said = refused("zip", document, "--kv-dtype", "int3")
    assert "'int3' is not one of" in said
    assert not document.with_suffix(".kvz").exists()


def test_heads_that_cannot_be_packed_are_found_before_scoring(
    refused, document, tmp_path, monkeypatch
):
    model = test_cli.save_model(tmp_path / "model", head_dim=30)
    monkeypatch.setattr("kvzip.model.ModelKVzip.score", lambda *_, **__: 1 / 0)
    said = refused("zip", document, "-m", model, "--kv-dtype", "int4")
    assert "whose dimension is 30: it must be a multiple of 4" in said


@by_dtype
def test_profile(kvzip, kv_dtype):
    arguments = ["profile", "--length", 300, "--kv-dtype", kv_dtype, "--json"]
    seen = json.loads(kvzip(*arguments)[1])
    assert seen["kv_dtype"] == kv_dtype
    assert 0 < seen["kv_bytes_zipped"] < 0.12 * seen["kv_bytes_full"]
