"""merge_attn_states on a GPU: merged and quantised at once against one after the other.

Warm: the same buffers again and again. Cold: as many buffers in turn as exceed the L2 cache, up to
`MOST_COPIES` of them (below 1 MB a call they still fit). Peers measured the same way stand beside
the fused kernel when there is a report of them (see :mod:`fastattn.bench.peers`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import paddle

import fastattn.functional as F
from fastattn.bench import gpu_timing
from fastattn.bench.cache_gpu import _gpu
from fastattn.bench.common import Row, register
from fastattn.bench.peers import peers

DIM = 128
TOKENS = (1, 16, 64, 256, 1024, 4096)
HEADS = (4, 8, 16, 32, 64, 128)
DTYPES = ("bfloat16", "float16", "float32")
VARIANTS = ("fused", "unfused", "fused dynamic")
COLD_BYTES = 160e6
MOST_COPIES = 64
UNFUSED = "merge, then quantize_fp8"

Call = Callable[[], object]


@functools.lru_cache(maxsize=len(DTYPES))
def _values(dtype: str) -> np.ndarray:
    """Normal values to repeat; bfloat16 as its bits, which Paddle takes for bfloat16."""
    values = np.random.default_rng(0).normal(size=1 << 20).astype(np.float32)
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype)


def _lse(rng: np.random.Generator, shape: tuple[int, int]) -> paddle.Tensor:
    lse = rng.normal(size=shape).astype(np.float32)
    lse[rng.random(shape) < 0.05] = np.inf  # a side without keys
    return _gpu(lse)


def _bytes(variant: str, tokens: int, heads: int, dtype: str) -> int:
    size = 4 if dtype == "float32" else 2
    lses = 3 * 4  # both sides' and the output's
    if variant == "unfused":
        return tokens * heads * (DIM * (4 * size + 1) + lses)
    scales = 4 if variant == "fused dynamic" else 0
    return tokens * heads * (DIM * (2 * size + 1) + lses + scales)


def _unfused(inputs: tuple[paddle.Tensor, ...], scale: Any, plain: Any, lse: Any, out: Any) -> None:
    F.merge_attn_states(*inputs, output=plain, output_lse=lse)
    F.quantize_fp8(plain, scale, output=out)


def _calls(tokens: int, heads: int, dtype: str) -> dict[str, list[Call]]:
    """Calls of each variant over buffers of their own."""
    rng = np.random.default_rng(1)
    shape = (tokens, heads, DIM)
    values = np.resize(_values(dtype), shape)
    scale = _gpu(np.array([0.1], np.float32))
    copies = min(MOST_COPIES, int(COLD_BYTES / _bytes("fused", tokens, heads, dtype)) + 1)
    calls: dict[str, list[Call]] = {variant: [] for variant in VARIANTS}
    for _ in range(copies):
        prefix, suffix = _gpu(values), _gpu(values)
        prefix_lse, suffix_lse = (_lse(rng, (heads, tokens)) for _ in range(2))
        inputs = (prefix, prefix_lse, suffix, suffix_lse)
        plain = gpu_timing.empty(shape, dtype)
        codes = gpu_timing.empty(shape, "uint8")
        lse = gpu_timing.empty([heads, tokens], "float32")
        scales = gpu_timing.empty([tokens, heads], "float32")
        merge = functools.partial(F.merge_attn_states, *inputs, output=codes, output_lse=lse)
        calls["fused"].append(functools.partial(merge, output_scale=scale))
        calls["fused dynamic"].append(functools.partial(merge, output_scales=scales))
        calls["unfused"].append(functools.partial(_unfused, inputs, scale, plain, lse, codes))
    return calls


def _rows(tokens: int, heads: int, dtype: str) -> Iterator[Row]:
    calls = _calls(tokens, heads, dtype)
    for state in ("warm", "cold"):
        shape = f"{tokens} tokens, H {heads}, D {DIM}, {dtype} to e4m3, {state}"
        us = {
            variant: gpu_timing.steady_us(turns[:1] if state == "warm" else turns)
            for variant, turns in calls.items()
        }
        for variant in VARIANTS:
            moved = _bytes(variant, tokens, heads, dtype)
            yield gpu_timing.row(f"merge_attn_states, {variant}", shape, us[variant], moved)
        others = {
            row["peer"]: row[f"us_{state}"]
            for row in peers("merge", tokens=tokens, heads=heads, dtype=dtype)
        }
        moved = _bytes("fused", tokens, heads, dtype)
        for peer, peer_us in {UNFUSED: us["unfused"], **others}.items():
            row = gpu_timing.row("merge_attn_states, fused", shape, us["fused"], moved)
            row.peer, row.peer_us = peer, peer_us
            yield row


@register("merge_attn_states")
def merge_rows(quick: bool) -> Iterator[Row]:
    """All tokens x heads x dtypes; a few of them when `quick`."""
    for dtype in ("bfloat16",) if quick else DTYPES:
        for tokens in (1, 64, 1024) if quick else TOKENS:
            for heads in (8, 128) if quick else HEADS:
                yield from _rows(tokens, heads, dtype)


def fused_speedup(rows: list[Row], state: str, peer: str = UNFUSED) -> float:
    """Geometric mean of peer's time / fused time over the rows that are "warm" or "cold"."""
    ratios = [row.ratio for row in rows if row.peer == peer and row.shape.endswith(state)]
    return math.exp(sum(math.log(ratio) for ratio in ratios if ratio) / len(ratios))
