"""Reports of a benchmark in JSON, and the comparison with an earlier one."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.core.rows import Row

#: Facts of the machine without whose equality times mean little beside each other.
_COMPARABLE = ("cpu", "cores", "gpu", "paddle")


class ReportError(ValueError):
    """A file is no report."""


@dataclasses.dataclass
class Report:
    """Measurements and what they belong to."""

    machine: dict[str, Any]
    rows: list[Row]
    #: Name of a benchmark that ended early -> why.
    failed: dict[str, str] = dataclasses.field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write JSON."""
        report = {"machine": self.machine, "rows": [row.as_dict() for row in self.rows]}
        if self.failed:
            report["failed"] = self.failed
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read JSON that :meth:`write` wrote.

        Raises
        ------
        ReportError
            If it is something else, or cannot be read.
        """
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            rows = [_row(fields) for fields in report["rows"]]
            return cls(dict(report.get("machine", {})), rows, dict(report.get("failed", {})))
        except (
            *(OSError, ValueError, KeyError, TypeError, AttributeError),
            RecursionError,  # of JSON that is too deep
        ) as error:
            raise ReportError(f"{path}: no report of this command: {error}") from None


def _row(fields: Mapping[str, Any]) -> Row:
    """A row of a file; other fields than a row's are left out."""
    names = {field.name for field in dataclasses.fields(Row)}
    row = Row(**{name: value for name, value in fields.items() if name in names})
    if not all(isinstance(text, str) for text in (row.op, row.shape, row.unit, row.peer)):
        raise TypeError("a row whose op, shape, unit or peer is no text")
    numbers = (row.us, *(x for x in (row.rate, row.peer_us, row.error) if x is not None))
    if not all(isinstance(x, (int, float)) for x in numbers):
        raise TypeError("a row whose us, rate, peer_us or error is no number")
    if not 0 < row.us < math.inf:
        raise ValueError("a row without microseconds")
    return row


class Baseline:
    """An earlier report, to hold another one against."""

    def __init__(self, report: Report) -> None:
        self.machine = report.machine
        # The same measurement may stand beside several peers.
        self._us: dict[tuple[str, str], float] = {}
        for row in report.rows:
            self._us.setdefault((row.op, row.shape), row.us)

    def ratio(self, row: Row) -> float | None:
        """Speed relative to the baseline: above 1 is faster; None for a row that it lacks."""
        earlier = self._us.get((row.op, row.shape))
        if earlier is None or earlier <= 0 or row.us <= 0:
            return None
        return earlier / row.us

    def differences(self, machine: Mapping[str, Any]) -> list[str]:
        """What differs between the machines: then the comparison says little."""
        return [
            f"{name}: {self.machine.get(name)} then, {machine.get(name)} now"
            for name in _COMPARABLE
            if self.machine.get(name) != machine.get(name)
        ]

    def summary(self, rows: Iterable[Row]) -> tuple[str, float | None]:
        """One line about all ratios, and the smallest of them."""
        ratios = {(row.op, row.shape): self.ratio(row) for row in rows}
        known = {key: ratio for key, ratio in ratios.items() if ratio is not None}
        if not known:
            return "no row of this run is in the baseline", None
        worst = min(known, key=lambda key: known[key])
        mean = math.exp(statistics.fmean(math.log(ratio) for ratio in known.values()))
        text = (
            f"{len(known)} of {len(ratios)} rows are in the baseline: geometric mean {mean:.2f}x, "
            f"slowest {known[worst]:.2f}x ({worst[0]}: {worst[1]})"
        )
        return text, known[worst]
