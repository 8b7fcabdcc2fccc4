"""The indexer's logits beside reading the keys once, NumPy, and DeepGEMM.

On a GPU, 64 heads of 128 channels: chunks of a prefill, whose queries see all keys up to their own,
and decode steps over pages of 64 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import paddle

import fastattn.functional as F
from benchmarks.cases.indexer_shapes import CHUNKS, DIM, HEADS, PAGE, STEPS
from benchmarks.core import cuda
from benchmarks.core.devices import Cpu, Gpu
from benchmarks.core.peers import READ, peers
from benchmarks.core.rows import Row, register
from benchmarks.core.timing import bind, medians

QUANTS = ("fp8", "mxfp4")
_CHUNK = 1 << 16  # keys that are written at a time


def _exponents(device: Gpu, shape: tuple[int, ...]) -> paddle.Tensor:
    """UE8M0 exponents of 1, four a word."""
    return device.int32(np.full(shape, 0x7F7F7F7F))


def _pages(device: Cpu | Gpu, pages: int, quant: str) -> paddle.Tensor:
    """Pages of normal keys, written by the operator that a server calls."""
    width = (DIM if quant == "fp8" else DIM // 2) + 4
    cache = device.empty((pages, PAGE, width), "uint8")
    for begin in range(0, pages * PAGE, _CHUNK):
        count = min(_CHUNK, pages * PAGE - begin)
        slots = device.array(np.arange(begin, begin + count))
        F.indexer_k_write_cache(device.random((count, DIM), seed=1), cache, slots, quant=quant)
    return cache


@register("mqa_logits", "gpu")
def mqa_logits(device: Gpu) -> Iterator[Row]:
    """Chunks of a prompt, FP8 and MXFP4."""
    for tokens, thousands in device.of(CHUNKS):
        keys = thousands * 1024
        ends = np.arange(keys - tokens + 1, keys + 1)
        flops = 2 * HEADS * DIM * int(ends.sum())
        out = device.empty((tokens, keys), "float32")
        starts, weights = device.int32(np.zeros(tokens)), device.uniform((tokens, HEADS))
        for quant in QUANTS:
            width = DIM if quant == "fp8" else DIM // 2
            kind = "e4m3" if quant == "fp8" else "int8"
            scales = device.uniform((keys,)) if quant == "fp8" else _exponents(device, (keys,))
            call = bind(
                F.mqa_logits,
                device.random((tokens, HEADS, width), kind),
                device.random((keys, width), kind, seed=1),
                weights,
                starts,
                device.int32(ends),
                k_scales=scales,
                q_scales=None if quant == "fp8" else _exponents(device, (tokens, HEADS)),
                quant=quant,
                out=out,
            )
            us = device.us([call])
            shape = f"{tokens} tokens, {thousands}k keys, {quant}"
            row = Row("mqa_logits", shape, us, flops / us / 1e6, "TFLOP/s")
            yield row
            for other in peers("logits", peer=f"mqa_logits q{tokens}", s=tokens, kv=keys):
                if quant == "fp8":
                    yield row.beside("DeepGEMM", other["us"])


@register("paged_mqa_logits", "gpu")
def paged_mqa_logits(device: Gpu) -> Iterator[Row]:
    """Decode steps, FP8 and MXFP4."""
    for batch, thousands, next_n in device.of(STEPS):
        keys = thousands * 1024
        pages = batch * keys // PAGE
        rows = batch * next_n
        order = np.random.default_rng(0).permutation(pages).reshape(batch, -1)
        tables, lengths = device.int32(order), device.int32(np.full(batch, keys))
        weights, out = device.uniform((rows, HEADS)), device.empty((rows, keys), "float32")
        for quant in QUANTS:
            width = DIM if quant == "fp8" else DIM // 2
            moved = batch * keys * (width + 4) + 4 * rows * keys
            kind = "e4m3" if quant == "fp8" else "int8"
            q_scales = None if quant == "fp8" else _exponents(device, (batch, next_n, HEADS))
            q = device.random((batch, next_n, HEADS, width), kind)
            calls = [
                bind(
                    F.paged_mqa_logits,
                    q,
                    _pages(device, pages, quant),
                    weights,
                    lengths,
                    tables,
                    keys,
                    q_scales=q_scales,
                    quant=quant,
                    out=out,
                )
                for _ in range(device.copies(moved))
            ]
            us = device.us(calls)
            shape = f"batch {batch}, {thousands}k keys, {next_n} queries, {quant}"
            read_us = moved / cuda.read_bandwidth() / 1e3
            row = Row("paged_mqa_logits", shape, us, moved / us / 1e3, "GB/s", READ, read_us)
            yield row
            name = f"paged_mqa_logits q{next_n}"
            for other in peers("logits", peer=name, b=batch, ctx=keys, next_n=next_n):
                if quant == "fp8":
                    yield row.beside("DeepGEMM", other["us"])
            del calls


@register("mqa_logits", "cpu")
def mqa_logits_cpu(device: Cpu) -> Iterator[Row]:
    """Beside products of fp32 matrices in NumPy, which leave out the codes' conversion."""
    tokens, keys, heads = (8, 512, 8) if device.quick else (64, 4096, 32)
    q, k = device.random((tokens, heads, DIM), "e4m3"), device.random((keys, DIM), "e4m3", seed=1)
    weights, scales = device.uniform((tokens, heads)), device.uniform((keys,))
    starts, ends = device.int32(np.zeros(tokens)), device.int32(np.full(tokens, keys))
    dense_q = np.ones((tokens * heads, DIM), np.float32)
    dense_k, w = np.ones((keys, DIM), np.float32), weights.numpy()[:, :, None]

    def numpy() -> object:
        scores = np.maximum(dense_q @ dense_k.T, 0).reshape(tokens, heads, keys)
        return (scores * w).sum(axis=1)

    calls = [bind(F.mqa_logits, q, k, weights, starts, ends, k_scales=scales), numpy]
    us, numpy_us = medians(calls, 3 if device.quick else 9)
    flops = 2 * tokens * keys * heads * DIM
    row = Row("mqa_logits", f"{tokens} tokens, {keys} keys, {heads} heads", us)
    row.rate, row.unit = flops / us / 1e3, "GFLOP/s"
    yield row.beside("NumPy", numpy_us)


@register("paged_mqa_logits", "cpu")
def paged_mqa_logits_cpu(device: Cpu) -> Iterator[Row]:
    """A decode step over pages, both formats."""
    batch, keys, heads = (1, 512, 8) if device.quick else (4, 4096, 32)
    pages = batch * keys // PAGE
    tables = device.int32(np.arange(pages).reshape(batch, -1))
    lengths, weights = device.int32(np.full(batch, keys)), device.uniform((batch, heads))
    for quant in QUANTS:
        width = DIM if quant == "fp8" else DIM // 2
        exponents = np.full((batch, 1, heads), 0x7F7F7F7F)
        call = bind(
            F.paged_mqa_logits,
            device.random((batch, 1, heads, width), "e4m3"),
            _pages(device, pages, quant),
            weights,
            lengths,
            tables,
            keys,
            q_scales=None if quant == "fp8" else device.int32(exponents),
            quant=quant,
        )
        (us,) = medians([call], 3 if device.quick else 9)
        shape = f"batch {batch}, {keys} keys, {heads} heads, {quant}"
        flops = 2 * batch * keys * heads * DIM
        yield Row("paged_mqa_logits", shape, us, flops / us / 1e3, "GFLOP/s")
