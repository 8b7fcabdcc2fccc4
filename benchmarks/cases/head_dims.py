"""Head dimensions besides 64 and 128: decode of a paged cache, and prefill."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

import fastattn.functional as F
from benchmarks.cases.inputs import Step, paged_calls, token_bytes
from benchmarks.core import cuda
from benchmarks.core.devices import Gpu
from benchmarks.core.peers import READ, peers
from benchmarks.core.rows import Row, register
from benchmarks.core.timing import bind
from fastattn.functional._cache_types import value_dim

#: Head dimension, query and KV heads: Phi-3, and models with 256 channels.
DECODE = {"gpu": [(96, 32, 32), (256, 16, 4), (256, 32, 2)], "gpu quick": [(256, 16, 4)]}
TYPES = {
    "gpu": (
        *("none", "cache_fp8", "block_wise_fp8", "cache_int8", "block_wise_int8"),
        *("block_wise_int4", "block_wise_mxfp4", "block_wise_k8v4"),
    ),
    "gpu quick": ("none", "block_wise_fp8"),
}
#: The same of prefill over contiguous keys; V of 192 channels has 128.
PREFILL = {"gpu": [(96, 32, 32), (192, 16, 16), (256, 16, 16), (256, 32, 2)]}
#: The same of prefill over caches.
PAGED = {"gpu": [(64, 64, 8), (96, 32, 32), (192, 16, 16), (256, 16, 16), (256, 32, 2)]}
BATCH, CONTEXT, SEQS, LENGTH = 64, 8192, 4, 4096
LAYER_BYTES = 1.2e9


@register("head_dims", "gpu")
def decode(device: Gpu) -> Iterator[Row]:
    """Decode of 64 sequences of 8k keys, beside reading as many bytes."""
    for dim, heads, kv in device.of(DECODE):
        step = Step(device, np.full(BATCH, CONTEXT - 1), [1] * BATCH)
        for quant in device.of(TYPES):
            of_token = token_bytes(quant, kv, dim)
            copies = max(1, round(LAYER_BYTES / (step.blocks * 64 * of_token)))
            us = device.us(paged_calls(device, quant, step, heads, kv, copies=copies, dim=dim))
            moved = BATCH * CONTEXT * of_token
            name = f"decode {quant} B {BATCH} ctx {CONTEXT} H {heads}/{kv} D {dim}"
            read_us = moved / cuda.read_bandwidth() / 1e3
            yield Row("paged_attention", name, us, moved / us / 1e3, "GB/s", READ, read_us)


@register("head_dims_prefill", "gpu")
def prefill(device: Gpu) -> Iterator[Row]:
    """Causal prefill of 4 sequences of 4k tokens over contiguous keys, in bf16 and in FP8."""
    for dim, heads, kv in device.of({**PREFILL, "gpu quick": PREFILL["gpu"][1:3]}):
        for dtype in ("bfloat16", "e4m3"):
            tokens = SEQS * LENGTH
            shapes = [(tokens, heads, dim), (tokens, kv, dim), (tokens, kv, value_dim(dim))]
            qkv = [device.random(shape, dtype, seed) for seed, shape in enumerate(shapes)]
            starts = device.int32(np.arange(SEQS + 1) * LENGTH)
            out = device.empty((tokens, heads, value_dim(dim)), "bfloat16")
            call = bind(
                F.flash_attention, *qkv, starts, starts, LENGTH, LENGTH, causal=True, out=out
            )
            us = device.us([call])
            pairs = SEQS * LENGTH * LENGTH / 2
            rate = 2.0 * heads * (dim + value_dim(dim)) * pairs / us / 1e6
            name = f"prefill {dtype} causal B {SEQS} x {LENGTH} H {heads}/{kv} D {dim}"
            row = Row("flash_attention", name, us, rate, "TFLOP/s")
            where = {"s": LENGTH, "h": heads, "hk": kv, "d": dim, "causal": True}
            wanted = "fp8_varlen" if dtype == "e4m3" else "vllm_fa3_bf16"
            rows = [other for other in peers("prefill", **where) if other.get("d") == dim]
            found = [other for other in rows if wanted in other["peer"]]
            yield from [row.beside(o["peer"], o["ms"] * 1e3) for o in found] or [row]


@register("head_dims_paged", "gpu")
def prefill_caches(device: Gpu) -> Iterator[Row]:
    """The same with bf16 queries over caches."""
    step = Step(device, [0] * SEQS, [LENGTH] * SEQS)
    for dim, heads, kv in device.of({**PAGED, "gpu quick": PAGED["gpu"][:2]}):
        for quant in device.of(TYPES):
            us = device.us(paged_calls(device, quant, step, heads, kv, dim=dim, causal=True))
            rate = 2.0 * heads * (dim + value_dim(dim)) * SEQS * LENGTH * LENGTH / 2 / us / 1e6
            name = f"prefill bf16 q, {quant} causal B {SEQS} x {LENGTH} H {heads}/{kv} D {dim}"
            yield Row("paged_attention", name, us, rate, "TFLOP/s")
