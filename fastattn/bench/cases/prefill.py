"""Prefill on a GPU: e4m3 and 16-bit queries, over every cache and over contiguous keys.

16384 tokens in all; a causal mask counts half the operations. Inputs are normal, so that the
tensor cores draw the power that they draw in use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

import fastattn.functional as F
from fastattn.bench.cases.inputs import DIM, Step, paged_calls
from fastattn.bench.core.devices import Gpu
from fastattn.bench.core.peers import peers
from fastattn.bench.core.rows import Row, register
from fastattn.bench.core.timing import Call, bind

TOKENS = 16384
#: Length of a sequence, query and KV heads.
Shape = tuple[int, int, int]
_SHAPES = [
    *((length, 16, 16) for length in (1024, 2048, 4096, 8192, 16384)),
    *((length, 64, 8) for length in (4096, 16384)),
]
SHAPES = {"gpu": _SHAPES, "gpu quick": _SHAPES[2:3]}
FP8_TYPES = ("cache_fp8", "block_wise_fp8")
TYPES = ("none", "cache_int8", "block_wise_int8", "cache_fp8", "block_wise_fp8")
#: Peers by a part of their names: those that do the work of a call.
PAGED_FP8, VARLEN_FP8 = ("fp8_paged", "cudnn_fp8"), ("fp8_varlen", "cudnn_fp8")
PEERS_FP16 = ("vllm_fa3_bf16", "cudnn_bf16")
#: Tokens and query heads of the pass over the queries alone, and shapes of prefill with it.
_QUERIES = {
    "gpu": [(64, 32), (256, 64), (2048, 32), (16384, 16), (16384, 64)],
    "gpu quick": [(16384, 64)],
}
_QUANTIZED = {
    "gpu": [(1024, 16, 16), (4096, 16, 16), (16384, 16, 16), (16384, 64, 8)],
    "gpu quick": [(4096, 16, 16)],
}


def _paged(
    device: Gpu,
    quant: str,
    shape: Shape,
    queries: str,
    prefix: int = 0,
    seqs: int = 0,
    **options: bool,
) -> Call:
    """A call for sequences of new tokens behind `prefix` cached ones."""
    length, heads, kv = shape
    seqs = seqs or TOKENS // length
    step = Step(device, [prefix] * seqs, [length] * seqs)
    return paged_calls(device, quant, step, heads, kv, queries, **options)[0]


def _contiguous(device: Gpu, dtype: str, shape: Shape, causal: bool) -> Call:
    """A call of flash_attention over queries, keys and values of a type."""
    length, heads, kv = shape
    starts = device.int32(np.arange(TOKENS // length + 1) * length)
    qkv = [device.random((TOKENS, n, DIM), dtype, seed) for seed, n in enumerate((heads, kv, kv))]
    out = device.empty((TOKENS, heads, DIM), "bfloat16")
    lengths = (starts, starts, length, length)
    return bind(F.flash_attention, *qkv, *lengths, causal=causal, out=out)


def _rate(us: float, seqs: int, prefix: int, shape: Shape, causal: bool) -> tuple[float, str]:
    """Multiplications and additions a second; the diagonal counts half."""
    length, heads, _ = shape
    pairs = prefix * length + (length * length / 2 if causal else length * length)
    return 4.0 * seqs * heads * DIM * pairs / us / 1e6, "TFLOP/s"


def _rows(
    device: Gpu,
    op: str,
    call: Call,
    name: str,
    shape: Shape,
    causal: bool,
    wanted: Sequence[str],
) -> Iterator[Row]:
    """Rows of a call over TOKENS tokens: beside each wanted peer, or one without."""
    length, heads, kv = shape
    us, seqs, mask = device.us([call]), TOKENS // length, "causal" if causal else "full"
    text = f"prefill {name} {mask} B {seqs} x {length} H {heads}/{kv} D {DIM}"
    row = Row(op, text, us, *_rate(us, seqs, 0, shape, causal))
    found = [
        row.beside(other["peer"], other["ms"] * 1e3)
        for other in peers("prefill", s=length, h=heads, hk=kv, causal=causal)
        if any(part in other["peer"] for part in wanted)
    ]
    yield from found or [row]


@register("prefill", "gpu")
def prefill(device: Gpu) -> Iterator[Row]:
    """FP8 prefill: both cache types, and chunks behind a long prefix."""
    op = "paged_attention"
    for causal in (True, False):
        for shape in device.of(SHAPES):
            for quant in FP8_TYPES:
                call = _paged(device, quant, shape, "e4m3", causal=causal)
                yield from _rows(device, op, call, quant, shape, causal, PAGED_FP8)
    shape, seqs, prefix = (2048, 16, 16), 4, 32768
    for quant in () if device.quick else FP8_TYPES:
        for causal in (True, False):
            us = device.us([_paged(device, quant, shape, "e4m3", prefix, seqs, causal=causal)])
            mask = "causal" if causal else "full"
            text = f"prefill {quant} {mask} B {seqs} x {shape[0]} behind {prefix} H 16/16 D {DIM}"
            yield Row(op, text, us, *_rate(us, seqs, prefix, shape, causal))


@register("prefill_fp16", "gpu")
def prefill_fp16(device: Gpu) -> Iterator[Row]:
    """Prefill with bf16 queries over every cache type."""
    for causal in (True, False):
        for shape in device.of(SHAPES):
            for quant in TYPES:
                call = _paged(device, quant, shape, "bfloat16", causal=causal)
                name = f"bf16 q, {'bf16' if quant == 'none' else quant}"
                yield from _rows(device, "paged_attention", call, name, shape, causal, PEERS_FP16)


@register("flash_attention", "gpu")
def flash_attention(device: Gpu) -> Iterator[Row]:
    """Prefill over contiguous keys, in FP8 and in bf16."""
    for dtype, name, wanted in (
        ("e4m3", "e4m3", VARLEN_FP8),
        ("bfloat16", "bf16 q, bf16", PEERS_FP16),
    ):
        for causal in (True, False):
            for shape in device.of(SHAPES):
                call = _contiguous(device, dtype, shape, causal)
                yield from _rows(device, "flash_attention", call, name, shape, causal, wanted)


def _pass_alone(device: Gpu, tokens: int, heads: int) -> Row:
    """Row of a step whose tokens are all padding.

    Nothing is attended, so a call is the pass and a kernel that finds nothing to do.
    """
    moved = tokens * heads * (3 * DIM + 4)
    key, no_seqs = device.random((64, heads, DIM), "e4m3"), device.int32([0])
    out = device.empty((tokens, heads, DIM), "bfloat16")
    queries = [device.random((tokens, heads, DIM)) for _ in range(device.copies(moved))]
    calls: list[Call] = [
        bind(F.flash_attention, q, key, key, no_seqs, no_seqs, tokens, 64, quantize_q=True, out=out)
        for q in queries
    ]
    shape = f"quantize_q alone T {tokens} H {heads} D {DIM}"
    return device.memory_row("flash_attention", shape, calls, moved)


@register("quantize_q", "gpu")
def quantize_q(device: Gpu) -> Iterator[Row]:
    """16-bit queries that the operators quantise: the pass alone, and prefill beside e4m3 ones."""
    for tokens, heads in device.of(_QUERIES):
        yield _pass_alone(device, tokens, heads)
    for quant in FP8_TYPES:
        for shape in device.of(_QUANTIZED):
            codes_us = device.us([_paged(device, quant, shape, "e4m3", causal=True)])
            call = _paged(device, quant, shape, "bfloat16", causal=True, quantize_q=True)
            us, (length, heads, kv) = device.us([call]), shape
            rate = _rate(us, TOKENS // length, 0, shape, True)
            text = f"prefill {quant} causal quantize_q B {TOKENS // length} x {length}"
            row = Row("paged_attention", f"{text} H {heads}/{kv}", us, *rate)
            yield row.beside("e4m3 queries", codes_us)
