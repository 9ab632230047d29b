"""`kvzip train-surrogate` as a user runs it."""

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

from kvzip import ModelKVzip
from kvzip.cli import main
from models import make_hf_model, make_tokenizer

WORDS = "the quick brown fox jumps over a lazy dog while it rains and someone sings of bees "


@pytest.fixture
def kvzip(capsys):
    """Run the program: `status, stdout, stderr`."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small random model."""
    folder = tmp_path_factory.mktemp("model")
    make_hf_model("gemma3").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path) -> list[Path]:
    paths = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for path in paths:
        path.write_text(path.stem + WORDS * 15)
    return paths


@pytest.fixture
def refused(kvzip, tmp_path, monkeypatch):
    """Run the program on bad input, without a model, and return the one line that it says."""

    def load(self, *args, **kwargs):
        raise AssertionError("a model was loaded")

    def run(*arguments: object, model: bool = False) -> str:
        before = sorted(tmp_path.rglob("*"))
        with monkeypatch.context() as patch:
            if not model:
                patch.setattr(ModelKVzip, "__init__", load)
            status, out, err = kvzip("train-surrogate", *arguments)
        assert (status, out) == (2, "")
        assert err.startswith("kvzip: ")
        assert err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return run


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_surrogate_is_trained_and_used(kind, kvzip, folder, texts, tmp_path):
    output = tmp_path / "surrogate"
    status, out, err = kvzip(
        "train-surrogate", "-m", folder, "--kind", kind, "--text", *texts, "-o", output,
        "--piece", 100, "--drawn", 60, "--json",
    )  # fmt: skip
    assert status == 0, err
    report = json.loads(out)
    assert report["kind"] == kind
    assert report["hidden_dim"] == {"linear": None, "mlp": 8}[kind]  # an eighth of 64
    assert report["pieces"] > report["held_out_pieces"] > 0
    assert report["tokens"] == 60 * report["pieces"]
    assert report["layers"] == [1]
    assert len(report["r2"]) == 1
    assert report["r2_mean"] == report["r2"][0] <= 1
    assert report["bytes"] == sum(path.stat().st_size for path in output.iterdir())
    assert sorted(path.name for path in output.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((output / "config.json").read_text())
    assert config["model_type"] == "kvzap"
    assert (config["input_dim"], config["output_dim"], config["n_modules"]) == (64, 2, 1)
    assert config["base_model"] == folder.name
    assert config["kvzip"]["r2"] == [round(report["r2"][0], 4)]
    names = {"linear": {"weight", "bias"}, "mlp": {"0.weight", "0.bias", "2.weight", "2.bias"}}
    tensors = load_file(output / "model.safetensors")
    assert set(tensors) == {f"layers.0.{name}" for name in names[kind]}
    kv = ModelKVzip(folder, device="cpu").prefill(WORDS * 5, ratio=0.4, scorer=f"kvzap:{output}")
    assert kv.realised_ratio == pytest.approx(0.4, abs=0.02)


def test_the_same_seed_gives_the_same_file(kvzip, folder, texts, tmp_path):
    made = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        arguments = ("-m", folder, "--text", texts[0], "--text", texts[1], "-o", tmp_path / name)
        status, out, _ = kvzip(
            "train-surrogate", *arguments, "--piece", 100, "--drawn", 30, "--seed", seed
        )
        assert status == 0
        assert "R²" in out
        assert f"kvzap:{tmp_path / name}" in out.replace("\n", "")
        made.append((tmp_path / name / "model.safetensors").read_bytes())
    assert made[0] == made[1] != made[2]


def test_bad_input_is_refused_before_a_model_is_loaded(refused, texts, tmp_path):
    output = tmp_path / "surrogate"
    text = ("--text", texts[0])
    assert "Missing option '--text'" in refused("-o", output)
    assert "Missing option '--output'" in refused(*text)
    assert "there is no file" in refused("--text", tmp_path / "no.txt", "-o", output)
    assert "is a folder" in refused("--text", tmp_path, "-o", output)
    (tmp_path / "empty.txt").touch()
    assert "is empty" in refused(*text, tmp_path / "empty.txt", "-o", output)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    assert "is not UTF-8" in refused("--text", tmp_path / "bytes.txt", "-o", output)
    assert "is not empty" in refused(*text, "-o", tmp_path)
    assert "is a file" in refused(*text, "-o", texts[1])
    assert "does not exist" in refused(*text, "-o", tmp_path / "no" / "way")
    assert "unknown model 'nonesuch'" in refused(*text, "-o", output, "-m", "nonesuch")
    assert "--hidden-dim is for an MLP" in refused(*text, "-o", output, "--hidden-dim", 8)
    assert "'tree'" in refused(*text, "-o", output, "--kind", "tree")
    assert "'--piece'" in refused(*text, "-o", output, "--piece", 5)
    if os.geteuid():
        tmp_path.chmod(0o500)
        assert "is not writable" in refused(*text, "-o", output)
        tmp_path.chmod(0o700)


def test_texts_that_do_not_suffice(refused, folder, texts, tmp_path):
    output = tmp_path / "surrogate"
    arguments = ("-m", folder, "--text", texts[0], "-o", output)
    said = refused(*arguments, model=True)
    assert "the text makes 1 piece, and one has to be held out: give more text" in said
    texts[0].write_text("too short")
    assert "the text makes 0 pieces" in refused(*arguments, model=True)
    texts[0].write_text(WORDS * 90)
    said = refused(*arguments, "--piece", 800, model=True)
    assert "of the model's 1024 positions" in said


def test_an_mlp_that_needs_more_memory_than_there_is(refused, folder, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("kvzip.surrogates.training.host_memory", lambda: 10**6)
    arguments = ("-m", folder, "--text", *texts, "-o", tmp_path / "surrogate", "--piece", 100)
    said = refused(*arguments, "--kind", "mlp", model=True)
    assert "of the host's memory, where 0.0 GB are left: draw fewer tokens" in said
