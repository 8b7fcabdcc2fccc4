"""Rows of FastDeploy's operators in the file that FASTATTN_BENCH_PEERS names: merge and table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

#: Start of the name of every peer that is timed here.
LIBRARY = "FastDeploy append_attention"
Row = dict[str, Any]


def peer_name(max_model_len: int, neox: bool, asked_neox: bool) -> str:
    """Name of a peer: its max_model_len sets its grid; the rope that it ran if not the model's."""
    other = "" if neox == asked_neox else ", interleaved rope"
    return f"{LIBRARY}, max_model_len {max_model_len // 1024}k{other}"


def step_row(model: str, step: str, quant: str, peer: str, us: float) -> Row:
    """A row as `fastattn.bench.core.peers` reads it: microseconds of one layer."""
    return {
        "section": "step",
        "model": model,
        "step": step,
        "quants": [quant],
        "peer": peer,
        "us": us,
    }


def merged(
    theirs: Mapping[str, Any],
    rows: Iterable[Row],
    left_out: Mapping[str, str],
    errors: Mapping[str, Any],
) -> Row:
    """Another report with these rows in place of the ones that an earlier run put there.

    Parameters
    ----------
    theirs : mapping
        A report, of vLLM's kernels for example; may be empty. Its other fields are kept.
    rows : iterable of dict
        What was timed now.
    left_out : mapping
        What was not timed -> why.
    errors : mapping
        Model and cache type -> relative RMS error of each step that was checked.
    """
    kept = [row for row in theirs.get("rows", []) if not is_ours(row)]
    facts = {"left_out": dict(left_out), "errors": dict(errors)}
    return {**theirs, "rows": [*kept, *rows], "fastdeploy": facts}


def is_ours(row: Mapping[str, Any]) -> bool:
    """Whether a row is of FastDeploy's operators."""
    return str(row.get("peer", "")).startswith("FastDeploy")


def write_merged(
    path: Path, rows: Iterable[Row], left_out: Mapping[str, str], errors: Mapping[str, Any]
) -> None:
    """Merge rows into a file, which need not exist; see :func:`merged`."""
    theirs = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(merged(theirs, rows, left_out, errors), indent=1) + "\n")


def table(rows: Iterable[Row]) -> list[str]:
    """Lines of a table: for each model, cache type and step all peers' microseconds, best first.

    Rows of other sections are not shown. A row with several cache types appears under each.
    """
    cells: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["section"] != "step":
            continue
        for quant in row["quants"]:
            steps = cells.setdefault((row["model"], quant), {})
            steps.setdefault(row["step"], {})[row["peer"]] = row["us"]
    lines = []
    for (model, quant), steps in cells.items():
        lines.append(f"{model}, {quant}")
        for step, peers in steps.items():
            best = sorted(peers.items(), key=lambda peer: peer[1])
            lines.append(f"  {step:28s} " + "; ".join(f"{us:.1f} {name}" for name, us in best))
    return lines


def compact(rows: Iterable[Row]) -> list[str]:
    """Lines of a narrow table of FastDeploy's rows: all steps and peers of a model and type."""
    cells: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in rows:
        if row["section"] == "step" and is_ours(row):
            steps = cells.setdefault((row["model"], row["quants"][0]), {})
            steps.setdefault(row["step"], []).append(f"{row['us']:.1f}")
    return [
        f"{model:18s} {quant:14s} "
        + " | ".join(f"{step.split(' x ')[0]}: {'/'.join(us)}" for step, us in steps.items())
        for (model, quant), steps in cells.items()
    ]
