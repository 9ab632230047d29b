"""`kvzip models`: lists, checks, and what is said about bad input."""

import json

import pytest

from kvzip import checks
from kvzip.cli import main
from kvzip.model_types import EXPECTED, REFUSED, TESTED


def run(capsys, *arguments: str, status: int = 0) -> str:
    assert main(["models", *arguments]) == status
    return capsys.readouterr().out


def test_lists_every_type(capsys):
    out = run(capsys)
    for one in (*TESTED, *EXPECTED, *REFUSED):
        assert one.id in out


def test_json(capsys):
    report = json.loads(run(capsys, "--json"))
    assert [len(report[name]) for name in ("tested", "expected", "refused")] == [
        len(TESTED),
        len(EXPECTED),
        len(REFUSED),
    ]
    assert all(one["note"] for one in report["refused"])


def test_a_name_takes_all_of_its_variants(capsys):
    report = json.loads(run(capsys, "mistral", "phi3-longrope", "--json"))
    assert [one["type"] for one in report["tested"]] == ["mistral", "phi3"]
    assert [one["variant"] for one in report["refused"]] == ["sliding"]


def test_check(capsys):
    report = json.loads(run(capsys, "--check", "olmo2", "--json"))
    (one,) = report["checked"]
    assert one["type"] == "olmo2"
    assert one["passed"] == dict.fromkeys(checks.CHECKS, True)
    assert set(report) == {"torch", "transformers", "checked"}


@pytest.mark.parametrize("form", ["table", "markdown"])
def test_a_failed_check_is_shown(capsys, monkeypatch, form):
    monkeypatch.setitem(checks.CHECKS, "full", lambda subject: False)
    more = ["--markdown"] if form == "markdown" else []
    assert "✗" in run(capsys, "--check", "olmo2", *more, status=1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gema2"], "did you mean 'gemma2'?"),
        (["--markdown"], "add --check"),
        (["--check", "--markdown", "--json"], "contradict each other"),
        (["--check", "falcon"], "of falcon none is tested"),
        (["--check", "olmo2", "--device", "abacus"], "device 'abacus' cannot be used"),
    ],
    ids=["unknown", "markdown", "forms", "refused", "device"],
)
def test_bad_input_is_one_line(capsys, arguments, said):
    assert main(["models", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
