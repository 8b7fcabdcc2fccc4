"""``python -m fastattn bench``: times the operators and shows a table."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.core.plots import plot
from benchmarks.core.processes import python_path
from benchmarks.core.report import Baseline, Report, ReportError
from benchmarks.core.rows import REGISTRY, Bench, benchmarks, family, is_of
from benchmarks.core.tables import WIDTH, markdown, table
from fastattn.cli.outputs import problem_of_file, problem_of_folder

#: What a plot may be.
_PLOTS = (".png", ".svg", ".pdf")


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
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def _import_cases() -> None:
    """Import every module of cases, which registers its benchmarks."""
    from benchmarks import cases as package

    for info in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{info.name}")


def _measure(chosen: Mapping[str, Bench], device: Any, console: Any, folder: Path | None) -> Report:
    """Rows of all; those of a family also go to its file, as soon as each benchmark is done.

    A benchmark that fails is recorded, with the rows that it has given, and the others go on: in a
    process of their own if the device is lost.
    """
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    machine = device.machine()
    families: dict[str, Report] = {}
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(chosen))
        left = list(chosen)
        for name, bench in chosen.items():
            left.remove(name)
            progress.update(task, description=name)
            report = families.setdefault(family(bench), Report(machine, []))
            try:
                for row in bench(device):
                    report.rows.append(row)
                    progress.update(task, description=f"{name}: {row.shape}")
            except Exception as error:  # whatever it is, hours of other rows are worth more
                report.failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            _write_family(report, family(bench), folder)
            progress.advance(task)
            if name in report.failed and not device.recovered():
                progress.update(task, description=f"{name} lost the device: the others go on")
                _measure_apart({x: chosen[x] for x in left}, device.quick, families, folder)
                break
    rows = [row for report in families.values() for row in report.rows]
    failed = {k: v for report in families.values() for k, v in report.failed.items()}
    return Report(machine, rows, failed)


def _measure_apart(
    chosen: Mapping[str, Bench], quick: bool, families: dict[str, Report], folder: Path | None
) -> None:
    """Measure benchmarks in another process and add their rows to those of their families."""
    if not chosen:
        return
    code = "import sys; from benchmarks.cli import _measure_here; _measure_here(*sys.argv[1:])"
    with tempfile.TemporaryDirectory() as made:
        command = [sys.executable, "-c", code, made, "quick" if quick else "", *chosen]
        environment = {**os.environ, "PYTHONPATH": python_path()}
        status = subprocess.run(command, env=environment).returncode
        read = {path.name: Report.read(path) for path in Path(made).glob("*.json")}
    for name in {family(bench): None for bench in chosen.values()}:
        theirs = next((r for file, r in read.items() if file == _file(r.machine, name)), None)
        report = families.setdefault(name, Report(theirs.machine if theirs else {}, []))
        if theirs:
            report.rows += theirs.rows
            report.failed.update(theirs.failed)
        else:
            report.failed[name] = f"its process ended with status {status}"
        _write_family(report, name, folder)


def _measure_here(folder: str, quick: str, *names: str) -> None:
    """Measure benchmarks and write the rows of their families: :func:`_measure_apart`."""
    from rich.console import Console

    device, known = _device_and_benchmarks(bool(quick))
    chosen = {name: known[name] for name in names}
    _measure(chosen, device, Console(width=WIDTH), Path(folder))


def _file(machine: Mapping[str, Any], name: str) -> str:
    """Name of a family's file."""
    return f"{_stem(machine)}-{name.replace('_', '-')}.json"


def _write_family(report: Report, name: str, folder: Path | None) -> None:
    if folder:
        report.write(folder / _file(report.machine, name))


def _stem(machine: Mapping[str, Any]) -> str:
    """Start of the names of a machine's files: ``h100`` of an NVIDIA H100, else ``cpu``."""
    match = re.search(r"[A-Z]+\d+\w*", machine.get("gpu", ""))
    return match[0].lower() if match else "gpu" if "gpu" in machine else "cpu"


def _device_and_benchmarks(quick: bool) -> tuple[Any, dict[str, Bench]]:
    import paddle

    from benchmarks.core.devices import present

    device = present(quick)
    paddle.set_device("cpu")  # benchmarks name their place
    _import_cases()
    return device, benchmarks(device.kind)


def _run_benchmarks(arguments: argparse.Namespace, console: Any) -> Report | int:
    """Measure what was asked for; an exit status where that ends the command."""
    device, known = _device_and_benchmarks(arguments.quick)
    if arguments.list:
        print("\n".join(known))
        return 0
    chosen: dict[str, Bench] = {}
    for wanted in arguments.op or list(known):
        found = {name: known[name] for name in known if is_of(name, wanted)}
        if not found:
            elsewhere = any(is_of(name, wanted) for name in REGISTRY)
            why = f"is not measured on a {device.kind.upper()}" if elsewhere else "is no benchmark"
            text = f"bench: --op {wanted} {why}: expected one of {', '.join(known)}"
            console.print(text, markup=False, soft_wrap=True)
            return 2
        chosen.update(found)
    return _measure(chosen, device, console, arguments.json_dir)


def _only(report: Report, operators: list[str] | None) -> Report:
    """Rows of some operators; a row's name may go on after the operator's."""
    if not operators:
        return report
    rows = [row for row in report.rows if row.op.split(",")[0].split(" ")[0] in operators]
    return Report(report.machine, rows, report.failed)


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Find out before minutes of measuring that a result could not be written.

    Raises
    ------
    ReportError
    """
    for path in (arguments.json, arguments.markdown, arguments.plot):
        problem = None if path is None else problem_of_file(path)
        if problem is not None:
            raise ReportError(f"{path}: cannot be written: {problem}")
    if arguments.json_dir is not None:
        if arguments.load:
            raise ReportError("--json-dir: --load measures nothing")
        problem = problem_of_folder(arguments.json_dir)
        if problem is not None:
            raise ReportError(f"{arguments.json_dir}: cannot be written: {problem}")
    if arguments.plot and arguments.plot.suffix not in _PLOTS:
        raise ReportError(f"{arguments.plot}: expected {', '.join(_PLOTS[:-1])} or {_PLOTS[-1]}")
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
        for name, why in report.failed.items():
            console.print(f"failed: {name}: {why}", markup=False, soft_wrap=True)
            status = max(status, int(not arguments.load))
        if arguments.plot:
            plot(report, arguments.plot, baseline)
    except (ReportError, OSError) as error:  # OSError: a disk that is full by now
        console.print(f"bench: {error}", markup=False, soft_wrap=True)
        return 2
    return status
