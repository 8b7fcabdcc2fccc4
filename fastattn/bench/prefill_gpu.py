"""Prefill on a GPU: e4m3 queries over e4m3 keys and values, paged and contiguous.

16384 tokens in all; a causal mask counts half the operations. Inputs are normal, so that the
tensor cores draw the power that they draw in use. Peers do not run in Paddle: see
:mod:`fastattn.bench.peers`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import ml_dtypes
import numpy as np
import paddle

import fastattn.functional as F
from fastattn.bench import gpu_timing
from fastattn.bench.attention_gpu import BLOCK, DIM
from fastattn.bench.cache_gpu import _gpu
from fastattn.bench.common import Row, register
from fastattn.bench.peers import peers

TOKENS = 16384
SHAPES = [(s, 16, 16) for s in (1024, 2048, 4096, 8192, 16384)] + [
    (s, 64, 8) for s in (4096, 16384)
]
#: Peers of paged and of contiguous calls, by a part of their names.
PEERS = {"paged": ("fp8_paged", "cudnn_fp8"), "contiguous": ("fp8_varlen", "cudnn_fp8")}


@functools.lru_cache(maxsize=8)
def _words(dtype: str, seed: int) -> np.ndarray:
    """Normal values: bf16, int8 codes of a sixteenth, or e4m3 codes."""
    values = np.random.default_rng(seed).standard_normal(1 << 22).astype(np.float32)
    if dtype == "bfloat16":
        return values.astype(ml_dtypes.bfloat16).view(np.uint8)
    if dtype == "int8":
        return np.clip(np.rint(values * 16), -127, 127).astype(np.int8).view(np.uint8)
    return values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def filled(dtype: str, seed: int, *shape: int) -> paddle.Tensor:
    """A tensor of its own seed: a query that is some key as well has a score like no other."""
    kind = "bfloat16" if dtype == "bfloat16" else "uint8"
    return gpu_timing.filled(shape, kind, _words(dtype, seed))


def paged(
    kind: str, rows: int, prefix: int, new: int, heads: int, kv_heads: int, causal: bool
) -> Callable[[], object]:
    """A call for `rows` sequences of `new` tokens behind `prefix` cached ones."""
    rng = np.random.default_rng(1)
    pages = -(-(prefix + new) // BLOCK)
    tables = rng.permutation(rows * pages).astype(np.int32).reshape(rows, pages)
    dynamic = kind.startswith("block_wise")
    shape = (rows * pages, kv_heads, BLOCK) if dynamic else (kv_heads,)
    scales = {
        name: _gpu(rng.uniform(0.8, 1.2, shape).astype(np.float32))
        for name in ("cache_k_scales", "cache_v_scales")
    }
    return functools.partial(
        F.paged_attention,
        filled("e4m3", 0, rows * new, heads, DIM),
        filled("e4m3", 1, rows * pages, kv_heads, BLOCK, DIM),
        filled("e4m3", 2, rows * pages, kv_heads, DIM, BLOCK),
        _gpu(tables),
        _gpu(np.arange(rows + 1, dtype=np.int32) * new),
        _gpu(np.full(rows, prefix, np.int32)),
        _gpu(np.full(rows, new, np.int32)),
        max_seqlen_q=new,
        max_seqlen_k=prefix + new,
        cache_quant_type=kind,
        causal=causal,
        out=gpu_timing.empty((rows * new, heads, DIM), "bfloat16"),
        **scales,
    )


def contiguous(
    dtype: str, rows: int, length: int, heads: int, kv_heads: int, causal: bool
) -> Callable[[], object]:
    """A call of flash_attention over queries, keys and values of a type."""
    starts = _gpu(np.arange(rows + 1, dtype=np.int32) * length)
    return functools.partial(
        F.flash_attention,
        filled(dtype, 0, rows * length, heads, DIM),
        filled(dtype, 1, rows * length, kv_heads, DIM),
        filled(dtype, 2, rows * length, kv_heads, DIM),
        starts,
        starts,
        length,
        length,
        causal=causal,
        out=gpu_timing.empty((rows * length, heads, DIM), "bfloat16"),
    )


def _operations(rows: int, prefix: int, new: int, heads: int, causal: bool) -> float:
    """Multiplications and additions; the diagonal counts half."""
    pairs = prefix * new + (new * new / 2 if causal else new * new)
    return 4.0 * rows * heads * DIM * pairs


def rows_of(
    op: str,
    call: Callable[[], object],
    name: str,
    length: int,
    heads: int,
    kv_heads: int,
    causal: bool,
    wanted: Sequence[str],
) -> Iterator[Row]:
    """Rows of a call over TOKENS tokens: beside each wanted peer, or one without."""
    rows = TOKENS // length
    us = gpu_timing.median_us([call], replays=20)
    rate = _operations(rows, 0, length, heads, causal) / us / 1e6
    mask = "causal" if causal else "full"
    shape = f"prefill {name} {mask} B {rows} x {length} H {heads}/{kv_heads} D {DIM}"
    found = [
        other
        for other in peers("prefill", s=length, h=heads, hk=kv_heads, causal=causal)
        if any(part in other["peer"] for part in wanted)
    ]
    if not found:
        yield Row(op, shape, us, rate, "TFLOP/s")
    for other in found:
        yield Row(op, shape, us, rate, "TFLOP/s", other["peer"], other["ms"] * 1e3)


def _rows(
    op: str, name: str, length: int, heads: int, kv_heads: int, causal: bool
) -> Iterator[Row]:
    rows = TOKENS // length
    if op == "paged_attention":
        call = paged(name, rows, 0, length, heads, kv_heads, causal)
    else:
        call = contiguous("e4m3", rows, length, heads, kv_heads, causal)
    wanted = PEERS["paged" if op == "paged_attention" else "contiguous"]
    yield from rows_of(op, call, name, length, heads, kv_heads, causal, wanted)


@register("prefill")
def prefill(quick: bool) -> Iterator[Row]:
    """FP8 prefill: both cache types, contiguous keys, and chunks behind a long prefix."""
    for causal in (True, False):
        for length, heads, kv_heads in SHAPES[2:3] if quick else SHAPES:
            for kind in ("cache_fp8", "block_wise_fp8"):
                yield from _rows("paged_attention", kind, length, heads, kv_heads, causal)
            yield from _rows("flash_attention", "e4m3", length, heads, kv_heads, causal)
    if quick:
        return
    for kind in ("cache_fp8", "block_wise_fp8"):
        for causal in (True, False):
            call = paged(kind, 4, 32768, 2048, 16, 16, causal)
            us = gpu_timing.median_us([call], replays=10)
            rate = _operations(4, 32768, 2048, 16, causal) / us / 1e6
            mask = "causal" if causal else "full"
            shape = f"prefill {kind} {mask} B 4 x 2048 behind 32768 H 16/16 D {DIM}"
            yield Row("paged_attention", shape, us, rate, "TFLOP/s")
