"""Rows of other libraries in the file of FASTATTN_BENCH_PEERS: merges, and narrow tables.

This needs neither torch nor Paddle.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

#: Prefix of the names of all peers of a library.
FASTDEPLOY, VLLM = "FastDeploy", "vLLM"
Row = dict[str, Any]


def fastdeploy_name(max_model_len: int, same_rope: bool, wrong: str, gathers: bool = False) -> str:
    """Name of FastDeploy as a peer: its max_model_len, which determines its grid, and marks.

    Parameters
    ----------
    max_model_len : int
    same_rope : bool
        Whether it ran the rotary style of the model.
    wrong : str
        Fault of its output; empty if it is right.
    gathers : bool
        Whether prefill used `gqa_rope_write_cache` and vLLM's flash attention.
    """
    marks = ("" if same_rope else ", other rope", ", wrong output" if wrong else "")
    name = f"{FASTDEPLOY} + vLLM's FA3" if gathers else FASTDEPLOY
    return f"{name} {max_model_len // 1024}k{''.join(marks)}"


def step_row(
    model: str, step: str, quants: Iterable[str], peer: str, us: float, **facts: object
) -> Row:
    """A row in the form of `benchmarks.core.peers`: microseconds per layer, and facts."""
    row = {"section": "step", "model": model, "step": step, "quants": list(quants), "peer": peer}
    return {**row, "us": us, **facts}


def is_of(library: str, row: Mapping[str, Any]) -> bool:
    """Whether a row is a step of a library, or its work once per step."""
    section, peer = str(row.get("section", "")), str(row.get("peer", ""))
    return section.startswith("step") and peer.startswith(library)


def merged(
    theirs: Mapping[str, Any], library: str, rows: Iterable[Row], facts: Mapping[str, Any]
) -> Row:
    """A report with these rows in place of the rows of an earlier run.

    Parameters
    ----------
    theirs : mapping
        A report with rows of other libraries; may be empty. Its other fields are kept.
    library : str
        Library whose steps are replaced: FASTDEPLOY or VLLM.
    rows : iterable of dict
        The timed rows.
    facts : mapping
        Facts to keep with the rows, such as what was left out and why.
    """
    kept = [row for row in theirs.get("rows", []) if not is_of(library, row)]
    return {**theirs, "rows": [*kept, *rows], library.lower(): dict(facts)}


def write_merged(
    path: Path, library: str, rows: Iterable[Row], facts: Mapping[str, Any]
) -> None:  # fmt: skip
    """Merge rows into a file, which need not exist; see :func:`merged`."""
    theirs = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(merged(theirs, library, rows, facts), indent=1) + "\n")


def write_section(
    path: Path, section: str, rows: Iterable[Row], facts: Mapping[str, Any]
) -> None:  # fmt: skip
    """Replace a section's rows in a file, which need not exist. `facts` are kept with them."""
    theirs = json.loads(path.read_text()) if path.exists() else {}
    kept = [row for row in theirs.get("rows", []) if row.get("section") != section]
    merged = {**theirs, "rows": [*kept, *rows], section: dict(facts)}
    path.write_text(json.dumps(merged, indent=1) + "\n")


def replaced(theirs: Mapping[str, Any], rows: Iterable[Row]) -> Row:
    """A report with these rows in place of the rows with the same section, peer and shape.

    Parameters
    ----------
    theirs : mapping
        A report; may be empty. Its other fields and rows are kept.
    rows : iterable of dict
        The timed rows: section, peer, the fields of a shape, and `us`.
    """
    new = [dict(row) for row in rows]
    shapes = [{name: value for name, value in row.items() if name != "us"} for row in new]
    kept = [
        row
        for row in theirs.get("rows", [])
        if not any(all(row.get(name) == x for name, x in shape.items()) for shape in shapes)
    ]
    return {**theirs, "rows": [*kept, *new]}


def compact(rows: Iterable[Row], library: str) -> list[str]:
    """Lines of a narrow table of a library's rows: all steps and peers of a model and type."""
    cells: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in rows:
        if row["section"] == "step" and is_of(library, row):
            steps = cells.setdefault((row["model"], row["quants"][0]), {})
            mark = "!" if row.get("wrong") else ""
            steps.setdefault(row["step"], []).append(f"{row['us']:.1f}{mark}")
    return [
        f"{model:18s} {quant:14s} "
        + " | ".join(f"{step.split(' x ')[0]}: {'/'.join(us)}" for step, us in steps.items())
        for (model, quant), steps in cells.items()
    ]
