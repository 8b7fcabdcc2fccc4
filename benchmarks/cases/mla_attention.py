"""Dense latent attention beside reading the cache once, and FlashMLA.

On a GPU decode steps, chunks of prompts and a step of both; ``GB/s`` counts the cached tokens,
queries and outputs. FlashMLA's FP8 kernel takes e4m3 queries, ours bf16 ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

import fastattn.functional as F
from benchmarks.cases.inputs import Step
from benchmarks.core import cuda
from benchmarks.core.devices import Cpu, Gpu
from benchmarks.core.peers import READ, peers
from benchmarks.core.rows import Row, register
from benchmarks.core.timing import Call, bind, medians

PAGE, DIM, VALUE_DIM = 64, 576, 512
#: Format: elements of a cached token, and its bytes.
_FORMATS = {"bf16": (576, 1152), "fp8": (576, 576), "fp8_656": (656, 656)}
#: Heads, thousands of keys, sequences.
STEPS = {
    "gpu": [(h, k, b) for h in (128, 16, 8) for k in (4, 8, 32) for b in (1, 16, 64, 128)],
    "gpu quick": [(128, 4, 16), (16, 4, 16)],
}
#: Heads, and sequences, new and cached tokens of each of a step's groups.
Groups = list[tuple[int, int, int]]
CHUNKS: dict[str, list[tuple[int, Groups]]] = {
    "gpu": [
        (16, [(1, 4096, 0)]),
        (16, [(4, 1024, 8192)]),
        (128, [(1, 1024, 0)]),
        (128, [(1, 1024, 8192)]),
        (16, [(1, 1024, 8192), (32, 1, 8191)]),
    ],
    "gpu quick": [(16, [(1, 1024, 0)])],
}
#: Format: start of a row's name in a report of peers, and the name here.
_PEERS = {
    "bf16": ("flashmla_bf16", "FlashMLA BF16"),
    "fp8": ("flashmla_fp8(q fp8)", "FlashMLA FP8"),
}


class _Work(NamedTuple):
    """Calls of the same work over caches of their own."""

    calls: list[Call]
    flops: int
    moved: int  # bytes


def _work(device: Cpu | Gpu, heads: int, groups: Groups, cache_format: str) -> _Work:
    """Calls over pages that lie anywhere."""
    new, cached = (np.repeat([g[i] for g in groups], [g[0] for g in groups]) for i in (1, 2))
    step = Step(device, cached, new)
    width, token = _FORMATS[cache_format]
    kind = "bfloat16" if cache_format == "bf16" else "e4m3"
    pairs = sum(int(c) * int(n) + int(n) * (int(n) + 1) // 2 for c, n in zip(cached, new))
    rows = 2 * step.tokens * heads * (DIM + VALUE_DIM)
    moved = int((cached + new).sum()) * token + rows
    q = device.random((step.tokens, heads, DIM))
    options = {
        "cache_format": cache_format,
        "scale": device.uniform((1,)) if cache_format == "fp8" else None,
        "out": device.empty((step.tokens, heads, VALUE_DIM), "bfloat16"),
    }
    # Codes of normal values, which are no NaN as scales and as bf16 channels either.
    caches = [
        device.random((step.blocks, PAGE, width), kind, seed=1)
        for _ in range(device.copies(moved, 48))
    ]
    sizes = int(new.max()), step.longest
    calls = [bind(F.mla_attention, q, cache, *step.meta, *sizes, **options) for cache in caches]
    return _Work(calls, 2 * heads * pairs * (DIM + VALUE_DIM), moved)


@register("mla_attention", "gpu")
def mla_attention(device: Gpu) -> Iterator[Row]:
    """Decode steps of every format, then chunks and a mixed step over bf16."""
    for heads, thousands, batch in device.of(STEPS):
        keys = thousands * 1024
        for cache_format in _FORMATS:
            work = _work(device, heads, [(batch, 1, keys - 1)], cache_format)
            us = device.us(work.calls)
            shape = f"{heads} heads, batch {batch}, {thousands}k keys, {cache_format}"
            read_us = work.moved / cuda.read_bandwidth() / 1e3
            row = Row("mla_attention", shape, us, work.moved / us / 1e3, "GB/s", READ, read_us)
            yield row
            start, name = _PEERS.get(cache_format, ("", ""))
            for other in peers(
                "mla_dense_decode", peer=f"{start} h{heads}", b=batch, ctx=keys, h=heads
            ):
                yield row.beside(name, other["us"])
            del work
    for heads, groups in device.of(CHUNKS):
        work = _work(device, heads, groups, "bf16")
        us = device.us(work.calls)
        steps = " + ".join(f"{b} x {n} new behind {c}" for b, n, c in groups)
        yield Row("mla_attention", f"{heads} heads, {steps}, bf16", us, work.flops / us / 1e6,
                  "TFLOP/s")  # fmt: skip


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
        work = _work(device, heads, [(batch, 1, keys - 1)], cache_format)
        us, numpy_us = medians([work.calls[0], numpy], 3 if device.quick else 9)
        shape = f"{heads} heads, batch {batch}, {keys} keys, {cache_format}"
        row = Row("mla_attention", shape, us, work.flops / us / 1e3, "GFLOP/s")
        yield row.beside("NumPy", numpy_us)
