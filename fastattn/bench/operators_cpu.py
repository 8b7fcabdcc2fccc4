"""The operators that move memory, on the CPU, against a copy of as many bytes in the same run.

A copy is a floor that only an operator bound by memory reaches; rounding to 8 bits takes most of
the time here. The rows are for comparing builds and machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import paddle

import fastattn.functional as F
from fastattn.bench.common import Row, medians, register
from fastattn.reference.layout import BLOCK_SIZE
from fastattn.reference.rope import make_rotary_embs

HEADS, KV, DIM = 32, 8, 128
COPY = "copy of as many bytes"
#: Bytes of an element: bf16, and a code with nothing else.
BF16, CODE = 2, 1


def _row(op: str, shape: str, call: Callable[[], object], moved: int, quick: bool) -> Row:
    """Time `call` and, in turn with it, a copy that reads and writes `moved` bytes in all."""
    source = np.ones(max(moved // 2, 1), np.uint8)
    target = np.empty_like(source)
    us, copy_us = medians([call, lambda: np.copyto(target, source)], 3 if quick else 9)
    return Row(op, shape, us, moved / us / 1e3, "GB/s", COPY, copy_us)


def _int32(values: Any) -> paddle.Tensor:
    return paddle.to_tensor(np.asarray(values, np.int32))


def _bfloat16(rng: np.random.Generator, shape: tuple[int, ...]) -> paddle.Tensor:
    values = rng.standard_normal(shape, dtype=np.float32)
    return paddle.to_tensor((values.view(np.uint32) >> 16).astype(np.uint16))


class _Cache:
    """A layer's cache of `tokens` tokens: 4 rows, blocks in random order."""

    rows = 4

    def __init__(self, quant: str, tokens: int) -> None:
        rng = np.random.default_rng(0)
        blocks = tokens // BLOCK_SIZE
        self.quant = quant
        self.tokens = tokens
        dynamic = quant.startswith("block_wise")
        self.token_bytes = 2 * KV * (DIM * (BF16 if quant == "none" else CODE) + 4 * dynamic)
        if quant == "none":
            self.key, self.value = (_bfloat16(rng, (blocks, KV, BLOCK_SIZE, DIM)) for _ in range(2))
        else:
            codes = rng.integers(0, 126, (blocks, KV, BLOCK_SIZE, DIM), dtype=np.uint8)
            self.key = paddle.to_tensor(codes)
            self.value = paddle.to_tensor(codes.reshape(blocks, KV, DIM, BLOCK_SIZE))
        sizes = (blocks, KV, BLOCK_SIZE) if dynamic else (KV,)
        scales = [None, None] if quant == "none" else [self._scales(rng, sizes) for _ in range(2)]
        self.options: dict[str, Any] = {
            "cache_k_scales": scales[0],
            "cache_v_scales": scales[1],
            "cache_quant_type": quant,
        }
        lengths = np.full(self.rows, tokens // self.rows)
        self.tables = _int32(rng.permutation(blocks).reshape(self.rows, -1))
        self.starts = _int32(np.concatenate([[0], np.cumsum(lengths)]))
        self.lengths = _int32(lengths)
        self.zeros = _int32(np.zeros(self.rows))

    @staticmethod
    def _scales(rng: np.random.Generator, sizes: tuple[int, ...]) -> paddle.Tensor:
        return paddle.to_tensor(rng.uniform(0.01, 0.02, sizes).astype(np.float32))


def _tokens(quick: bool) -> int:
    return 1024 if quick else 8192


@register("write_cache_kv")
def write(quick: bool) -> Iterator[Row]:
    """A prefill's K and V into an empty cache."""
    tokens = _tokens(quick)
    key, value = (_bfloat16(np.random.default_rng(i), (tokens, KV, DIM)) for i in (1, 2))
    for quant in ("none", "cache_int8", "cache_fp8", "block_wise_int8", "block_wise_fp8"):
        cache = _Cache(quant, tokens)
        rows = (cache.tables, cache.starts, cache.zeros, cache.lengths)

        def call(cache: _Cache = cache, rows: Any = rows) -> object:
            return F.write_cache_kv(key, value, cache.key, cache.value, *rows, **cache.options)

        moved = tokens * (2 * KV * DIM * BF16 + cache.token_bytes)
        yield _row("write_cache_kv", f"{quant}, {tokens} tokens, KV 8, D 128", call, moved, quick)


@register("rope_write_cache_kv")
def rope_write(quick: bool) -> Iterator[Row]:
    """The same from a fused projection, with rotation, and Q in bf16 or e4m3."""
    tokens = _tokens(quick) // 4
    qkv = _bfloat16(np.random.default_rng(3), (tokens, (HEADS + 2 * KV) * DIM))
    angles = paddle.to_tensor(make_rotary_embs(tokens, DIM))
    for quant, q_quant in (
        *(("none", "none"), ("block_wise_fp8", "none")),
        *(("block_wise_fp8", "per_token_head"), ("cache_int8", "none")),
    ):
        cache = _Cache(quant, tokens)
        rows = (cache.tables, cache.starts, cache.zeros, cache.lengths)

        def call(cache: _Cache = cache, rows: Any = rows, q_quant: str = q_quant) -> object:
            return F.rope_write_cache_kv(
                qkv,
                cache.key,
                cache.value,
                angles,
                *rows,
                num_heads=HEADS,
                num_kv_heads=KV,
                q_quant=q_quant,
                **cache.options,
            )

        q_bytes = HEADS * (DIM * BF16 if q_quant == "none" else DIM * CODE + 4)
        moved = tokens * ((HEADS + 2 * KV) * DIM * BF16 + q_bytes + cache.token_bytes)
        shape = f"{quant}, q {q_quant}, {tokens} tokens, H 32, KV 8, D 128"
        yield _row("rope_write_cache_kv", shape, call, moved, quick)


@register("append_cache_kv_c8")
def append(quick: bool) -> Iterator[Row]:
    """All cached tokens as contiguous bf16."""
    tokens = _tokens(quick)
    key, value = (_bfloat16(np.random.default_rng(4), (tokens, KV, DIM)) for _ in range(2))
    for quant in ("cache_int8", "cache_fp8", "block_wise_int8", "block_wise_fp8"):
        cache = _Cache(quant, tokens)
        rows = (cache.tables, cache.lengths, cache.starts)

        def call(cache: _Cache = cache, rows: Any = rows) -> object:
            return F.append_cache_kv_c8(
                cache.key,
                cache.value,
                key,
                value,
                *rows,
                dynamic_quant=cache.quant.startswith("block_wise"),
                **cache.options,
            )

        moved = tokens * (2 * KV * DIM * BF16 + cache.token_bytes)
        shape = f"{quant}, {tokens} tokens, KV 8, D 128"
        yield _row("append_cache_kv_c8", shape, call, moved, quick)


@register("convert_cache_layout")
def convert(quick: bool) -> Iterator[Row]:
    """From FastDeploy's bytes to this package's."""
    blocks = _tokens(quick) // BLOCK_SIZE
    codes = np.random.default_rng(5).integers(0, 126, (blocks, KV, BLOCK_SIZE, DIM), np.uint8)
    for kind in ("k", "v"):
        cache = paddle.to_tensor(codes)

        def call(cache: paddle.Tensor = cache, kind: str = kind) -> object:
            return F.convert_cache_layout(
                cache, kind=kind, cache_quant_type="cache_fp8", src="fastdeploy", dst="fastattn"
            )

        shape = f"{kind}, fastdeploy to fastattn, {blocks} blocks, KV 8, D 128"
        yield _row("convert_cache_layout", shape, call, 2 * codes.size, quick)


@register("merge_attn_states")
def merge(quick: bool) -> Iterator[Row]:
    """Two states in bf16, stored as bf16 and as e4m3."""
    tokens = _tokens(quick) // 8
    rng = np.random.default_rng(6)
    outputs = [_bfloat16(rng, (tokens, HEADS, DIM)) for _ in range(2)]
    lses = [paddle.to_tensor(rng.normal(size=(HEADS, tokens)).astype(np.float32)) for _ in "ps"]
    states = (outputs[0], lses[0], outputs[1], lses[1])
    for scale in (None, paddle.to_tensor(np.array([0.1], np.float32))):

        def call(scale: paddle.Tensor | None = scale) -> object:
            return F.merge_attn_states(*states, output_scale=scale)

        stored = BF16 if scale is None else CODE
        moved = tokens * HEADS * (DIM * (2 * BF16 + stored) + 12)
        shape = f"bf16 to {'bf16' if scale is None else 'e4m3'}, {tokens} tokens, H 32, D 128"
        yield _row("merge_attn_states", shape, call, moved, quick)


@register("quantize_fp8")
def quantize(quick: bool) -> Iterator[Row]:
    """Dynamic scales of every granularity."""
    rows, columns = _tokens(quick) // 8, 4096
    x = _bfloat16(np.random.default_rng(7), (rows, columns))
    for granularity in ("tensor", "token", "group"):

        def call(granularity: str = granularity) -> object:
            return F.quantize_fp8(x, granularity=granularity)

        moved = rows * columns * (BF16 + CODE)
        yield _row("quantize_fp8", f"{granularity}, {rows} x {columns} bf16", call, moved, quick)


@register("mxfp4_quantize")
def mxfp4(quick: bool) -> Iterator[Row]:
    """Both directions."""
    rows, columns = _tokens(quick) // 8, 4096
    x = _bfloat16(np.random.default_rng(8), (rows, columns))
    codes, scales = F.mxfp4_quantize(x)
    moved = rows * columns * BF16 + rows * columns // 2 + rows * columns // 32
    shape = f"{rows} x {columns} bf16"
    yield _row("mxfp4_quantize", shape, lambda: F.mxfp4_quantize(x), moved, quick)

    def back() -> object:
        return F.mxfp4_dequantize(codes, scales, dtype="bfloat16")

    yield _row("mxfp4_dequantize", shape, back, moved, quick)


@register("indexer_q_rope_quant")
def indexer_query(quick: bool) -> Iterator[Row]:
    """Queries of 64 heads."""
    tokens, heads, rope, positions = _tokens(quick) // 32, 64, 64, 4096
    rng = np.random.default_rng(9)
    table = paddle.to_tensor(rng.uniform(-1, 1, (positions, rope)).astype(np.float32))
    at = paddle.to_tensor(rng.integers(0, positions, tokens))
    q = _bfloat16(rng, (tokens, heads, DIM))
    weights = paddle.to_tensor(rng.normal(size=(tokens, heads)).astype(np.float32))
    for quant in ("fp8", "mxfp4"):

        def call(quant: str = quant) -> object:
            return F.indexer_q_rope_quant(at, q, table, weights, DIM**-0.5, 0.125, quant=quant)

        codes = DIM if quant == "fp8" else DIM // 2
        moved = tokens * (heads * (BF16 * DIM + codes + 12) + 4 * rope + 8)
        shape = f"{quant}, {tokens} tokens, H 64"
        yield _row("indexer_q_rope_quant", shape, call, moved, quick)


@register("indexer_kv_compress_insert")
def indexer_key(quick: bool) -> Iterator[Row]:
    """One sequence of new tokens, four to a group."""
    tokens, ratio, page, rope = _tokens(quick) // 4, 4, 64, 64
    rng = np.random.default_rng(10)
    for quant, head, token_bytes in (("fp8", 128, 132), ("mxfp4", 128, 68), ("fp8_512", 512, 584)):
        blocks = tokens // 4
        state = rng.standard_normal((blocks, 4, 4 * head), dtype=np.float32)
        at = np.arange(tokens)
        tensors = [
            paddle.to_tensor(array)
            for array in (
                state,
                rng.permutation(blocks).astype(np.int32)[None],
                np.zeros(tokens, np.int32),
                *(at, at, at // ratio),
                rng.uniform(0.5, 2, head).astype(np.float32),
                rng.uniform(-1, 1, (tokens, rope)).astype(np.float32),
                np.zeros((tokens // ratio // page + 1, page * token_bytes), np.uint8),
            )
        ]

        def call(tensors: Any = tensors, quant: str = quant) -> object:
            return F.indexer_kv_compress_insert(
                *tensors, compress_ratio=ratio, page_size=page, quant=quant
            )

        moved = tokens // ratio * (8 * head * 8 + token_bytes + 4 * rope) + tokens * 28
        shape = f"{quant}, {tokens} tokens, ratio {ratio}"
        yield _row("indexer_kv_compress_insert", shape, call, moved, quick)
