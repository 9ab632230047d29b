"""Markdown tables of the programs here that run on GPUs, for benchmarks/README.md.

    python benchmarks/gpu_tables.py benchmarks/results

`tests/test_benchmark_tables.py` compares the tables in the README with what this prints.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Fields = dict[str, Any]


def tables(folder: Path) -> Iterator[str]:
    """Quantised weights, two GPUs, and training."""
    yield quantized_weights(_lines(folder / "h200_quantized_weights.jsonl"))
    names = ("h200_two_gpus.json", "h200_two_gpus_heads.json")
    files = [json.loads((folder / name).read_text(encoding="utf-8")) for name in names]
    yield two_gpus({way: found for file in files for way, found in file["ways"].items()})
    yield training(_lines(folder / "h200_surrogate_training.jsonl"))


def quantized_weights(lines: Sequence[Fields]) -> str:
    """From `quantized_weights.py`, a row for each line."""
    return _table(
        ["weights", "bytes", "a token", "answer of 2 tokens", "reading"],
        [
            [
                line["weights"],
                _gigabytes(line["bytes_of_weights"], 2),
                f"{line['seconds_a_token'] * 1e3:.2f} ms",
                f"{line['seconds_of_two_tokens'] * 1e3:.0f} ms",
                f"{line['seconds_to_read']:.2f} s",
            ]
            for line in lines
        ],
    )


def two_gpus(ways: dict[str, Fields]) -> str:
    """From `two_gpus.py`, a column for each way."""
    columns = [way["processes"] for way in ways.values()]

    def memory(stage: str, kind: str) -> list[str]:
        return [" and ".join(_used(processes, stage, kind)) for processes in columns]

    def slowest(digits: int, seconds: Callable[[Fields], float], unit: float = 1) -> list[str]:
        name = "s" if unit == 1 else "ms"
        return [f"{max(map(seconds, each)) * unit:.{digits}f} {name}" for each in columns]

    def stage(name: str) -> list[str]:
        return slowest(2, lambda process: process["stages"][name]["seconds"])

    rows = {
        "weights": memory("load", "bytes"),
        "... and full cache": memory("prefill", "bytes"),
        "... and zipped cache": memory("prune", "bytes"),
        "peak": memory("prefill", "peak"),
        "prefill": stage("prefill"),
        "scoring": stage("score"),
        "a token": slowest(2, lambda process: process["seconds_a_token"], unit=1e3),
        "answer of 2 tokens": stage("answer of 2 tokens"),
    }
    return _table(["", *ways], [[name, *cells] for name, cells in rows.items()])


def training(lines: Sequence[Fields]) -> str:
    """From `surrogate_training.py`, a column for each line."""
    seconds = {"read and score": "score", "fit": "fit", "check those held out": "check"}
    peaks = {"peak on the GPU": "device_bytes_at_peak", "peak on the host": "host_bytes_at_peak"}
    rows = [
        ["samples fitted to, held out"]
        + [f"{line['samples_fitted']}, {line['samples_held_out']}" for line in lines],
        *(
            [name] + [f"{line['seconds'][key]:.1f} s" for line in lines]
            for name, key in seconds.items()
        ),
        ["in all", *(f"{line['seconds_in_all']:.1f} s" for line in lines)],
        *([name] + [_gigabytes(line[key]) for line in lines] for name, key in peaks.items()),
    ]
    return _table(["", *(line["kind"] for line in lines)], rows)


def _used(processes: Sequence[Fields], stage: str, kind: str) -> list[str]:
    """Memory of every GPU that was used."""
    found = [process["stages"][stage][kind] for process in processes]
    return [_gigabytes(size) for process in found for size in process.values() if size]


def _gigabytes(size: float, digits: int = 1) -> str:
    return f"{size / 1e9:.{digits}f} GB"


def _lines(path: Path) -> list[Fields]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


if __name__ == "__main__":
    print(*tables(Path(sys.argv[1])), sep="\n\n")
