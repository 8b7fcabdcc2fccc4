"""Paged decode on a GPU beside the read-only bandwidth of the run, and beside peers' kernels.

The bytes are those of K, V and their scales. Peers do not run in Paddle: another program times them
on the same machine before (see :mod:`fastattn.bench.peers`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

import fastattn.functional as F
from fastattn.bench import gpu_timing
from fastattn.bench.cache_gpu import _bf16, _gpu
from fastattn.bench.common import Row, register
from fastattn.bench.peers import peers

BLOCK, DIM = 64, 128
TYPES = ("cache_fp8", "block_wise_fp8", "cache_int8", "block_wise_int8", "none")
#: Batch and context of the table; a shape is repeated over layers that exceed the L2 cache.
SHAPES = [(b, k * 1024) for k in (1, 8, 32, 128) for b in (1, 16, 64, 128) if b * k <= 4096]
LAYER_BYTES = 1.2e9
#: Peers that read the same kind of cache, by the prefix of their names.
PEERS = {"cache_fp8": "fp8", "block_wise_int8": "int8", "none": "bf16"}


@functools.lru_cache(maxsize=2)
def _random(kind: str) -> np.ndarray:
    """Bytes to repeat: codes that are finite in e4m3, or values near 1 in bfloat16."""
    rng = np.random.default_rng(0)
    if kind == "none":
        bits = rng.integers(0, 1 << 16, 1 << 23, dtype=np.uint16)
        return (bits & np.uint16(0x807F)) | np.uint16(0x3F00)
    return rng.integers(0, 256, 1 << 24, dtype=np.uint8) & np.uint8(0xBF)


class Decode:
    """One decode step of rows of given lengths, over as many layers as exceed the L2 cache."""

    def __init__(
        self, kind: str, lengths: Sequence[int], heads: int, kv_heads: int, new: int = 1
    ) -> None:
        rng = np.random.default_rng(1)
        pages = [-(-length // BLOCK) for length in lengths]
        blocks, rows = sum(pages), len(lengths)
        tables = np.full((rows, max(pages)), -1, np.int32)
        order = np.split(rng.permutation(blocks).astype(np.int32), np.cumsum(pages)[:-1])
        for row, ids in enumerate(order):
            tables[row, : len(ids)] = ids
        dynamic = kind.startswith("block_wise")
        size = 2 if kind == "none" else 1
        per_token = 2 * kv_heads * (DIM * size + (4 if dynamic else 0))
        self.bytes = sum(lengths) * per_token
        layers = max(1, min(64, round(LAYER_BYTES / (blocks * BLOCK * per_token))))
        meta = (
            _gpu(tables),
            _gpu(np.arange(rows + 1, dtype=np.int32) * new),
            _gpu(np.array(lengths, np.int32) - new),
            _gpu(np.full(rows, new, np.int32)),
        )
        self.calls: list[Callable[[], object]] = []
        for _ in range(layers):
            dtype = "bfloat16" if kind == "none" else "uint8"
            v_shape = (BLOCK, DIM) if kind == "none" else (DIM, BLOCK)
            words = _random("none" if kind == "none" else "codes")
            key = gpu_timing.filled((blocks, kv_heads, BLOCK, DIM), dtype, words)
            value = gpu_timing.filled((blocks, kv_heads, *v_shape), dtype, words)
            scales = {}
            if kind != "none":
                shape = (blocks, kv_heads, BLOCK) if dynamic else (kv_heads,)
                scales = {
                    name: _gpu(rng.uniform(0.01, 0.03, shape).astype(np.float32))
                    for name in ("cache_k_scales", "cache_v_scales")
                }
            query = _bf16(rng, (rows * new, heads, DIM))
            call = functools.partial(F.paged_attention, query, key, value, *meta)
            self.calls.append(
                functools.partial(
                    call,
                    max_seqlen_q=new,
                    max_seqlen_k=max(lengths),
                    cache_quant_type=kind,
                    out=gpu_timing.empty((rows * new, heads, DIM), "bfloat16"),
                    **scales,
                )
            )


def _row(shape: str, us: float, moved: int) -> Row:
    bandwidth = gpu_timing.read_bandwidth()
    peer = "reading as many bytes"
    return Row(
        "paged_attention", shape, us, moved / us / 1e3, "GB/s", peer, moved / bandwidth / 1e3
    )


def _rows(kind: str, batch: int, context: int, heads: int, kv_heads: int) -> Iterator[Row]:
    step = Decode(kind, [context] * batch, heads, kv_heads)
    us = gpu_timing.median_us(step.calls, replays=15)
    shape = f"decode {kind} B {batch} ctx {context} H {heads}/{kv_heads} D {DIM}"
    yield _row(shape, us, step.bytes)
    for other in peers("decode", b=batch, ctx=context, h=heads, hk=kv_heads):
        if kind in PEERS and PEERS[kind] in other["peer"]:
            yield Row(
                "paged_attention", shape, us, step.bytes / us / 1e3, "GB/s", other["peer"],
                other["us"],
            )  # fmt: skip


def ragged_lengths(rows: int = 64, shortest: int = 64, longest: int = 32768) -> list[int]:
    """Lengths spread evenly over their logarithm."""
    steps = (np.arange(rows) + 0.5) / rows
    return [int(x) for x in shortest * (longest / shortest) ** steps]


@register("paged_attention")
def paged_attention(quick: bool) -> Iterator[Row]:
    """Decode over every cache type, batch and context; then a few other shapes."""
    for heads, kv_heads in ((32, 8),) if quick else ((32, 8), (64, 8)):
        for kind in ("block_wise_fp8",) if quick else TYPES:
            for batch, context in ((1, 8192), (64, 1024)) if quick else SHAPES:
                yield from _rows(kind, batch, context, heads, kv_heads)
    if quick:
        return
    for kind in TYPES:
        yield from _rows(kind, 64, 8192, 16, 1)
        step = Decode(kind, ragged_lengths(), 32, 8)
        us = gpu_timing.median_us(step.calls, replays=15)
        yield _row(f"decode {kind} B 64 ctx 64..32768 ragged H 32/8 D {DIM}", us, step.bytes)
        step = Decode(kind, [8192] * 64, 32, 8, new=4)
        us = gpu_timing.median_us(step.calls, replays=15)
        yield _row(f"4 new tokens {kind} B 64 ctx 8192 H 32/8 D {DIM}", us, step.bytes)
