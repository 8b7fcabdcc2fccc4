"""Decode context parallelism: a step over a cache that two and more ranks share, beside one rank.

Each rank is a process of its own, on a GPU of its own (:mod:`benchmarks.cases.dcp_rank`). A
row's time is that of the slowest rank, gathering and merging included.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import paddle

from benchmarks.core.devices import Device
from benchmarks.core.processes import run_group
from benchmarks.core.rows import Row, register

ONE = "one rank"


def group_sizes(device: Device) -> tuple[int, ...]:
    """Two processes of a CPU; on GPUs 2, 4 and 8 as far as there are as many."""
    if device.kind == "cpu":
        return (2,)
    return tuple(n for n in (2, 4, 8) if n <= paddle.device.cuda.device_count())


@register("dcp")
def dcp(device: Device) -> Iterator[Row]:
    """Decode, drafts and chunks of a prompt over long contexts, of two cache types."""
    for ranks in group_sizes(device):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            run_group(
                "benchmarks.cases.dcp_rank",
                *(name, device.kind, "quick" if device.quick else "all"),
                world_size=ranks,
                logs=folder,
                backend="nccl" if device.kind == "gpu" else "gloo",
                timeout=600,
            )
            of_ranks = [json.loads((folder / f"{r}.json").read_text("utf-8")) for r in range(ranks)]
        for cells in zip(*of_ranks):
            us, one_us = (max(cell[key] for cell in cells) for key in ("us", "one_us"))
            shape = f"{cells[0]['shape']}, {ranks} ranks, {cells[0]['how']}"
            yield Row("paged_attention_dcp", shape, us, peer=ONE, peer_us=one_us)
