"""Cache operators on a GPU, against the copy bandwidth of the same run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

import fastattn.functional as F
from fastattn.bench import gpu_timing
from fastattn.bench.common import Row, register

BLOCK = 64
#: Bytes that the rotating buffers of a measurement add up to, several times an L2 cache.
COLD_BYTES = 400 << 20

TYPES = ("cache_int8", "cache_fp8", "block_wise_int8", "block_wise_fp8")


def _gpu(array: np.ndarray) -> paddle.Tensor:
    if array.dtype.itemsize == 2 and array.dtype.kind == "V":
        array = array.view(np.uint16)
    return paddle.to_tensor(array, place=paddle.CUDAPlace(0))


def _bf16(rng: np.random.Generator, shape: tuple[int, ...]) -> paddle.Tensor:
    # Random bits with an exponent near 1: real values without a host-side conversion.
    bits = rng.integers(0, 1 << 16, size=1 << 20, dtype=np.uint16)
    bits = (bits & np.uint16(0x807F)) | np.uint16(0x3F00) | (bits & np.uint16(0x0080))
    return gpu_timing.filled(shape, "bfloat16", bits)


class Cache:
    """A layer's cache on the GPU with random codes, its blocks dealt out in random order."""

    def __init__(self, cache_type: str, num_blocks: int, kv_heads: int, head_dim: int) -> None:
        rng = np.random.default_rng(0)
        self.type = cache_type
        self.num_blocks = num_blocks
        codes = rng.integers(0, 126, size=1 << 20, dtype=np.uint8)
        shape: tuple[int, ...] = (num_blocks, kv_heads, BLOCK, head_dim)
        self.key = gpu_timing.filled(shape, "uint8", codes)
        self.value = gpu_timing.filled((num_blocks, kv_heads, head_dim, BLOCK), "uint8", codes)
        #: The same number of other bytes in the shape that FastDeploy gives V.
        self.value_as_deployed = gpu_timing.filled(shape, "uint8", codes)
        dynamic = cache_type.startswith("block_wise")
        shape = (num_blocks, kv_heads, BLOCK) if dynamic else (kv_heads,)
        self.k_scales = _gpu(rng.uniform(0.01, 0.02, size=shape).astype(np.float32))
        self.v_scales = _gpu(rng.uniform(0.01, 0.02, size=shape).astype(np.float32))
        self.dynamic = dynamic
        self.scale_bytes = 4 if dynamic else 0

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments that every cache operator takes."""
        return {
            "cache_k_scales": self.k_scales,
            "cache_v_scales": self.v_scales,
            "cache_quant_type": self.type,
        }


@dataclass
class Step:
    """Row metadata of one step: `batch` rows with `new` tokens each after `cached` ones."""

    block_tables: paddle.Tensor
    cu_seqlens_q: paddle.Tensor
    seq_lens_decoder: paddle.Tensor
    seq_lens_this_time: paddle.Tensor
    tokens: int

    @classmethod
    def make(cls, ids: np.ndarray, batch: int, cached: int, new: int) -> Step:
        """Deal the block ids out to the rows."""
        blocks = -(-(cached + new) // BLOCK)
        tables = ids[: batch * blocks].reshape(batch, blocks).astype(np.int32)
        return cls(
            _gpu(tables),
            _gpu(np.arange(batch + 1, dtype=np.int32) * new),
            _gpu(np.full(batch, cached, np.int32)),
            _gpu(np.full(batch, new, np.int32)),
            batch * new,
        )

    def rows(self) -> tuple[paddle.Tensor, ...]:
        """Arguments of the write operators."""
        return self.block_tables, self.cu_seqlens_q, self.seq_lens_decoder, self.seq_lens_this_time


def _copies(bytes_of_one: int, most: int = 64) -> int:
    return int(min(most, max(1, -(-COLD_BYTES // bytes_of_one))))


@register("append_cache_kv_c8")
def append_rows(quick: bool) -> Iterator[Row]:
    """append_cache_kv_c8: 32k and 256k cached tokens, every variant."""
    kv, dim = 8, 128
    rng = np.random.default_rng(1)
    for tokens in (32768,) if quick else (32768, 262144):
        key, value = (_bf16(rng, (tokens, kv, dim)) for _ in range(2))
        batch = 8
        for cache_type in TYPES:
            cache = Cache(cache_type, tokens // BLOCK, kv, dim)
            tables = rng.permutation(tokens // BLOCK).astype(np.int32).reshape(batch, -1)
            lens = np.full(batch, tokens // batch, np.int32)
            cu = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
            args = (_gpu(tables), _gpu(lens), _gpu(cu))
            moved = 2 * tokens * kv * (dim * 3 + cache.scale_bytes)
            for layout in ("fastattn", "fastdeploy"):
                value_cache = cache.value if layout == "fastattn" else cache.value_as_deployed

                call = functools.partial(
                    F.append_cache_kv_c8,
                    cache.key,
                    value_cache,
                    key,
                    value,
                    *args,
                    dynamic_quant=cache.dynamic,
                    cache_layout=layout,
                    **cache.arguments(),
                )
                us = gpu_timing.median_us([call] * 4)
                shape = f"{tokens // 1024}k tokens, KV {kv}, D {dim}, {cache_type}, {layout}"
                yield gpu_timing.row("append_cache_kv_c8", shape, us, moved)


def _write_calls(
    cache: Cache, step: Step, heads: int, kv: int, dim: int, q_quant: str, rope: Any
) -> tuple[list[Callable[[], object]], list[Callable[[], object]], int, int]:
    """Calls of rope_write and write over rotating inputs, and the bytes each has to move."""
    rng = np.random.default_rng(2)
    width = (heads + 2 * kv) * dim
    code = 2 if cache.type == "none" else 1
    kv_out = 2 * step.tokens * kv * (dim * code + cache.scale_bytes)
    q_out = step.tokens * heads * (dim + 4 if q_quant == "per_token_head" else dim * 2)
    rope_bytes = step.tokens * (width * 2 + dim * 4) + kv_out + q_out
    write_bytes = 2 * step.tokens * kv * dim * 2 + kv_out
    fused: list[Callable[[], object]] = []
    plain: list[Callable[[], object]] = []
    for _ in range(_copies(rope_bytes)):
        qkv = _bf16(rng, (step.tokens, width))
        fused.append(
            functools.partial(
                F.rope_write_cache_kv,
                qkv,
                cache.key,
                cache.value,
                rope,
                *step.rows(),
                num_heads=heads,
                num_kv_heads=kv,
                q_quant=q_quant,
                **cache.arguments(),
            )
        )
    for _ in range(_copies(write_bytes)):
        key, value = (_bf16(rng, (step.tokens, kv, dim)) for _ in range(2))
        plain.append(
            functools.partial(
                F.write_cache_kv,
                key,
                value,
                cache.key,
                cache.value,
                *step.rows(),
                **cache.arguments(),
            )
        )
    return fused, plain, rope_bytes, write_bytes


@register("rope_write_cache_kv")
def write_rows(quick: bool) -> Iterator[Row]:
    """rope_write_cache_kv and write_cache_kv: decode, speculative and prefill steps."""
    heads, kv, dim = 32, 8, 128
    steps = [
        (1, 8000, 1),
        (64, 2000, 1),
        (256, 1000, 1),
        (64, 2000, 4),
        (1, 37, 8192),
        (8, 100, 2048),
    ]
    if not quick:
        steps += [(1, 0, 1024), (1, 0, 32768), (1, 0, 65536)]
    longest = max(cached + new for _, cached, new in steps)
    angles = np.random.default_rng(3).uniform(-1, 1, (2, 1, longest, 1, dim // 2))
    rope = _gpu(np.stack([np.cos(angles[0]), np.sin(angles[1])]).astype(np.float32))
    for cache_type in (
        ("block_wise_fp8",) if quick else ("block_wise_fp8", "cache_fp8", "cache_int8")
    ):
        for batch, cached, new in steps:
            needed = batch * -(-(cached + new) // BLOCK)
            cache = Cache(cache_type, max(needed, 1024), kv, dim)
            ids = np.random.default_rng(4).permutation(cache.num_blocks)
            step = Step.make(ids, batch, cached, new)
            for q_quant in ("none", "per_token_head"):
                fused, plain, rope_bytes, write_bytes = _write_calls(
                    cache, step, heads, kv, dim, q_quant, rope
                )
                shape = f"batch {batch} x {new} new, H {heads}, KV {kv}, D {dim}, {cache_type}"
                # A few microseconds each: enough of them that what a replay costs does not count.
                median = gpu_timing.steady_us if step.tokens <= 1024 else gpu_timing.median_us
                us = median(fused)
                yield gpu_timing.row("rope_write_cache_kv", f"{shape}, q {q_quant}", us, rope_bytes)
                if q_quant == "none":
                    yield gpu_timing.row("write_cache_kv", shape, median(plain), write_bytes)


@register("convert_cache_layout")
def convert_rows(quick: bool) -> Iterator[Row]:
    """convert_cache_layout over a whole cache, and convert_cache_blocks range by range."""
    cache = Cache("block_wise_int8", 2048 if quick else 16384, 8, 128)
    for kind, tensor in (("k", cache.key), ("v", cache.key)):
        for src, dst in (("fastdeploy", "fastattn"), ("logical", "fastattn")):
            call = functools.partial(
                F.convert_cache_layout,
                tensor,
                kind=kind,
                cache_quant_type="block_wise_int8",
                src=src,
                dst=dst,
            )
            us = gpu_timing.median_us([call] * 2)
            blocks = tensor.shape[0]
            shape = f"{blocks} blocks, {kind}, {src} to {dst}"
            moved = 2 * blocks * 8 * BLOCK * 128
            yield gpu_timing.row("convert_cache_layout", shape, us, moved)
            for step in (256, 2048):
                ranges = [
                    functools.partial(
                        F.convert_cache_blocks, *call.args, **call.keywords, begin=i, end=i + step
                    )
                    for i in range(0, blocks, step)
                ]
                us = gpu_timing.median_us(ranges) * len(ranges)
                shape_of_ranges = f"{shape}, in place in ranges of {step}"
                yield gpu_timing.row("convert_cache_blocks", shape_of_ranges, us, moved)


@register("quantize_fp8")
def quantize_rows(quick: bool) -> Iterator[Row]:
    """quantize_fp8 of activations."""
    rng = np.random.default_rng(5)
    for rows, cols in ((4096, 4096), (16384, 8192)) if not quick else ((4096, 4096),):
        for granularity in ("tensor", "token", "group"):
            moved = rows * cols * 3
            inputs = [_bf16(rng, (rows, cols)) for _ in range(_copies(moved, 8))]
            calls = [functools.partial(F.quantize_fp8, x, granularity=granularity) for x in inputs]
            yield gpu_timing.row(
                "quantize_fp8",
                f"{rows} x {cols} bf16, {granularity}",
                gpu_timing.median_us(calls),
                moved,
            )
