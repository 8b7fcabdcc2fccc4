"""``python -m fastattn bench``: times the operators and shows a table."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import pkgutil
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastattn.bench.core.plots import plot
from fastattn.bench.core.report import Baseline, Report, ReportError
from fastattn.bench.core.rows import Bench, Row, benchmarks, family, is_of
from fastattn.bench.core.tables import WIDTH, markdown, table


def add_parser(subparsers: Any) -> None:
    """Add the ``bench`` subcommand."""
    parser = subparsers.add_parser(
        "bench",
        help="time the operators on this machine",
        description="Times the operators; docs/benchmarks.md tells how to read the rows.",
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--op", action="append", metavar="NAME", help="only this one; repeatable")
    chosen.add_argument("--all", action="store_true", help="all of them, which is the default")
    parser.add_argument("--quick", action="store_true", help="small shapes, few repetitions")
    parser.add_argument("--list", action="store_true", help="list the names and exit")
    for option, text in (
        ("--load", "measure nothing: take the rows of this JSON"),
        ("--baseline", "compare with the JSON of an earlier run"),
        ("--json", "write the rows there"),
        ("--markdown", "write the table there"),
        ("--plot", "draw them (needs matplotlib)"),
    ):
        parser.add_argument(option, type=Path, metavar="FILE", help=text)
    parser.add_argument(
        "--json-dir", type=Path, metavar="FOLDER", help="write a JSON of each family there"
    )
    parser.add_argument(
        "--fail-below",
        type=_ratio,
        metavar="RATIO",
        help="status 1 if a row is slower than that (0.9: 10%%) relative to the baseline",
    )
    parser.set_defaults(func=run)


def _ratio(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def _import_cases() -> None:
    """Import every module of cases, which registers its benchmarks."""
    import fastattn.bench.cases as package

    for info in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{info.name}")


def _measure(chosen: Mapping[str, Bench], device: Any, console: Any, folder: Path | None) -> Report:
    """Rows of all; those of a family also go to its file, as soon as each benchmark is done."""
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    machine = device.machine()
    rows: dict[str, list[Row]] = {}
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(chosen))
        for name, bench in chosen.items():
            progress.update(task, description=name)
            of_family = rows.setdefault(family(bench), [])
            for row in bench(device):
                of_family.append(row)
                progress.update(task, description=f"{name}: {row.shape}")
            if folder:
                file = f"{_stem(machine)}-{family(bench).replace('_', '-')}.json"
                Report(machine, of_family).write(folder / file)
            progress.advance(task)
    return Report(machine, [row for of_family in rows.values() for row in of_family])


def _stem(machine: Mapping[str, Any]) -> str:
    """Start of the names of a machine's files: ``h100`` of an NVIDIA H100, else ``cpu``."""
    match = re.search(r"[A-Z]+\d+\w*", machine.get("gpu", ""))
    return match[0].lower() if match else "gpu" if "gpu" in machine else "cpu"


def _run_benchmarks(arguments: argparse.Namespace, console: Any) -> Report | int:
    """Measure what was asked for; an exit status where that ends the command."""
    import paddle

    from fastattn.bench.core.devices import present

    device = present(arguments.quick)
    paddle.set_device("cpu")  # benchmarks name their place
    _import_cases()
    known = benchmarks(device.kind)
    if arguments.list:
        print("\n".join(known))
        return 0
    chosen: dict[str, Bench] = {}
    for wanted in arguments.op or list(known):
        found = {name: known[name] for name in known if is_of(name, wanted)}
        if not found:
            console.print(f"bench: --op {wanted}: expected one of {', '.join(known)}",
                          soft_wrap=True)  # fmt: skip
            return 2
        chosen.update(found)
    return _measure(chosen, device, console, arguments.json_dir)


def _only(report: Report, operators: list[str] | None) -> Report:
    """Rows of some operators; a row's name may go on after the operator's."""
    if not operators:
        return report
    rows = [row for row in report.rows if row.op.split(",")[0].split(" ")[0] in operators]
    return Report(report.machine, rows)


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Find out before minutes of measuring that a result could not be written.

    Raises
    ------
    ReportError
    """
    for path in (arguments.json, arguments.markdown, arguments.plot):
        if path is not None and (not path.absolute().parent.is_dir() or path.is_dir()):
            raise ReportError(f"{path}: cannot be written: no such folder, or a folder")
    if arguments.json_dir is not None:
        if arguments.load:
            raise ReportError("--json-dir: --load measures nothing")
        if not arguments.json_dir.is_dir():
            raise ReportError(f"{arguments.json_dir}: cannot be written: no such folder")
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        raise ReportError("--plot needs matplotlib: pip install matplotlib")


def _compare(report: Report, baseline: Baseline, fail_below: float | None) -> int:
    """Print the comparison; returns the exit status."""
    for difference in baseline.differences(report.machine):
        print(f"the baseline is of another machine: {difference}")
    text, slowest = baseline.summary(report.rows)
    print(text)
    if fail_below is None:
        return 0
    if slowest is None:
        return 1
    slower = [row for row in report.rows if (baseline.ratio(row) or math.inf) < fail_below]
    for row in slower:
        print(f"below {fail_below:g}: {row.op}: {row.shape}: {baseline.ratio(row):.2f}x")
    return int(bool(slower))


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmarks that were asked for; returns the exit status."""
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    if arguments.fail_below is not None and arguments.baseline is None:
        console.print("bench: --fail-below needs --baseline")
        return 2
    try:
        _check_outputs(arguments)
        baseline = Baseline(Report.read(arguments.baseline)) if arguments.baseline else None
        if arguments.load:
            report = _only(Report.read(arguments.load), arguments.op)
        else:
            measured = _run_benchmarks(arguments, console)
            if isinstance(measured, int):
                return measured
            report = measured
        console.print(table(report, baseline))
        if arguments.json:
            report.write(arguments.json)
        if arguments.markdown:
            arguments.markdown.write_text(markdown(report, baseline), encoding="utf-8")
        status = _compare(report, baseline, arguments.fail_below) if baseline else 0
        if arguments.plot:
            plot(report, arguments.plot, baseline)
    except ReportError as error:
        console.print(f"bench: {error}", markup=False, soft_wrap=True)
        return 2
    return status
