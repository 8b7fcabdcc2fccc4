"""quantize_q on a GPU: what the attention operators spend on 16-bit queries before they attend.

Prefill with 16-bit queries that are quantised stands beside the same call with e4m3 queries; the
pass over the queries alone beside a copy of as many bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np

import fastattn.functional as F
from fastattn.bench import gpu_timing
from fastattn.bench.attention_gpu import DIM
from fastattn.bench.cache_gpu import COLD_BYTES, _bf16, _gpu
from fastattn.bench.common import Row, register
from fastattn.bench.prefill_gpu import TOKENS, _operations, paged

#: Tokens and query heads of the pass alone.
QUERIES = [(64, 32), (256, 64), (2048, 32), (16384, 16), (16384, 64)]
#: Prefill of TOKENS tokens: sequence length, query and KV heads.
SHAPES = [(1024, 16, 16), (4096, 16, 16), (16384, 16, 16), (16384, 64, 8)]


def _pass_alone(tokens: int, heads: int) -> tuple[list[Callable[[], object]], int]:
    """Calls of a step whose tokens are all padding, and the bytes of one.

    Nothing is attended, so each is the pass and a kernel that finds nothing to do.
    """
    rng = np.random.default_rng(0)
    moved = tokens * heads * (3 * DIM + 4)
    key = _gpu(np.zeros((64, heads, DIM), np.uint8))
    no_rows = _gpu(np.zeros(1, np.int32))
    out = gpu_timing.empty((tokens, heads, DIM), "bfloat16")
    calls = [
        functools.partial(
            F.flash_attention,
            _bf16(rng, (tokens, heads, DIM)),
            key,
            key,
            no_rows,
            no_rows,
            tokens,
            64,
            quantize_q=True,
            out=out,
        )
        for _ in range(max(1, min(64, COLD_BYTES // moved)))
    ]
    return list(calls), moved


def _with_queries_of_16_bits(call: Callable[[], object], quantize_q: bool) -> Callable[[], object]:
    """A call of :func:`fastattn.bench.prefill_gpu.paged` with bfloat16 queries."""
    assert isinstance(call, functools.partial)
    q = _bf16(np.random.default_rng(0), tuple(call.args[0].shape))
    return functools.partial(call.func, q, *call.args[1:], **call.keywords, quantize_q=quantize_q)


@register("quantize_q")
def quantize_q(quick: bool) -> Iterator[Row]:
    """16-bit queries that the operators quantise: the pass alone, and prefill with it."""
    for tokens, heads in QUERIES[-1:] if quick else QUERIES:
        calls, moved = _pass_alone(tokens, heads)
        us = gpu_timing.steady_us(calls)
        shape = f"quantize_q alone T {tokens} H {heads} D {DIM}"
        yield gpu_timing.row("flash_attention", shape, us, moved)
    for kind in ("cache_fp8", "block_wise_fp8"):
        for length, heads, kv_heads in SHAPES[1:2] if quick else SHAPES:
            rows = TOKENS // length
            of_codes = paged(kind, rows, 0, length, heads, kv_heads, True)
            quantised = _with_queries_of_16_bits(of_codes, True)
            codes_us = gpu_timing.median_us([of_codes], replays=20)
            us = gpu_timing.median_us([quantised], replays=20)
            rate = _operations(rows, 0, length, heads, True) / us / 1e6
            shape = f"prefill {kind} causal quantize_q B {rows} x {length} H {heads}/{kv_heads}"
            yield Row("paged_attention", shape, us, rate, "TFLOP/s", "e4m3 queries", codes_us)
