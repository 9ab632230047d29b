"""Markdown tables of `surrogate_quality.py`, for benchmarks/README.md.

    python benchmarks/surrogate_tables.py benchmarks/results/surrogate_quality_cpu.jsonl

`tests/test_benchmark_tables.py` compares the tables in the README with what this prints.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

Key = tuple[str, float]
"""A surrogate and a threshold."""


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of results, a document each."""
    lines = path.read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line) for line in lines]
    names = [(document["family"], document["seed"]) for document in documents]
    if len(set(names)) != len(names):
        raise SystemExit(f"{path} holds a document twice: {sorted(names)}")
    return documents


def tables(documents: list[dict[str, Any]]) -> Iterator[str]:
    """Exact answers and shares evicted by threshold and family, and times."""
    full: dict[str, list[int]] = defaultdict(list)
    right: dict[Key, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    evicted: dict[Key, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for document in documents:
        family = document["family"]
        full[family] += document["full"]
        for cell in document["cells"]:
            key = (cell["scorer"], cell["threshold"])
            right[key][family] += cell["right"]
            evicted[key][family].append(cell["evicted"])
    families = sorted(full, key=[document["family"] for document in documents].index)
    (asked,) = {len(answers) for answers in full.values()}
    yield _table(
        [f"exact answers, of {asked} a family", "all", *families],
        [_row("full cache", full, families, "{:.3f}".format)]
        + [_row(_name(key), by, families, "{:.3f}".format) for key, by in right.items()],
    )
    yield _table(
        ["share evicted", "all", *families],
        [_row(_name(key), by, families, "{:.2f}".format) for key, by in evicted.items()],
    )
    timed = [document["seconds"] for document in documents if document["seconds"]]
    title = f"time to read and compress, over plain prefill, {len(timed)} documents"
    rows = []
    for way in timed[0]:
        low, middle, high = quantiles(
            (seconds[way] / seconds["plain prefill"] for seconds in timed), n=4, method="inclusive"
        )
        rows.append([way, f"{middle:.2f}", f"{low:.2f} - {high:.2f}"])
    yield _table([title, "median", "middle half"], rows[1:])


def _name(key: Key) -> str:
    scorer, threshold = key
    return f"{scorer}, {threshold:g}"


def _row(
    name: str, by: dict[str, list[Any]], families: list[str], show: Callable[[float], str]
) -> list[str]:
    """Means of every family, and the mean of these in front."""
    means = [mean(by[family]) for family in families]
    return [name, *map(show, (mean(means), *means))]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print("\n\n".join(tables(read(Path(sys.argv[1])))))
