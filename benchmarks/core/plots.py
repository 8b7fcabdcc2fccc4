"""Plots of a report: curves where its rows are some, else the ratio to the peer of every row.

Decode is drawn in microseconds over the least time that the memory allows: its bytes once at the
rate of the memory's pins, which nothing crosses. The measured rate of reading is no such bound.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.core.peers import COPY, EMPTY, READ, public_name
from benchmarks.core.report import Baseline, Report, ReportError
from benchmarks.core.rows import Row
from benchmarks.core.tables import title

#: A plot of at most this many rows names each of them; a larger one has a line for each operator.
MOST_BARS = 24
#: Peers in a chart: of each line of ours, those that are the fastest beside it somewhere.
MOST_PEERS = 4
_OURS = ("#08306b", "#2171b5", "#6baed6")
_PEERS = ("#d94801", "#fd8d3c", "#7f2704", "#c51b8a")
_MARKERS = "os^DvPX"
#: Times that differ by more than this factor are drawn on a logarithmic axis.
_WIDE = 20
#: Colours of what stands beside a peer, and beside a floor that memory or a launch sets.
_SPEEDUP, _FRACTION = "#2171b5", "#969696"

#: GB/s of a GPU's memory: twice its clock (2619 and 3201 MHz) times its bytes (640 and 768).
PIN_RATES = {"NVIDIA H100 80GB HBM3": 3352.3, "NVIDIA H200": 4916.7}

#: Line -> its points.
Curves = dict[str, dict[int, float]]


class Chart(NamedTuple):
    """A chart of curves: what it draws of which rows."""

    shape: re.Pattern[str]  # of a row: groups `name`, `panel` and `x`
    ours: Mapping[str, str]  # name in the shape -> label
    panels: Mapping[str, str]  # panel in the shape -> its title
    title: str
    xlabel: str
    ylabel: str
    op: str = "paged_attention"
    is_time: bool = False  # draws microseconds, not rates
    scale: int = 1  # of x: 1024 for a shape that tells thousands


CHARTS = (
    Chart(
        re.compile(r"^decode (?P<name>\w+) B (?P<panel>\d+) ctx (?P<x>\d+) H 32/8 D 128$"),
        {"cache_fp8": "FP8", "block_wise_fp8": "FP8, per-token scales", "none": "BF16"},
        {"1": "batch 1", "16": "batch 16", "64": "batch 64"},
        "Paged decode, H 32, KV 8, D 128, blocks of 64 tokens",
        "context, tokens",
        "us (lower is better)",
        is_time=True,
    ),
    Chart(
        re.compile(r"^prefill (?P<name>.+) (?P<panel>causal|full) B \d+ x (?P<x>\d+) H 16/16"),
        {
            "cache_fp8": "FP8, E4M3 queries",
            "block_wise_fp8": "FP8, per-token scales, E4M3 queries",
            "bf16 q, bf16": "BF16",
        },
        {"causal": "causal", "full": "full"},
        "Paged prefill, 16384 tokens in all, H 16, KV 16, D 128",
        "length of a sequence, tokens",
        "TFLOP/s",
    ),
    Chart(
        re.compile(r"^(?P<panel>\d+) heads, batch (?P<x>\d+), 32k keys, (?P<name>\w+)$"),
        {"bf16": "BF16", "fp8": "FP8", "fp8_656": "656 bytes a token"},
        {"16": "16 heads", "128": "128 heads"},
        "Dense latent decode, 32k keys a sequence, pages of 64 tokens",
        "batch",
        "us (lower is better)",
        op="mla_attention",
        is_time=True,
    ),
    Chart(
        re.compile(
            r"^(?P<name>decode) (?P<panel>\d+) B, batch 128, 1 queries, H (?P<x>\d+), top \d+.*$"
        ),
        {"decode": ""},
        {"656": "656 bytes a token, 2048 keys", "584": "584 bytes a token, 512 + 128 keys"},
        "Sparse latent decode, batch 128; FlashMLA pads to 64 heads",
        "heads of a rank",
        "us (lower is better)",
        op="mla_sparse_attention",
        is_time=True,
    ),
    Chart(
        re.compile(
            r"^(?P<panel>.* TP8) (?P<name>decode) (?P<x>\d+) x 32k, parts of vLLM, graph$"
        ),
        {"decode": ""},
        {name: f"DeepSeek-{name}" for name in ("V3.2 TP8", "V4-Flash TP8")},
        "A layer's attention step, the parts that vLLM has compiled kernels for, 32k tokens",
        "batch",
        "us (lower is better)",
        op="sparse step",
        is_time=True,
    ),
    Chart(
        re.compile(r"^batch (?P<x>\d+), (?P<panel>\d+)k keys, 1 queries, (?P<name>\w+)$"),
        {"fp8": "FP8", "mxfp4": "MXFP4"},
        {"8": "8k keys a sequence", "64": "64k keys a sequence"},
        "Paged logits of the indexer, H 64, D 128, one query a sequence",
        "batch",
        "us (lower is better)",
        op="paged_mqa_logits",
        is_time=True,
    ),
    Chart(
        re.compile(r"^(?P<panel>\d+) tokens, (?P<x>\d+)k keys, (?P<name>\w+)$"),
        {"fp8": "FP8", "mxfp4": "MXFP4"},
        {"2048": "2048 queries", "4096": "4096 queries"},
        "Logits of the indexer, H 64, D 128, causal",
        "keys",
        "TFLOP/s",
        op="mqa_logits",
        scale=1024,
    ),
    Chart(
        re.compile(r"^(?P<panel>\d+) x (?P<x>\d+)k, k 2048, (?P<name>\w+)$"),
        {"normal": "normal logits", "zeros": "three quarters zeros"},
        {"1": "1 row", "64": "64 rows", "4096": "4096 rows"},
        "Top-k of fp32 logits, k 2048",
        "columns",
        "us (lower is better)",
        op="topk_indices",
        is_time=True,
        scale=1024,
    ),
)  # fmt: skip


class Drawn(NamedTuple):
    """Curves of a chart, by panel."""

    ours: dict[str, Curves]
    others: dict[str, Curves]
    floors: dict[str, Curves]  # least time that the memory allows, under our labels
    beside: dict[str, dict[tuple[str, int], dict[str, float]]]  # our label -> point -> peers' times


def curves(chart: Chart, rows: Sequence[Row], gpu: str = "") -> Drawn:
    """Curves of ours, of peers and of the memory's least times in each panel.

    A peer's rate follows from its time for the same work.
    """
    ours: dict[str, Curves] = {panel: {} for panel in chart.panels}
    others: dict[str, Curves] = {panel: {} for panel in chart.panels}
    floors: dict[str, Curves] = {panel: {} for panel in chart.panels}
    drawn = Drawn(ours, others, floors, {})
    for row in rows:
        match = chart.shape.match(row.shape) if row.op == chart.op else None
        if not match or (row.rate is None and not chart.is_time):
            continue
        panel, x = match["panel"], int(match["x"]) * chart.scale
        if panel not in chart.panels:
            continue
        value, label = row.us if chart.is_time else row.rate or 0.0, ""
        if match["name"] in chart.ours:
            label = _label(chart, match["name"])
            drawn.ours[panel].setdefault(label, {})[x] = value
            if chart.is_time and row.rate and row.unit == "GB/s" and gpu in PIN_RATES:
                least = row.us * row.rate / PIN_RATES[gpu]
                drawn.floors[panel].setdefault(label, {})[x] = least
        if not row.peer_us or row.peer in (READ, COPY, EMPTY):
            continue
        theirs = row.peer_us if chart.is_time else value * row.us / row.peer_us
        drawn.others[panel].setdefault(_peer(row.peer), {})[x] = theirs
        times = drawn.beside.setdefault(label, {}).setdefault((panel, x), {})
        times[_peer(row.peer)] = row.peer_us
    return drawn


def _label(chart: Chart, name: str) -> str:
    return f"fastattn {chart.ours[name]}".strip()


def _peer(name: str) -> str:
    """Public name of a peer, however many heads it pads to."""
    return public_name(name).partition(", padded")[0]


def fastest(chart: Chart, drawn: Drawn) -> list[str]:
    """Peers to draw: those that are the fastest beside one of our lines, by how often they are."""
    wins: dict[str, int] = {}
    for label, points in drawn.beside.items():
        for times in points.values() if label else ():
            least = min(times, key=lambda name: times[name])
            wins[least] = wins.get(least, 0) + 1
    return sorted(wins, key=lambda name: -wins[name])[:MOST_PEERS]


def draw_curves(chart: Chart, report: Report, plt: Any) -> Any | None:
    """Figure of a chart; None where the report has too few rows for it."""
    device = report.machine.get("gpu", report.machine.get("cpu"))
    drawn = curves(chart, report.rows, str(device))
    ours, others, floors = drawn.ours, drawn.others, drawn.floors
    panels = [panel for panel in chart.panels if any(len(p) > 1 for p in ours[panel].values())]
    if not panels:
        return None
    labels = [_label(chart, name) for name in chart.ours]
    lines: dict[str, dict[str, Any]] = {}  # peers on top, dashed and hollow: what is below shows
    for color, marker, name in zip(_OURS, _MARKERS, labels):
        lines[name] = {"color": color, "marker": marker, "linewidth": 2.2}
    for color, marker, name in zip(_PEERS, _MARKERS[len(_OURS) :], fastest(chart, drawn)):
        hollow = {"markerfacecolor": "white", "linestyle": "--", "zorder": 3}
        lines[name] = {"color": color, "marker": marker, "linewidth": 1.4, **hollow}
    height = 4.0 + 0.2 * math.ceil((len(lines) + bool(drawn.floors)) / len(panels))
    size = (4.2 * len(panels) + 0.6, height)
    rates = not chart.is_time  # of calls that differ little; times differ by orders of magnitude
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=rates, squeeze=False)
    for axis, panel in zip(axes[0], panels):
        of_panel = {**ours[panel], **others[panel]}
        for name, style in lines.items():
            if name in of_panel:
                points = sorted(of_panel[name].items())
                axis.plot(*zip(*points), label=name, markersize=6, **style)
        for name, of_name in floors[panel].items():
            points = sorted(of_name.items())
            label = f"least time at {PIN_RATES[str(device)]:.0f} GB/s"
            thin = {"color": lines[name]["color"], "linewidth": 0.9, "linestyle": ":"}
            axis.plot(*zip(*points), label=label, **thin)
        ticks = sorted({x for points in of_panel.values() for x in points})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{x // 1024}k" if x >= 1024 else str(x) for x in ticks])
        axis.minorticks_off()
        axis.set(title=chart.panels[panel], xlabel=chart.xlabel)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(chart.ylabel)
    values = [y for axis in axes[0] for line in axis.get_lines() for y in line.get_ydata()]
    for axis in axes[0]:
        if chart.is_time and max(values) > _WIDE * min(values):
            axis.set_yscale("log")
            _number_logarithms(axis.yaxis)
        else:
            axis.set_ylim(0, None)
    handles = {h.get_label(): h for axis in axes[0] for h in axis.get_lines()}
    shown = [name for name in lines if name in handles]
    shown += [name for name in handles if name not in lines]
    spelled = [name.replace("FA3", "FlashAttention-3") for name in shown]
    rows = math.ceil(len(shown) / len(panels))
    figure.legend([handles[n] for n in shown], spelled, loc="lower center", ncol=len(panels),
                  frameon=False, fontsize=9)  # fmt: skip
    figure.suptitle(f"{chart.title}\n{device}", fontsize=11)
    figure.tight_layout(rect=(0, (0.1 + 0.2 * rows) / height, 1, 1))
    return figure


def _number_logarithms(axis: Any) -> None:
    """Numbers at 1, 2 and 5 of each decade, and no others."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def draw_ratios(report: Report, baseline: Baseline | None, plt: Any) -> Any:
    """Figure of the ratio to the peer (or to the baseline) of every row."""
    ratio_of: Callable[[Row], float | None] = baseline.ratio if baseline else lambda row: row.ratio
    points = [(row, ratio) for row in report.rows if (ratio := ratio_of(row)) and ratio > 0]
    if not points:
        raise ReportError("no row has a ratio to draw")
    grouped = len(points) > MOST_BARS
    names = []
    for row, _ in points:
        name = row.op if grouped else f"{row.op}: {row.shape}"
        names.append(f"{name} / {public_name(row.peer)}" if row.peer else name)
    lines = list(dict.fromkeys(names))
    figure, axes = plt.subplots(figsize=(10, 1.4 + 0.28 * len(lines)))
    heights = [lines.index(name) for name in names]
    ratios = [ratio for _, ratio in points]
    floors = () if baseline else (COPY, EMPTY, READ)
    colors = [_FRACTION if row.peer in floors else _SPEEDUP for row, _ in points]
    axes.scatter(ratios, heights, s=20, alpha=0.5 if grouped else 1, linewidths=0, color=colors)
    if grouped:
        for i, name in enumerate(lines):
            middle = statistics.median(r for n, r in zip(names, ratios) if n == name)
            axes.plot([middle], [i], "|", color="black", markersize=14)
    axes.set_yticks(range(len(lines)), lines, fontsize=8)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    _number_logarithms(axes.xaxis)
    other = "the baseline" if baseline is not None else "the peer"
    grey = ", grey: of what memory or a launch allows" if _FRACTION in colors else ""
    axes.set_xlabel(f"speed relative to {other} (right of 1 is faster{grey})")
    axes.set_title(title(report.machine), fontsize=10)
    axes.grid(axis="x", linewidth=0.3)
    figure.tight_layout()
    return figure


def plot(report: Report, path: Path, baseline: Baseline | None = None) -> None:
    """Draw a report into a file.

    Raises
    ------
    ReportError
        If no row has anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fastattn"  # the same rows give the same file
    import matplotlib.pyplot as plt

    drawn = (draw_curves(chart, report, plt) for chart in CHARTS if baseline is None)
    figure = next((f for f in drawn if f is not None), None)
    if figure is None:
        figure = draw_ratios(report, baseline, plt)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
