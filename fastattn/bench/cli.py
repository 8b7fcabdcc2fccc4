"""``python -m fastattn bench``: times the operators and shows a table."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
from pathlib import Path
from typing import Any

from fastattn.bench.common import Row


def add_parser(subparsers: Any) -> None:
    """Add the ``bench`` subcommand."""
    parser = subparsers.add_parser("bench", help="time the operators on this machine")
    parser.add_argument("--op", action="append", metavar="NAME", help="only this one; repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them (needs matplotlib)")
    parser.add_argument("--quick", action="store_true", help="small shapes, few repetitions")
    parser.set_defaults(func=run)


def _import_benchmarks(on_gpu: bool) -> None:
    """Import every module of this package, which registers its benchmarks; ``*_gpu`` on a GPU."""
    import fastattn.bench as package

    for module in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
        if module in ("cli", "gpu_timing") or (module.endswith("_gpu") and not on_gpu):
            continue
        importlib.import_module(f"{package.__name__}.{module}")


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmarks that were asked for; returns the exit status."""
    import paddle
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from fastattn.bench.common import REGISTRY, machine

    on_gpu = paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
    paddle.set_device("cpu")  # GPU benchmarks name their place
    _import_benchmarks(on_gpu)

    # Not a terminal: wide enough that no column is squeezed away.
    console = Console() if sys.stdout.isatty() else Console(width=180)
    names = arguments.op or list(REGISTRY)
    unknown = [name for name in names if name not in REGISTRY]
    if unknown:
        console.print(f"bench: --op {unknown[0]}: expected one of {', '.join(REGISTRY)}")
        return 2
    facts = machine()
    if on_gpu:
        from fastattn.bench import gpu_timing

        facts.update(gpu_timing.machine())
    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(names))
        for name in names:
            progress.update(task, description=name)
            for row in REGISTRY[name](arguments.quick):
                rows.append(row)
                progress.update(task, description=f"{name}: {row.shape}")
            progress.advance(task)
    console.print(_table(rows, facts))
    if arguments.json:
        report = {"machine": facts, "rows": [row.as_dict() for row in rows]}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    if arguments.plot:
        _plot(rows, facts, arguments.plot)
    return 0


def _table(rows: list[Row], facts: dict[str, Any]) -> Any:
    from rich.table import Table

    title = f"{facts['cpu']}, {facts['cores']} cores, Paddle {facts['paddle']}"
    if "gpu" in facts:
        title += f"; {facts['gpu']}, copy {facts['copy_gbs']:.0f} GB/s"
    table = Table(title=title, caption=f"ratio: peer's time / ours; commit {facts['commit']}")
    table.add_column("operator", no_wrap=True)
    table.add_column("shape")
    for name in ("us", "rate", "peer us", "ratio", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("peer")
    for row in rows:
        table.add_row(
            row.op,
            row.shape,
            f"{row.us:,.1f}",
            "" if row.rate is None else f"{row.rate:.1f} {row.unit}",
            "" if row.peer_us is None else f"{row.peer_us:,.1f}",
            "" if row.ratio is None else f"{row.ratio:.2f}x",
            "" if row.error is None else f"{row.error:.1e}",
            row.peer,
        )
    return table


def _plot(rows: list[Row], facts: dict[str, Any], path: Path) -> None:
    """Bars of the ratio to the peer, one a row that has one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ratios = {f"{row.op}: {row.shape}": row.ratio for row in rows if row.ratio is not None}
    figure, axes = plt.subplots(figsize=(10, 1 + 0.4 * len(ratios)))
    axes.barh(list(ratios), list(ratios.values()))
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("speed relative to the peer")
    axes.set_title(f"{facts['cpu']}, {facts['cores']} cores")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
