#!/usr/bin/env python3
"""Time FastDeploy's attention operators at the steps of `python -m fastattn bench --op step`.

    scripts/fastdeploy_peers/time_step.py --library DIR/libfastdeploy_peers.so --out peers.json

The script needs a Hopper GPU, torch with CUDA, and the library from
`scripts/build_fastdeploy_peers.py`, but no Paddle. A layer's time is one call of
`append_attention_with_output`: rotation, cache write, attention and merge of its chunks, in a CUDA
graph with as many layers as the benchmark. With vLLM's FlashAttention-3 (`--vllm`, or
`--peers FILE` as for `scripts/vllm_step_peers.py`), steps with prefill are timed a second time, as
FastDeploy's FLASH_ATTN backend runs them (`prefill.py`). Rows are merged into the file, which may
have rows of other libraries; name it in FASTATTN_BENCH_PEERS.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import check
import prefill
import report
import torch
from library import Cache, Library, Shape, Step
from steps import (
    BLOCK,
    CONTEXT,
    MAX_MODEL_LEN,
    MODELS,
    STEPS,
    Model,
    block_tables,
    graph_us,
    layer_count,
)  # fmt: skip
from vllm_operators import load_operators

QUANTS = ("cache_fp8", "block_wise_fp8", "cache_int8", "none")
MAX_MODEL_LENS = (MAX_MODEL_LEN, CONTEXT)
#: Model and cache type -> errors of each checked step.
Checks = dict[str, dict[str, check.Found]]


def filled_cache(shape: Shape, blocks: int) -> Cache:
    """A cache of random bytes, which are finite numbers below 2, or of normal numbers."""
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


def times(
    library: Library,
    model: Model,
    quant: str,
    neox: bool,
    sequences: list[tuple[int, int, bool]],
    gathers: bool = False,
) -> dict[int, float]:
    """Microseconds of a layer's step for each max_model_len; with `gathers`, of `prefill.run`."""
    found = {}
    caches: list[Cache] = []
    lengths = [cached + new for cached, new, _ in sequences]
    for longest in MAX_MODEL_LENS:
        shape = Shape(model.heads, model.kv, model.dim, quant, neox, model.rope_3d, longest)
        tables, blocks = block_tables(lengths, -1, longest // BLOCK + 2)
        width = 2 if quant == "none" else 1
        of_layer = 2 * blocks * BLOCK * model.kv * model.dim * width
        caches = caches or [filled_cache(shape, blocks) for _ in range(layer_count(of_layer))]
        step = Step(sequences, tables, model.heads // model.kv, longest)
        columns = (model.heads + 2 * model.kv) * model.dim
        qkv = [
            torch.randn(step.tokens, columns, device="cuda", dtype=torch.bfloat16) for _ in range(4)
        ]
        out = torch.empty(step.tokens, model.heads * model.dim, device="cuda", dtype=torch.bfloat16)
        rotary = check.rotary_table(shape, len(sequences), longest)
        sinks = torch.rand(model.heads, device="cuda").bfloat16() if model.sinks else None
        library.split_blocks(step, model.heads // model.kv)

        run = functools.partial(library.append_attention, step, shape)
        more = (rotary, sinks)
        if gathers:
            run, more = functools.partial(prefill.run, library, step, shape), (rotary,)
        calls = [
            functools.partial(run, qkv[i % 4], cache, out, *more) for i, cache in enumerate(caches)
        ]
        found[longest] = graph_us(calls)
    return found


def preparation(library: Library, model: Model, name: str) -> report.Row:
    """Cost of a step for all layers together: in a graph, and on the host with blocking copies.

    The host's time is measured with the stand-in's copies, not with Paddle's.
    """
    lengths = [cached + new for cached, new, _ in STEPS[name]]
    tables, _ = block_tables(lengths, -1, CONTEXT // BLOCK + 2)
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
    if "decode" in name:  # a step with prefill copies to the host, which a graph cannot contain
        us = graph_us([lambda: library.split_blocks(step, group)])
    return {
        "section": "step preparation",
        "step": name,
        "peer": "FastDeploy get_block_shape_and_split_kv_block",
        "us": us,
        "host_us": statistics.median(on_host),
    }


def verdict(fault: str, found: dict[str, check.Found], step: str) -> tuple[str, bool]:
    """Fault of the outputs of a step, and whether FastDeploy is known to cause it."""
    names = ("decode", "next decode") if step.startswith("decode") else ("prefill", "mixed")
    errors = [found[name] for name in names]
    worst = max(e.error if math.isfinite(e.error) else math.inf for e in errors)
    if all(of_step.error <= check.BOUND for of_step in errors):
        return "", True
    known = [of_step.as_known for of_step in errors]
    if fault and all(error is not None and error <= check.BOUND for error in known):
        return f"{fault}: relative error {worst:.3g}", True
    return f"relative error {worst:.3g}", False


def model_rows(
    library: Library,
    name: str,
    quant: str,
    left_out: dict[str, str],
    checks: Checks,
    gathers: bool = False,
) -> Iterator[report.Row]:
    """Rows of a model and cache type whose outputs are right, or wrong for a known reason.

    With `gathers`, rows of steps with prefill, which use `prefill.run`.
    """
    model, what = MODELS[name], f"{name} {quant}{' gathered' if gathers else ''}"
    # The writer of this pair stores INT8 codes in an FP8 cache, so outputs are not finite.
    neox = model.neox and quant != "cache_fp8"
    shape = Shape(model.heads, model.kv, model.dim, quant, neox, model.rope_3d, CONTEXT)
    if gathers and (why := prefill.lacking(shape, model.sinks)):
        left_out[what] = why
        return
    found = checks[what] = check.errors(library, shape, model.sinks, gathers)
    fault = check.known_fault(shape, gathers)
    for step, sequences in STEPS.items():
        if gathers and not any(in_prefill for _, _, in_prefill in sequences):
            continue
        wrong, known = verdict(fault, found, step)
        if not known:
            left_out[f"{what} {step}"] = f"wrong output: {wrong}"
            continue
        timed = times(library, model, quant, neox, sequences, gathers)
        torch.cuda.empty_cache()
        for longest, us in timed.items():
            peer = report.fastdeploy_name(longest, neox == model.neox, wrong, gathers)
            facts = {"wrong": wrong} if wrong else {}
            yield report.step_row(name, step, [quant], peer, us, **facts)


def all_rows(
    library: Library, has_vllm: bool, left_out: dict[str, str], checks: Checks
) -> Iterator[report.Row]:
    """Every row. Cases that are not timed go to `left_out`, errors against float64 to `checks`."""
    for gathers in (False, True) if has_vllm else (False,):
        for name, model in MODELS.items():
            for quant in QUANTS:
                what = f"{name} {quant}{' gathered' if gathers else ''}"
                if quant != "none" and model.dim != 128:
                    why = "FastDeploy's 8-bit kernels have a head dimension of 128 only"
                    left_out[what] = why
                    continue
                try:
                    yield from model_rows(library, name, quant, left_out, checks, gathers)
                except RuntimeError as error:  # of the operator, or of CUDA
                    left_out[what] = str(error)[:200]
    for step in STEPS:
        yield preparation(library, MODELS["Qwen3-8B"], step)


def main() -> None:
    """Time and print from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, required=True, help="libfastdeploy_peers.so")
    parser.add_argument("--out", type=Path, required=True, help="file to merge rows into")
    parser.add_argument("--vllm", action="store_true", help="vLLM is installed")
    parser.add_argument("--peers", type=Path, help="Python file that loads vLLM's operators")
    arguments = parser.parse_args()
    has_vllm = arguments.vllm or arguments.peers is not None
    if has_vllm:
        load_operators(arguments.peers)
    library = Library(arguments.library)
    left_out: dict[str, str] = {}
    checks: Checks = {}
    rows = []
    for row in all_rows(library, has_vllm, left_out, checks):
        rows.append(row)
        errors = {what: {k: v._asdict() for k, v in of.items()} for what, of in checks.items()}
        facts = {"left_out": left_out, "errors": errors}
        report.write_merged(arguments.out, report.FASTDEPLOY, rows, facts)
    for what, found in checks.items():
        print(f"error {what:32s}", " ".join(f"{v.error:.2%}" for v in found.values()))
        if next(iter(found.values())).as_known is not None:
            known = " ".join(f"{v.as_known:.2%}" for v in found.values())
            print(f"  with its known fault           {known}")
    print("\n".join(report.compact(rows, report.FASTDEPLOY)))
    for row in rows:
        if row["section"] != "step":
            us = "" if row["us"] is None else f"{row['us']:.1f} us, "
            print(f"{row['peer']}, {row['step']}: {us}host {row['host_us']:.1f} us")
    for what, why in left_out.items():
        print(f"left out: {what}: {why}")


if __name__ == "__main__":
    main()
