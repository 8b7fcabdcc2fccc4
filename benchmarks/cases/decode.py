"""Paged decode on a GPU beside the read-only bandwidth of the run, and beside peers' kernels.

The bytes are those of K, V and their scales; a shape is repeated over caches that exceed the L2
cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from benchmarks.cases.inputs import DIM, Step, paged_calls, token_bytes
from benchmarks.core import cuda
from benchmarks.core.devices import Gpu
from benchmarks.core.peers import READ, peers
from benchmarks.core.rows import Row, register

TYPES = {
    "gpu": (
        *("cache_fp8", "block_wise_fp8", "cache_int8", "block_wise_int8", "block_wise_int4"),
        *("block_wise_mxfp4", "block_wise_k8v4", "block_wise_kfp8v4"),
        "none",
    ),
    "gpu quick": ("block_wise_fp8",),
}
HEADS = {"gpu": ((32, 8), (64, 8)), "gpu quick": ((32, 8),)}
#: Batch and context.
SHAPES = {
    "gpu": [(b, k * 1024) for k in (1, 8, 32, 128) for b in (1, 16, 64, 128) if b * k <= 4096],
    "gpu quick": [(1, 8192), (64, 1024)],
}
LAYER_BYTES = 1.2e9
#: Peers that read the same kind of cache, by a part of their names.
PEERS = {"cache_fp8": "fp8", "block_wise_int8": "int8", "none": "bf16"}


def _row(
    device: Gpu, name: str, quant: str, lengths: Sequence[int], heads: int, kv: int, new: int = 1
) -> Row:
    step = Step(device, np.asarray(lengths) - new, [new] * len(lengths))
    of_token = token_bytes(quant, kv)
    layers = round(LAYER_BYTES / (step.blocks * 64 * of_token))
    calls = paged_calls(device, quant, step, heads, kv, copies=max(1, min(64, layers)))
    us, moved = device.us(calls), sum(lengths) * of_token
    read_us = moved / cuda.read_bandwidth() / 1e3
    return Row("paged_attention", name, us, moved / us / 1e3, "GB/s", READ, read_us)


def _square(
    device: Gpu, quant: str, batch: int, context: int, heads: int, kv: int
) -> Iterator[Row]:
    name = f"decode {quant} B {batch} ctx {context} H {heads}/{kv} D {DIM}"
    row = _row(device, name, quant, [context] * batch, heads, kv)
    yield row
    for other in peers("decode", b=batch, ctx=context, h=heads, hk=kv):
        if quant in PEERS and PEERS[quant] in other["peer"]:
            yield row.beside(other["peer"], other["us"])


def ragged_lengths() -> list[int]:
    """64 lengths from 64 to 32768, spread evenly over their logarithm."""
    steps = (np.arange(64) + 0.5) / 64
    return [int(x) for x in 64 * (32768 / 64) ** steps]


@register("paged_attention", "gpu")
def paged_attention(device: Gpu) -> Iterator[Row]:
    """Decode over every cache type, batch and context; then a few other shapes."""
    for heads, kv in device.of(HEADS):
        for quant in device.of(TYPES):
            for batch, context in device.of(SHAPES):
                yield from _square(device, quant, batch, context, heads, kv)
    for quant in () if device.quick else TYPES["gpu"]:
        yield from _square(device, quant, 64, 8192, 16, 1)
        name = f"decode {quant} B 64 ctx 64..32768 ragged H 32/8 D {DIM}"
        yield _row(device, name, quant, ragged_lengths(), 32, 8)
        name = f"4 new tokens {quant} B 64 ctx 8192 H 32/8 D {DIM}"
        yield _row(device, name, quant, [8192] * 64, 32, 8, new=4)
