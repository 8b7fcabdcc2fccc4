#!/usr/bin/env python3
"""Time FastDeploy's attention operators at the steps of `python -m fastattn bench --op step`.

    scripts/fastdeploy_peers/time_step.py --library DIR/libfastdeploy_peers.so --out peers.json

Needs a Hopper GPU, torch with CUDA, and the library that `scripts/build_fastdeploy_peers.py` makes;
no Paddle. A layer's time is one call of `append_attention_with_output`: rotation, cache write,
attention and merging of its chunks, in a CUDA graph of as many layers as the benchmark has. Rows
are merged into the file, which may hold those of other libraries; name it in FASTATTN_BENCH_PEERS.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import check
import report
import torch
from library import BLOCK, Cache, Library, Shape, Step


class Model(NamedTuple):
    """What a rank has of a layer, as in `fastattn.bench.cases.step`."""

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
QUANTS = ("cache_fp8", "block_wise_fp8", "cache_int8", "none")
CONTEXT = 8192
#: Name of a step -> (cached, new, in prefill) of each sequence.
STEPS = {
    **{f"decode {batch} x 8k": [(CONTEXT - 1, 1, False)] * batch for batch in (1, 16, 64, 128)},
    "2048 behind 6144 + 32 x 8k": [(6144, 2048, True), *[(CONTEXT - 1, 1, False)] * 32],
}
MAX_MODEL_LENS = (32768, CONTEXT)
LAYER_BYTES, MOST_LAYERS = 8e8, 48
REPLAYS = 15
Call = Callable[[], None]
#: Model and cache type -> relative error of each step that was checked.
Checks = dict[str, dict[str, float]]


def graph_us(calls: list[Call]) -> float:
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


def filled_cache(shape: Shape, blocks: int) -> Cache:
    """A cache of random bytes that stand for finite numbers below 2, or of normal numbers."""
    size = (blocks, shape.kv, BLOCK, shape.dim)
    if shape.quant == "none":
        key, value = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        return Cache(key, value)
    key, value = (torch.randint(0, 256, size, device="cuda", dtype=torch.uint8) for _ in range(2))
    if shape.quant != "cache_int8":
        key &= 0xBF
        value &= 0xBF
    scales = (blocks, shape.kv, BLOCK) if shape.quant == "block_wise_fp8" else (shape.kv,)
    small, large = (
        torch.full(scales, x, device="cuda", dtype=torch.bfloat16) for x in (0.02, 50.0)
    )
    if shape.quant == "block_wise_fp8":
        return Cache(key, value, (small, small.clone()))
    return Cache(key, value, (large, large), (small, small))


def make_tables(lengths: list[int], max_model_len: int) -> tuple[torch.Tensor, int]:
    """Tables of blocks in random order with two spare columns; the number of blocks."""
    counts = [-(-length // BLOCK) for length in lengths]
    order = torch.randperm(sum(counts), device="cuda").int()
    shape = (len(counts), max_model_len // BLOCK + 2)
    tables = torch.full(shape, -1, dtype=torch.int32, device="cuda")
    for row, part in zip(tables, order.split(counts)):
        row[: len(part)] = part
    return tables, sum(counts)


def times(
    library: Library, model: Model, quant: str, neox: bool, sequences: list[tuple[int, int, bool]]
) -> dict[int, float]:
    """Microseconds of a layer's step for each max_model_len."""
    found = {}
    caches: list[Cache] = []
    lengths = [cached + new for cached, new, _ in sequences]
    for longest in MAX_MODEL_LENS:
        shape = Shape(model.heads, model.kv, model.dim, quant, neox, model.rope_3d, longest)
        tables, blocks = make_tables(lengths, longest)
        width = 2 if quant == "none" else 1
        of_layer = 2 * blocks * BLOCK * model.kv * model.dim * width
        layers = int(min(max(LAYER_BYTES / of_layer, 1), MOST_LAYERS))
        caches = caches or [filled_cache(shape, blocks) for _ in range(layers)]
        step = Step(sequences, tables, model.heads // model.kv, longest)
        columns = (model.heads + 2 * model.kv) * model.dim
        qkv = [
            torch.randn(step.tokens, columns, device="cuda", dtype=torch.bfloat16) for _ in range(4)
        ]
        out = torch.empty(step.tokens, model.heads * model.dim, device="cuda", dtype=torch.bfloat16)
        rotary = check.rotary_table(shape, len(sequences), longest)
        sinks = torch.rand(model.heads, device="cuda").bfloat16() if model.sinks else None
        library.split_blocks(step, model.heads // model.kv)

        append = functools.partial(library.append_attention, step, shape)
        calls = [
            functools.partial(append, qkv[i % 4], cache, out, rotary, sinks)
            for i, cache in enumerate(caches)
        ]
        found[longest] = graph_us(calls)
    return found


def preparation(library: Library, model: Model, name: str) -> report.Row:
    """What a step costs once for all layers: in a graph, and on the host with its blocking copies.

    The host's time is that of the stand-in's copies, not Paddle's.
    """
    lengths = [cached + new for cached, new, _ in STEPS[name]]
    tables, _ = make_tables(lengths, CONTEXT)
    group = model.heads // model.kv
    step = Step(STEPS[name], tables, group, CONTEXT)
    library.split_blocks(step, group)
    on_host = []
    for _ in range(20):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        library.split_blocks(step, group)
        on_host.append((time.perf_counter() - begin) * 1e6)
    us = None
    if "decode" in name:  # a step with prefill copies to the host, which a graph cannot hold
        us = graph_us([lambda: library.split_blocks(step, group)])
    return {
        "section": "step preparation",
        "step": name,
        "peer": "FastDeploy get_block_shape_and_split_kv_block",
        "us": us,
        "host_us": statistics.median(on_host),
    }


def model_rows(
    library: Library, name: str, quant: str, left_out: dict[str, str], checks: Checks
) -> Iterator[report.Row]:
    """Rows of a model and cache type whose outputs are right."""
    model, what = MODELS[name], f"{name} {quant}"
    # The writer of this pair stores INT8 codes in an FP8 cache: outputs are not finite.
    neox = model.neox and quant != "cache_fp8"
    shape = Shape(model.heads, model.kv, model.dim, quant, neox, model.rope_3d, CONTEXT)
    found = checks[what] = check.errors(library, shape, model.sinks)
    for step, sequences in STEPS.items():
        names = ("decode", "next decode") if step.startswith("decode") else ("prefill", "mixed")
        error = max(found[n] if math.isfinite(found[n]) else math.inf for n in names)
        if error > check.BOUNDS[quant]:
            left_out[f"{what} {step}"] = f"wrong output: relative error {error:.3g}"
            continue
        timed = times(library, model, quant, neox, sequences)
        torch.cuda.empty_cache()
        for longest, us in timed.items():
            peer = report.peer_name(longest, neox, model.neox)
            yield report.step_row(name, step, quant, peer, us)


def all_rows(library: Library, left_out: dict[str, str], checks: Checks) -> Iterator[report.Row]:
    """Every row; what is not timed goes to `left_out`, errors against float64 to `checks`."""
    for name, model in MODELS.items():
        for quant in QUANTS:
            if quant != "none" and model.dim != 128:
                why = "FastDeploy's 8-bit kernels have a head dimension of 128 only"
                left_out[f"{name} {quant}"] = why
                continue
            try:
                yield from model_rows(library, name, quant, left_out, checks)
            except RuntimeError as error:  # of the operator, or of CUDA
                left_out[f"{name} {quant}"] = str(error)[:200]
    for step in STEPS:
        yield preparation(library, MODELS["Qwen3-8B"], step)


def main() -> None:
    """Time and print from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, required=True, help="libfastdeploy_peers.so")
    parser.add_argument("--out", type=Path, required=True, help="file to merge rows into")
    arguments = parser.parse_args()
    library = Library(arguments.library)
    left_out: dict[str, str] = {}
    checks: Checks = {}
    rows = []
    for row in all_rows(library, left_out, checks):
        rows.append(row)
        report.write_merged(arguments.out, rows, left_out, checks)
    for what, found in checks.items():
        print(f"error {what:32s}", {k: f"{v:.2%}" for k, v in found.items()})
    print("\n".join(report.compact(rows)))
    for row in rows:
        if row["section"] != "step":
            us = "" if row["us"] is None else f"{row['us']:.1f} us, "
            print(f"{row['peer']}, {row['step']}: {us}host {row['host_us']:.1f} us")
    for what, why in left_out.items():
        print(f"left out: {what}: {why}")


if __name__ == "__main__":
    main()
