"""The rows that a committed plot is drawn from: peers corrected, and named with their caveats."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from gpu_tables.peers import EMPTY_US, Peer, alike, corrected, declared, is_hidden

#: Start of a peer's name -> a name for a legend where its label is too long for one.
_SHORT = {
    "vllm reshape": "vLLM",
    "vllm reshape_and_cache_flash": "vLLM",
    "vllm rope": "vLLM, 2 kernels",
}


def committed(path: Path) -> dict[str, Any]:
    """A file of results as the last commit has it.

    Raises
    ------
    ValueError
        If the file is not committed, or differs from the commit.
    """
    git = ["git", "-C", str(path.parent)]
    held = subprocess.run(
        [*git, "show", f"HEAD:./{path.name}"], capture_output=True, check=False, text=True
    )
    if held.returncode or held.stdout != path.read_text(encoding="utf-8"):
        raise ValueError(f"{path}: plots are drawn from committed rows only: commit it first")
    report: dict[str, Any] = json.loads(held.stdout)
    return report


def _label(peer: Peer, op: str) -> str:
    """Name of a peer in a legend."""
    told = []
    if peer.keys == "contiguous" and "contiguous" not in peer.label:
        told.append("contiguous")
    told += ["one level"] * (peer.levels == 1) + [f"{peer.output} output"] * bool(peer.output)
    told += [f"{peer.queries} queries"] * bool(peer.queries)
    told += ["e4m3 products"] * any("e4m3 products" in text for text in peer.differs)
    told += ["without LSE"] * any("no LSE" in text for text in peer.differs)
    empty = f"less {EMPTY_US} us"
    told += [
        f"launched alike in another run, or {empty}" if op == "paged_mqa_logits" else empty
    ] * peer.has_empty
    told += ["2 kernels"] * any("two kernels" in text for text in peer.differs)
    label = _SHORT.get(peer.start, peer.label.replace("`", ""))
    return f"{label} ({', '.join(told)})" if told else label


def prepared(report: dict[str, Any]) -> dict[str, Any]:
    """A report whose peers have corrected times and say what they do; others are left out.

    Left out are peers of other work, times with the host in them, and slower peers beside such a
    time. Where both sides were also launched alike, the peer's time follows from that.
    """
    times: dict[tuple[str, str], dict[str, float]] = {}
    for row in report["rows"]:
        if row.get("peer"):
            times.setdefault((row["op"], row["shape"]), {})[row["peer"]] = row["peer_us"]
    return {**report, "rows": [_drawn(row, times) for row in report["rows"]]}


def _drawn(row: dict[str, Any], times: dict[tuple[str, str], dict[str, float]]) -> dict[str, Any]:
    op, shape, name = row["op"], row["shape"], row.get("peer") or ""
    peer = declared(op, shape, name) if name else None
    if peer is None:
        return row
    us = corrected(op, shape, name, row["peer_us"])
    if us is None or peer.other_work or is_hidden(op, shape, times[op, shape]):
        return {**row, "peer": "", "peer_us": None}
    ratio = alike(op, shape)
    return {**row, "peer": _label(peer, op), "peer_us": ratio * row["us"] if ratio else us}
