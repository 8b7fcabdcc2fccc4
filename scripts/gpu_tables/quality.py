"""What cache types cost real models, from reports of ``python -m fastattn evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpu_tables.results import NONE, Results, grid

_HEAD = ("K and V", "bits a value", "loss of perplexity, %", "KL, nats", "same top-1, %")


def _error(value: float | None) -> str:
    return "" if value is None else f" +- {value:.2f}"


def _line(row: dict[str, Any], values: int) -> list[str]:
    """A row; `values` is how many numbers of K and V a token has."""
    name, plus, rest = row["name"].partition("+")
    size = row["bytes_per_token"]
    shown = f"`{name}`{plus.replace('+', ', ')}{rest.replace('+', ', ')}"
    if size is None:  # the model in fp32
        shown = row["name"]
    return [
        f"**{shown}**" if row["default"] and name != "none" else shown,
        NONE if size is None else f"{8 * size / values:.2f}",
        f"{row['loss_percent']:+.2f}{_error(row['loss_error'])}",
        f"{row['divergence']:.1e}",
        f"{row['top1_percent']:.1f}",
    ]


def _table(results: Results, model: str) -> str:
    path = Path(results.folder) / f"quality-{model}.json"
    if not path.exists():
        return grid(_HEAD, [[NONE] * len(_HEAD)])
    report = json.loads(path.read_text(encoding="utf-8"))
    heads, kv_heads, dim = report["model"]["heads"]
    values = report["model"]["layers"] * 2 * kv_heads * dim
    text, base = report["text"], report["rows"][0]
    about = (
        f"{report['model']['file']}: {report['model']['layers']} layers, heads {heads}/{kv_heads} "
        f"of {dim}; {text['tokens']} tokens in {text['windows']} windows of {text['window']}; "
        f"perplexity with a 16-bit cache {base['perplexity']:.3f}. "
        f"[{path.stem}](ROOT/benchmarks/results/{path.name})"
    )
    return grid(_HEAD, (_line(row, values) for row in report["rows"])) + "\n\n" + about + "."


def smollm2(results: Results) -> str:
    """Rows of SmolLM2-135M."""
    return _table(results, "smollm2")


def gemma3(results: Results) -> str:
    """Rows of Gemma 3 270M."""
    return _table(results, "gemma3-270m")
