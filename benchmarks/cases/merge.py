"""merge_attn_states: merged and quantised at once, beside one after the other and peers.

And merge_many_attn_states, of what the ranks of a group exchange.

Warm: the same buffers again and again. Cold: as many buffers in turn as exceed the L2 cache, up to
`MOST_COPIES` of them (below 1 MB a call they still fit).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

import fastattn.functional as F
from benchmarks.cases.inputs import BF16, CODE, DIM
from benchmarks.core.devices import Device
from benchmarks.core.peers import peers
from benchmarks.core.rows import Row, register
from benchmarks.core.timing import Call, bind

TOKENS = {"cpu": (1024,), "cpu quick": (128,), "gpu": (1, 16, 64, 256, 1024, 4096),
          "gpu quick": (1, 64, 1024)}  # fmt: skip
HEADS = {"cpu": (32,), "gpu": (4, 8, 16, 32, 64, 128), "gpu quick": (8, 128)}
DTYPES = {"gpu": ("bfloat16", "float16", "float32"), "gpu quick": ("bfloat16",)}
VARIANTS = ("fused", "unfused", "fused dynamic")
MOST_COPIES = 64
#: Type that has every shape, and that a peer's row means that names none.
MAIN_DTYPE = "bfloat16"
#: Of the other types so many do.
OTHER_TOKENS, OTHER_HEADS = (1, 256, 1024, 4096), (4, 32, 64, 128)
UNFUSED = "merge, then quantize_fp8"


def _states(device: Device, tokens: int, heads: int, dtype: str) -> list[Any]:
    """Outputs and LSEs of both sides; in one of 20 places a side has no keys."""
    rng, states = np.random.default_rng(1), []
    for seed in (0, 1):
        lse = rng.normal(size=(heads, tokens))
        lse[rng.random(lse.shape) < 0.05] = np.inf
        states += [device.random((tokens, heads, DIM), dtype, seed), device.array(lse, np.float32)]
    return states


def _bytes(variant: str, tokens: int, heads: int, dtype: str) -> int:
    size = 4 if dtype == "float32" else 2
    lses = 3 * 4  # both sides' and the output's
    if variant == "unfused":
        return tokens * heads * (DIM * (4 * size + 1) + lses)
    scales = 4 if variant == "fused dynamic" else 0
    return tokens * heads * (DIM * (2 * size + 1) + lses + scales)


def _unfused(states: list[Any], scale: Any, plain: Any, lse: Any, out: Any) -> None:
    F.merge_attn_states(*states, output=plain, output_lse=lse)
    F.quantize_fp8(plain, scale, output=out)


def _calls(device: Device, tokens: int, heads: int, dtype: str) -> dict[str, list[Call]]:
    """Calls of each variant over buffers of their own."""
    shape, scale = (tokens, heads, DIM), device.uniform((1,))
    calls: dict[str, list[Call]] = {variant: [] for variant in VARIANTS}
    for _ in range(device.copies(_bytes("fused", tokens, heads, dtype), MOST_COPIES)):
        states = _states(device, tokens, heads, dtype)
        plain, codes = device.empty(shape, dtype), device.empty(shape, "uint8")
        lse = device.empty((heads, tokens), "float32")
        scales = device.empty((tokens, heads), "float32")
        merge = bind(F.merge_attn_states, *states, output=codes, output_lse=lse)
        calls["fused"].append(bind(merge, output_scale=scale))
        calls["fused dynamic"].append(bind(merge, output_scales=scales))
        calls["unfused"].append(bind(_unfused, states, scale, plain, lse, codes))
    return calls


def _rows(device: Device, tokens: int, heads: int, dtype: str) -> Iterator[Row]:
    calls = _calls(device, tokens, heads, dtype)
    for state in ("warm", "cold"):
        shape = f"{tokens} tokens, H {heads}, D {DIM}, {dtype} to e4m3, {state}"
        rows = {}
        for variant, turns in calls.items():
            op, some = f"merge_attn_states, {variant}", turns[:1] if state == "warm" else turns
            moved = _bytes(variant, tokens, heads, dtype)
            rows[variant] = device.memory_row(op, shape, some, moved)
        yield from rows.values()
        yield rows["fused"].beside(UNFUSED, rows["unfused"].us)
        for other in peers("merge", tokens=tokens, heads=heads):
            if other.get("dtype", MAIN_DTYPE) != dtype:
                continue
            yield rows["fused"].beside(other["peer"], other[f"us_{state}"])


@register("merge_attn_states", "gpu")
def merge_on_gpu(device: Device) -> Iterator[Row]:
    """All tokens x heads in bf16, some in the other types."""
    for dtype in device.of(DTYPES):
        main = dtype == MAIN_DTYPE
        for tokens in device.of(TOKENS) if main else OTHER_TOKENS:
            for heads in device.of(HEADS) if main else OTHER_HEADS:
                yield from _rows(device, tokens, heads, dtype)


@register("merge_attn_states", "cpu")
def merge_on_cpu(device: Device) -> Iterator[Row]:
    """Two states in bf16, stored as bf16 and as e4m3."""
    (tokens,), (heads,) = device.of(TOKENS), device.of(HEADS)
    states = _states(device, tokens, heads, "bfloat16")
    for stored, size in (("bf16", BF16), ("e4m3", CODE)):
        scale = device.uniform((1,)) if stored == "e4m3" else None
        call = bind(F.merge_attn_states, *states, output_scale=scale)
        moved = tokens * heads * (DIM * (2 * BF16 + size) + 12)
        shape = f"{tokens} tokens, H {heads}, D {DIM}, bf16 to {stored}"
        yield device.memory_row("merge_attn_states", shape, [call], moved)


#: Ranks, and new tokens of a step.
MANY = {
    "gpu": [(ranks, tokens) for ranks in (2, 4, 8) for tokens in (1, 64, 2048)],
    "gpu quick": [(2, 1)],
    "cpu": [(4, 64)],
}


@register("merge_many_attn_states")
def merge_many(device: Device) -> Iterator[Row]:
    """Fp32 states of several ranks, stored as bf16."""
    heads = 32
    for ranks, tokens in device.of(MANY):
        moved = tokens * heads * (ranks * (4 * DIM + 4) + BF16 * DIM + 4)
        calls = []
        for _ in range(device.copies(moved, MOST_COPIES)):
            outputs = device.random((ranks, tokens, heads, DIM), "float32")
            lses = device.random((ranks, heads, tokens), "float32", seed=1)
            output = device.empty((tokens, heads, DIM), "bfloat16")
            calls.append(bind(F.merge_many_attn_states, outputs, lses, output=output))
        shape = f"{ranks} states, {tokens} tokens, H {heads}, D {DIM}, float32 to bfloat16"
        yield device.memory_row("merge_many_attn_states", shape, calls, moved)
