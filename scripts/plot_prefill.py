#!/usr/bin/env python3
"""Draws the rate that prefill reaches over the length of a sequence, peers beside it.

scripts/plot_prefill.py OUT.png docs/benchmarks/h100-prefill-2026-11-21.json MORE.json ...
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

_SHAPE = re.compile(r"^prefill (.+) (causal|full) B \d+ x (\d+) H 16/16 D 128$")


def curves(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[int, float]]]:
    """TFLOP/s: mask -> name -> length -> rate. A peer's follows from its time for the same work."""
    found: dict[str, dict[str, dict[int, float]]] = {"causal": {}, "full": {}}
    for row in rows:
        match = _SHAPE.match(row["shape"])
        if not match:
            continue
        name, mask, length = match[1], match[2], int(match[3])
        if row["op"] == "flash_attention":
            name = f"{name}, contiguous"
        found[mask].setdefault(name, {})[length] = row["rate"]
        if row["peer"]:
            peer = row["rate"] * row["us"] / row["peer_us"]
            found[mask].setdefault(row["peer"], {})[length] = peer
    return found


def draw(reports: list[dict[str, Any]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = curves([row for report in reports for row in report["rows"]])
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
    colors = [*range(0, 20, 2), *range(1, 20, 2)]  # the ten strong ones first
    for axis, (mask, names) in zip(axes, found.items()):
        axis.set_prop_cycle(color=[plt.get_cmap("tab20")(i) for i in colors])
        for name, points in names.items():
            style = "--" if name.startswith(("vllm", "cudnn")) else "-"
            axis.plot(*zip(*sorted(points.items())), style, marker="o", ms=3, label=name)
        axis.set(xscale="log", title=mask, xlabel="tokens of a sequence")
        axis.set_xticks([1024, 2048, 4096, 8192, 16384], ["1k", "2k", "4k", "8k", "16k"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("TFLOP/s")
    axes[0].set_ylim(bottom=0)
    gpu = reports[0]["machine"]["gpu"]
    figure.suptitle(f"prefill, 16384 tokens in all, H 16, KV 16, D 128: {gpu}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=4, fontsize=8)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.savefig(out, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("reports", type=Path, nargs="+")
    arguments = parser.parse_args()
    draw([json.loads(path.read_text()) for path in arguments.reports], arguments.out)


if __name__ == "__main__":
    main()
