"""Models and steps of `python -m fastattn bench --op step`, and its method to time a layer.

Programs that time other libraries in torch use it. A test compares this file with
`benchmarks.cases.step`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch


class Model(NamedTuple):
    """A rank's part of a layer, as in `benchmarks.cases.layers`."""

    heads: int
    kv: int
    dim: int
    neox: bool = False
    sinks: bool = False
    rope_3d: bool = False


MODELS = {
    "Qwen3-8B": Model(32, 8, 128, neox=True),
    "ERNIE-4.5-300B TP8": Model(8, 1, 128),
    "gpt-oss-120b": Model(64, 8, 64, neox=True, sinks=True),
    "PaddleOCR-VL": Model(16, 2, 128, neox=True, rope_3d=True),
}
CONTEXT = 8192
#: Longest sequence of the benchmark's server.
MAX_MODEL_LEN = 32768
#: Number of tokens of a cache block.
BLOCK = 64
#: Name of a step -> (cached, new, in prefill) of each sequence.
STEPS = {
    **{f"decode {batch} x 8k": [(CONTEXT - 1, 1, False)] * batch for batch in (1, 16, 64, 128)},
    "2048 behind 6144 + 32 x 8k": [(6144, 2048, True), *[(CONTEXT - 1, 1, False)] * 32],
}
LAYER_BYTES, MOST_LAYERS = 8e8, 48
REPLAYS = 15


def layer_count(bytes_of_layer: int) -> int:
    """Number of layers whose caches together exceed the L2 cache, as in the benchmark."""
    return int(min(max(LAYER_BYTES / bytes_of_layer, 1), MOST_LAYERS))


def block_tables(lengths: list[int], spare: int, width: int = 0) -> tuple[torch.Tensor, int]:
    """Blocks of sequences in random order, and their number.

    Parameters
    ----------
    lengths : list of int
        Number of tokens of each sequence.
    spare : int
        Entry for a position without a block.
    width : int
        Number of columns, int32; 0 means as many as the longest sequence needs.
    """
    counts = [-(-length // BLOCK) for length in lengths]
    order = torch.randperm(sum(counts), device="cuda").int()
    shape = (len(counts), width or max(counts))
    tables = torch.full(shape, spare, dtype=torch.int32, device="cuda")
    for row, part in zip(tables, order.split(counts)):
        row[: len(part)] = part
    return tables, sum(counts)


def graph_us(calls: list[Callable[[], object]]) -> float:
    """Median microseconds of a call, from replays of a CUDA graph of all calls."""
    calls = calls * max(1, -(-10 // len(calls)))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:3]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    spent = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        spent.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(spent)
