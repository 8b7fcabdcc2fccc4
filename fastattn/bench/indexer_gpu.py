"""MXFP4 and the indexer operators on a GPU, against the copy bandwidth of the same run.

Peers stand beside the queries when there is a report of them (see :mod:`fastattn.bench.peers`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np

import fastattn.functional as F
from fastattn.bench import gpu_timing
from fastattn.bench.cache_gpu import _bf16, _copies, _gpu
from fastattn.bench.common import Row, register
from fastattn.bench.peers import peers

HEAD = 128
ROPE = 64
#: 32, 64, 128 and 512 MiB of bf16.
MXFP4_SHAPES = ((4096, 4096), (8192, 4096), (8192, 8192), (16384, 16384))
#: Rows of the cosine and sine table.
POSITIONS = 32768


def _table(rng: np.random.Generator) -> np.ndarray:
    angles = rng.uniform(-3, 3, (POSITIONS, ROPE // 2))
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


@register("mxfp4_quantize")
def mxfp4_rows(quick: bool) -> Iterator[Row]:
    """mxfp4_quantize and mxfp4_dequantize of bf16."""
    rng = np.random.default_rng(6)
    for rows, cols in MXFP4_SHAPES[:1] if quick else MXFP4_SHAPES:
        elements = rows * cols
        size = f"{rows} x {cols} bf16, {elements >> 19} MiB"
        inputs = [_bf16(rng, (rows, cols)) for _ in range(_copies(2 * elements, 8))]
        calls = [functools.partial(F.mxfp4_quantize, x) for x in inputs]
        moved = elements * 2 + elements // 2 + elements // 32
        yield gpu_timing.row("mxfp4_quantize", size, gpu_timing.median_us(calls), moved)
        pairs = [F.mxfp4_quantize(x) for x in inputs]
        back = [functools.partial(F.mxfp4_dequantize, *pair, dtype="bfloat16") for pair in pairs]
        yield gpu_timing.row("mxfp4_dequantize", size, gpu_timing.median_us(back), moved)


@register("indexer_q_rope_quant")
def query_rows(quick: bool) -> Iterator[Row]:
    """indexer_q_rope_quant: 1 to 16384 tokens, 64 heads."""
    heads = 64
    rng = np.random.default_rng(7)
    table = _gpu(_table(rng))
    for quant in ("fp8", "mxfp4"):
        codes, scale = (HEAD, 4) if quant == "fp8" else (HEAD // 2, 4)
        for tokens in (1, 128, 4096) if quick else (1, 7, 32, 128, 512, 1024, 4096, 16384):
            # Each token's row of the table, its position, and both weights of a head.
            moved = tokens * (heads * (2 * HEAD + codes + scale + 8) + 4 * ROPE + 8)
            positions = _gpu(rng.integers(0, POSITIONS, tokens))
            weights = _gpu(rng.normal(size=(tokens, heads)).astype(np.float32))
            queries = [_bf16(rng, (tokens, heads, HEAD)) for _ in range(_copies(moved))]
            settings = (table, weights, HEAD**-0.5, 0.125)
            calls = [
                functools.partial(F.indexer_q_rope_quant, positions, q, *settings, quant=quant)
                for q in queries
            ]
            shape = f"T {tokens}, H {heads}, {quant}"
            us = gpu_timing.steady_us(calls)
            yield gpu_timing.row("indexer_q_rope_quant", shape, us, moved)
            for peer in peers("indexer", tokens=tokens, quant=quant):
                if "q_rope_quant" in peer["peer"]:
                    row = gpu_timing.row("indexer_q_rope_quant", shape, us, moved)
                    row.peer, row.peer_us = peer["peer"], peer["us"]
                    yield row


def _key_call(
    rng: np.random.Generator, tokens: int, ratio: int, quant: str
) -> tuple[Callable[[], object], int]:
    """One call on one sequence of new tokens from position 0, and the bytes it has to move."""
    head, page_token = {"fp8": (128, 132), "mxfp4": (128, 68), "fp8_512": (512, 584)}[quant]
    block = 4 if ratio == 4 else 8
    width = head * (2 if ratio == 4 else 1)
    page_size = 64
    blocks = -(-tokens // block)
    # Small integers over 8: real values without a slow normal distribution.
    state = rng.integers(-24, 25, (blocks, block, 2 * width), dtype=np.int8).astype(np.float32) / 8
    tensors = [
        _gpu(array)
        for array in (
            state,
            rng.permutation(blocks).astype(np.int32)[None],
            np.zeros(tokens, np.int32),
            np.arange(tokens),
            np.arange(tokens),
            np.arange(tokens) // ratio,
            rng.uniform(0.5, 2, head).astype(np.float32),
            _table(rng),
            np.zeros((tokens // ratio // page_size + 1, page_size * page_token), np.uint8),
        )
    ]
    groups = tokens // ratio
    # Every kv and score is read once, whether groups overlap (in the other half) or not.
    rows_of_group = 8 if ratio == 4 else 128
    moved = groups * (rows_of_group * head * 8 + page_token + 4 * ROPE) + tokens * 28

    def call() -> object:
        return F.indexer_kv_compress_insert(
            *tensors, compress_ratio=ratio, page_size=page_size, quant=quant
        )

    return call, moved


@register("indexer_kv_compress_insert")
def key_rows(quick: bool) -> Iterator[Row]:
    """indexer_kv_compress_insert: every page format and ratio, fp32 state."""
    rng = np.random.default_rng(8)
    for ratio in (4, 128):
        for quant in ("fp8", "mxfp4", "fp8_512"):
            for tokens in (4096,) if quick else (128, 4096, 16384):
                call, moved = _key_call(rng, tokens, ratio, quant)
                calls = [call]
                while len(calls) < min(_copies(moved), 4 if quant == "fp8_512" else 16):
                    calls.append(_key_call(rng, tokens, ratio, quant)[0])
                yield gpu_timing.row(
                    "indexer_kv_compress_insert",
                    f"{tokens} tokens, ratio {ratio}, {quant}",
                    gpu_timing.median_us(calls),
                    moved,
                )
