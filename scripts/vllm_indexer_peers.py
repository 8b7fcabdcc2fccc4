#!/usr/bin/env python3
"""Time DeepGEMM's logits and vLLM's top-k at the indexer's shapes of `python -m fastattn bench`.

    scripts/vllm_indexer_peers.py --out peers.json [--peers FILE]

The script needs a Hopper GPU, and torch with an installed vLLM 0.26 and its DeepGEMM. Instead of
vLLM, FILE may be given as for scripts/vllm_step_peers.py, whose `HAVE` has DeepGEMM. Times are
medians of CUDA graphs of calls over buffers that together exceed the L2 cache, as in the benchmark:
one call after the other, with programmatic dependent launch on both sides. DeepGEMM's schedule of a
decode step is made beforehand and not timed here; in a server a separate kernel makes it once per
step.

Rows replace the rows of the same kernel and shape in the file; name it in FASTATTN_BENCH_PEERS.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import runpy
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "fastdeploy_peers"))
from report import replaced
from steps import graph_us
from vllm_operators import load_operators

ROOT = Path(__file__).resolve().parents[1]
shapes = types.SimpleNamespace(
    **runpy.run_path(str(ROOT / "benchmarks" / "cases" / "indexer_shapes.py"))
)
HEADS, DIM, PAGE = shapes.HEADS, shapes.DIM, shapes.PAGE
E4M3, I32, U8 = torch.float8_e4m3fn, torch.int32, torch.uint8
#: Total bytes of the buffers of a call, their maximum number, and the maximum number of rows for
#: which vLLM has a cluster top-k.
COLD_BYTES, MOST_COPIES, CLUSTER_ROWS = 400 << 20, 64, 32
Call = Callable[[], object]


def copies(moved: int) -> int:
    """Calls over separate buffers that together exceed the L2 cache."""
    return max(1, min(MOST_COPIES, COLD_BYTES // moved + 1))


def deep_gemm(file: Path | None) -> Any:
    """DeepGEMM, set up as in vLLM."""
    load_operators(file)
    if file is not None:
        return sys.modules[file.stem].HAVE.gemm  # type: ignore[attr-defined]
    gemm = importlib.import_module("vllm.third_party.deep_gemm")
    gemm.set_pdl(True)
    return gemm


def normal(*shape: int) -> torch.Tensor:
    """Normal values in e4m3."""
    return torch.randn(*shape, device="cuda").to(E4M3)


def chunk_call(gemm: Any, tokens: int, keys: int) -> Call:
    """Logits of a chunk at the end of a prompt."""
    ends = torch.arange(keys - tokens + 1, keys + 1, device="cuda", dtype=I32)
    return functools.partial(
        gemm.fp8_fp4_mqa_logits,
        (normal(tokens, HEADS, DIM), None),
        (normal(keys, DIM), torch.rand(keys, device="cuda") + 0.5),
        torch.randn(tokens, HEADS, device="cuda"),
        torch.zeros_like(ends),
        ends,
        clean_logits=False,
    )


def step_call(gemm: Any, batch: int, keys: int, next_n: int) -> Call:
    """Logits of a decode step over pages."""
    pages = batch * keys // PAGE
    pool = torch.randint(0, 256, (pages, PAGE * (DIM + 4)), device="cuda", dtype=U8)
    pool &= 0xBF  # finite numbers below 2
    pool[:, PAGE * DIM :] = (torch.rand(pages, PAGE, device="cuda") + 0.5).view(U8)
    tables = torch.randperm(pages, device="cuda").to(I32).view(batch, -1)
    lengths = torch.arange(keys - next_n + 1, keys + 1, device="cuda", dtype=I32)
    lengths = lengths.repeat(batch, 1)
    plan = gemm.get_paged_mqa_logits_metadata(lengths, PAGE, gemm.get_num_sms())
    return functools.partial(
        gemm.fp8_fp4_paged_mqa_logits,
        (normal(batch, next_n, HEADS, DIM), None),
        pool.view(pages, PAGE, 1, DIM + 4),
        torch.randn(batch * next_n, HEADS, device="cuda"),
        lengths,
        tables,
        plan,
        keys,
        clean_logits=False,
    )


def topk_calls(rows: int, columns: int, k: int) -> Iterator[tuple[str, list[Call]]]:
    """Names and calls of vLLM's kernels that support this number of rows."""
    ops = torch.ops._C
    count = copies(4 * rows * columns)
    logits = [torch.randn(rows, columns, device="cuda") for _ in range(count)]
    lengths = torch.full((rows,), columns, device="cuda", dtype=I32)
    none, work = torch.zeros_like(lengths), torch.zeros(1 << 20, device="cuda", dtype=U8)
    out = torch.full((rows, k), -1, device="cuda", dtype=I32)

    def each(call: Callable[[torch.Tensor], object]) -> list[Call]:
        return [functools.partial(call, x) for x in logits]

    yield (
        "vllm top_k_per_row_prefill",
        each(lambda x: ops.top_k_per_row_prefill(x, none, lengths, out, rows, columns, 1, k)),
    )
    yield (
        "vllm persistent_topk",
        each(lambda x: ops.persistent_topk(x, lengths, out, work, k, columns)),
    )
    if rows <= CLUSTER_ROWS:
        yield (
            "vllm cooperative_topk",
            each(lambda x: ops.cooperative_topk(x, lengths, out, work, k, columns)),
        )


def wanted() -> tuple[set[tuple[int, int]], set[tuple[int, int, int]], set[tuple[int, int, int]]]:
    """Chunks and steps of logits, and (rows, columns, k) of selections, as in the bench."""
    chunks = {(s, 1024 * k) for s, k in shapes.CHUNKS["gpu"] + shapes.TOPK_CHUNKS["gpu"]}
    steps = {(b, 1024 * k, n) for b, k, n in shapes.STEPS["gpu"] + shapes.TOPK_STEPS["gpu"]}
    rows = {(s, 1024 * k) for s, k in shapes.TOPK_CHUNKS["gpu"]}
    rows |= {(b * n, 1024 * k) for b, k, n in shapes.TOPK_STEPS["gpu"]}
    return chunks, steps, {(n, keys, shapes.selected(keys)) for n, keys in rows}


def cases(gemm: Any) -> Iterator[tuple[dict[str, Any], Callable[[], list[Call]]]]:
    """Section, peer and shape of each row, and the function that makes its calls."""
    chunks, steps, selections = wanted()
    for s, kv in sorted(chunks):
        row = {"section": "logits", "peer": f"mqa_logits q{s}", "s": s, "kv": kv}
        yield row, lambda s=s, kv=kv: [chunk_call(gemm, s, kv)]
    for b, ctx, n in sorted(steps):
        shape = {"b": b, "ctx": ctx, "next_n": n}
        count = copies(b * ctx * (DIM + 4 + 4 * n))
        make = functools.partial(step_call, gemm, b, ctx, n)
        row = {"section": "logits", "peer": f"paged_mqa_logits q{n}", **shape}
        yield row, lambda make=make, count=count: [make() for _ in range(count)]
    for rows, columns, k in sorted(selections):
        shape = {"rows": rows, "columns": columns, "k": k}
        for name, calls in topk_calls(rows, columns, k):
            yield {"section": "topk", "peer": name, **shape}, lambda calls=calls: calls


def all_rows(gemm: Any, failed: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Every row. Cases that could not be timed go to `failed`."""
    for row, make in cases(gemm):
        try:
            us = graph_us(make())
        except (RuntimeError, TypeError, AttributeError) as error:
            failed[", ".join(f"{value}" for value in row.values())] = str(error)[:200]
            continue
        finally:
            torch.cuda.empty_cache()
        yield {**row, "us": us}


def compact(rows: Iterable[dict[str, Any]]) -> list[str]:
    """One line per kernel: its times at its shapes, in microseconds."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        shape = "x".join(
            str(row[x]) for x in ("s", "b", "rows", "kv", "ctx", "columns") if x in row
        )
        lines.setdefault(row["peer"], []).append(f"{shape} {row['us']:.1f}")
    return [f"{peer}: {', '.join(cells)}" for peer, cells in lines.items()]


def main() -> None:
    """Time and print from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="file to merge rows into")
    parser.add_argument("--peers", type=Path, help="Python file that loads vLLM's operators")
    arguments = parser.parse_args()
    failed: dict[str, str] = {}
    rows = list(all_rows(deep_gemm(arguments.peers), failed))
    theirs = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    report = {**replaced(theirs, rows), "indexer": {"left_out": failed}}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(compact(rows)))
    for what, why in failed.items():
        print(f"left out: {what}: {why}")
    if not rows:
        raise SystemExit("nothing could be timed")


if __name__ == "__main__":
    main()
