"""Dense latent attention beside reading the cache once, and FlashMLA.

On a GPU decode steps and chunks of prompts; ``GB/s`` counts the cached tokens, queries and outputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

import fastattn.functional as F
from fastattn.bench.core import cuda
from fastattn.bench.core.devices import Cpu, Gpu
from fastattn.bench.core.peers import READ, peers
from fastattn.bench.core.rows import Row, register
from fastattn.bench.core.timing import Call, bind, medians

PAGE, DIM, VALUE_DIM = 64, 576, 512
#: Format: elements of a cached token, and its bytes.
_FORMATS = {"bf16": (576, 1152), "fp8": (576, 576), "fp8_656": (656, 656)}
#: Heads, thousands of keys, sequences.
STEPS = {
    "gpu": [(h, k, b) for h in (128, 16, 8) for k in (4, 8, 32) for b in (1, 16, 64, 128)],
    "gpu quick": [(128, 4, 16), (16, 4, 16)],
}
#: Heads, new and cached tokens, sequences.
CHUNKS = {
    "gpu": [(16, 4096, 0, 1), (16, 1024, 8192, 4), (128, 1024, 0, 1), (128, 1024, 8192, 1)],
    "gpu quick": [(16, 1024, 0, 1)],
}
_PEERS = {"bf16": "flashmla_bf16", "fp8": "flashmla_fp8(q fp8)"}


def _call(
    device: Cpu | Gpu, heads: int, new: int, cached: int, batch: int, cache_format: str
) -> tuple[Call, int, int]:
    """A call over pages that lie anywhere, its floating-point operations, and its bytes."""
    keys = new + cached
    blocks = -(-keys // PAGE)
    width, token = _FORMATS[cache_format]
    kind = "bfloat16" if cache_format == "bf16" else "e4m3"
    order = np.random.default_rng(0).permutation(batch * blocks).reshape(batch, blocks)
    call = bind(
        F.mla_attention,
        device.random((batch * new, heads, DIM)),
        # Codes of normal values, which are no NaN as scales and as bf16 channels either.
        device.random((batch * blocks, PAGE, width), kind, seed=1),
        device.int32(order),
        device.int32(np.arange(batch + 1) * new),
        device.int32(np.full(batch, cached)),
        device.int32(np.full(batch, new)),
        new,
        keys,
        cache_format=cache_format,
        scale=device.uniform((1,)) if cache_format == "fp8" else None,
        out=device.empty((batch * new, heads, VALUE_DIM), "bfloat16"),
    )
    pairs = batch * sum(range(cached + 1, keys + 1))
    flops = 2 * heads * pairs * (DIM + VALUE_DIM)
    moved = batch * (keys * token + 2 * new * heads * (DIM + VALUE_DIM))
    return call, flops, moved


@register("mla_attention", "gpu")
def mla_attention(device: Gpu) -> Iterator[Row]:
    """Decode steps of every format, then chunks over bf16."""
    for heads, thousands, batch in device.of(STEPS):
        keys = thousands * 1024
        for cache_format in _FORMATS:
            call, flops, moved = _call(device, heads, 1, keys - 1, batch, cache_format)
            us = device.us([call])
            shape = f"{heads} heads, batch {batch}, {thousands}k keys, {cache_format}"
            read_us = moved / cuda.read_bandwidth() / 1e3
            row = Row("mla_attention", shape, us, moved / us / 1e3, "GB/s", READ, read_us)
            yield row
            name = f"{_PEERS.get(cache_format)} h{heads}"
            for other in peers("mla_dense_decode", peer=name, b=batch, ctx=keys, h=heads):
                yield row.beside("FlashMLA", other["us"])
            del call
    for heads, new, cached, batch in device.of(CHUNKS):
        call, flops, _ = _call(device, heads, new, cached, batch, "bf16")
        us = device.us([call])
        shape = f"{heads} heads, batch {batch}, {new} new, {cached} cached tokens, bf16"
        yield Row("mla_attention", shape, us, flops / us / 1e6, "TFLOP/s")


@register("mla_attention", "cpu")
def mla_attention_cpu(device: Cpu) -> Iterator[Row]:
    """Beside products of fp32 matrices in NumPy, which leave out the codes' conversion."""
    heads, keys, batch = 16, 512 if device.quick else 4096, 1 if device.quick else 4
    dense = np.random.default_rng(0).normal(size=(batch, keys, DIM)).astype(np.float32)
    queries = np.ones((batch, heads, DIM), np.float32)

    def numpy() -> object:
        scores = queries @ dense.transpose(0, 2, 1)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True) @ dense[..., :VALUE_DIM]

    for cache_format in _FORMATS:
        call, flops, _ = _call(device, heads, 1, keys - 1, batch, cache_format)
        us, numpy_us = medians([call, numpy], 3 if device.quick else 9)
        shape = f"{heads} heads, batch {batch}, {keys} keys, {cache_format}"
        row = Row("mla_attention", shape, us, flops / us / 1e3, "GFLOP/s")
        yield row.beside("NumPy", numpy_us)
