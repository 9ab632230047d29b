"""The README's Python runs as printed."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_readme_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick_start, around, stock = re.findall(
        r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    names: dict = {}
    exec(quick_start, names)
    assert capsys.readouterr().out == "Kim\nYes\ncomputer science\n"
    exec(around, names)
    assert names["answers"] == ["Kim", "Yes", "computer science"]
    assert (tmp_path / "profile.kvz").is_file()
    assert names["kv"].tail_length > 0
    exec(stock, names)
    new = names["out"][0, names["ids"].shape[1] :]
    assert names["model"].prompts.decode(new) == "Kim"
