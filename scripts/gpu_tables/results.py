"""Committed results of the benchmark, and the format of table cells."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from gpu_tables.peers import COPY, EMPTY, READ, corrected, lender

__all__ = ["COPY", "EMPTY", "READ"]
NONE = "-"
#: Files of results from which tables are made.
KINDS = ("h100-*.json", "*-dcp.json", "cpu-*.json")


@dataclasses.dataclass
class Measured:
    """A call at a shape, and the times of its peers in the same run."""

    op: str
    shape: str
    us: float
    rate: float | None
    file: str
    machine: dict[str, Any]
    peers: dict[str, float] = dataclasses.field(default_factory=dict)  # as peers.corrected has them
    as_measured: dict[str, float] = dataclasses.field(default_factory=dict)

    def peer_us(self, *starts: str) -> float | None:
        """Time of the first peer whose name has this prefix."""
        found = (
            us for start in starts for name, us in self.peers.items() if name.startswith(start)
        )
        return next(found, None)

    def ratio(self, *starts: str) -> float | None:
        """Speed relative to a peer: above 1 is faster."""
        other = self.peer_us(*starts)
        return other / self.us if other else None

    def peer_rate(self, *starts: str) -> float | None:
        """Rate of a peer that does the same work."""
        ratio = self.ratio(*starts)
        return self.rate / ratio if ratio and self.rate else None

    def of_copy(self) -> float | None:
        """Fraction of a copy's speed; None if an empty kernel takes longer than a copy."""
        if EMPTY in self.peers or not self.rate or "copy_gbs" not in self.machine:
            return None
        if COPY in self.peers:
            return self.peers[COPY] / self.us
        return self.rate / float(self.machine["copy_gbs"])


class Results:
    """Rows of all files, each from the newest run that has it."""

    def __init__(
        self, rows: Sequence[Measured], files: dict[str, dict[str, Any]], folder: Path = Path()
    ) -> None:
        self.files = files  # name of a file -> its report
        self.folder = folder
        self._rows = {(row.op, row.shape): row for row in rows}

    @classmethod
    def read(cls, folder: Path, kinds: Sequence[str] = KINDS) -> Results:
        """Rows from the files of one H100, of several GPUs and of the CPU, or of other kinds.

        A row with fewer peers does not replace an older one, because all times in a row of a table
        must come from one run.
        """
        paths = [path for kind in kinds for path in folder.glob(kind)]
        files = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(paths)}
        newest: dict[tuple[str, str], Measured] = {}
        for name in sorted(files, key=lambda name: files[name]["machine"].get("date", "")):
            machine = files[name]["machine"]
            of_file: dict[tuple[str, str], Measured] = {}
            for row in files[name]["rows"]:
                key = row["op"], row["shape"]
                made = Measured(*key, row["us"], row["rate"], name, machine)
                entry = of_file.setdefault(key, made)
                if row.get("peer"):
                    entry.as_measured.setdefault(row["peer"], row["peer_us"])
            for key, entry in of_file.items():
                if key not in newest or len(entry.as_measured) >= len(newest[key].as_measured):
                    newest[key] = entry
        for (op, shape), entry in newest.items():
            lent = newest.get((op, lender(op, shape)))
            if lent and lent.file == entry.file:
                others = lent.as_measured.items()
                more = {name: us for name, us in others if name.startswith("vllm")}
                entry.as_measured = {**more, **entry.as_measured}
            times = {name: corrected(op, shape, name, us) for name, us in entry.as_measured.items()}
            entry.peers = {name: us for name, us in times.items() if us is not None}
        return cls(list(newest.values()), files, folder)

    def get(self, op: str, shape: str) -> Measured | None:
        """The row of a shape, or None."""
        return self._rows.get((op, shape))

    def rows(self) -> list[Measured]:
        """All rows."""
        return list(self._rows.values())

    def find(self, op: str, pattern: str) -> list[Measured]:
        """Rows whose whole shape matches."""
        compiled = re.compile(pattern)
        return [
            row for (name, shape), row in self._rows.items()
            if name == op and compiled.fullmatch(shape)
        ]  # fmt: skip


def grid(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    rows = [list(head), ["---"] * len(head), *map(list, lines)]
    return "\n".join("|" + "|".join(f" {x} " if x != "---" else x for x in r) + "|" for r in rows)


def links(rows: Iterable[Measured | None]) -> str:
    """The line below a table that names its files, with commit and date of their runs."""
    machines = {row.file: row.machine for row in rows if row}
    found = [
        f"[{name}](ROOT/benchmarks/results/{name}.json) ({machine.get('commit')}, {date(machine)})"
        for name, machine in sorted(machines.items())
    ]
    text = f"\nRows of {', '.join(found) or 'no committed file'}."
    mixed = len({machine.get("commit") for machine in machines.values()}) > 1
    return text + (" Each row is of the newest run that has its peers." if mixed else "")


def date(machine: dict[str, Any]) -> str:
    """Start time of a run, UTC."""
    return str(machine.get("date", NONE))[:16].replace("T", " ")


def digits(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def two_digits(value: float) -> str:
    """Two digits, or all before the point."""
    return f"{value:.{1 if value < 9.95 else 0}f}"


def ratio(value: float) -> str:
    """A speed-up."""
    return f"{value:.2f}"


def percent(value: float) -> str:
    """A fraction, without its sign."""
    return f"{100 * value:.0f}"


def span(values: Iterable[float | None], write: Callable[[float], str]) -> str:
    """Minimum and maximum, or one number if they read the same."""
    known = [value for value in values if value is not None]
    if not known:
        return NONE
    ends = [write(min(known)), write(max(known))]
    return "-".join(dict.fromkeys(ends))


def cell(value: float | None, write: Callable[[float], str]) -> str:
    """A number, or a dash."""
    return NONE if value is None else write(value)


def mean(values: Sequence[float]) -> float | None:
    """Geometric mean."""
    return math.exp(statistics.fmean(map(math.log, values))) if values else None
