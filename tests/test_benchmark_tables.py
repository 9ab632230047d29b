"""The tables of benchmarks/README.md are those that the files of results give."""

import re
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from kvzip.benchmarks import sliding_layers, suite
from kvzip.benchmarks.workbench import Plan

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_tables  # noqa: E402
import quantized_tables  # noqa: E402
import streaming_tables  # noqa: E402
import surrogate_tables  # noqa: E402
import tables  # noqa: E402

FILES = (
    "h200.jsonl",
    "h200_decode_step.jsonl",
    "h200_stream.jsonl",
    "h200_quantized.jsonl",
    "h200_growth.jsonl",
    "h200_matvec.jsonl",
    "h200_surrogate.jsonl",
    "h200_sliding.jsonl",
)


def printed() -> list[str]:
    results = BENCHMARKS / "results"
    sections = [table for name in FILES for table in tables.tables(tables.read(results / name))]
    return [*sections, *gpu_tables.tables(results)]


def test_the_readme_quotes_the_results() -> None:
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    gpu = text.partition("## On one NVIDIA H200\n")[2].partition("\n## ")[0]
    quoted = [table.strip() for table in re.findall(r"(?:^\|.*\n)+", gpu, flags=re.MULTILINE)]
    assert len(quoted) == len(printed()) > 10
    assert set(quoted) == set(printed())


def test_sliding_layers_have_two_tables() -> None:
    plan = Plan(geometries=("tiny-gemma3",), contexts=(96,), ratios=(0.5,))
    records = suite.run(
        suite.make_workbench(plan), [sliding_layers.NAME], Console(file=StringIO()), command=[]
    )
    steps, once = tables.tables(records)
    shares = [row.split(" | ")[4] for row in steps.splitlines()[2:]]
    assert shares[:2] == ["", ""]  # ceilings
    assert all(share.endswith("%") for share in shares[2:])
    assert len(shares) == 5
    # 124 tokens with the prefix, of which 28 and half of the others stay
    assert "| tiny-gemma3: zipped cache, layers with full attention | 19.5 kB, 61.3% of" in once


def test_another_figure_makes_another_table() -> None:
    records = tables.read(BENCHMARKS / "results" / FILES[1])
    faster = [replace(r, median=r.median / 2) if r.unit == "s" else r for r in records]
    assert tables.step(faster) != tables.step(records)


def test_sections_without_lines_have_no_table() -> None:
    assert list(tables.tables([])) == []


def test_a_missing_figure_is_said() -> None:
    records = tables.read(BENCHMARKS / "results" / FILES[1])
    failed = [replace(r, median=None, note="outputs differ") for r in records]
    with pytest.raises(SystemExit, match="has no figure: outputs differ"):
        tables.step(failed)


def test_the_readme_quotes_the_streaming_results() -> None:
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    documents = streaming_tables.read(BENCHMARKS / "results" / "streaming_quality_cpu.jsonl")
    printed = [*streaming_tables.tables(documents)]
    assert len(printed) == 2
    for table in printed:
        assert table in text


def test_the_readme_quotes_the_quantised_results() -> None:
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    documents = streaming_tables.read(BENCHMARKS / "results" / "quantized_quality_cpu.jsonl")
    printed = [*quantized_tables.tables(documents)]
    assert len(printed) == 4
    for table in printed:
        assert table in text


def test_the_readme_quotes_the_surrogates_results() -> None:
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Surrogates\n")[2].partition("\n## ")[0]
    quoted = [table.strip() for table in re.findall(r"(?:^\|.*\n)+", section, flags=re.MULTILINE)]
    documents = surrogate_tables.read(BENCHMARKS / "results" / "surrogate_quality_cpu.jsonl")
    assert quoted == [*surrogate_tables.tables(documents)]
    assert len(quoted) == 3


def test_a_family_has_its_documents_once(tmp_path: Path) -> None:
    lines = (BENCHMARKS / "results" / "surrogate_quality_cpu.jsonl").read_text().splitlines()
    (tmp_path / "once.jsonl").write_text("\n".join(lines[:3]))
    assert len(surrogate_tables.read(tmp_path / "once.jsonl")) == 3
    (tmp_path / "twice.jsonl").write_text("\n".join([*lines[:3], lines[1]]))
    with pytest.raises(SystemExit, match="twice"):
        surrogate_tables.read(tmp_path / "twice.jsonl")


def test_a_document_counts_once(tmp_path: Path) -> None:
    line = (BENCHMARKS / "results" / "streaming_quality_cpu.jsonl").read_text().splitlines()[0]
    (tmp_path / "twice.jsonl").write_text(f"{line}\n{line}\n")
    with pytest.raises(SystemExit, match="twice"):
        streaming_tables.read(tmp_path / "twice.jsonl")
