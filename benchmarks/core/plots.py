"""Plots of a report: curves where its rows are some, else the ratio to the peer of every row."""

from __future__ import annotations

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
#: Lines of a chart of times, ours and the fastest peers; peers beside up to three rates of ours.
MOST_LINES, MOST_PEERS = 5, 2
_OURS = ("#08306b", "#2171b5", "#6baed6")
_PEERS = ("#d94801", "#fd8d3c", "#7f2704")
_MARKERS = "os^DvP"
#: Times that differ by more than this factor are drawn on a logarithmic axis.
_WIDE = 20
#: Colours of what stands beside a peer, and beside a floor that memory or a launch sets.
_SPEEDUP, _FRACTION = "#2171b5", "#969696"

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
        "K, V and scales read, GB/s",
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
        "cache, queries and outputs, GB/s",
        op="mla_attention",
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
        "keys read and logits written, GB/s",
        op="paged_mqa_logits",
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


def _curves(
    chart: Chart, rows: Sequence[Row]
) -> tuple[dict[str, Curves], dict[str, Curves], float]:
    """Curves of ours and of peers in each panel, and the largest rate of a floor's rows.

    A peer's rate follows from its time for the same work.
    """
    ours: dict[str, Curves] = {panel: {} for panel in chart.panels}
    others: dict[str, Curves] = {panel: {} for panel in chart.panels}
    floor = 0.0
    for row in rows:
        match = chart.shape.match(row.shape) if row.op == chart.op else None
        if not match or (row.rate is None and not chart.is_time):
            continue
        panel, x = match["panel"], int(match["x"]) * chart.scale
        if panel not in chart.panels:
            continue
        value = row.us if chart.is_time else row.rate or 0.0
        if match["name"] in chart.ours:
            ours[panel].setdefault(_label(chart, match["name"]), {})[x] = value
        if not row.peer_us:
            continue
        theirs = row.peer_us if chart.is_time else value * row.us / row.peer_us
        if row.peer != READ:
            others[panel].setdefault(_peer(row.peer), {})[x] = theirs
        elif not chart.is_time:
            floor = max(floor, theirs)
    return ours, others, floor


def _label(chart: Chart, name: str) -> str:
    return f"fastattn {chart.ours[name]}".strip()


def _peer(name: str) -> str:
    """Public name of a peer, however many heads it pads to."""
    return public_name(name).partition(", padded")[0]


def _fastest(chart: Chart, others: Mapping[str, Curves]) -> list[str]:
    """Peers to draw: those with the highest mean rate, where they were measured.

    Of times, which differ by orders of magnitude, those that are the fastest at the most points.
    """
    values: dict[str, list[float]] = {}
    wins: dict[str, int] = {}
    for curves in others.values():
        for name, points in curves.items():
            values.setdefault(name, []).extend(points.values())
        for x in {x for points in curves.values() for x in points}:
            least = min((points[x], name) for name, points in curves.items() if x in points)
            wins[least[1]] = wins.get(least[1], 0) + 1
    if chart.is_time:
        order = sorted(values, key=lambda name: -wins.get(name, 0))
        return order[: MOST_LINES - len(chart.ours)]
    return sorted(values, key=lambda name: -statistics.fmean(values[name]))[:MOST_PEERS]


def draw_curves(chart: Chart, report: Report, plt: Any) -> Any | None:
    """Figure of a chart; None where the report has too few rows for it."""
    ours, others, floor = _curves(chart, report.rows)
    panels = [panel for panel in chart.panels if any(len(p) > 1 for p in ours[panel].values())]
    if not panels:
        return None
    labels = [_label(chart, name) for name in chart.ours]
    lines: dict[str, dict[str, Any]] = {}  # peers on top, dashed and hollow: what is below shows
    for color, marker, name in zip(_OURS, _MARKERS, labels):
        lines[name] = {"color": color, "marker": marker, "linewidth": 2.2}
    for color, marker, name in zip(_PEERS, _MARKERS[len(_OURS) :], _fastest(chart, others)):
        hollow = {"markerfacecolor": "white", "linestyle": "--", "zorder": 3}
        lines[name] = {"color": color, "marker": marker, "linewidth": 1.4, **hollow}
    size = (4.2 * len(panels) + 0.6, 4.6)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for axis, panel in zip(axes[0], panels):
        of_panel = {**ours[panel], **others[panel]}
        for name, style in lines.items():
            if name in of_panel:
                points = sorted(of_panel[name].items())
                axis.plot(*zip(*points), label=name, markersize=6, **style)
        ticks = sorted({x for points in of_panel.values() for x in points})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{x // 1024}k" if x >= 1024 else str(x) for x in ticks])
        axis.minorticks_off()
        axis.set(title=chart.panels[panel], xlabel=chart.xlabel)
        axis.grid(alpha=0.3)
        if floor:
            axis.axhline(floor, color="black", linewidth=0.8, linestyle=":")
            axis.annotate("reading alone", (ticks[0], floor), (0, 3),
                          textcoords="offset points", fontsize=8)  # fmt: skip
    axes[0][0].set_ylabel(chart.ylabel)
    drawn = [y for axis in axes[0] for line in axis.get_lines() for y in line.get_ydata()]
    if chart.is_time and max(drawn) > _WIDE * min(drawn):
        axes[0][0].set_yscale("log")
        _number_logarithms(axes[0][0].yaxis)
    else:
        axes[0][0].set_ylim(0, floor * 1.1 or None)
    handles = {h.get_label(): h for axis in axes[0] for h in axis.get_lines()}
    shown = [name for name in lines if name in handles]
    spelled = [name.replace("FA3", "FlashAttention-3") for name in shown]
    figure.legend([handles[n] for n in shown], spelled, loc="lower center", ncol=3, frameon=False)
    device = report.machine.get("gpu", report.machine.get("cpu"))
    figure.suptitle(f"{chart.title}\n{device}, one run", fontsize=11)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
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
