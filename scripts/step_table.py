#!/usr/bin/env python3
"""The table of layer steps in docs/gpu.md, in markdown, from a report of `bench --op step`.

    scripts/step_table.py benchmarks/results/h100-step.json

A cell has our microseconds in a CUDA graph without lengths on the host, and in parentheses the time
over ours of vLLM's sum of kernels and of FastDeploy's operator with the benchmark's max_model_len.
Marks on FastDeploy's: r, it ran the other rotary style; w, its output is wrong. A dash: no such
row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

#: Name of a step in a report -> heading of its column.
STEPS = {
    "decode 1 x 8k": "1 x 8k",
    "decode 16 x 8k": "16 x 8k",
    "decode 64 x 8k": "64 x 8k",
    "decode 128 x 8k": "128 x 8k",
    "2048 behind 6144 + 32 x 8k": "2048 behind 6144, and 32 x 8k",
}
VLLM, FASTDEPLOY = "vLLM", "FastDeploy 32k"
MARKS = {", other rope": "r", ", wrong output": "w"}
Row = Mapping[str, Any]


def split_shape(shape: str) -> tuple[str, str] | None:
    """Model with cache type, and step, of a row's shape; None of a row that the table leaves out.

    Shapes are those of `fastattn.bench.cases.step`: "MODEL TYPE STEP, graph".
    """
    what, _, how = shape.rpartition(", ")
    step = next((step for step in STEPS if what.endswith(" " + step)), None)
    return None if how != "graph" or step is None else (what[: -len(step) - 1], step)


def cell(rows: Iterable[Row]) -> str:
    """Our time, and the ratios of a step's peers."""
    us, ratios = None, {VLLM: "-", FASTDEPLOY: "-"}
    for row in rows:
        us = row["us"]
        for peer in ratios:
            name = row.get("peer") or ""
            if name.startswith(peer) and row.get("peer_us"):
                marks = "".join(mark for text, mark in MARKS.items() if text in name)
                ratios[peer] = f"{row['peer_us'] / us:.2f}{marks}"
    if us is None:
        return ""
    return f"{us:.{1 if us < 100 else 0}f} ({ratios[VLLM]}, {ratios[FASTDEPLOY]})"


def step_table(rows: Iterable[Row]) -> str:
    """The markdown of all models and cache types in the order of the report."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        parts = split_shape(row["shape"])
        if parts is not None and row["op"] == "layer step":
            found.setdefault(parts[0], {}).setdefault(parts[1], []).append(row)
    head = "us (of vLLM's sum, of FastDeploy's operator; above 1 is faster)"
    lines = ["| " + " | ".join((head, *STEPS.values())) + " |", "|---" * (len(STEPS) + 1) + "|"]
    for what, steps in found.items():
        model, _, quant = what.rpartition(" ")
        cells = (cell(steps.get(step, ())) for step in STEPS)
        lines.append("| " + " | ".join((f"{model}, `{quant}`", *cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="JSON of python -m fastattn bench --op step")
    print(step_table(json.loads(parser.parse_args().report.read_text())["rows"]))


if __name__ == "__main__":
    main()
