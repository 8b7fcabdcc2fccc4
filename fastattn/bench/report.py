"""Reports of a benchmark: table, JSON, markdown, plot, and the comparison with an earlier one."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastattn.bench.common import Row

#: A plot of at most this many rows names each of them; a larger one has a line for each operator.
MOST_BARS = 40

#: Facts of the machine without whose equality times mean little beside each other.
_COMPARABLE = ("cpu", "cores", "gpu", "paddle")


class ReportError(ValueError):
    """A file is no report."""


@dataclasses.dataclass
class Report:
    """Measurements and what they belong to."""

    machine: dict[str, Any]
    rows: list[Row]

    def write(self, path: Path) -> None:
        """Write JSON."""
        report = {"machine": self.machine, "rows": [row.as_dict() for row in self.rows]}
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read JSON that :meth:`write` wrote.

        Raises
        ------
        ReportError
            If it is something else, or cannot be read.
        """
        names = {field.name for field in dataclasses.fields(Row)}
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            rows = [Row(**{k: v for k, v in row.items() if k in names}) for row in report["rows"]]
            if not all(isinstance(row.us, (int, float)) for row in rows):
                raise TypeError("a row without microseconds")
            return cls(dict(report.get("machine", {})), rows)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ReportError(f"{path}: no report of this command: {error}") from None


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

    def cell(value: float | None, pattern: str) -> str:
        return "" if value is None else pattern.format(value)

    columns = {
        "operator": [row.op for row in rows],
        "shape": [row.shape for row in rows],
        "us": [f"{row.us:,.1f}" for row in rows],
        "rate": [cell(row.rate, "{:.1f} " + row.unit) for row in rows],
        "peer us": [cell(row.peer_us, "{:,.1f}") for row in rows],
        "ratio": [cell(row.ratio, "{:.2f}x") for row in rows],
        "error": [cell(row.error, "{:.1e}") for row in rows],
        "peer": [row.peer for row in rows],
    }
    if baseline is not None:
        columns["baseline"] = [cell(baseline.ratio(row), "{:.2f}x") for row in rows]
    return {name: texts for name, texts in columns.items() if name == "us" or any(texts)}


_LEFT = ("operator", "shape", "peer")


def table(report: Report, baseline: Baseline | None = None) -> Any:
    """A table for the terminal."""
    from rich.table import Table

    caption = f"ratio: peer's time / ours; commit {report.machine.get('commit')}"
    if baseline is not None:
        caption += f"; baseline: time at {baseline.machine.get('commit')} / now"
    result = Table(title=title(report.machine), caption=caption)
    columns = _columns(report.rows, baseline)
    for name in columns:
        justify = "left" if name in _LEFT else "right"
        result.add_column(name, justify=justify, no_wrap=name not in ("shape", "peer"))  # type: ignore[arg-type]
    for texts in zip(*columns.values()):
        result.add_row(*texts)
    return result


def markdown(report: Report, baseline: Baseline | None = None) -> str:
    """The table in markdown."""
    columns = _columns(report.rows, baseline)
    lines = [
        f"{title(report.machine)}; commit {report.machine.get('commit')}, "
        f"{report.machine.get('date')}. Ratio: the peer's time / ours.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "|".join("---" if name in _LEFT else "---:" for name in columns) + "|",
    ]
    for texts in zip(*columns.values()):
        lines.append("| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |")
    return "\n".join(lines) + "\n"


def plot(report: Report, path: Path, baseline: Baseline | None = None) -> None:
    """Draw the ratio to the peer (or to the baseline) of every row.

    Raises
    ------
    ReportError
        If no row has one.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fastattn"  # the same rows give the same file
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    points = []
    for row in report.rows:
        ratio = baseline.ratio(row) if baseline is not None else row.ratio
        if ratio is not None and ratio > 0:
            points.append((row, ratio))
    if not points:
        raise ReportError("no row has a ratio to draw")
    names = [_label(row, len(points) > MOST_BARS) for row, _ in points]
    lines = list(dict.fromkeys(names))
    figure, axes = plt.subplots(figsize=(10, 1.4 + 0.28 * len(lines)))
    heights = [lines.index(name) for name in names]
    ratios = [ratio for _, ratio in points]
    if len(points) > MOST_BARS:
        axes.plot(ratios, heights, "o", markersize=4, alpha=0.35, markeredgewidth=0)
        for i, name in enumerate(lines):
            middle = statistics.median(r for n, r in zip(names, ratios) if n == name)
            axes.plot([middle], [i], "|", color="black", markersize=14)
    else:
        axes.barh(heights, ratios, height=0.7)
    axes.set_yticks(range(len(lines)), lines, fontsize=8)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    if max(ratios) / min(ratios) > 8:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(left=0)
    other = "the baseline" if baseline is not None else "the peer"
    axes.set_xlabel(f"speed relative to {other} (right of 1 is faster)")
    axes.set_title(title(report.machine), fontsize=10)
    axes.grid(axis="x", linewidth=0.3)
    figure.tight_layout()
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, metadata=metadata)
    plt.close(figure)


def _label(row: Row, grouped: bool) -> str:
    return f"{row.op} / {row.peer}" if grouped else f"{row.op}: {row.shape}"
