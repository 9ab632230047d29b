"""The command line, run as a user runs it: arguments in; status, output and files out."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvzip import __version__
from kvzip.cli import main, options
from models import GEMMA3_LAYERS, make_hf_model, make_tokenizer

COMMANDS = ("demo", "zip", "ask", "chat", "inspect")
DOCUMENT = "Ada keeps 417 in the red box. Chloé keeps 902 in the blue box, 文字 in hand.\n" * 6
LAYERS, HEADS, HEAD_DIM, POSITIONS = 3, 2, 32, 8192


def save_model(folder: Path, kind: str = "qwen3", **changes: Any) -> str:
    """A small random model on disk."""
    settings = {"max_position_embeddings": POSITIONS, **changes}
    make_hf_model(kind, **settings).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def zipped(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zipped")
    text = folder / "document.txt"
    text.write_text(DOCUMENT, "utf-8")
    assert main(["zip", str(text), "-m", model, "-r", "0.4"]) == 0
    return text.with_suffix(".kvz")


@pytest.fixture
def document(tmp_path) -> Path:
    path = tmp_path / "document.txt"
    path.write_text(DOCUMENT, "utf-8")
    return path


@pytest.fixture
def kvzip(capsys):
    """Run the program: `status, stdout, stderr`."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def refused(kvzip):
    """Run the program on bad input and return the one line that it says."""

    def run(*arguments: object) -> str:
        status, out, err = kvzip(*arguments)
        assert status == 2
        assert out == ""
        assert err.startswith("kvzip: ")
        assert err.count("\n") == 1, err
        return err

    return run


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model is an error: what is wrong must be found before."""

    def load(self, *args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("kvzip.model.ModelKVzip.__init__", load)


@pytest.fixture
def standard_input(monkeypatch):
    def feed(data: str | bytes) -> None:
        data = data.encode() if isinstance(data, str) else data
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))

    return feed


def program(*arguments: object, **kwargs) -> subprocess.Popen:
    """The program in a process of its own."""
    code = "import sys; from kvzip.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, text=True, **kwargs)


# What is asked about the program itself


def test_version(kvzip):
    assert kvzip("--version") == (0, f"kvzip {__version__}\n", "")


def test_no_arguments_is_help(kvzip):
    status, out, _ = kvzip()
    assert status == 0
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(kvzip, command):
    status, out, _ = kvzip(command, "--help")
    assert status == 0
    assert f"kvzip {command}" in out.partition("Example")[2]


def test_help_loads_no_heavy_library():
    code = (
        "import sys; from kvzip.cli import main; status = main(['zip', '--help']); "
        "sys.exit(status or sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_levels_are_those_of_selection():
    from kvzip.selection import LEVELS

    assert tuple(level.value for level in options.Level) == LEVELS


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bogus"], "'bogus'"),
        (["zip"], "FILE"),
        (["ask", "x.kvz"], "QUESTION"),
        (["zip", "x", "--bogus"], "--bogus"),
        (["ask", "x.kvz", "Who?", "--max-new-tokens", "0"], "--max-new-tokens"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_line(refused, arguments, said):
    line = refused(*arguments)
    assert said in line
    assert "--help" in line


# zip


def test_zip_reports_what_it_did(kvzip, document, model):
    status, out, err = kvzip("zip", document, "-m", model, "-r", "0.25", "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    file = document.with_suffix(".kvz")
    assert report["file"] == str(file)
    assert report["file_bytes"] == file.stat().st_size
    assert report["model"] == model
    assert report["ratio_requested"] == 0.25
    pairs = LAYERS * HEADS * report["context_tokens"]
    assert report["ratio_realised"] == int(0.25 * pairs) / pairs
    row = 2 * HEAD_DIM * 4  # key and value, float32
    prefix = LAYERS * HEADS * report["prefix_tokens"]
    assert report["kv_bytes_full"] == (prefix + pairs) * row
    assert report["kv_bytes_zipped"] == (prefix + int(0.25 * pairs)) * row
    assert set(report["seconds"]) == {"prefill", "score", "compact", "save"}


def test_zip_reads_standard_input(kvzip, standard_input, document, model, tmp_path):
    standard_input(DOCUMENT)
    status, out, _ = kvzip("zip", "-", "-m", model, "-o", tmp_path / "piped.kvz")
    assert status == 0
    assert "piped.kvz" in out
    assert kvzip("zip", document, "-m", model)[0] == 0
    piped, read = (
        json.loads(kvzip("inspect", tmp_path / name, "--json")[1])
        for name in ("piped.kvz", "document.kvz")
    )
    assert {**piped, "file": read["file"]} == read


@pytest.mark.usefixtures("no_model")
def test_zip_of_standard_input_needs_a_name(refused):
    assert "--output" in refused("zip", "-")


@pytest.mark.parametrize("level", ["pair-uniform", "head"])
def test_zip_levels(kvzip, document, model, level):
    assert kvzip("zip", document, "-m", model, "-r", "0.5", "--level", level)[0] == 0
    _, out, _ = kvzip("inspect", document.with_suffix(".kvz"), "--json")
    shares = {share for layer in json.loads(out)["kept_by_layer_and_head"] for share in layer}
    assert len(shares) == 1 if level == "pair-uniform" else shares == {0, 1}


@pytest.mark.usefixtures("no_model")
def test_existing_output_is_left_alone(refused, document):
    output = document.with_suffix(".kvz")
    output.write_text("precious")
    assert "--force" in refused("zip", document)
    assert output.read_text() == "precious"


def test_existing_output_is_overwritten_by_force(kvzip, document, model):
    output = document.with_suffix(".kvz")
    output.write_text("worthless")
    assert kvzip("zip", document, "-m", model, "--force")[0] == 0
    assert kvzip("inspect", output)[0] == 0


@pytest.mark.usefixtures("no_model")
def test_input_is_never_overwritten(refused, document):
    line = refused("zip", document, "-o", document.parent / "." / document.name, "--force")
    assert "overwritten" in line
    assert document.read_text("utf-8") == DOCUMENT


@pytest.mark.parametrize("ratio", ["0", "1.5", "-0.1", "nan", "inf", "many"])
@pytest.mark.parametrize("command", ["zip", "demo"])
@pytest.mark.usefixtures("no_model")
def test_bad_ratio(refused, document, command, ratio):
    file = [document] if command == "zip" else ["-f", document, "-q", "Who?"]
    assert "ratio" in refused(command, *file, f"--ratio={ratio}")
    assert [*document.parent.iterdir()] == [document]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"caf\xe9 au lait", "not UTF-8 text (byte 3)"),
        (None, "there is no file"),
        ("folder", "is a folder"),
    ],
    ids=["empty", "blank", "latin-1", "missing", "folder"],
)
@pytest.mark.parametrize("command", ["zip", "demo"])
@pytest.mark.usefixtures("no_model")
def test_bad_document(refused, tmp_path, command, content, said):
    path = tmp_path / "input.txt"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    arguments = [path] if command == "zip" else ["-f", path, "-q", "Who?"]
    before = [*tmp_path.iterdir()]
    line = refused(command, *arguments)
    assert said in line
    assert str(path) in line
    assert [*tmp_path.iterdir()] == before


@pytest.mark.usefixtures("no_model")
def test_bad_standard_input(refused, standard_input, tmp_path):
    standard_input(b"")
    assert "the standard input is empty" in refused("zip", "-", "-o", tmp_path / "out.kvz")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-m", "qwen2.5-7B-instruct"], "did you mean 'qwen2.5-7b'?"),
        (["--level", "pears"], "'pair-uniform'"),
        (["--dtype", "float33"], "'bfloat16'"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
        (["--device", "meta"], "device 'meta' cannot be used"),
    ],
    ids=" ".join,
)
@pytest.mark.usefixtures("no_model")
def test_bad_setting(refused, document, arguments, said):
    assert said in refused("zip", document, *arguments)
    assert [*document.parent.iterdir()] == [document]


@pytest.mark.parametrize("config", ["{", '{"model_type": "qwen3"}', '{"model_type": "abacus"}'])
def test_bad_model_folder(refused, document, tmp_path, config):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(config)
    assert f"model '{folder}' cannot be loaded" in refused("zip", document, "-m", folder)


@pytest.mark.usefixtures("no_model")
def test_bad_output_folder(refused, document, tmp_path):
    assert "does not exist" in refused("zip", document, "-o", tmp_path / "nowhere" / "out.kvz")
    assert "is a folder" in refused("zip", document, "-o", tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_folder_without_permission(refused, document, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    assert "not writable" in refused("zip", document, "-o", locked / "out.kvz")


def test_context_beyond_the_positions(refused, tmp_path):
    short = save_model(tmp_path / "short", max_position_embeddings=128)
    path = tmp_path / "long.txt"
    path.write_text(DOCUMENT)
    assert "128" in refused("zip", path, "-m", short)
    assert not path.with_suffix(".kvz").exists()


def test_interrupt_while_scoring_leaves_nothing(tmp_path, model):
    # The program says when it has read the text, so that the signal finds it at work.
    code = """
import sys
from contextlib import contextmanager
from kvzip.cli import main, zip

@contextmanager
def loud(stages):
    yield lambda stage, done, total: print(stage, file=sys.stderr, flush=True)

zip.progress_bar = loud
sys.exit(main())
"""
    path = tmp_path / "long.txt"
    path.write_text("Ada keeps 417 in the red box. " * 200)
    command = [sys.executable, "-c", code, "zip", str(path), "-m", model]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline() == "prefill\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.replace("score\n", "") == "kvzip: interrupted\n"
    assert [*tmp_path.iterdir()] == [path]


def test_interrupt_while_saving_leaves_nothing(kvzip, document, model, monkeypatch):
    def interrupted(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr("kvzip.storage.save_file", interrupted)
    assert kvzip("zip", document, "-m", model) == (130, "", "kvzip: interrupted\n")
    assert [*document.parent.iterdir()] == [document]


def test_out_of_memory_is_one_line(kvzip, document, model, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("CUDA out of memory. Tried to allocate 80 GiB")

    monkeypatch.setattr("kvzip.model.ModelKVzip.read", full)
    status, out, err = kvzip("zip", document, "-m", model)
    assert (status, out) == (1, "")
    assert err.startswith("kvzip: out of memory")


# zip: budgets


def heads_kept(path: Path) -> Any:
    """`[L, H, n]`, bool: context pairs that a file holds."""
    import torch
    from safetensors.torch import load_file

    from kvzip.storage import read_header

    header, tensors = read_header(path), load_file(path)
    kept = torch.zeros(LAYERS, HEADS, header.prefix_length + header.context_tokens).bool()
    for layer in range(LAYERS):
        rows = tensors[f"layers.{layer}.positions"].long()
        lengths = tensors[f"layers.{layer}.indptr"].diff().tolist()
        for head, positions in enumerate(rows.split(lengths)):
            kept[layer, head, positions] = True
    return kept[..., header.prefix_length :]


def test_zip_to_bytes(kvzip, document, model):
    status, out, err = kvzip("zip", document, "-m", model, "--bytes", "200kB", "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    row = 2 * HEAD_DIM * 4
    assert report["budget"] == {"bytes": 200_000}
    assert report["kv_bytes_zipped"] <= 200_000 < report["kv_bytes_zipped"] + row
    assert report["ratio_requested"] == report["ratio_realised"] < 0.7


def test_zip_to_tokens(kvzip, document, model):
    report = json.loads(kvzip("zip", document, "-m", model, "--tokens", 20, "--json")[1])
    assert report["budget"] == {"tokens": 20}
    assert heads_kept(document.with_suffix(".kvz")).sum() == 20 * LAYERS * HEADS


def test_zip_to_a_threshold(kvzip, document, model):
    from kvzip import ModelKVzip

    kv = ModelKVzip(model).prefill(DOCUMENT)
    threshold = float(f"{kv.scores.values.median():.6f}")
    status, out, _ = kvzip("zip", document, "-m", model, "--threshold", threshold, "--json")
    assert status == 0
    assert json.loads(out)["budget"] == {"threshold": threshold}
    assert (heads_kept(document.with_suffix(".kvz")) == (kv.scores.values >= threshold)).all()


def test_zip_with_a_threshold_that_nothing_reaches(kvzip, document, model):
    status, out, err = kvzip("zip", document, "-m", model, "--threshold", 3, "--json")
    assert status == 0
    assert err.startswith("kvzip: warning: no score reaches threshold 3.0")
    assert err.count("\n") == 1
    assert json.loads(out)["ratio_realised"] == 0
    assert not heads_kept(document.with_suffix(".kvz")).any()
    assert kvzip("ask", document.with_suffix(".kvz"), "Who?", "--max-new-tokens", 2)[0] == 0


def test_zip_keeps_parts_of_the_document_and_some_of_every_head(kvzip, document, model):
    from kvzip import ModelKVzip

    keep = ["--keep-text", "red box", "--keep", "0:9", "--keep-text", "Chloé"]
    arguments = ["zip", document, "-m", model, "-r", 0.5, *keep, "--min-per-head", 60, "--json"]
    status, out, err = kvzip(*arguments)
    assert (status, err) == (0, "")
    spans = ModelKVzip(model).spans(DOCUMENT, [(0, 9), "red box", "Chloé"])
    assert len(spans) == 13
    report = json.loads(out)
    assert report["budget"] == {"ratio": 0.5, "min_per_head": 60, "keep": [*map(list, spans)]}
    assert report["ratio_requested"] == 0.5
    kept = heads_kept(document.with_suffix(".kvz"))
    assert kept.sum() == kept.numel() // 2
    assert all(kept[..., start:end].all() for start, end in spans)
    assert (kept.sum(-1) >= 60).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-r", "0.3", "--bytes", "1GB"], "got ratio and bytes"),
        (["--tokens", "9", "--threshold", "0"], "got tokens and threshold"),
        (["--tokens", "0"], "tokens is a number of pairs a head, above 0"),
        (["--tokens", "nan"], "tokens is a number of pairs a head, above 0"),
        (["--bytes", "plenty"], "such as 512MB"),
        (["--bytes", "0"], "such as 512MB"),
        (["--threshold", "nan"], "a finite number"),
        (["--threshold", "0.1", "--level", "pair-uniform"], "choose level 'pair' or 'head'"),
        (["--min-per-head", "-1"], "--min-per-head"),
        (["--keep", "4"], "START:END"),
        (["--keep", "-4:3"], "START:END"),
        (["--keep", "9:4"], "characters 9 to 4"),
        (["--keep", "0:100000"], f"which has {len(DOCUMENT)}"),
        (["--keep-text", "Zoe"], "'Zoe' does not occur"),
        (["--keep-text", ""], "'' does not occur"),
        (["--streaming", "--tokens", "9"], "--tokens does not go with --streaming"),
        (["--streaming", "--bytes", "1GB"], "--bytes does not go with --streaming"),
        (["--streaming", "--keep-text", "Ada"], "--keep-text does not go with --streaming"),
        (["--append", "x.kvz", "--keep", "0:4"], "--keep does not go with --append"),
        (["--append", "x.kvz", "--min-per-head", "4"], "--min-per-head does not go with --append"),
        (["--append", "x.kvz", "--threshold", "4"], "--threshold does not go with --append"),
    ],
    ids=" ".join,
)
@pytest.mark.usefixtures("no_model")
def test_bad_budget(refused, document, arguments, said):
    assert said in refused("zip", document, *arguments)
    assert [*document.parent.iterdir()] == [document]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bytes", "2kB"], "bytes is 2,000, but the prefix"),
        (["--tokens", "5", "--min-per-head", "6"], "tokens 5.0 allows 5 pairs a head"),
        (["--keep", f"0:{len(DOCUMENT)}"], "ratio 0.3 allows"),
    ],
    ids=" ".join,
)
def test_a_budget_that_the_document_does_not_fit(
    refused, document, model, monkeypatch, arguments, said
):
    def score(*args, **kwargs):
        raise AssertionError("it was scored")

    monkeypatch.setattr("kvzip.model.ModelKVzip.score", score)
    assert said in refused("zip", document, "-m", model, *arguments)
    assert [*document.parent.iterdir()] == [document]


# ask


def test_ask_prints_answers_alone(kvzip, zipped):
    status, out, err = kvzip("ask", zipped, "Who?", "What is in the box?", "--max-new-tokens", "9")
    assert (status, err) == (0, "")
    assert len(out.splitlines()) == 2


def test_ask_agrees_with_the_library(kvzip, zipped, model):
    from kvzip import ModelKVzip

    questions = ["Who?", "What is in the box?"]
    status, out, _ = kvzip("ask", zipped, *questions, "--json", "--max-new-tokens", "9")
    library = ModelKVzip(model)
    answers = library.ask(library.load(zipped), questions, max_new_tokens=9)
    assert status == 0
    assert json.loads(out) == {
        "model": model,
        "file": str(zipped),
        "answers": [
            {"question": question, "answer": answer}
            for question, answer in zip(questions, answers, strict=True)
        ],
    }


def test_newlines_in_answers(kvzip, zipped, monkeypatch):
    answer = "one\ntwo\r\nthree"
    monkeypatch.setattr("kvzip.model.ModelKVzip.ask", lambda *args, **kwargs: [answer])
    assert kvzip("ask", zipped, "Who?")[1] == "one two three\n"
    assert json.loads(kvzip("ask", zipped, "Who?", "--json")[1])["answers"][0]["answer"] == answer


@pytest.mark.parametrize("question", ["", "  ", "\udcff"], ids=ascii)
def test_bad_question(refused, zipped, question):
    assert "question 2" in refused("ask", zipped, "Who?", question)


def test_question_beyond_the_positions(refused, zipped):
    assert "positions" in refused("ask", zipped, "Why? " * POSITIONS)


def test_file_of_another_model(refused, zipped, tmp_path):
    other = save_model(tmp_path, seed=2)
    assert "was made with model" in refused("ask", zipped, "Who?", "-m", other)


def test_model_that_moved(kvzip, refused, document, tmp_path):
    folder = tmp_path / "here"
    save_model(folder)
    assert kvzip("zip", document, "-m", folder)[0] == 0
    moved = folder.rename(tmp_path / "there")
    file = document.with_suffix(".kvz")
    line = refused("ask", file, "Who?")
    assert str(folder) in line
    assert "--model" in line
    assert kvzip("ask", file, "Who?", "-m", moved, "--max-new-tokens", "2")[0] == 0


@pytest.mark.parametrize("command", [["ask", "{}", "Who?"], ["chat", "{}"], ["inspect", "{}"]])
@pytest.mark.parametrize(
    "damage", ["missing", "folder", "foreign", "truncated", "flipped", "safetensors"]
)
def test_bad_file(refused, zipped, tmp_path, command, damage):
    path = tmp_path / "bad.kvz"
    data = zipped.read_bytes()
    if damage == "folder":
        path.mkdir()
    elif damage == "foreign":
        path.write_text(DOCUMENT)
    elif damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        at = data.index(b"bfloat16" if b"bfloat16" in data else b"float32")
        path.write_bytes(data[:at] + b"c" + data[at + 1 :])
    elif damage == "safetensors":
        import torch
        from safetensors.torch import save_file

        save_file({"weight": torch.zeros(3)}, path)
    line = refused(*(part.format(path) for part in command))
    assert str(path) in line


# chat


def chat(kvzip, standard_input, file, *lines: str) -> str:
    standard_input("".join(f"{line}\n" for line in lines))
    status, out, _ = kvzip("chat", file, "--max-new-tokens", "6")
    assert status == 0
    return out


def test_chat_remembers_until_told_to_forget(kvzip, standard_input, zipped):
    once = chat(kvzip, standard_input, zipped, "Who?")
    twice = chat(kvzip, standard_input, zipped, "Who?", "Who?")
    assert once
    assert twice.startswith(once)
    assert twice != once * 2, "the second answer does not depend on the first turn"
    assert chat(kvzip, standard_input, zipped, "Who?", "/forget", "", "Who?") == once * 2


def test_chat_ends_at_quit(kvzip, standard_input, zipped):
    once = chat(kvzip, standard_input, zipped, "Who?")
    assert chat(kvzip, standard_input, zipped, "Who?", "/quit", "Who?") == once


def test_chat_interrupted_answer_is_forgotten(kvzip, standard_input, zipped, monkeypatch):
    from transformers import TextStreamer

    before = chat(kvzip, standard_input, zipped, "Who?", "Where?")
    first = chat(kvzip, standard_input, zipped, "Who?")
    put, ends = TextStreamer.put, []

    def interrupted_put(self, value):
        # in the second answer, after the question and two tokens
        interrupted_put.calls += 1
        if len(ends) == 1 and interrupted_put.calls == 3:
            ends.append("interrupted")
            raise KeyboardInterrupt
        put(self, value)

    def counting_end(self):
        ends.append("ended")
        interrupted_put.calls = 0
        end(self)

    end, interrupted_put.calls = TextStreamer.end, 0
    monkeypatch.setattr(TextStreamer, "put", interrupted_put)
    monkeypatch.setattr(TextStreamer, "end", counting_end)
    out = chat(kvzip, standard_input, zipped, "Who?", "What?", "Where?")
    assert ends == ["ended", "interrupted", "ended"]
    assert out.startswith(first)
    assert out.endswith("\n" + before.removeprefix(first))


def test_chat_survives_a_question_that_is_too_long(kvzip, standard_input, zipped):
    standard_input("Why? " * POSITIONS + "\nWho?\n")
    status, out, err = kvzip("chat", zipped, "--max-new-tokens", "6")
    assert status == 0
    assert "positions" in err
    assert out == chat(kvzip, standard_input, zipped, "Who?")


# inspect


@pytest.mark.usefixtures("no_model")
def test_inspect_needs_no_model(kvzip, zipped):
    from kvzip.storage import read_header

    header = read_header(zipped)
    status, out, err = kvzip("inspect", zipped)
    assert (status, err) == (0, "")
    assert header.origin.model_id in out
    assert header.origin.fingerprint in out
    assert "layer 1" in out


def test_inspect_reports_what_the_file_holds(kvzip, zipped):
    from safetensors.torch import load_file

    report = json.loads(kvzip("inspect", zipped, "--json")[1])
    tensors = load_file(zipped)
    for part in ("key", "value"):
        held = [tensor for name, tensor in tensors.items() if name.endswith(f".{part}s")]
        assert report[f"{part}_bytes"] == sum(tensor.nbytes for tensor in held)
    kept = report["kept_by_layer_and_head"]
    assert [len(layer) for layer in kept] == [HEADS] * LAYERS
    assert sum(map(sum, kept)) / (LAYERS * HEADS) == pytest.approx(
        report["ratio_realised"], abs=1e-6
    )
    assert report["prefix_tokens"] + report["context_tokens"] == len(tensors["token_ids"])
    assert report["file_bytes"] == zipped.stat().st_size
    assert report["ratio_requested"] == 0.4
    assert report["scorer"] == "reconstruction"
    assert report["format_version"] == 2


def test_inspect_of_a_model_with_sliding_layers(kvzip, document, tmp_path):
    gemma3 = save_model(tmp_path / "gemma3", "gemma3")
    assert kvzip("zip", document, "-m", gemma3, "-r", "0.5")[0] == 0
    file = document.with_suffix(".kvz")
    report = json.loads(kvzip("inspect", file, "--json")[1])
    assert len(report["kept_by_layer_and_head"]) == GEMMA3_LAYERS.count("full_attention")
    assert report["key_bytes"] + report["value_bytes"] < report["file_bytes"]
    out = kvzip("inspect", file)[1]
    shown = [line.split()[1] for line in out.splitlines() if line.startswith("layer ")]
    assert shown == [str(GEMMA3_LAYERS.index("full_attention"))]


@pytest.mark.parametrize("arguments", [["--version"], ["inspect"]], ids=" ".join)
def test_broken_pipe_is_silent(zipped, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    files = [zipped] if arguments == ["inspect"] else []
    process = program(*arguments, *files, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, "")


def test_the_package_runs_as_a_module():
    """With the command's exit codes."""
    for arguments, code in ((["--help"], 0), (["inspect", "nothing.kvz"], 2)):
        command = [sys.executable, "-m", "kvzip", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
