"""`kvzip zip --streaming`, `--append` and `--reach`, run as a user runs them."""

import json
import re
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import test_cli
from kvzip import ModelKVzip
from kvzip.cli import pieces, progress
from kvzip.cli.pieces import Pieces
from kvzip.cli.zip import Reach, StreamingBudget
from test_cli import DOCUMENT, HEAD_DIM, HEADS, LAYERS, save_model

document, kvzip, model = test_cli.document, test_cli.kvzip, test_cli.model
no_model, refused, standard_input = test_cli.no_model, test_cli.refused, test_cli.standard_input

MORE = " Bob keeps 38 in the green box, and nobody knows why.\n" * 3
STREAMING = ["--streaming", "--chunk-size", 100]
ROW = 2 * HEAD_DIM * 4  # key and value, float32


@pytest.fixture
def zipped(kvzip, document, model) -> Path:
    assert kvzip("zip", document, "-m", model, "-r", "0.4", *STREAMING)[0] == 0
    return document.with_suffix(".kvz")


@pytest.fixture
def more(tmp_path) -> Path:
    path = tmp_path / "more.txt"
    path.write_text(MORE, "utf-8")
    return path


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def content(path: Path) -> dict[str, Any]:
    """Everything that a file holds."""
    from safetensors.torch import load_file

    from kvzip.storage import read_header

    header = read_header(path)
    return {"tensors": load_file(path), "ratio": header.ratio, "scorer": header.scorer}


def assert_same_content(path: Path, other: Path) -> None:
    one, two = content(path), content(other)
    tensors, others = one.pop("tensors"), two.pop("tensors")
    assert one == two
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, others[name], atol=1e-5, rtol=1e-5)
        else:
            assert torch.equal(tensor, others[name]), name


# --streaming


def test_choices_are_those_of_the_library():
    from kvzip.scoring.reconstruction import REACHES
    from kvzip.streaming import BUDGETS

    assert tuple(budget.value for budget in StreamingBudget) == BUDGETS
    assert tuple(reach.value for reach in Reach) == REACHES


@pytest.mark.parametrize("budget", ["chunk", "context"])
def test_streaming_agrees_with_the_library(kvzip, document, model, budget, tmp_path):
    output = tmp_path / "out.kvz"
    arguments = ["zip", document, "-m", model, "-r", "0.3", "--budget", budget, "-o", output]
    status, out, err = kvzip(*arguments, *STREAMING, "--json")
    assert (status, err) == (0, "")
    library = ModelKVzip(model)
    kv = library.prefill(DOCUMENT, ratio=0.3, streaming=True, chunk_size=100, budget=budget)
    assert_same_content(output, kv.save(tmp_path / "library.kvz"))
    report = json.loads(out)
    n, p = kv.document.context_length, kv.document.prefix_length
    assert report["file"] == str(output)
    assert report["file_bytes"] == output.stat().st_size
    assert report["model"] == model
    assert (report["context_tokens"], report["prefix_tokens"]) == (n, p)
    assert report["tokens_read"] == n
    assert report["level"] == "pair"
    assert report["ratio_requested"] == 0.3
    pairs = LAYERS * HEADS * n
    assert report["ratio_realised"] == int(0.3 * pairs) / pairs
    assert report["kv_bytes_full"] is None
    assert report["kv_bytes_zipped"] == kv.nbytes
    # the last whole chunk came on top of what was kept of those before it
    before = (n - 1) // 100 * 100
    least = LAYERS * HEADS * (p + int(0.3 * (before - 100)) + 100) * ROW
    assert least <= report["kv_bytes_peak"] < LAYERS * HEADS * (p + n) * ROW
    assert set(report["seconds"]) == {"stream", "save"}
    assert report["tokens_per_second"] == pytest.approx(n / report["seconds"]["stream"])


def test_streaming_reports_in_rows(kvzip, document, model):
    _, out, _ = kvzip("zip", document, "-m", model, *STREAMING)
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert rows.keys() == {"file", "model", "tokens", "cache", "kept", "time"}
    assert re.fullmatch(r"[\d.]+ kB, at most [\d.]+ kB while reading", rows["cache"])
    assert re.search(r"stream .*; [\d,]+ tokens/s$", rows["time"])
    assert "new" not in rows["tokens"]


def test_two_passes_report_peak_and_speed(kvzip, document, model):
    report = json.loads(kvzip("zip", document, "-m", model, "--json")[1])
    assert report["kv_bytes_peak"] == report["kv_bytes_full"]
    assert report["tokens_read"] == report["context_tokens"]
    times = [report["seconds"][stage] for stage in ("prefill", "score", "compact")]
    assert report["tokens_per_second"] == pytest.approx(report["tokens_read"] / sum(times))


def test_streaming_reads_standard_input(kvzip, standard_input, zipped, model, tmp_path):
    standard_input(DOCUMENT)
    output = tmp_path / "piped.kvz"
    assert kvzip("zip", "-", "-m", model, "-r", "0.4", "-o", output, *STREAMING)[0] == 0
    assert_same_content(output, zipped)


def test_the_ratio_is_what_it_always_was(kvzip, document, model):
    report = json.loads(kvzip("zip", document, "-m", model, *STREAMING, "--json")[1])
    assert report["ratio_requested"] == 0.3


@pytest.mark.parametrize("reach", ["context", "chunk"])
def test_reach(kvzip, document, model, tmp_path, reach):
    output = tmp_path / "out.kvz"
    assert kvzip("zip", document, "-m", model, "-o", output, "--reach", reach)[0] == 0
    library = ModelKVzip(model)
    kv = library.prefill(DOCUMENT, ratio=0.3, reach=reach)
    assert_same_content(output, kv.save(tmp_path / "library.kvz"))
    expected = "reconstruction" + ", reach chunk" * (reach == "chunk")
    assert json.loads(kvzip("inspect", output, "--json")[1])["scorer"] == expected


def test_the_document_is_read_while_it_is_compressed(kvzip, document, model, monkeypatch):
    document.write_text(DOCUMENT * 6, "utf-8")
    monkeypatch.setattr(pieces, "PIECE", 64)
    opened, ahead = [], []
    inner = Pieces.__init__

    def noted(self, path):
        inner(self, path)
        opened.append(self)

    def report(self, *args: Any, **kwargs: Any) -> Any:
        ahead.append(opened[0].done)
        return prefill(self, *args, **kwargs)

    prefill = ModelKVzip.prefill
    monkeypatch.setattr(Pieces, "__init__", noted)
    monkeypatch.setattr(ModelKVzip, "prefill", report)
    assert kvzip("zip", document, "-m", model, *STREAMING)[0] == 0
    assert len(ahead) == 1
    assert ahead[0] < 600 < opened[0].done == opened[0].size == document.stat().st_size


# --append


def test_append_equals_one_pass_where_chunks_end(kvzip, document, model, tmp_path):
    library = ModelKVzip(model)
    words = DOCUMENT.split(" ")
    for end in range(20, len(words)):  # a text that ends with a whole chunk
        head, tail = " ".join(words[:end]), " " + " ".join(words[end:])
        ids = [library.prompts.context_ids(part) for part in (head, tail)]
        if len(ids[0]) > 60:
            break
    size = len(ids[0])
    document.write_text(head, "utf-8")
    rest = tmp_path / "rest.txt"
    rest.write_text(tail, "utf-8")
    how = ["--chunk-size", size]
    assert kvzip("zip", document, "-m", model, "-r", "0.4", "--streaming", *how)[0] == 0
    file = document.with_suffix(".kvz")
    status, out, err = kvzip("zip", "--append", file, rest, *how, "--json")
    assert (status, err) == (0, "")
    once = library.prefill(torch.cat(ids), ratio=0.4, streaming=True, chunk_size=size)
    assert_same_content(file, once.save(tmp_path / "once.kvz"))
    report = json.loads(out)
    assert report["file"] == str(file)
    assert report["model"] == model
    assert report["tokens_read"] == len(ids[1])
    assert report["context_tokens"] == len(ids[0]) + len(ids[1])
    assert report["ratio_requested"] == 0.4
    assert report["kv_bytes_zipped"] == once.nbytes < report["kv_bytes_peak"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "document.kvz",
        "document.txt",
        "once.kvz",
        "rest.txt",
    ]


def test_append_writes_elsewhere(kvzip, refused, zipped, more, tmp_path):
    before = zipped.read_bytes()
    output = tmp_path / "other.kvz"
    status, out, _ = kvzip("zip", "--append", zipped, more, "-o", output, "-r", "0.2")
    assert status == 0
    assert "of them new" in out
    assert zipped.read_bytes() == before
    assert content(output)["ratio"] == 0.2
    assert "--force" in refused("zip", "--append", zipped, more, "-o", output)
    assert kvzip("zip", "--append", zipped, more, "-o", output, "--force")[0] == 0
    assert content(output)["ratio"] == 0.4
    assert kvzip("ask", output, "Who?", "--max-new-tokens", "2")[0] == 0


def test_append_from_standard_input(kvzip, standard_input, zipped, more, tmp_path):
    output = tmp_path / "other.kvz"
    assert kvzip("zip", "--append", zipped, more, "-o", output)[0] == 0
    standard_input(MORE)
    assert kvzip("zip", "--append", zipped, "-")[0] == 0
    assert_same_content(zipped, output)


def test_append_through_a_link(kvzip, zipped, more, tmp_path):
    link = tmp_path / "link.kvz"
    link.symlink_to(zipped)
    before = zipped.read_bytes()
    assert kvzip("zip", "--append", link, more)[0] == 0
    assert link.is_symlink()
    assert zipped.read_bytes() != before


def test_append_with_a_model_that_moved(kvzip, refused, document, more, tmp_path):
    folder = tmp_path / "here"
    save_model(folder)
    assert kvzip("zip", document, "-m", folder, *STREAMING)[0] == 0
    moved = folder.rename(tmp_path / "there")
    file = document.with_suffix(".kvz")
    assert "--model" in refused("zip", "--append", file, more)
    assert kvzip("zip", "--append", file, more, "-m", moved)[0] == 0


@pytest.mark.parametrize("where", ["stream", "save"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full"), MemoryError])
def test_append_that_fails_leaves_the_file_whole(
    kvzip, zipped, more, monkeypatch, tmp_path, where, error
):
    before = listing(tmp_path)

    def fails(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise error

    def stops(*args):
        raise error

    if where == "save":
        monkeypatch.setattr("kvzip.storage.save_file", fails)
    else:
        monkeypatch.setattr("kvzip.streaming._compact", stops)
    try:
        status, out, err = kvzip("zip", "--append", zipped, more)
    except OSError:
        assert where == "stream"
    else:
        assert (status, out) == ({KeyboardInterrupt: 130, MemoryError: 1}.get(error, 2), "")
        assert err.count("\n") == 1
    assert listing(tmp_path) == before


@pytest.mark.parametrize("damage", ["missing", "folder", "foreign", "truncated", "flipped"])
def test_append_to_a_bad_file(refused, zipped, more, tmp_path, damage):
    path = tmp_path / "bad.kvz"
    data = zipped.read_bytes()
    if damage == "folder":
        path.mkdir()
    elif damage == "foreign":
        path.write_text(DOCUMENT)
    elif damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    before = listing(tmp_path)
    for output in ([], ["-o", tmp_path / "other.kvz"]):
        line = refused("zip", "--append", path, more, *output)
        assert str(path) in line
        assert listing(tmp_path) == before


def test_append_to_the_file_of_another_model(refused, zipped, more, tmp_path):
    other = save_model(tmp_path / "other", seed=2)
    before = listing(tmp_path)
    assert "was made with model" in refused("zip", "--append", zipped, more, "-m", other)
    assert listing(tmp_path) == before


def test_append_to_a_file_without_scores(refused, document, model, more, tmp_path):
    path = tmp_path / "unscored.kvz"
    ModelKVzip(model).read(DOCUMENT).save(path)
    before = listing(tmp_path)
    assert "holds no scores" in refused("zip", "--append", path, more)
    assert listing(tmp_path) == before


def test_append_beyond_the_positions(kvzip, refused, document, tmp_path):
    short = save_model(tmp_path / "short", max_position_embeddings=700)
    document.write_text("Ada keeps 417 in the red box. ")
    assert kvzip("zip", document, "-m", short, *STREAMING)[0] == 0
    rest = tmp_path / "rest.txt"
    rest.write_text(DOCUMENT * 3)
    before = listing(tmp_path)
    line = refused("zip", "--append", document.with_suffix(".kvz"), rest, "--chunk-size", 50)
    assert "700 positions" in line
    assert listing(tmp_path) == before


# What does not go together


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--streaming", "--level", "head"], "--level"),
        (["--streaming", "--level", "pair-uniform"], "--level"),
        (["--streaming", "--reach", "chunk"], "--reach"),
        (["--append", "{}", "--reach", "context"], "--reach"),
        (["--append", "{}", "--level", "head"], "--level"),
        (["--append", "{}", "--dtype", "float32"], "--dtype"),
        (["--append", "{}", "--ratio", "0"], "ratio"),
        (["--streaming", "--ratio", "1.1"], "ratio"),
        (["--streaming", "--chunk-size", "0"], "--chunk-size"),
        (["--streaming", "--budget", "all"], "--budget"),
        (["--reach", "far"], "--reach"),
        (["--chunk-size", "100"], "--streaming"),
        (["--budget", "context"], "--streaming"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_combination(refused, zipped, more, no_model, tmp_path, arguments, said):
    before = listing(tmp_path)
    assert said in refused("zip", more, *(part.format(zipped) for part in arguments))
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b" \n\t\n" * 9000, "is empty"),
        (b"caf\xe9 au lait", "not UTF-8 text (byte 3)"),
        (None, "there is no file"),
        ("folder", "is a folder"),
    ],
    ids=["empty", "blank", "latin-1", "missing", "folder"],
)
@pytest.mark.parametrize("way", ["--streaming", "--append"])
def test_bad_document(refused, zipped, no_model, tmp_path, way, data, said):
    path = tmp_path / "bad.txt"
    if data == "folder":
        path.mkdir()
    elif data is not None:
        path.write_bytes(data)
    before = listing(tmp_path)
    line = refused("zip", path, way, *([zipped] if way == "--append" else []))
    assert said in line
    assert str(path) in line
    assert listing(tmp_path) == before


@pytest.mark.parametrize("way", ["--streaming", "--append"])
def test_bad_standard_input(refused, standard_input, zipped, no_model, tmp_path, way):
    target = ["-o", tmp_path / "out.kvz"] if way == "--streaming" else [zipped]
    standard_input(b"")
    arguments = ["-", way, *target] if way == "--append" else ["-", *target, way]
    assert "the standard input is empty" in refused("zip", *arguments)


@pytest.mark.parametrize("end", [b"caf\xe9 au lait", b"caf\xc3"], ids=["latin-1", "cut"])
@pytest.mark.parametrize("size", [1, 64, 99])
def test_bytes_that_are_no_text_far_in(refused, zipped, model, tmp_path, monkeypatch, end, size):
    monkeypatch.setattr(pieces, "PIECE", size)
    path = tmp_path / "late.txt"
    good = DOCUMENT.encode()
    path.write_bytes(good + end)
    before = listing(tmp_path)
    for arguments in ([path, "-m", model, "--streaming"], [path, "--append", zipped]):
        line = refused("zip", *arguments, "--chunk-size", 100)
        assert f"not UTF-8 text (byte {len(good) + 3})" in line
        assert listing(tmp_path) == before


def test_the_text_is_never_overwritten(refused, zipped, more, no_model):
    assert "overwritten" in refused("zip", "--append", zipped, more, "-o", more, "--force")
    assert "overwritten" in refused("zip", "--append", zipped, zipped)
    assert more.read_text("utf-8") == MORE


def test_interrupt_while_streaming_leaves_nothing(tmp_path, model):
    code = """
import sys
from contextlib import contextmanager
from kvzip.cli import main, streaming

@contextmanager
def loud(size):
    yield lambda *report: print("chunk", file=sys.stderr, flush=True)

streaming.streaming_bar = loud
sys.exit(main())
"""
    path = tmp_path / "long.txt"
    path.write_text("Ada keeps 417 in the red box. " * 200)
    arguments = ["zip", str(path), "-m", model, "--streaming", "--chunk-size", "50"]
    command = [sys.executable, "-c", code, *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline() == "chunk\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.replace("chunk\n", "") == "kvzip: interrupted\n"
    assert [*tmp_path.iterdir()] == [path]


# The pieces of a text


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 5000])
@pytest.mark.parametrize(
    "text",
    [DOCUMENT, "文字" * 40, " a  b \n\n c d", "x" * 99, "\n\n  word", "end \n"],
    ids=["document", "no-blanks", "blanks", "one-word", "blank-first", "blank-last"],
)
def test_pieces_join_to_the_text(tmp_path, monkeypatch, text, size):
    monkeypatch.setattr(pieces, "PIECE", size)
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    document = Pieces(path)
    parts = [*document]
    assert "".join(parts) == text
    assert all(parts)
    assert document.done == document.size == path.stat().st_size


def test_pieces_end_between_words(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 40)
    path = tmp_path / "text.txt"
    path.write_text(DOCUMENT, "utf-8")
    parts = [*Pieces(path)]
    assert len(parts) > 5
    for before, after in pairwise(parts):
        assert re.search(r"\S$", before)
        assert re.match(r" \S", after)


def test_tokens_of_pieces_are_those_of_the_text(tmp_path, monkeypatch):
    from kvzip.loading import load

    _, tokenizer = load(None)
    path = tmp_path / "text.txt"
    path.write_text(DOCUMENT, "utf-8")
    monkeypatch.setattr(pieces, "PIECE", 50)
    ids = [token for piece in Pieces(path) for token in tokenizer.encode(piece)]
    assert ids == tokenizer.encode(DOCUMENT)


# The bar


def test_the_bar_shows_speed_and_memory(monkeypatch):
    from io import StringIO

    from rich.console import Console

    written = StringIO()
    console = Console(file=written, force_terminal=True, width=120)
    monkeypatch.setattr(progress, "Console", lambda **kwargs: console)
    now = iter([10.0, 12.0, 14.0])
    monkeypatch.setattr(progress, "perf_counter", lambda: next(now))
    with progress.streaming_bar(1000) as report:
        report(500, 4000, 2_500_000)
        report(1000, 12000, 3_000_000)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue())
    assert "compressing" in shown
    assert "100%" in shown
    assert "12,000 tokens, 3,000 tokens/s, 3.0 MB held" in shown


def test_no_bar_without_a_terminal(kvzip, document, model):
    assert kvzip("zip", document, "-m", model, *STREAMING)[2] == ""
