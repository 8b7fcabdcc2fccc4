"""Writing to the cache on a GPU, at the shapes at which other libraries' kernels were timed.

Tokens are rotated over as many inputs as those measurements rotate over: beyond the L2 cache from
4096 tokens on. Without a report of peers (see :mod:`fastattn.bench.peers`) the rows stand beside a
copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np

import fastattn.functional as F
from fastattn.bench import gpu_timing
from fastattn.bench.cache_gpu import BLOCK, Cache, Step, _bf16, _gpu
from fastattn.bench.common import Row, register
from fastattn.bench.peers import peers

KV, DIM = 8, 128
TOKENS = (1, 16, 128, 1024, 4096, 16384)

Call = Callable[[], object]


def _rows(
    op: str, shape: str, calls: list[Call], moved: int, peer: str, **where: int
) -> Iterator[Row]:
    row = gpu_timing.row(op, shape, gpu_timing.steady_us(calls), moved)
    for other in peers("append", **where):
        if other["peer"].startswith(peer):
            row.peer, row.peer_us = other["peer"], other["us"]
    yield row


@register("cache_peers")
def peer_rows(quick: bool) -> Iterator[Row]:
    """write_cache_kv and rope_write_cache_kv into an FP8 cache."""
    rng = np.random.default_rng(6)
    angles = rng.uniform(-1, 1, (2, 1, max(TOKENS), 1, DIM // 2))
    rope = _gpu(angles.astype(np.float32))
    for tokens in (1, 128, 4096) if quick else TOKENS:
        # Few tokens are rows of a decode step, more are a prompt.
        rows, new = (tokens, 1) if tokens < BLOCK else (1, tokens)
        cache = Cache("cache_fp8", max(2048, 2 * tokens // BLOCK), KV, DIM)
        step = Step.make(rng.permutation(cache.num_blocks), rows, 0 if new > 1 else 777, new)
        copies = 4 if tokens >= 4096 else 16
        shape = f"{tokens} tokens, KV {KV}, D {DIM}, cache_fp8"
        writes: list[Call] = []
        for _ in range(copies):
            key, value = (_bf16(rng, (tokens, KV, DIM)) for _ in range(2))
            writes.append(
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
        moved = 2 * tokens * KV * DIM * 3
        peer = "vllm reshape_and_cache_flash fp8"
        yield from _rows("write_cache_kv", shape, writes, moved, peer, tokens=tokens, h=32)
        for heads in (32, 64):
            fused: list[Call] = [
                functools.partial(
                    F.rope_write_cache_kv,
                    _bf16(rng, (tokens, (heads + 2 * KV) * DIM)),
                    cache.key,
                    cache.value,
                    rope,
                    *step.rows(),
                    num_heads=heads,
                    num_kv_heads=KV,
                    use_neox_rotary_style=True,
                    **cache.arguments(),
                )
                for _ in range(copies)
            ]
            moved = tokens * DIM * (4 * heads + 6 * KV + 4)
            peer = "vllm rope + reshape_and_cache fp8"
            yield from _rows(
                "rope_write_cache_kv",
                f"{shape}, H {heads}",
                fused,
                moved,
                peer,
                tokens=tokens,
                h=heads,
            )
