"""Markdown tables of `surrogate_quality.py`, for benchmarks/README.md.

python benchmarks/surrogate_tables.py benchmarks/results/surrogate_quality_cpu.jsonl
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of results, a document each."""
    lines = path.read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line) for line in lines]
    names = [(document["family"], document["seed"]) for document in documents]
    if len(set(names)) != len(names):
        raise SystemExit(f"{path} holds a document twice: {sorted(names)}")
    return documents


def tables(documents: list[dict[str, Any]]) -> Iterator[str]:
    """Exact answers by ratio and by threshold, shares evicted by family, and times."""
    by_ratio: dict[str, dict[float, list[int]]] = defaultdict(lambda: defaultdict(list))
    by_threshold: dict[tuple[str, float], list[int]] = defaultdict(list)
    evicted: dict[tuple[str, float], dict[str, list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for document in documents:
        for cell in document["cells"]:
            if "ratio" in cell:
                by_ratio[cell["way"]][cell["ratio"]] += cell["right"]
                continue
            key = (cell["way"], cell["threshold"])
            by_threshold[key] += cell["right"]
            evicted[key][document["family"]].append(1 - cell["realised_ratio"])
    full = by_ratio.pop("full")[1.0]
    ratios = sorted({ratio for ways in by_ratio.values() for ratio in ways}, reverse=True)
    title = f"exact answers of {len(full)}, full cache {mean(full):.3f}"
    yield _table(
        [title, *map(str, ratios)],
        [[way, *(f"{mean(cells[r]):.3f}" for r in ratios)] for way, cells in by_ratio.items()],
    )
    shares = {key: [s for own in by.values() for s in own] for key, by in evicted.items()}
    families = list(dict.fromkeys(document["family"] for document in documents))
    yield _table(
        ["threshold", "exact answers", "evicted", *families],
        [
            [
                f"{way}, {threshold:g}",
                f"{mean(answers):.3f}",
                f"{mean(shares[way, threshold]):.2f}",
                *(f"{mean(evicted[way, threshold][family]):.2f}" for family in families),
            ]
            for (way, threshold), answers in by_threshold.items()
        ],
    )
    ways = documents[0]["seconds"]
    plain = "plain"
    times = {
        way: median(d["seconds"][way] / d["seconds"][plain] for d in documents) for way in ways
    }
    yield _table(
        ["time to read and compress", "over plain reading"],
        [[way, f"{share:.2f}"] for way, share in times.items()],
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print("\n\n".join(tables(read(Path(sys.argv[1])))))
