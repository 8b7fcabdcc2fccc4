"""Measured figures of a page, and what may be their source."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.support import ROOT

#: What is no figure: generated tables, code, addresses of links, dates, versions.
_NO_FIGURES = [
    re.compile(r"<!-- table: .*?<!-- end -->", re.S),
    re.compile(r"```.*?```", re.S),
    re.compile(r"`[^`\n]*`"),
    re.compile(r"\]\([^)]*\)"),
    re.compile(r"\b\d{4}-\d{2}-\d{2}\b"),
    re.compile(r"\b\d+\.\d+\.\d+\b"),
    re.compile(r"\b(?:Paddle|Python|CUDA|nvcc|ptxas|FastDeploy|vLLM) \d+\.\d+"),
]
_NUMBER = r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?"
_UNIT = r"(?:%|us\b|ms\b|s\b|GB/s|[GT]FLOP/s|minutes|seconds|tokens/s)"
#: "12.5 us", each number of "6 to 7 us", and errors such as 1.6e-3.
_MEASURED = re.compile(
    rf"({_NUMBER})(?=(?:(?:,| to| and| or|-| /| beside) ?\d[\d.]*(?:e-\d+)?)* ?({_UNIT}))"
    r"|((?<![\w.])\d+(?:\.\d+)?e-\d+)"
)
_HEAD_UNIT = re.compile(r"(?:^|[\s(,])(us|ms|GB/s|[GT]FLOP/s)(?=[\s),;]|$)")
_CELL = re.compile(r"(?<![\w.^-])\d+(?:\.\d+)?(?![\w.])")
#: The mark of what no program of the repository repeats: "measured once, 2026-11-22, H100".
_ONCE = re.compile(r"measured once, \d{4}-\d{2}-\d{2}(?: to \d{4}-\d{2}-\d{2})?, [A-Z]\w", re.I)
_COMMAND = re.compile(
    r"(?:python|\$PYTHON) -m (?:fastattn|pytest)\b|\bpytest |\bscripts/\w+\.(?:py|sh)"
)
_RESULTS = re.compile(r"\]\((?:\.\./)*(benchmarks/results/(?:experiments/)?[\w.-]+\.json)\)")


class Figure(NamedTuple):
    told: str  # as the page has it
    unit: str  # "" for an error


def _plain(text: str) -> str:
    for pattern in _NO_FIGURES:
        text = pattern.sub(" ", text)
    return text


def _of_tables(text: str) -> Iterator[Figure]:
    """Cells below a head that names a unit of time or rate."""
    units: list[str] | None = None
    for line in text.splitlines():
        if not line.startswith("|"):
            units = None
            continue
        cells = line.strip("|").split("|")
        if units is None:
            found = [_HEAD_UNIT.search(cell) for cell in cells]
            units = [match[1] if match else "" for match in found]
            if units[0]:  # the head's first cell tells the unit of the whole table
                units = ["", *[unit or units[0] for unit in units[1:]]]
        else:
            for unit, cell in zip(units, cells):
                if unit:
                    yield from (Figure(match[0], unit) for match in _CELL.finditer(cell))


def measured(text: str) -> set[Figure]:
    """Numbers of a text with a unit of time, rate or share, and errors."""
    text = _plain(text)
    found = {Figure(m[1] or m[3], m[2] or "") for m in _MEASURED.finditer(text)}
    return found | set(_of_tables(text))


def sections(page: str) -> dict[str, str]:
    """Heading -> text below it, code included."""
    found: dict[str, str] = {}
    heading, code = "", False
    for line in page.splitlines():
        if line.startswith("```"):
            code = not code
        match = None if code else re.match(r"#+ (.*)", line)
        if match:
            heading = match[1]
            assert heading not in found, f"two sections: {heading}"
            found[heading] = ""
        else:
            found[heading] = found.get(heading, "") + line + "\n"
    return found


def rates(path: Path) -> dict[str, list[float]]:
    """Unit -> values that a committed file has in it: of the benchmark's rows, or of tables."""
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    found: dict[str, list[float]] = {"us": [], "ms": [], "%": []}
    for table in (table for part in report.get("sections", []) for table in part.get("tables", [])):
        match = _HEAD_UNIT.search(table["columns"][0])
        cells = [x for row in table["rows"] for x in row[1:] if isinstance(x, (int, float))]
        found.setdefault(match[1] if match else "", []).extend(cells)
    for row in report.get("rows", []):
        us, peer_us, rate, unit = (row.get(key) for key in ("us", "peer_us", "rate", "unit"))
        times = [time for time in (us, peer_us) if time]
        found["us"] += times
        found["ms"] += [time / 1e3 for time in times]
        if us and peer_us:
            found["%"].append(100 * peer_us / us)
        if rate and unit:
            found.setdefault(unit, []).extend(rate * us / time for time in times)
    return found


def is_in(figure: Figure, values: dict[str, list[float]]) -> bool:
    """Whether a value rounds to the figure, at the figure's own digits."""
    digits = len(figure.told.partition(".")[2])
    half = 0.5 * 10.0**-digits * (1 + 1e-9)
    return any(abs(value - float(figure.told)) <= half for value in values.get(figure.unit, []))


def without_source(page: str, *, rows_only: bool = False) -> dict[str, list[str]]:
    """Heading -> measured figures for which a page names no source.

    With `rows_only` a command in the section is no source.
    """
    parts = sections(page)
    head = next(iter(parts.values()), "")
    if _ONCE.search(head):  # the whole page is of one series of runs
        return {}
    found: dict[str, list[str]] = {}
    for heading, body in parts.items():
        if not rows_only and _COMMAND.search(body):
            continue
        files = {match[1] for match in _RESULTS.finditer(body)}
        values: dict[str, list[float]] = {}
        for name in files:
            for unit, some in rates(ROOT / name).items():
                values.setdefault(unit, []).extend(some)
        plain = _NO_FIGURES[0].sub(" ", body)
        blocks = [block for block in re.split(r"\n\s*\n", plain) if not _ONCE.search(block)]
        lost = {f for block in blocks for f in measured(block) if not is_in(f, values)}
        if lost:
            found[heading] = sorted(f"{figure.told} {figure.unit}".strip() for figure in lost)
    return found
