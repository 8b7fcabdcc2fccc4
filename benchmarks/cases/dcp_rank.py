"""The process of one rank of :mod:`benchmarks.cases.dcp`.

``python -m benchmarks.cases.dcp_rank FOLDER gpu|cpu all|quick`` joins the group that the
environment describes and writes its times to ``FOLDER/<rank>.json``.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist

import fastattn.functional as F
from benchmarks.cases.inputs import DIM, HEADS, KV, Cache, Step
from benchmarks.core import cuda
from benchmarks.core.devices import Cpu, Device, Gpu
from benchmarks.core.timing import Call, bind
from fastattn.distributed import (
    dcp_local_keys,
    dcp_stripe_block_tables,
    paged_attention_dcp,
)

TYPES = {"gpu": ("cache_fp8", "block_wise_fp8"), "cpu": ("cache_fp8",)}
ONE = "one"
#: A chunk of a prompt among sequences that decode.
MIXED = (2048, *[1] * 15)
#: Cached tokens of every sequence, and new ones of each.
CELLS = {
    "gpu": (
        (1 << 20, (1,)),
        (1 << 18, (1,)),
        (1 << 16, (1,)),
        (1 << 17, (1,) * 16),
        (1 << 18, (4,)),
        (1 << 16, (4,) * 16),
        (1 << 18, (2048,)),
        (1 << 16, MIXED),
    ),
    "gpu quick": ((1 << 16, (1,)),),
    "cpu": ((1 << 14, (1,)), (1 << 12, (4,))),
    "cpu quick": ((1 << 9, (1,)),),
}
#: Calls of a replayed graph; the same on every rank, as each holds collectives.
CALLS, REPLAYS = 4, 15


def _graph_us(call: Call) -> float:
    """Median microseconds of a call in a CUDA graph."""
    from paddle.device.cuda.graphs import CUDAGraph

    for _ in range(2):  # so that nothing is set up inside the capture
        call()
    paddle.device.cuda.synchronize()
    graph = CUDAGraph()
    graph.capture_begin()
    graph.kept = [call() for _ in range(CALLS)]
    graph.capture_end()
    for _ in range(5):
        graph.replay()
    us = cuda.median_event_us(graph.replay, REPLAYS) / CALLS
    paddle.device.cuda.synchronize()
    graph.reset()
    return us


def _several(call: Call) -> None:
    for _ in range(CALLS):
        call()


def _eager_us(call: Call) -> float:
    """Median microseconds of a call of several, without a graph, by the GPU's clock.

    The GPU is idle before them, so its clock has the host's time wherever that is longer.
    """
    _several(call)
    return cuda.median_event_us(bind(_several, call), REPLAYS) / CALLS


def _host_us(call: Call) -> float:
    """Median microseconds of a call on a CPU."""
    taken = []
    for _ in range(REPLAYS + 2):
        begin = time.perf_counter()
        _several(call)
        taken.append((time.perf_counter() - begin) / CALLS * 1e6)
    return statistics.median(taken[2:])


def _whole(
    device: Device, quant: str, step: Step, q: Any, options: dict[str, Any]
) -> dict[str, Call]:
    cache = Cache(device, quant, step.blocks)
    arguments = (q, *cache.tensors, *step.meta)
    return {ONE: bind(F.paged_attention, *arguments, **cache.options, **options)}


def _shared(
    device: Device, quant: str, step: Step, q: Any, options: dict[str, Any], rank: int, ranks: int
) -> dict[str, Call]:
    """The part of a rank: a cache of stripes, each of them a block on every rank.

    The second call is given the rank's keys, as those of a step's layers are.
    """
    pages = -(-(step.cached + step.new) // 64)
    counts = -(-pages // ranks)
    ids = np.random.default_rng(4).permutation(int(counts.sum()))
    stripes = np.full((len(counts), int(counts.max())), -1)
    stripes[np.arange(counts.max()) < counts[:, None]] = ids
    tables = dcp_stripe_block_tables(stripes, rank, ranks)
    cache = Cache(device, quant, int(counts.sum()))
    seqs = (device.int32(tables), *step.meta[1:])
    most = options["max_seqlen_q"]
    local = dcp_local_keys(*seqs, most, num_tokens=step.tokens, num_blocks=cache.blocks)
    call = bind(paged_attention_dcp, q, *cache.tensors, *seqs, **cache.options, **options)
    return {"": call, ", local_keys given": bind(call, local_keys=local)}


def _shape(quant: str, cached: int, new: tuple[int, ...]) -> str:
    """A cell in words."""
    each = {1: "decode", 4: "4 new tokens"}.get(new[0], f"{new[0]} new tokens")
    if new[0] != new[-1]:
        each += f" and {len(new) - 1} x {new[-1]}"
    return f"{each} {quant} B {len(new)} ctx {cached} H {HEADS}/{KV} D {DIM}"


def _cell(device: Device, quant: str, cached: int, new: tuple[int, ...]) -> list[dict[str, Any]]:
    """Times of a cell, in a CUDA graph where there is a GPU, and of single calls."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    step = Step(device, [cached] * len(new), new)
    q = device.random((step.tokens, HEADS, DIM))
    options = {"max_seqlen_q": max(new), "max_seqlen_k": step.longest}
    # Paddle's current device is no guide: inputs are made on the CPU.
    ways = {"eager": _host_us}
    if device.kind == "gpu":
        ways = {"eager": _eager_us, "graph": _graph_us}
    makers: tuple[Callable[[], dict[str, Call]], ...] = (
        bind(_whole, device, quant, step, q, options),
        bind(_shared, device, quant, step, q, options, rank, ranks),
    )
    times: dict[str, dict[str, float]] = {}
    for make in makers:
        calls = make()
        for name, call in calls.items():
            times[name] = {how: measure(call) for how, measure in ways.items()}
        del calls, call
        gc.collect()
        if device.kind == "gpu":
            paddle.device.cuda.empty_cache()
    one, shape = times.pop(ONE), _shape(quant, cached, new)
    return [
        {"shape": shape, "how": how + name, "one_us": one[how], "us": of_ranks[how]}
        for how in ways
        for name, of_ranks in times.items()
    ]


def main(folder: str, kind: str, extent: str) -> None:
    """Measure all cells and write them."""
    paddle.set_device(kind)
    dist.init_parallel_env()
    device = (Gpu if kind == "gpu" else Cpu)(extent == "quick")
    cells = [
        row
        for quant in device.of(TYPES)
        for cell in device.of(CELLS)
        for row in _cell(device, quant, *cell)
    ]
    path = Path(folder) / f"{dist.get_rank()}.json"
    path.write_text(json.dumps(cells), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
