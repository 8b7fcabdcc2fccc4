"""Tables of a report: for a terminal of 80 columns, and in markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.core.peers import public_name
from benchmarks.core.report import Baseline, Report
from benchmarks.core.rows import Row

#: Columns a terminal is taken to have where the output goes somewhere else.
WIDTH = 80

_TEXTS = ("operator", "shape", "peer")
#: What parts of a shape stand between: "decode cache_fp8 B 1 ctx 1024 H 32/8 D 128" has three.
_PARTS = re.compile(r", | (?=H \d)| (?=D \d)")


def title(machine: Mapping[str, Any]) -> str:
    """One line about the machine."""
    parts = []
    if "gpu" in machine:
        parts.append(f"{machine['gpu']}, copy {machine.get('copy_gbs', 0):.0f} GB/s")
    if "cpu" in machine:
        parts.append(f"{machine['cpu']}, {machine.get('cores')} cores")
    return "; ".join([*parts, f"Paddle {machine.get('paddle')}"])


def _columns(rows: Sequence[Row], baseline: Baseline | None) -> dict[str, list[str]]:
    """Name of each column -> its texts. Empty columns are left out."""

    def cell(value: float | None, pattern: str, unit: str = "") -> str:
        return "" if value is None else pattern.format(value, unit)

    units = {row.unit for row in rows if row.rate is not None}
    rate, pattern = (units.pop(), "{:.1f}") if len(units) == 1 else ("rate", "{:.1f} {}")
    columns = {
        "operator": [row.op for row in rows],
        "shape": [row.shape for row in rows],
        "us": [f"{row.us:,.1f}" for row in rows],
        rate: [cell(row.rate, pattern, row.unit) for row in rows],
        "peer us": [cell(row.peer_us, "{:,.1f}") for row in rows],
        "ratio": [cell(row.ratio, "{:.2f}x") for row in rows],
        "error": [cell(row.error, "{:.1e}") for row in rows],
        "peer": [public_name(row.peer) for row in rows],
    }
    if baseline is not None:
        columns["baseline"] = [cell(baseline.ratio(row), "{:.2f}x") for row in rows]
    return {name: texts for name, texts in columns.items() if name == "us" or any(texts)}


def _factored(columns: dict[str, list[str]]) -> list[str]:
    """Take what all rows share out of the columns of an operator; returns it, for a heading."""
    heading = [columns.pop("operator")[0]]
    shapes = [_PARTS.split(shape) for shape in columns["shape"]]
    if len(set(columns["shape"])) > 1:
        shared = [part for part in shapes[0] if all(part in shape for shape in shapes)]
        columns["shape"] = [", ".join(p for p in shape if p not in shared) for shape in shapes]
        heading += shared
    if "peer" in columns and len(set(columns["peer"])) == 1:
        heading.append(f"peer: {columns.pop('peer')[0]}")
    return heading


def _operators(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows of each operator and unit."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.op, row.unit), []).append(row)
    yield from groups.values()


def table(report: Report, baseline: Baseline | None = None) -> Any:
    """Tables for a terminal, one for each operator."""
    from rich import box
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    tables: list[Any] = [escape(title(report.machine))]
    for rows in _operators(report.rows):
        columns = _columns(rows, baseline)
        tables.append("\n[bold]" + escape(", ".join(_factored(columns))) + "[/bold]")
        result = Table(box=box.SIMPLE_HEAD, padding=(0, 0), show_edge=False)
        for name in columns:
            text = name in _TEXTS
            result.add_column(
                name, justify="left" if text else "right", no_wrap=not text, overflow="fold"
            )
        for texts in zip(*columns.values()):
            result.add_row(*map(escape, texts))
        tables.append(result)
    caption = f"ratio: peer's time / ours; commit {report.machine.get('commit')}"
    if baseline is not None:
        caption += f"; baseline: time at {baseline.machine.get('commit')} / now"
    return Group(*tables, escape(caption))


def markdown(report: Report, baseline: Baseline | None = None) -> str:
    """The table in markdown."""
    columns = _columns(report.rows, baseline)
    lines = [
        f"{title(report.machine)}; commit {report.machine.get('commit')}, "
        f"{report.machine.get('date')}. Ratio: the peer's time / ours.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "|".join("---" if name in _TEXTS else "---:" for name in columns) + "|",
    ]
    for texts in zip(*columns.values()):
        lines.append("| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |")
    return "\n".join(lines) + "\n"
