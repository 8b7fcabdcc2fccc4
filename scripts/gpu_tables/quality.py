"""What cache types cost real models, from reports of ``python -m fastattn evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpu_tables.results import NONE, Results, grid

_HEAD = ("K and V", "bits a value", "loss of perplexity, %", "KL, nats", "same top-1, %")
_NEEDLES = ("K and V", "bits a value", "facts repeated, %", "loss of the answers, nats")


def _error(value: float | None) -> str:
    return "" if value is None else f" +- {value:.2f}"


def _name(row: dict[str, Any]) -> str:
    """The type as code, then what is done to K; bold where that is the default."""
    if row["name"].startswith("calibrate"):
        return f"`{row['name']}`"
    kind, _, rest = row["name"].partition("+")
    if row["bytes_per_token"] is None:  # the model in fp32
        return row["name"]
    shown = f"`{kind}`" + "".join(f", {word}" for word in rest.split("+") if word)
    return f"**{shown}**" if row["default"] and kind != "none" else shown


def loss(row: dict[str, Any]) -> str:
    """Loss of perplexity with its standard error."""
    return f"{row['loss_percent']:+.2f}{_error(row['loss_error'])}"


def _bits(report: dict[str, Any], row: dict[str, Any]) -> str:
    """Bits of a number of K or V, scales included."""
    _, kv_heads, dim = report["model"]["heads"]
    size, values = row["bytes_per_token"], report["model"]["layers"] * 2 * kv_heads * dim
    return NONE if size is None else f"{8 * size / values:.2f}"


def read(results: Results, name: str) -> dict[str, Any] | None:
    """A report, or None if there is none."""
    path = Path(results.folder) / "quality" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def link(name: str) -> str:
    """A link to a report."""
    return f"[{name}.json](ROOT/benchmarks/results/quality/{name}.json)"


def _table(results: Results, name: str) -> str:
    report = read(results, name)
    if report is None:
        return grid(_HEAD, [[NONE] * len(_HEAD)])
    heads, kv_heads, dim = report["model"]["heads"]
    text = report["text"]
    about = (
        f"{report['model']['file']}: {report['model']['layers']} layers, heads {heads}/{kv_heads} "
        f"of {dim}. {text['tokens']} tokens in {text['windows']} windows of {text['window']}; "
        f"perplexity with a 16-bit cache {report['rows'][0]['perplexity']:.3f}. The file with its "
        f"command: {link(name)}."
    )
    lines = [
        [
            _name(row),
            _bits(report, row),
            loss(row),
            f"{row['divergence']:.1e}",
            f"{row['top1_percent']:.1f}",
        ]
        for row in report["rows"]
    ]
    return about + "\n\n" + grid(_HEAD, lines)


def smollm2(results: Results) -> str:
    """Rows of SmolLM2-135M."""
    return _table(results, "smollm2")


def gemma3(results: Results) -> str:
    """Rows of Gemma 3 270M."""
    return _table(results, "gemma3-270m")


def smollm2_feedback(results: Results) -> str:
    """Rows of SmolLM2-135M whose V is rotated by the weights."""
    return _table(results, "smollm2-feedback")


def gemma3_feedback(results: Results) -> str:
    """The same of Gemma 3 270M."""
    return _table(results, "gemma3-270m-feedback")


def smollm2_mix(results: Results) -> str:
    """SmolLM2-135M with types of its own for each layer."""
    return _table(results, "smollm2-mix")


def gemma3_mix(results: Results) -> str:
    """Gemma 3 270M with types of its own for each layer."""
    return _table(results, "gemma3-270m-mix")


def smollm2_gpu(results: Results) -> str:
    """Rows of SmolLM2-135M with caches and attention on an H100."""
    return _table(results, "smollm2-h100")


def both(results: Results) -> str:
    """Defaults of each type, and 4 bits at their best, on both models: for the README.

    The last row is of other reports, whose base has V rotated, too.
    """
    head = ("K and V", "SmolLM2-135M, % more perplexity", "Gemma 3 270M, % more perplexity")
    reports = [read(results, name) for name in ("smollm2", "gemma3-270m")]
    rows = [{row["name"]: row for row in report["rows"]} for report in reports if report]
    if len(rows) < 2:
        return grid(head, [[NONE] * len(head)])
    lines = [
        [_name({**row, "default": False}), *(loss(of_model[name]) for of_model in rows)]
        for name, row in rows[0].items()
        if row["default"] and row["bytes_per_token"] and name in rows[1] and name != "none"
    ]
    best = "block_wise_int4+center+hadamard+feedback"
    others = [read(results, f"{name}-feedback") for name in ("smollm2", "gemma3-270m")]
    found = [row for report in others if report for row in report["rows"] if row["name"] == best]
    if len(found) == 2:
        lines.append([f"{_name(found[0])}, V rotated", *map(loss, found)])
    return grid(head, lines)


def needles(results: Results) -> str:
    """Facts that SmolLM2-135M repeats after a long text."""
    report = read(results, "smollm2-needles")
    if report is None:
        return grid(_NEEDLES, [[NONE] * len(_NEEDLES)])
    lines = [
        [
            _name(row),
            _bits(report, row),
            f"{100 * found['recalled']:.0f}",
            f"{found['loss']:.3f}",
        ]
        for row in report["rows"]
        for found in row["needles"].values()
    ]
    lengths = ", ".join(report["rows"][0]["needles"])
    about = f"Eight facts in a text of {lengths} tokens. {link('smollm2-needles')}."
    return about + "\n\n" + grid(_NEEDLES, lines)
