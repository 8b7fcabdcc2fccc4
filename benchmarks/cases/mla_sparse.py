"""Sparse attention over latent caches beside reading the tokens once, NumPy, and FlashMLA.

On a GPU the shapes of DeepSeek-V3.2 (656 bytes a token), of V4 (584 bytes, a window of 128 tokens
beside the compressed ones) and of a prefill over contiguous bf16 keys, and over a cache of 656
bytes. Kernels for 64 heads at least are peers of fewer, too: servers pad queries for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import paddle
from numpy.typing import NDArray

import fastattn.functional as F
from benchmarks.core import cuda
from benchmarks.core.devices import Cpu, Device, Gpu
from benchmarks.core.peers import READ, peers
from benchmarks.core.rows import Row, register
from benchmarks.core.timing import Call, bind, medians

OP = "mla_sparse_attention"
PAGE, WINDOW, VALUE_DIM = 64, 128, 512
#: Format: channels of a key, bytes of a token, elements of it in the cache's tensor.
_FORMATS = {
    "bf16": (576, 1152, 576),
    "fp8_656": (576, 656, 656),
    "fp8_584": (512, 584, 584),
}
#: Sequences, queries of each, heads and indices.
_V32 = {
    "gpu": [
        *((128, q, 128, 2048) for q in (1, 2)),
        *((128, 1, heads, 2048) for heads in (64, 16, 8)),
        *((batch, 1, 128, 2048) for batch in (1, 8)),
    ],
    "gpu quick": [(8, 1, 16, 512)],
}
_V4 = {"gpu": [(128, 1, heads, 512) for heads in (64, 16)], "gpu quick": [(8, 1, 16, 512)]}
#: Keys of a sequence in a decode step.
_CONTEXT = {"gpu": 8192, "gpu quick": 1024}
#: Queries, heads, indices and keys of a prefill.
_PREFILL = {
    "gpu": [(4096, 128, 2048, keys * 1024) for keys in (8, 32, 64)],
    "gpu quick": [(64, 16, 512, 1024)],
}
#: A prefill over a cache of 8 bits in two operators.
GATHERED = "mla_gather_cache, then bf16 keys"
_CHUNK = 1 << 16  # tokens that are written at a time


class _Work(NamedTuple):
    """What a call computes and reads."""

    queries: int
    heads: int
    dim: int
    keys: int  # of each query
    token_bytes: int

    @property
    def flops(self) -> int:
        return 2 * self.queries * self.heads * self.keys * (self.dim + VALUE_DIM)

    @property
    def moved(self) -> int:
        """Tokens once for each query, queries and outputs."""
        rows = 2 * self.heads * (self.dim + VALUE_DIM)
        return self.queries * (self.keys * self.token_bytes + rows)


def _cache(device: Device, tokens: int, cache_format: str, seed: int = 1) -> paddle.Tensor:
    """Normal latents, written by the operator that a server calls."""
    dim, _, width = _FORMATS[cache_format]
    if cache_format == "bf16":
        return device.random((tokens // PAGE, PAGE, width), seed=seed)
    cache = device.empty((tokens // PAGE, PAGE, width), "uint8")
    for begin in range(0, tokens, _CHUNK):
        count = min(_CHUNK, tokens - begin)
        latent = device.random((count, dim - 64), seed=seed)
        rope = device.random((count, 64), seed=seed + 1)
        slots = device.int32(np.arange(begin, begin + count))
        F.mla_write_cache(latent, rope, cache, slots, cache_format=cache_format)
    return cache


def _choice(rows: int, keys: int, topk: int, seed: int) -> NDArray[Any]:
    """For each row distinct keys in an order of its own."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(keys)[:topk]
    return ((order + rng.integers(0, keys, (rows, 1))) % keys).astype(np.int32)


def _slots(batch: int, queries: int, context: int, topk: int, seed: int) -> NDArray[Any]:
    """Slots of sequences that lie one after the other in a cache."""
    first = np.repeat(np.arange(batch) * context, queries)[:, None]
    return (_choice(batch * queries, context, topk, seed) + first).astype(np.int32)


def _row(device: Gpu, shape: str, calls: Sequence[Call], work: _Work) -> Row:
    us = device.us(calls)
    read_us = work.moved / cuda.read_bandwidth() / 1e3
    return Row(OP, shape, us, work.flops / us / 1e6, "TFLOP/s", READ, read_us)


def _beside(row: Row, section: str, heads: int, shape: Mapping[str, object]) -> Iterator[Row]:
    padded = max(64, heads)
    name = "FlashMLA" if padded == heads else f"FlashMLA, padded to {padded} heads"
    yield row
    for other in peers(section, h=padded, **shape):
        yield row.beside(name, other["us"])


@register(OP, "gpu")
def sparse(device: Gpu) -> Iterator[Row]:
    """Decode steps of V3.2 and V4, then prefill."""
    yield from _decode_v32(device)
    yield from _decode_v4(device)
    yield from _prefill(device)


def _decode_v32(device: Gpu) -> Iterator[Row]:
    context, cases = device.of(_CONTEXT), device.of(_V32)
    cache = _cache(device, max(case[0] for case in cases) * context, "fp8_656")
    for batch, queries, heads, topk in cases:
        work = _Work(batch * queries, heads, 576, topk, 656)
        q = device.random((work.queries, heads, 576), seed=3)
        calls = [
            bind(
                F.mla_sparse_attention,
                q,
                cache,
                device.int32(_slots(batch, queries, context, topk, seed)),
                cache_format="fp8_656",
                out=device.empty((work.queries, heads, VALUE_DIM), "bfloat16"),
            )
            for seed in range(device.copies(work.moved, 16))
        ]
        shape = f"decode 656 B, batch {batch}, {queries} queries, H {heads}, top {topk}"
        fields = {"kind": "v32", "s_q": queries, "topk": topk, "b": batch, "ctx": context}
        row = _row(device, shape, calls, work)
        yield from _beside(row, "mla_sparse_decode", heads, fields)


def _decode_v4(device: Gpu) -> Iterator[Row]:
    context, cases = device.of(_CONTEXT), device.of(_V4)
    kept, most = context // 4, max(case[0] for case in cases)
    near, far = _cache(device, most * WINDOW, "fp8_584"), _cache(device, most * kept, "fp8_584", 5)
    for batch, queries, heads, topk in cases:
        rows, topk = batch * queries, min(topk, kept)
        work = _Work(rows, heads, 512, topk + WINDOW, 584)
        recent = np.arange(batch * WINDOW).reshape(batch, WINDOW).repeat(queries, axis=0)
        options = {
            "cache_format": "fp8_584",
            "topk_length": device.int32(np.full(rows, WINDOW)),
            "extra_topk_length": device.int32(np.full(rows, topk)),
            "sinks": device.uniform((heads,)),
        }
        calls = [
            bind(
                F.mla_sparse_attention,
                device.random((rows, heads, 512), seed=3),
                near,
                device.int32(recent),
                extra_cache=far,
                extra_indices=device.int32(_slots(batch, queries, kept, topk, seed)),
                out=device.empty((rows, heads, VALUE_DIM), "bfloat16"),
                **options,
            )
            for seed in range(device.copies(work.moved, 16))
        ]
        shape = f"decode 584 B, batch {batch}, {queries} queries, H {heads}, top {topk} + {WINDOW}"
        fields = {"kind": "v4", "s_q": queries, "topk": topk, "b": batch, "ctx": context}
        row = _row(device, shape, calls, work)
        yield from _beside(row, "mla_sparse_decode", heads, fields)


def _gather(device: Gpu, cache: paddle.Tensor, keys: int) -> Call:
    """The sequence's tokens to contiguous rows of bf16, as many as the attention behind it reads.

    Those that it reads lie elsewhere: Paddle 2.6 has no view of rows as pages on a Hopper GPU.
    """
    return bind(
        F.mla_gather_cache,
        cache,
        device.empty((keys, 576), "bfloat16"),
        device.int32(np.arange(keys // PAGE)[None]),
        device.int32([keys]),
        device.int32([0, keys]),
        cache_format="fp8_656",
    )


def _prefill(device: Gpu) -> Iterator[Row]:
    for queries, heads, topk, keys in device.of(_PREFILL):
        q = device.random((queries, heads, 576), seed=3)
        out = device.empty((queries, heads, VALUE_DIM), "bfloat16")
        indices = device.int32(_choice(queries, keys, topk, 0))
        plain_us, plain = None, None
        for cache_format in ("bf16", "fp8_656"):
            work = _Work(queries, heads, 576, topk, _FORMATS[cache_format][1])
            cache = _cache(device, keys, cache_format)
            call = bind(
                F.mla_sparse_attention, q, cache, indices, cache_format=cache_format, out=out
            )
            shape = f"prefill {cache_format}, {queries} x H {heads}, top {topk}, {keys} keys"
            us = device.us([call])
            row = Row(OP, shape, us, work.flops / us / 1e6, "TFLOP/s")
            fields = {"dim": 576, "topk": topk, "s": queries, "kv": keys}
            # FlashMLA reads bf16 keys alone: those of a cache are gathered before, uncounted here.
            yield from _beside(row, "mla_sparse_prefill", heads, fields)
            if plain_us is None or plain is None:
                plain_us, plain = us, call
            else:
                yield row.beside("bf16 keys", plain_us)
                steps = [_gather(device, cache, keys), plain]
                yield row.beside(GATHERED, device.us(steps) * len(steps))


@register(OP, "cpu")
def sparse_cpu(device: Cpu) -> Iterator[Row]:
    """Beside NumPy's fp32 products over keys that are gathered and dequantised already."""
    queries, heads, topk, tokens = (1, 4, 64, 256) if device.quick else (8, 16, 1024, 8192)
    for cache_format, (dim, _, _) in _FORMATS.items():
        work = _Work(queries, heads, dim, topk, 0)
        call = bind(
            F.mla_sparse_attention,
            device.random((queries, heads, dim), seed=3),
            _cache(device, tokens, cache_format),
            device.int32(_choice(queries, tokens, topk, 0)),
            cache_format=cache_format,
        )
        q = np.ones((queries, heads, dim), np.float32)
        keys = np.ones((queries, topk, dim), np.float32)

        def numpy(q: Any = q, keys: Any = keys) -> object:
            scores = q @ keys.transpose(0, 2, 1)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            return weights @ keys[..., :VALUE_DIM] / weights.sum(axis=-1, keepdims=True)

        us, numpy_us = medians([call, numpy], 3 if device.quick else 9)
        shape = f"{queries} queries, H {heads}, top {topk}, {cache_format}"
        row = Row(OP, shape, us, work.flops / us / 1e3, "GFLOP/s")
        yield row.beside("NumPy", numpy_us)
