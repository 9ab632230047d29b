"""`kvzip ask` and `kvzip chat` with questions and answers that shrink."""

import io
import json
import sys
from pathlib import Path

import pytest

from kvzip import Budget, ModelKVzip, Shrinking
from kvzip.cli import main
from models import make_hf_model, make_tokenizer
from test_surrogates import write_kvzap

DOCUMENT = "Ada keeps 417 in the red box. Chloé keeps 902 in the blue box, 文字 in hand.\n" * 6
LONG = "Who keeps what, and why in that box? " * 36
NEW = 40


@pytest.fixture(scope="module")
def zipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .kvz file of a small random model, in whose folder is a surrogate."""
    folder = tmp_path_factory.mktemp("model")
    make_hf_model("qwen3", max_position_embeddings=8192).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    write_kvzap(folder / "kvzap-linear", mlp=False)
    text = tmp_path_factory.mktemp("zipped") / "document.txt"
    text.write_text(DOCUMENT, "utf-8")
    assert main(["zip", str(text), "-m", str(folder), "-r", "0.4"]) == 0
    return text.with_suffix(".kvz")


@pytest.fixture
def kvzip(capsys, monkeypatch):
    """Run the program on a standard input: `status, stdout, stderr`."""

    def run(*arguments: object, lines: str = "") -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode()), "utf-8"))
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


def model_of(zipped: Path) -> ModelKVzip:
    from kvzip.storage import read_header

    return ModelKVzip(read_header(zipped).origin.model_id)


def test_ask(kvzip, zipped):
    asked = ["ask", zipped, LONG, "Who?", "--json", "--max-new-tokens", NEW]
    status, out, _ = kvzip(*asked, "--shrink", "0.1")
    assert status == 0
    answers = [one["answer"] for one in json.loads(out)["answers"]]
    model = model_of(zipped)
    kv, how = model.load(zipped), Shrinking(Budget(0.1), "kvzap:linear")
    assert answers == model.ask(kv, [LONG, "Who?"], shrink=how, max_new_tokens=NEW)
    assert answers != model.ask(kv, [LONG, "Who?"], max_new_tokens=NEW)
    whole = json.loads(kvzip(*asked, "--shrink", "1.0")[1])
    assert [one["answer"] for one in whole["answers"]] == model.ask(
        kv, [LONG, "Who?"], max_new_tokens=NEW
    )


def test_chat_refuses_at_once_what_cannot_shrink(kvzip, zipped):
    status, out, err = kvzip(
        "chat", zipped, "--shrink", "0.3", "--shrink-scorer", "kvzap:/nowhere", lines="Who?\n"
    )
    assert (status, out) == (2, "")
    assert "no KVzap surrogate '/nowhere'" in err


def test_chat(kvzip, zipped):
    lines = f"{LONG}\nWho?\n/forget\nWho?\n"
    asked = ["chat", zipped, "--max-new-tokens", NEW]
    status, out, err = kvzip(*asked, "--shrink-threshold", "0.5", lines=lines)
    assert (status, "forgotten" in err) == (0, True)
    model = model_of(zipped)
    context, how = model.load(zipped), Shrinking(Budget(threshold=0.5))
    kv, expected = context.fork(), []
    for question in (LONG, "Who?"):
        settings = {"kv": kv, "shrink": how, "update_cache": True, "max_new_tokens": NEW}
        expected.append(model.generate(question, **settings))
    assert kv.document.context_length > context.document.context_length + 200
    expected.append(model.generate("Who?", kv=context, max_new_tokens=NEW))
    assert out == "".join(f"{answer}\n" for answer in expected)


@pytest.mark.parametrize("command", ["ask", "chat"])
def test_a_threshold_that_nothing_reaches_is_one_line(kvzip, zipped, command):
    asked = [LONG] if command == "ask" else []
    status, out, err = kvzip(
        command, zipped, *asked, "--shrink-threshold", "1e6", "--max-new-tokens", "3",
        lines=f"{LONG}\n",
    )  # fmt: skip
    assert (status, bool(out.strip())) == (0, True)
    said = [line for line in err.splitlines() if line.startswith("kvzip: warning: ")]
    assert len(said) == 1
    assert "is kept by threshold 1000000.0" in said[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shrink", "0"], "in (0, 1]: got 0.0"),
        (["--shrink", "0.3", "--shrink-threshold", "-4"], "one budget only"),
        (["--shrink", "0.3", "--shrink-scorer", "random"], "by a surrogate, not by 'random'"),
        (["--shrink", "0.3", "--shrink-scorer", "kvzip:linear"], "did you mean 'kvzap:linear'"),
        (["--shrink-scorer", "kvzap:mlp"], "belongs to --shrink or --shrink-threshold"),
        (["--shrink-threshold", "nan"], "a finite number: got nan"),
    ],
    ids=lambda options: " ".join(options) if isinstance(options, list) else "",
)
@pytest.mark.parametrize("command", ["ask", "chat"])
def test_bad_input_is_one_line_before_a_model_is_loaded(
    kvzip, zipped, monkeypatch, command, options, said
):
    def load(self, *args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(ModelKVzip, "__init__", load)
    asked = ["Who?"] if command == "ask" else []
    status, out, err = kvzip(command, zipped, *asked, *options)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("kvzip: ")
    assert said in err


def test_a_model_without_a_surrogate(kvzip, zipped):
    status, out, err = kvzip(
        "ask", zipped, "Who?", "--shrink", "0.3", "--shrink-scorer", "kvzap:/nowhere"
    )
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "/nowhere" in err
