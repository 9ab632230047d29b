"""Markdown tables of a file of results, for benchmarks/README.md.

    python benchmarks/tables.py benchmarks/results/h200.jsonl

A table of each section that the file has lines of. `tests/test_benchmark_tables.py` compares the
tables in the README with what this prints.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from kvzip.benchmarks import (
    ceilings,
    chunk_attention,
    compact,
    decode_step,
    geometries,
    growth,
    matvec,
    quantized_attention,
    read_context,
    reconstruction_score,
    shared_batch,
    sliding_layers,
    stream,
    surrogate,
    zipped_attention,
)
from kvzip.benchmarks.records import OURS, Record, Subject
from kvzip.benchmarks.report import figure
from kvzip.benchmarks.targets import TARGETS

Figures = Mapping[str, Record]
"""The lines of one subject, by contender."""


def read(path: Path) -> list[Record]:
    """The lines of a file of results."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        subject, record = (
            {name: fields[name] for name in kind.__dataclass_fields__ if name in fields}
            for kind in (Subject, Record)
        )
        records.append(Record(Subject(**subject), **record))
    return records


def tables(records: Sequence[Record]) -> Iterator[str]:
    """Every table that these lines allow, in the order of the README."""
    made = (
        targets(records),
        device(records),
        *decoding(records),
        questions(records),
        step(records),
        parts(records),
        batch(records),
        dense(records),
        scoring(records),
        compaction(records),
        single_token(records),
        reading(records),
        memory(records),
        quantised(records),
        surrogates(records),
        streaming(records),
        growing(records),
        grown(records),
        sliding(records),
        sliding_once(records),
    )
    yield from filter(None, made)


def targets(records: Sequence[Record]) -> str:
    rows = []
    for target in TARGETS:
        value = target.value(records)
        if value is not None:
            sign = "≥" if target.at_least else "≤"
            goal = f"{sign} {figure(target.goal, target.unit)}"
            reached = "yes" if target.reached(value) else "**no**"
            rows.append([target.what, goal, figure(value, target.unit), reached])
    return _table("target | | measured | reached", rows)


def device(records: Sequence[Record]) -> str:
    rows = [
        [r.contender, figure(r.median, r.unit), f"`{r.note}`"]
        for r in records
        if r.subject.benchmark == ceilings.NAME
    ]
    return _table("ceiling | measured | by", rows)


def decoding(records: Sequence[Record]) -> Iterator[str]:
    """A table for each geometry."""
    bandwidth = _read_bandwidth(records)
    step = zipped_attention.decode_case()
    subjects = _subjects(records, zipped_attention.NAME)
    steps = ((s, figures) for s, figures in subjects if s.case == step)
    for geometry, group in groupby(steps, key=lambda item: item[0].geometry):
        rows = []
        for subject, by in group:
            least, ours = _seconds(by[zipped_attention.CEILING]), _seconds(by[OURS])
            copying = by[zipped_attention.PUBLISHED_COPYING]
            rows.append(
                [
                    f"{subject.context:,}",
                    f"{subject.ratio:g}",
                    f"{least * bandwidth / 1e6:.1f}",
                    _micro(least),
                    _micro(ours),
                    _micro(ours - least),
                    f"{least / ours:.1%}",
                    _beside(by[zipped_attention.PUBLISHED], ours),
                    _beside(copying, ours),
                    _beside(by[zipped_attention.DENSE], ours),
                ]
            )
        yield _table(
            f"{geometry}: context | kept | MB | ceiling | kvzip | over the ceiling | share | "
            "published | with its copy | dense, full cache",
            rows,
        )


def questions(records: Sequence[Record]) -> str:
    rows = []
    for subject, by in _subjects(records, zipped_attention.NAME):
        if subject.case != zipped_attention.decode_case():
            least, ours = _seconds(by[zipped_attention.CEILING]), _seconds(by[OURS])
            others = (by[zipped_attention.PUBLISHED], by[zipped_attention.DENSE])
            rows.append(
                [subject.case, _micro(least), _micro(ours), f"{least / ours:.1%}"]
                + [_beside(other, ours) for other in others]
            )
    return _table("case | ceiling | kvzip | share | published | dense, full cache", rows)


def step(records: Sequence[Record]) -> str:
    rows = []
    for _, by in _subjects(records, decode_step.NAME):
        least, least_all = (
            _seconds(by[name]) for name in (decode_step.CEILING, decode_step.CEILING_ALL)
        )
        dynamic = _seconds(by[decode_step.DYNAMIC])
        for record in by.values():
            if record.unit == "s":
                seconds = _seconds(record)
                measured = record.outputs_error is not None
                rows.append(
                    [
                        record.contender,
                        f"{seconds * 1e3:.2f}",
                        _spread(record),
                        f"{least / seconds:.1%}" if measured else "",
                        f"{least_all / seconds:.1%}" if measured else "",
                        f"{dynamic / seconds:.2f}" if measured else "",
                        _error(record),
                    ]
                )
    return _table(
        "a step | ms | p10 - p90 | share of the ceiling | embeddings counted | "
        "times DynamicCache | error",
        rows,
    )


def parts(records: Sequence[Record]) -> str:
    """A step, split by what was measured elsewhere in the same file."""
    bandwidth = _read_bandwidth(records)
    attention = {
        s: by
        for s, by in _subjects(records, zipped_attention.NAME)
        if s.case == zipped_attention.decode_case()
    }
    rows = []
    for subject, by in _subjects(records, decode_step.NAME):
        same = [
            figures
            for s, figures in attention.items()
            if (s.geometry, s.context, s.ratio)
            == (subject.geometry, subject.context, subject.ratio)
        ]
        if not same:
            continue
        layers = geometries.find(subject.geometry).layers
        weights = (by["weights read by a step"].median or 0) / bandwidth
        attending = layers * _seconds(same[0][OURS])
        for name in (OURS, decode_step.COMPILED):
            seconds = _seconds(by[name])
            spent = (weights, attending, seconds - weights - attending, seconds)
            rows.append([name, *(f"{part * 1e3:.2f}" for part in spent)])
    return _table(
        "ms of a step | weights, at the read bandwidth | attention, as measured alone | "
        "the rest | in all",
        rows,
    )


def batch(records: Sequence[Record]) -> str:
    rows = []
    for _, by in _subjects(records, shared_batch.NAME):
        alone = _seconds(by[shared_batch.SINGLE])
        for record in by.values():
            seconds = _seconds(record)
            rows.append(
                [
                    record.contender,
                    f"{seconds * 1e3:.3f}",
                    _spread(record, 3),
                    f"{1 / seconds:,.0f}",
                    f"{alone / seconds:.1f}",
                    _error(record),
                ]
            )
    return _table("answers | ms a token | p10 - p90 | tokens a second | times | error", rows)


def dense(records: Sequence[Record]) -> str:
    rows = []
    for subject, by in _subjects(records, chunk_attention.NAME):
        least, ours = _seconds(by[chunk_attention.CEILING]), _seconds(by[OURS])
        flash = _seconds(by[chunk_attention.FLASH])
        rows.append(
            [
                subject.geometry,
                subject.case,
                *(f"{seconds * 1e3:.2f}" for seconds in (least, ours, flash)),
                f"{least / ours:.1%}",
                f"{flash / ours:.2f}",
                _error(by[OURS]),
            ]
        )
    return _table(
        "geometry | case | ceiling, ms | kvzip, ms | FlashAttention-2, ms | share | times | error",
        rows,
    )


def scoring(records: Sequence[Record]) -> str:
    rows = []
    for subject, by in _subjects(records, reconstruction_score.NAME):
        least, ours = _seconds(by[reconstruction_score.CEILING]), _seconds(by[OURS])
        other = reconstruction_score.MATERIALISED
        peaks = (by[name + reconstruction_score.PEAK] for name in (OURS, other))
        rows.append(
            [
                subject.geometry,
                _micro(least),
                _micro(ours),
                _micro(_seconds(by[other])),
                f"{least / ours:.1%}",
                f"{_seconds(by[other]) / ours:.1f}",
                *(figure(peak.median, "B") for peak in peaks),
                _error(by[OURS]),
                _error(by[other]),
            ]
        )
    return _table(
        "geometry | ceiling | kvzip | materialised | share | times | memory, kvzip | "
        "memory, materialised | error, kvzip | error, materialised",
        rows,
    )


def compaction(records: Sequence[Record]) -> str:
    rows = []
    for subject, by in _subjects(records, compact.NAME):
        least, ours = _seconds(by[compact.CEILING]), _seconds(by[OURS])
        other = by[compact.INDEXING]
        rows.append(
            [
                subject.geometry,
                *(_micro(seconds) for seconds in (least, ours, _seconds(other))),
                f"{least / ours:.1%}",
                f"{_seconds(other) / ours:.2f}",
                figure(by[OURS + compact.PEAK].median, "B"),
            ]
        )
    return _table(
        "geometry | ceiling | kvzip | boolean indexing | share | times | "
        "memory beyond the kept pairs",
        rows,
    )


def single_token(records: Sequence[Record]) -> str:
    rows = []
    for subject, by in _subjects(records, matvec.NAME):
        least, ours = _seconds(by[matvec.CEILING]), _seconds(by[OURS])
        rows.append(
            [
                *(subject.geometry, subject.case, _micro(least), _micro(ours)),
                f"{least / ours:.1%}",
                _beside(by[matvec.LINEAR], ours),
            ]
        )
    return _table("geometry | linear layers of one token | ceiling | kvzip | share | torch", rows)


def reading(records: Sequence[Record]) -> str:
    stages = (read_context.PREFILL, read_context.SCORING, read_context.BOTH)
    rows = []
    for subject, by in _subjects(records, read_context.NAME):
        if subject.case in stages and OURS in by:
            ours, theirs = _seconds(by[OURS]), _seconds(by[read_context.PUBLISHED])
            cells = [subject.case, f"{ours:.2f}", f"{theirs:.2f}", f"{ours / theirs:.1%}"]
            rows.append([*cells, _error(by[OURS])])
    rows.sort(key=lambda row: stages.index(row[0]))
    return _table("stage | kvzip, s | published, s | kvzip over published | error of scores", rows)


def memory(records: Sequence[Record]) -> str:
    rows = []
    for _, by in _subjects(records, read_context.NAME):
        for record in by.values():
            if record.contender not in (OURS, read_context.PUBLISHED):
                rows.append([record.contender, _with_share(record)])
    return _table("128k context, taken once |", rows)


def quantised(records: Sequence[Record]) -> str:
    rows = []
    for subject, by in _subjects(records, quantized_attention.NAME):
        least, ours = _seconds(by[quantized_attention.CEILING]), _seconds(by[OURS])
        made = _seconds(by[quantized_attention.AS_MADE])
        rows.append(
            [
                subject.case,
                figure(by[quantized_attention.BYTES].median, "share"),
                *(_micro(seconds) for seconds in (least, ours, made)),
                f"{least / ours:.1%}",
                f"{made / ours:.2f}",
                _error(by[OURS]),
            ]
        )
    return _table(
        "case | bytes over the full cache | ceiling | kvzip | kvzip, not quantised | share | "
        "times | error",
        rows,
    )


def surrogates(records: Sequence[Record]) -> str:
    rows = []
    for _, by in _subjects(records, surrogate.NAME):
        plain = _seconds(by[surrogate.PLAIN])
        for record in by.values():
            if record.contender != surrogate.PLAIN or not rows:
                seconds = _seconds(record)
                cells = [record.contender, f"{seconds:.2f}", f"{seconds / plain:.3f}"]
                rows.append([*cells, record.note, _error(record)])
    return _table("128k context | s | over plain prefill | timed | error of scores", rows)


def streaming(records: Sequence[Record]) -> str:
    by_context: dict[int | None, dict[str, Record]] = {}
    for subject, by in _subjects(records, stream.NAME):
        cases = {f"{subject.case}: {name}": record for name, record in by.items()}
        by_context.setdefault(subject.context, {}).update(cases)
    rows = []
    for context, by in by_context.items():
        plain, streamed, scored = (
            by.get(name)
            for name in (
                f"{stream.TOTAL}: {stream.PLAIN}",
                f"{stream.TOTAL}: {stream.STREAMED}",
                f"{stream.SCORING}: {stream.SCORED}",
            )
        )
        published = by.get(f"{stream.TOTAL}: {read_context.PUBLISHED}")
        peak = by[f": {stream.STREAMED}, {stream.CACHE_PEAK}"]
        assert plain is not None
        assert streamed is not None
        assert scored is not None
        rows.append(
            [
                f"{context:,}",
                f"{_seconds(plain):.1f}",
                f"{_seconds(scored):.2f} ({_seconds(scored) / _seconds(plain):.2f})",
                f"{_seconds(streamed):.1f} ({_seconds(streamed) / _seconds(plain):.2f})",
                f"{_seconds(published):.1f} ({_seconds(streamed) / _seconds(published):.2f})"
                if published
                else "",
                f"{figure(peak.median, 'B')} ({peak.ratio_to:.2f})",
                _error(streamed),
            ]
        )
    return _table(
        "context | plain prefill, s | scoring, reach chunk, s (over plain) | "
        "streaming, s (over plain) | published, s (streaming over it) | "
        "largest cache (over the full one) | error",
        rows,
    )


def growing(records: Sequence[Record]) -> str:
    rows = []
    for subject, by in _subjects(records, growth.NAME):
        if subject.case == growth.CASE:
            plain, ours = by.get(stream.PLAIN), by[stream.STREAMED]
            rows.append(
                [
                    f"{subject.context:,}",
                    _micro(_seconds(plain)) if plain else "",
                    _micro(_seconds(ours)),
                    f"{_seconds(ours) / _seconds(plain):.2f}" if plain else "",
                    f"{_seconds(ours) * (subject.context or 0):.1f}",
                ]
            )
    return _table(
        "first tokens | plain prefill, µs a token | streaming, µs a token | over plain | "
        "streaming, s in all",
        rows,
    )


def grown(records: Sequence[Record]) -> str:
    rows = []
    for subject, by in _subjects(records, growth.NAME):
        for record in by.values():
            if subject.case != growth.CASE:
                name = f"{subject.context:,} tokens: {record.contender}"
                rows.append([name, _with_share(record)])
    return _table("taken once |", rows)


def sliding(records: Sequence[Record]) -> str:
    rows = []
    for subject, by in _subjects(records, sliding_layers.NAME):
        if subject.case != sliding_layers.STEP:
            continue
        least, least_full = (
            _seconds(by[name])
            for name in (sliding_layers.CEILING_ZIPPED, sliding_layers.CEILING_FULL)
        )
        dynamic = _seconds(by[sliding_layers.DYNAMIC])
        for record in by.values():
            if record.unit == "s":
                seconds = _seconds(record)
                measured = record.outputs_error is not None
                reachable = least if record.contender == sliding_layers.ZIPPED else least_full
                rows.append(
                    [
                        subject.geometry,
                        record.contender,
                        f"{seconds * 1e3:.2f}",
                        _spread(record),
                        f"{reachable / seconds:.1%}" if measured else "",
                        f"{dynamic / seconds:.2f}" if measured else "",
                        _error(record),
                    ]
                )
    return _table(
        "geometry | a step | ms | p10 - p90 | share of its ceiling | times DynamicCache | error",
        rows,
    )


def sliding_once(records: Sequence[Record]) -> str:
    rows = []
    for subject, by in _subjects(records, sliding_layers.NAME):
        for record in by.values():
            if subject.case != sliding_layers.STEP:
                rows.append([f"{subject.geometry}: {record.contender}", _with_share(record)])
    return _table("taken once |", rows)


def _subjects(records: Iterable[Record], benchmark: str) -> Iterator[tuple[Subject, Figures]]:
    """The subjects of a section in order, with the last line of each contender."""
    found: dict[Subject, dict[str, Record]] = {}
    for record in records:
        if record.subject.benchmark == benchmark:
            found.setdefault(record.subject, {})[record.contender] = record
    yield from found.items()


def _read_bandwidth(records: Iterable[Record]) -> float:
    """Bytes a second."""
    for _, by in _subjects(records, ceilings.NAME):
        return by["read bandwidth"].median or 0.0
    return 0.0


def _seconds(record: Record) -> float:
    if record.median is None:
        raise SystemExit(f"{record.contender} has no figure: {record.note}")
    return record.median


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}"


def _beside(other: Record, ours: float) -> str:
    """Microseconds of another contender, and how many times as fast kvzip is."""
    return f"{_micro(_seconds(other))} ({_seconds(other) / ours:.2f}x)"


def _with_share(record: Record) -> str:
    """A figure, and what share of another it is."""
    value = figure(record.median, record.unit)
    if record.ratio_to is None:
        return value
    return f"{value}, {record.ratio_to:.1%} of {record.compared_with}"


def _spread(record: Record, digits: int = 2) -> str:
    if record.p10 is None or record.p90 is None or record.p10 == record.p90:
        return ""
    return f"{record.p10 * 1e3:.{digits}f} - {record.p90 * 1e3:.{digits}f}"


def _error(record: Record) -> str:
    return "" if record.outputs_error is None else f"{record.outputs_error:.1e}"


def _table(head: str, rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, or nothing if it has no rows."""
    if not rows:
        return ""
    names = [name.strip() for name in head.split("|")]
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python benchmarks/tables.py RESULTS.jsonl")
    print("\n\n".join(tables(read(Path(sys.argv[1])))))
