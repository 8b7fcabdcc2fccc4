#!/usr/bin/env python3
"""Draws the bandwidth that decode reaches over the context, from a JSON file of the benchmark.

scripts/plot_decode.py docs/benchmarks/h100-attention-2026-11-21.json OUT.png
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

_SHAPE = re.compile(r"^decode (\w+) B (\d+) ctx (\d+) H 32/8 D 128$")
_FLOOR = "reading as many bytes"


def curves(rows: list[dict[str, Any]]) -> dict[str, dict[int, dict[int, float]]]:
    """Fraction of the read-only bandwidth: name -> batch -> context -> fraction."""
    found: dict[str, dict[int, dict[int, float]]] = {}
    floors = {row["shape"]: row["peer_us"] for row in rows if row["peer"] == _FLOOR}
    for row in rows:
        match = _SHAPE.match(row["shape"])
        if not match:
            continue
        kind, batch, context = match[1], int(match[2]), int(match[3])
        ours = row["peer"] == _FLOOR
        us = row["us"] if ours else row["peer_us"]
        name = kind if ours else f"{row['peer']} (same bytes as {kind})"
        found.setdefault(name, {}).setdefault(batch, {})[context] = floors[row["shape"]] / us
    return found


def draw(report: dict[str, Any], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = curves(report["rows"])
    batches = [1, 16, 64, 128]
    figure, axes = plt.subplots(1, len(batches), figsize=(15, 4.2), sharey=True)
    for axis, batch in zip(axes, batches):
        for name, of_batch in found.items():
            points = sorted(of_batch.get(batch, {}).items())
            if points:
                peer = "same bytes" in name
                axis.plot(*zip(*points), "--" if peer else "-", marker="o", ms=3, label=name)
        axis.set(xscale="log", title=f"batch {batch}", xlabel="context", ylim=(0, 1.05))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("of the read-only bandwidth")
    figure.suptitle(f"paged decode, H 32, KV 8, D 128, page 64: {report['machine']['gpu']}")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="lower center", ncol=4, fontsize=8)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(out, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    draw(json.loads(arguments.report.read_text()), arguments.out)


if __name__ == "__main__":
    main()
