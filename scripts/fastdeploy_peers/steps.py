"""Models and steps of `python -m fastattn bench --op step`, and how a layer's step is timed there.

For programs that time other libraries in torch; a test holds this to `benchmarks.cases.step`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch


class Model(NamedTuple):
    """What a rank has of a layer, as in `benchmarks.cases.layers`."""

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
#: Longest sequence that the benchmark's server takes.
MAX_MODEL_LEN = 32768
#: Tokens of a block of the cache.
BLOCK = 64
#: Name of a step -> (cached, new, in prefill) of each sequence.
STEPS = {
    **{f"decode {batch} x 8k": [(CONTEXT - 1, 1, False)] * batch for batch in (1, 16, 64, 128)},
    "2048 behind 6144 + 32 x 8k": [(6144, 2048, True), *[(CONTEXT - 1, 1, False)] * 32],
}
LAYER_BYTES, MOST_LAYERS = 8e8, 48
REPLAYS = 15


def layer_count(bytes_of_layer: int) -> int:
    """Layers whose caches exceed the L2 cache together, as the benchmark counts them."""
    return int(min(max(LAYER_BYTES / bytes_of_layer, 1), MOST_LAYERS))


def block_tables(lengths: list[int], spare: int, width: int = 0) -> tuple[torch.Tensor, int]:
    """Blocks of sequences in random order, and how many there are.

    Parameters
    ----------
    lengths : list of int
        Tokens of each sequence.
    spare : int
        What stands where a sequence has no block.
    width : int
        Columns, int32; as many as the longest sequence needs if 0.
    """
    counts = [-(-length // BLOCK) for length in lengths]
    order = torch.randperm(sum(counts), device="cuda").int()
    shape = (len(counts), width or max(counts))
    tables = torch.full(shape, spare, dtype=torch.int32, device="cuda")
    for row, part in zip(tables, order.split(counts)):
        row[: len(part)] = part
    return tables, sum(counts)


def graph_us(calls: list[Callable[[], object]]) -> float:
    """Median microseconds of a call, from replays of a CUDA graph of all of them."""
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
