"""Attention on the CPU against NumPy (BLAS) attention over the same K and V, already in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastattn.functional as F
from benchmarks.cases.inputs import Step, paged_calls
from benchmarks.core.devices import Cpu
from benchmarks.core.rows import Row, register
from benchmarks.core.timing import Call, bind, medians
from fastattn.reference import layout, numerics
from fastattn.reference.cache import code_of, dynamic_scales

Array = NDArray[Any]
_PEER = "NumPy, K/V in fp32"

_DECODE = {  # cache type, batch, H, KV, D, context
    "cpu": [
        ("block_wise_fp8", 8, 32, 8, 128, 4096),
        ("block_wise_fp8", 8, 32, 8, 128, 1024),
        ("block_wise_int8", 8, 32, 8, 128, 1024),
        ("block_wise_int4", 8, 32, 8, 128, 1024),
        ("block_wise_mxfp4", 8, 32, 8, 128, 1024),
        ("cache_fp8", 8, 32, 8, 128, 1024),
        ("none", 8, 32, 8, 128, 1024),
        ("block_wise_fp8", 1, 32, 8, 128, 4096),
        ("block_wise_fp8", 8, 8, 8, 128, 1024),
        ("block_wise_fp8", 8, 32, 8, 64, 1024),
    ],
    "cpu quick": [("block_wise_fp8", 2, 32, 8, 128, 1024), ("none", 2, 32, 8, 128, 1024)],
}
_CHUNKS = {"cpu": ("block_wise_fp8", "none"), "cpu quick": ("block_wise_fp8",)}
_DTYPES = {"cpu": ("float32", "bfloat16"), "cpu quick": ("float32",)}


def numpy_attention(q: Array, k: Array, v: Array, new: int) -> Array:
    """Attention as matrix products, one pair a sequence and KV head, causal for `new` queries.

    Parameters
    ----------
    q : array, shape [B, KV, new * group, D], float32
    k, v : array, shape [B, KV, context, D], float32
    """
    out = np.empty_like(q)
    scale = np.float32(q.shape[-1] ** -0.5)
    context = k.shape[2]
    masked = None
    if new > 1:
        position = np.arange(q.shape[2])[:, None] // (q.shape[2] // new) + context - new
        masked = np.arange(context)[None, :] > position
    for seq, head in np.ndindex(q.shape[:2]):
        s = (q[seq, head] * scale) @ k[seq, head].T
        if masked is not None:
            s[masked] = -np.inf
        s -= s.max(axis=-1, keepdims=True)
        np.exp(s, out=s)
        total = s.sum(axis=-1, keepdims=True)
        np.matmul(s, v[seq, head], out=out[seq, head])
        out[seq, head] /= total
    return out


def _fp32(tensor: Any) -> Array:
    return tensor.cast("float32").numpy()


def _contiguous(cache: Any, scales: Any, kind: str, quant: str, tables: Array) -> Array:
    """Values [B, KV, context, D] of a cache in fp32, in the order of the block tables."""
    if quant == "none":
        values = _fp32(cache)
    else:
        code = code_of(quant, kind=kind)
        options = {"int8": code == "int8", "nibbles": code in numerics.NIBBLES}
        codes = layout.unpack(cache.numpy(), kind, "fastattn", **options)
        multiplier = scales.numpy()
        if multiplier.ndim == 1:
            multiplier = multiplier[:, None, None]
        else:
            multiplier = dynamic_scales(multiplier, quant)
        values = numerics.from_codes(codes, code) * multiplier
    of_seqs = values[tables].swapaxes(1, 2)
    batch, kv, blocks, size, dim = of_seqs.shape
    return np.ascontiguousarray(of_seqs).reshape(batch, kv, blocks * size, dim)


def _folded(q: Any, batch: int, kv: int) -> Array:
    """Queries [T, H, D] as [B, KV, new * group, D] in fp32."""
    tokens, heads, dim = q.shape
    split = _fp32(q).reshape(batch, tokens // batch, kv, heads // kv, dim)
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(batch, kv, -1, dim)


def _row(
    device: Cpu, op: str, shape: str, ours: Call, numpy: Call, work: float, unit: str, batch: int
) -> Row:
    expected: Any = numpy()
    actual = _folded(ours(), batch, expected.shape[1])
    error = float(np.abs(actual - expected).max() / np.abs(expected).max())
    repeats = (5 if device.quick else 15) if unit == "GB/s" else (3 if device.quick else 7)
    us, peer_us = medians([ours, numpy], repeats)
    return Row(op, shape, us, work / us / 1e3, unit, _PEER, peer_us, error)


def _paged(
    device: Cpu, quant: str, batch: int, heads: int, kv: int, dim: int, context: int, new: int
) -> tuple[Call, Call, int]:
    """Ours, NumPy's, and the bytes of K, V and scales that ours reads."""
    step = Step(device, [context - new] * batch, [new] * batch)
    ours: Any = paged_calls(device, quant, step, heads, kv, dim=dim)[0]
    q, key, value = ours.args[:3]
    scales = [ours.keywords[name] for name in ("cache_k_scales", "cache_v_scales")]
    tables = step.meta[0].numpy()
    k, v = (
        _contiguous(cache, of_cache, kind, quant, tables)
        for cache, of_cache, kind in zip((key, value), scales, "kv")
    )
    tensors = [x for x in (key, value, *scales) if x is not None]
    size = sum(x.size * x.element_size() for x in tensors)
    return ours, bind(numpy_attention, _folded(q, batch, kv), k, v, new), size


@register("paged_attention", "cpu")
def paged_attention(device: Cpu) -> Iterator[Row]:
    """Decode, then chunked prefill, over every kind of cache."""
    op = "paged_attention"
    for quant, batch, heads, kv, dim, context in device.of(_DECODE):
        ours, numpy, size = _paged(device, quant, batch, heads, kv, dim, context, 1)
        shape = f"decode {quant} B {batch} ctx {context} H {heads}/{kv} D {dim}"
        yield _row(device, op, shape, ours, numpy, size, "GB/s", batch)
    heads, kv, context, new = 16, 4, 1024, 256
    for quant in device.of(_CHUNKS):
        ours, numpy, _ = _paged(device, quant, 1, heads, kv, 128, context, new)
        flops = 4 * heads * 128 * sum(range(context - new + 1, context + 1))
        shape = f"chunk of {new} {quant} B 1 ctx {context} H {heads}/{kv} D 128"
        yield _row(device, op, shape, ours, numpy, flops, "GFLOP/s", 1)


@register("flash_attention", "cpu")
def flash_attention(device: Cpu) -> Iterator[Row]:
    """Causal prefill of one sequence on contiguous tensors."""
    tokens, heads, kv, dim = 512, 16, 4, 128
    starts = device.int32([0, tokens])
    for dtype in device.of(_DTYPES):
        q, k, v = (device.random((tokens, n, dim), dtype, i) for i, n in enumerate((heads, kv, kv)))
        lengths = (starts, starts, tokens, tokens)
        ours = bind(F.flash_attention, q, k, v, *lengths, causal=True)
        folded = (_folded(q, 1, kv), *(_folded(x, 1, kv) for x in (k, v)), tokens)
        flops = 4 * heads * dim * tokens * (tokens + 1) // 2
        shape = f"causal {dtype} T {tokens} H {heads}/{kv} D {dim}"
        numpy = bind(numpy_attention, *folded)
        yield _row(device, "flash_attention", shape, ours, numpy, flops, "GFLOP/s", 1)
