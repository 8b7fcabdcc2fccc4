"""What a server calls beside the single operators, on the CPU: shared prefixes, new layouts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import paddle

import fastattn.functional as F
from fastattn.bench.common import Row, medians, register
from fastattn.bench.operators_cpu import DIM, HEADS, KV, _bfloat16, _int32, _row, _tokens
from fastattn.reference.layout import BLOCK_SIZE


@register("convert_cache_blocks")
def convert(quick: bool) -> Iterator[Row]:
    """All blocks of a cache from FastDeploy's bytes to this package's and, in turn, back."""
    blocks = _tokens(quick) // BLOCK_SIZE
    codes = np.random.default_rng(5).integers(0, 126, (blocks, KV, BLOCK_SIZE, DIM), np.uint8)
    layouts = ("fastdeploy", "fastattn")
    for kind in ("k", "v"):
        cache = paddle.to_tensor(codes)
        turn = [0]

        def call(cache: paddle.Tensor = cache, kind: str = kind, turn: list[int] = turn) -> object:
            src, dst = layouts[turn[0]], layouts[1 - turn[0]]
            turn[0] = 1 - turn[0]
            return F.convert_cache_blocks(
                cache, kind=kind, cache_quant_type="cache_fp8", src=src, dst=dst
            )

        shape = f"{kind}, fastdeploy to fastattn and back, {blocks} blocks, KV 8, D 128"
        yield _row("convert_cache_blocks", shape, call, 2 * codes.size, quick)


@register("cascade_attention")
def cascade(quick: bool) -> Iterator[Row]:
    """Rows that decode behind one prefix, against `paged_attention` of the whole rows."""
    rng = np.random.default_rng(6)
    rows, prefix, own = (4, 512, 64) if quick else (16, 2048, 128)
    shared, private = prefix // BLOCK_SIZE, own // BLOCK_SIZE
    blocks = shared + rows * private
    tables = np.concatenate(
        [
            np.tile(np.arange(shared), (rows, 1)),
            shared + np.arange(rows * private).reshape(rows, private),
        ],
        axis=1,
    )
    codes = rng.integers(0x28, 0x48, (2, blocks, KV, BLOCK_SIZE, DIM), np.uint8)
    key = paddle.to_tensor(codes[0])
    value = paddle.to_tensor(codes[1].reshape(blocks, KV, DIM, BLOCK_SIZE))
    scale = paddle.to_tensor(np.array([0.5], np.float32))
    cache = {"cache_k_scales": scale, "cache_v_scales": scale, "cache_quant_type": "cache_fp8"}
    decoder, new = np.full(rows, prefix + own - 1), np.ones(rows, np.int64)
    plan = F.plan_cascade(tables, decoder, new, prefix)
    query = _bfloat16(rng, (rows, HEADS, DIM))
    starts, this_time = _int32(np.arange(rows + 1)), _int32(new)
    lengths = (_int32(tables), starts, _int32(decoder), this_time, 1, prefix + own)

    def ours() -> object:
        return F.cascade_attention(
            query, key, value, plan, starts, this_time, 1, prefix + own, **cache
        )

    def whole() -> object:
        return F.paged_attention(query, key, value, *lengths, **cache)

    us, whole_us = medians([ours, whole], 3 if quick else 9)
    shape = (
        f"{rows} rows behind {prefix} shared tokens, {own} of their own, H 32/8 D 128, cache_fp8"
    )
    peer = "paged_attention of the whole rows"
    yield Row("cascade_attention", shape, us, rows / us * 1e3, "tokens/ms", peer, whole_us)
