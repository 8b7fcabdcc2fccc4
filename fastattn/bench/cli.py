"""``python -m fastattn bench``: times the operators and shows a table."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import pkgutil
import sys
from pathlib import Path
from typing import Any

from fastattn.bench.common import Row
from fastattn.bench.report import Baseline, Report, ReportError, markdown, plot, table


def add_parser(subparsers: Any) -> None:
    """Add the ``bench`` subcommand."""
    parser = subparsers.add_parser(
        "bench",
        help="time the operators on this machine",
        description="Times the operators; docs/benchmarks.md tells how to read the rows.",
    )
    parser.add_argument("--op", action="append", metavar="NAME", help="only this one; repeatable")
    parser.add_argument("--quick", action="store_true", help="small shapes, few repetitions")
    parser.add_argument("--list", action="store_true", help="list the names and exit")
    parser.add_argument(
        "--load", type=Path, metavar="FILE", help="measure nothing: take the rows of this JSON"
    )
    parser.add_argument(
        "--baseline", type=Path, metavar="FILE", help="compare with the JSON of an earlier run"
    )
    parser.add_argument(
        "--fail-below",
        type=_ratio,
        metavar="RATIO",
        help="status 1 if a row is slower than that (0.9: 10%%) relative to the baseline",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them (needs matplotlib)")
    parser.set_defaults(func=run)


def _ratio(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def _import_benchmarks(on_gpu: bool) -> None:
    """Import every module of this package, which registers its benchmarks.

    Modules named ``*_gpu`` need a GPU; those named ``*_cpu`` are for machines without one.
    """
    import fastattn.bench as package

    skipped = "_cpu" if on_gpu else "_gpu"
    for module in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
        if module not in ("cli", "gpu_timing", "report") and not module.endswith(skipped):
            importlib.import_module(f"{package.__name__}.{module}")


def _measure(names: list[str], quick: bool, facts: dict[str, Any], console: Any) -> Report:
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from fastattn.bench.common import REGISTRY

    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(names))
        for name in names:
            progress.update(task, description=name)
            for row in REGISTRY[name](quick):
                rows.append(row)
                progress.update(task, description=f"{name}: {row.shape}")
            progress.advance(task)
    return Report(facts, rows)


def _run_benchmarks(arguments: argparse.Namespace, console: Any) -> Report | int:
    """Measure what was asked for; an exit status where that ends the command."""
    import paddle

    from fastattn.bench.common import REGISTRY, machine

    on_gpu = paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
    paddle.set_device("cpu")  # GPU benchmarks name their place
    _import_benchmarks(on_gpu)
    if arguments.list:
        print("\n".join(REGISTRY))
        return 0
    names = arguments.op or list(REGISTRY)
    unknown = [name for name in names if name not in REGISTRY]
    if unknown:
        console.print(f"bench: --op {unknown[0]}: expected one of {', '.join(REGISTRY)}")
        return 2
    facts = machine()
    if on_gpu:
        from fastattn.bench import gpu_timing

        facts.update(gpu_timing.machine())
    return _measure(names, arguments.quick, facts, console)


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

    # Not a terminal: wide enough that no column is squeezed away.
    console = Console() if sys.stdout.isatty() else Console(width=180)
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
        console.print(f"bench: {error}", markup=False)
        return 2
    return status
