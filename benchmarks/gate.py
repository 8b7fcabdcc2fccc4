#!/usr/bin/env python3
"""Compare a run of the benchmark with the newest committed times of the same GPU.

    python -m fastattn bench --op paged_attention --json run1.json    # five times, in one go
    python benchmarks/gate.py run1.json run2.json run3.json run4.json run5.json

A row is an operator with a shape. Its time is the median over the given runs, and its noise the
median distance of the runs from it. The row is slower if its time less its noise is more than 2 %
above the committed time. Times of another GPU are no baseline, and --baseline takes other reports
than those of benchmarks/results.

Exit status: 1 if a row is slower, if a run lacks a row of another run, or if a benchmark of a run
ended early; 2 if there is nothing to compare; otherwise 0.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.core.report import Report, ReportError  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
#: Part of a committed time by which a row may be slower.
ALLOWED = 0.02

Key = tuple[str, str]  # operator, shape


class Committed(NamedTuple):
    """The newest committed time of a row."""

    us: float
    date: str
    commit: str


class Compared(NamedTuple):
    """A row of this run beside its committed time."""

    key: Key
    us: float
    noise: float  # us
    committed: Committed

    @property
    def excess(self) -> float:
        """Part of the committed time by which the row is slower, its noise taken out."""
        return (self.us - self.noise) / self.committed.us - 1

    @property
    def is_slower(self) -> bool:
        """Whether the gate stays shut."""
        return self.excess > ALLOWED


def committed_times(reports: Iterable[Report], gpu: str) -> dict[Key, Committed]:
    """The newest time of each row among reports of a GPU."""
    found: dict[Key, Committed] = {}
    for report in reports:
        machine = report.machine
        if machine.get("gpu") != gpu:
            continue
        date, commit = str(machine.get("date", "")), str(machine.get("commit", "?"))
        for row in report.rows:
            key = row.op, row.shape
            if key not in found or date > found[key].date:
                found[key] = Committed(row.us, date, commit)
    return found


def compare(runs: Sequence[Report], committed: dict[Key, Committed]) -> list[Compared]:
    """Rows of all runs that have a committed time, the slowest first."""
    times: dict[Key, list[float]] = {}
    for run in runs:
        own: dict[Key, float] = {}
        for row in run.rows:  # a row may stand beside several peers
            own.setdefault((row.op, row.shape), row.us)
        for key, us in own.items():
            times.setdefault(key, []).append(us)
    rows = [
        Compared(key, statistics.median(us), _noise(us), committed[key])
        for key, us in times.items()
        if key in committed and len(us) == len(runs)
    ]
    return sorted(rows, key=lambda row: -row.excess)


def _noise(times: Sequence[float]) -> float:
    """Median distance from the median: one run beside the others does not move it."""
    middle = statistics.median(times)
    return statistics.median(abs(us - middle) for us in times)


def lost(runs: Sequence[Report]) -> list[Key]:
    """Rows that some runs have and others lack."""
    have: list[set[Key]] = [{(row.op, row.shape) for row in run.rows} for run in runs]
    return sorted(key for key in set[Key]().union(*have) if not all(key in own for own in have))


def not_run(runs: Sequence[Report], committed: dict[Key, Committed]) -> int:
    """Number of committed rows of the runs' operators that no run has."""
    have = {(row.op, row.shape) for run in runs for row in run.rows}
    ops = {op for op, _ in have}
    return sum(key[0] in ops and key not in have for key in committed)


def _gpu_of(runs: Sequence[Report]) -> str:
    names = {str(run.machine.get("gpu") or "") for run in runs}
    if len(names) != 1 or "" in names:
        raise ReportError(f"expected runs of one GPU, got {sorted(names)}")
    return names.pop()


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="reports of the same benchmark")
    parser.add_argument("--baseline", nargs="+", type=Path, help="default: benchmarks/results")
    args = parser.parse_args(argv)
    try:
        runs = [Report.read(path) for path in args.runs]
        gpu = _gpu_of(runs)
        paths = args.baseline or sorted(RESULTS.glob("*.json"))
        committed = committed_times([Report.read(path) for path in paths], gpu)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = compare(runs, committed)
    if not rows:
        print(f"error: no row of these runs has a committed time on {gpu}", file=sys.stderr)
        return 2
    if len(runs) < 5:
        print(f"note: noise of {len(runs)} runs; five tell it better")
    slower = [row for row in rows if row.is_slower]
    for row in slower:
        print(
            f"slower by {100 * row.excess:.1f} %: {row.key[0]}, {row.key[1]}: {row.us:.2f} us "
            f"+- {row.noise:.2f}, {row.committed.us:.2f} at {row.committed.commit} "
            f"({row.committed.date[:10]})"
        )
    gone = lost(runs)
    for op, shape in gone:
        print(f"not in every run: {op}, {shape}")
    failed = {name: why for run in runs for name, why in run.failed.items()}
    for name, why in failed.items():
        print(f"ended early: {name}: {why}")
    print(
        f"{gpu}: {len(rows)} rows, {len(slower)} slower by more than {100 * ALLOWED:.0f} %; "
        f"{not_run(runs, committed)} committed rows of these operators were not run"
    )
    return 1 if slower or gone or failed else 0


if __name__ == "__main__":
    sys.exit(main())
