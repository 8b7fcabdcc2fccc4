"""Prefill on a GPU with bf16 queries: bf16 and 8-bit caches, and contiguous keys.

The shapes of :mod:`fastattn.bench.prefill_gpu`, with peers that compute in bf16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np

import fastattn.functional as F
from fastattn.bench import gpu_timing
from fastattn.bench.attention_gpu import BLOCK, DIM
from fastattn.bench.cache_gpu import _gpu
from fastattn.bench.common import Row, register
from fastattn.bench.prefill_gpu import SHAPES, TOKENS, contiguous, filled, rows_of

KINDS = ("none", "cache_int8", "block_wise_int8", "cache_fp8", "block_wise_fp8")
PEERS = ("vllm_fa3_bf16", "cudnn_bf16")


def paged(
    kind: str, rows: int, length: int, heads: int, kv_heads: int, causal: bool
) -> Callable[[], object]:
    """A call for `rows` prompts of `length` tokens."""
    rng = np.random.default_rng(1)
    pages = -(-length // BLOCK)
    tables = rng.permutation(rows * pages).astype(np.int32).reshape(rows, pages)
    quantised = kind != "none"
    code = "bfloat16" if not quantised else "int8" if kind.endswith("int8") else "e4m3"
    shape = (rows * pages, kv_heads, BLOCK) if kind.startswith("block_wise") else (kv_heads,)
    unit = 1 / 16 if code == "int8" else 1.0
    scales = {
        name: _gpu((unit * rng.uniform(0.8, 1.2, shape)).astype(np.float32))
        for name in ("cache_k_scales", "cache_v_scales")
        if quantised
    }
    tokens = (rows * pages, kv_heads, BLOCK, DIM)
    return functools.partial(
        F.paged_attention,
        filled("bfloat16", 0, rows * length, heads, DIM),
        filled(code, 1, *tokens),
        filled(code, 2, *((rows * pages, kv_heads, DIM, BLOCK) if quantised else tokens)),
        _gpu(tables),
        _gpu(np.arange(rows + 1, dtype=np.int32) * length),
        _gpu(np.zeros(rows, np.int32)),
        _gpu(np.full(rows, length, np.int32)),
        max_seqlen_q=length,
        max_seqlen_k=length,
        cache_quant_type=kind,
        causal=causal,
        out=gpu_timing.empty((rows * length, heads, DIM), "bfloat16"),
        **scales,
    )


def _rows(kind: str, length: int, heads: int, kv_heads: int, causal: bool) -> Iterator[Row]:
    rows = TOKENS // length
    if kind == "contiguous":
        op, call = "flash_attention", contiguous("bfloat16", rows, length, heads, kv_heads, causal)
    else:
        op, call = "paged_attention", paged(kind, rows, length, heads, kv_heads, causal)
    name = "bf16" if kind in ("none", "contiguous") else kind
    name = f"bf16 q, {name}"
    yield from rows_of(op, call, name, length, heads, kv_heads, causal, PEERS)


@register("prefill_half")
def prefill_half(quick: bool) -> Iterator[Row]:
    """Prefill with bf16 queries: every cache type, and contiguous keys."""
    for causal in (True, False):
        for length, heads, kv_heads in SHAPES[2:3] if quick else SHAPES:
            for kind in (*KINDS, "contiguous"):
                yield from _rows(kind, length, heads, kv_heads, causal)
