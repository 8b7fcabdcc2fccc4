"""Attention on the CPU against NumPy (BLAS) attention over the same K and V, already in fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import paddle

from fastattn import functional
from fastattn.bench.common import Row, medians, register
from fastattn.reference import layout, numerics

_BLOCK = layout.BLOCK_SIZE
_PEER = "NumPy, K/V in fp32"


def _int32(values: Any) -> paddle.Tensor:
    return paddle.to_tensor(np.asarray(values, np.int32))


def _bfloat16(values: np.ndarray) -> paddle.Tensor:
    return paddle.to_tensor(values.astype(ml_dtypes.bfloat16).view(np.uint16))


def numpy_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, new: int) -> np.ndarray:
    """Attention as matrix products, one pair a row and KV head, causal for `new` queries a row.

    Parameters
    ----------
    q : array, shape [B, KV, new * group, D], float32
    k, v : array, shape [B, KV, context, D], float32
    """
    out = np.empty_like(q)
    scale = np.float32(q.shape[-1] ** -0.5)
    context = k.shape[2]
    hidden = None
    if new > 1:
        position = np.arange(q.shape[2])[:, None] // (q.shape[2] // new) + context - new
        hidden = np.arange(context)[None, :] > position
    for row in range(q.shape[0]):
        for head in range(q.shape[1]):
            s = (q[row, head] * scale) @ k[row, head].T
            if hidden is not None:
                s[hidden] = -np.inf
            s -= s.max(axis=-1, keepdims=True)
            np.exp(s, out=s)
            total = s.sum(axis=-1, keepdims=True)
            np.matmul(s, v[row, head], out=out[row, head])
            out[row, head] /= total
    return out


class _Half:
    """K or V of a cache: logical elements, its tensors, and its values in fp32."""

    def __init__(self, rng: np.random.Generator, kind: str, shape: tuple[int, ...], quant: str):
        self.scales: paddle.Tensor | None = None
        if quant == "none":
            values = rng.standard_normal(shape, dtype=np.float32).astype(ml_dtypes.bfloat16)
            self.cache = _bfloat16(values)
            self.values = values.astype(np.float32)
            return
        if quant.endswith("int8"):
            codes = rng.integers(-127, 128, shape, dtype=np.int8).view(np.uint8)
            table, size = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32), 0.012
        else:
            codes = rng.integers(0x28, 0x48, shape, dtype=np.uint8)
            codes |= rng.integers(0, 2, shape, dtype=np.uint8) << 7
            table, size = numerics.from_codes(np.arange(256, dtype=np.uint8), "e4m3"), 0.5
        self.cache = paddle.to_tensor(
            layout.pack(codes, kind, "fastattn", int8=quant.endswith("int8"))
        )
        if quant.startswith("block_wise"):
            scales = rng.uniform(0.5, 1.5, shape[:3]).astype(np.float32) * np.float32(size)
            multiplier = scales[..., None]
        else:
            scales = multiplier = np.array([size], np.float32)
        self.scales = paddle.to_tensor(scales)
        self.values = table[codes]
        self.values *= multiplier

    def contiguous(self, tables: np.ndarray) -> np.ndarray:
        """Values [B, KV, context, D] in the order of the block tables."""
        rows = self.values[tables].swapaxes(1, 2)
        batch, kv_heads, blocks, _, dim = rows.shape
        return np.ascontiguousarray(rows).reshape(batch, kv_heads, blocks * _BLOCK, dim)


def _paged_case(
    quant: str, batch: int, heads: int, kv_heads: int, dim: int, context: int, new: int
) -> tuple[Callable[[], paddle.Tensor], Callable[[], np.ndarray], int]:
    """Ours, NumPy's, and the bytes of K, V and scales that ours reads."""
    rng = np.random.default_rng(0)
    blocks = context // _BLOCK
    shape = (batch * blocks, kv_heads, _BLOCK, dim)
    tables = rng.permutation(batch * blocks).reshape(batch, blocks)
    halves = [_Half(rng, kind, shape, quant) for kind in ("k", "v")]
    size = sum(
        x.size * x.element_size()
        for half in halves
        for x in (half.cache, half.scales)
        if x is not None
    )
    k, v = (half.contiguous(tables) for half in halves)
    group = heads // kv_heads
    q = rng.standard_normal((batch, new, kv_heads, group, dim), dtype=np.float32)
    q = q.astype(ml_dtypes.bfloat16)
    packed = np.ascontiguousarray(q.transpose(0, 2, 1, 3, 4)).astype(np.float32)
    packed = packed.reshape(batch, kv_heads, new * group, dim)
    arguments = (
        _bfloat16(q.reshape(batch * new, heads, dim)),
        halves[0].cache,
        halves[1].cache,
        _int32(tables),
        _int32(np.arange(batch + 1) * new),
        _int32([context - new] * batch),
        _int32([new] * batch),
        new,
        context,
    )
    scales: dict[str, Any] = {
        "cache_k_scales": halves[0].scales,
        "cache_v_scales": halves[1].scales,
    }

    def ours() -> paddle.Tensor:
        return functional.paged_attention(*arguments, cache_quant_type=quant, **scales)

    def numpy() -> np.ndarray:
        return numpy_attention(packed, k, v, new)

    return ours, numpy, size


def _error(ours: paddle.Tensor, peer: np.ndarray, new: int) -> float:
    batch, kv_heads, rows, dim = peer.shape
    expected = peer.reshape(batch, kv_heads, new, rows // new, dim).transpose(0, 2, 1, 3, 4)
    actual = ours.cast("float32").numpy().reshape(expected.shape)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


_DECODE = [  # cache type, batch, H, KV, D, context
    ("block_wise_fp8", 8, 32, 8, 128, 4096),
    ("block_wise_fp8", 8, 32, 8, 128, 1024),
    ("block_wise_int8", 8, 32, 8, 128, 1024),
    ("cache_fp8", 8, 32, 8, 128, 1024),
    ("none", 8, 32, 8, 128, 1024),
    ("block_wise_fp8", 1, 32, 8, 128, 4096),
    ("block_wise_fp8", 8, 8, 8, 128, 1024),
    ("block_wise_fp8", 8, 32, 8, 64, 1024),
]
_QUICK = [("block_wise_fp8", 2, 32, 8, 128, 1024), ("none", 2, 32, 8, 128, 1024)]


@register("paged_attention")
def paged_attention(quick: bool) -> Iterator[Row]:
    """Decode, then chunked prefill, over every kind of cache."""
    for quant, batch, heads, kv_heads, dim, context in _QUICK if quick else _DECODE:
        ours, numpy, size = _paged_case(quant, batch, heads, kv_heads, dim, context, 1)
        error = _error(ours(), numpy(), 1)
        us, peer_us = medians([ours, numpy], 5 if quick else 15)
        shape = f"decode {quant} B{batch} H{heads}/{kv_heads} D{dim} ctx {context}"
        yield Row("paged_attention", shape, us, size / us / 1e3, "GB/s", _PEER, peer_us, error)
    for quant in ("block_wise_fp8",) if quick else ("block_wise_fp8", "none"):
        batch, heads, kv_heads, dim, context, new = 1, 16, 4, 128, 1024, 256
        ours, numpy, _ = _paged_case(quant, batch, heads, kv_heads, dim, context, new)
        error = _error(ours(), numpy(), new)
        us, peer_us = medians([ours, numpy], 3 if quick else 7)
        flops = 4 * batch * heads * dim * sum(range(context - new + 1, context + 1))
        shape = f"chunk of {new} {quant} B{batch} H{heads}/{kv_heads} D{dim} ctx {context}"
        yield Row("paged_attention", shape, us, flops / us / 1e3, "GFLOP/s", _PEER, peer_us, error)


def _flash_case(
    dtype: str, tokens: int, heads: int, kv_heads: int, dim: int
) -> tuple[Callable[[], paddle.Tensor], Callable[[], np.ndarray]]:
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal((tokens, n, dim), dtype=np.float32) for n in (heads, kv_heads, kv_heads)
    )
    if dtype == "bfloat16":
        q, k, v = (x.astype(ml_dtypes.bfloat16).astype(np.float32) for x in (q, k, v))
    tensors: list[Any] = [
        _bfloat16(x) if dtype == "bfloat16" else paddle.to_tensor(x) for x in (q, k, v)
    ]
    lengths = _int32([0, tokens])
    group = heads // kv_heads
    packed = q.reshape(tokens, kv_heads, group, dim).transpose(1, 0, 2, 3)
    packed = np.ascontiguousarray(packed).reshape(1, kv_heads, tokens * group, dim)
    keys, values = (np.ascontiguousarray(x.swapaxes(0, 1))[None] for x in (k, v))

    def ours() -> paddle.Tensor:
        return functional.flash_attention(
            tensors[0], tensors[1], tensors[2], lengths, lengths, tokens, tokens, causal=True
        )

    def numpy() -> np.ndarray:
        return numpy_attention(packed, keys, values, tokens)

    return ours, numpy


@register("flash_attention")
def flash_attention(quick: bool) -> Iterator[Row]:
    """Causal prefill of one row on contiguous tensors."""
    tokens, heads, kv_heads, dim = 512, 16, 4, 128
    for dtype in ("float32",) if quick else ("float32", "bfloat16"):
        ours, numpy = _flash_case(dtype, tokens, heads, kv_heads, dim)
        error = _error(ours(), numpy(), tokens)
        us, peer_us = medians([ours, numpy], 3 if quick else 7)
        flops = 4 * heads * dim * tokens * (tokens + 1) // 2
        shape = f"causal {dtype} T{tokens} H{heads}/{kv_heads} D{dim}"
        yield Row("flash_attention", shape, us, flops / us / 1e3, "GFLOP/s", _PEER, peer_us, error)
