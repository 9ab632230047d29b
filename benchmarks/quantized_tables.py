"""Markdown tables of `quantized_quality.py`, for benchmarks/README.md.

    python benchmarks/quantized_tables.py benchmarks/results/quantized_quality_cpu.jsonl

`tests/test_benchmark_tables.py` compares the tables in the README with what this prints.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from streaming_tables import read


def tables(documents: list[dict[str, Any]]) -> Iterator[str]:
    """Exact answers, errors of logits, and bytes, by dtype and ratio; then what int4 is made of."""
    cells: dict[str, dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for document in documents:
        for cell in document["cells"]:
            cells[cell["way"]][cell["ratio"]].append(cell)
    ratios = sorted(cells["as made"], reverse=True)
    ways = [way for way in cells if len(cells[way]) == len(ratios)]
    asked = sum(document["questions"] for document in documents)
    yield _table(f"exact answers of {asked}", ways, ratios, cells, lambda c: f"{_right(c):.3f}")
    quantized = [way for way in ways if way != "as made"]
    title = "distance of the logits from those as made"
    yield _table(title, quantized, ratios, cells, lambda c: f"{_error(c):.4f}")
    title = "bytes over those of a full cache in bfloat16"
    yield _table(title, ways, ratios, cells, lambda c: f"{mean(x['bytes'] for x in c):.3f}")
    (ratio,) = {ratio for way in cells.keys() - set(ways) for ratio in cells[way]}
    rows = [
        f"| {way} | {_error(cells[way][ratio]):.4f} | {_right(cells[way][ratio]):.3f} |"
        for way in ("int4", *(way for way in cells if way not in ways))
    ]
    head = f"| at ratio {ratio} | distance of the logits | exact answers |"
    yield "\n".join([head, "| --- | --- | --- |", *rows])


def _table(
    title: str, ways: list[str], ratios: list[float], cells: dict[str, Any], show: Any
) -> str:
    head = f"| {title} | {' | '.join(map(str, ratios))} |"
    rows = [f"| {way} | {' | '.join(show(cells[way][r]) for r in ratios)} |" for way in ways]
    return "\n".join([head, "| --- " * (len(ratios) + 1) + "|", *rows])


def _right(cells: list[dict[str, Any]]) -> float:
    return mean(answer for cell in cells for answer in cell["right"])


def _error(cells: list[dict[str, Any]]) -> float:
    return mean(error for cell in cells for error in cell["logits_error"])


if __name__ == "__main__":
    print("\n\n".join(tables(read(Path(sys.argv[1])))))
