"""Prefill on a GPU: e4m3 and 16-bit queries, over every cache and over contiguous keys.

16384 tokens in all; a causal mask counts half the operations. Inputs are normal, so that the
tensor cores draw the power that they draw in use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

import fastattn.functional as F
from benchmarks.cases.inputs import DIM, HEADS, KV, Step, paged_calls
from benchmarks.core import cuda
from benchmarks.core.devices import Gpu
from benchmarks.core.peers import peers
from benchmarks.core.rows import Row, register
from benchmarks.core.timing import bind

TOKENS = 16384
FP8_TYPES = ("cache_fp8", "block_wise_fp8")
_NIBBLES = ("block_wise_int4", "block_wise_mxfp4")
_MIXED = ("block_wise_k8v4", "block_wise_kfp8v4")
TYPES = ("none", "cache_int8", "block_wise_int8", *_NIBBLES, *_MIXED, *FP8_TYPES)
#: Peers by a part of their names: those that do the work of a call.
PAGED_FP8, VARLEN_FP8 = ("fp8_paged", "cudnn_fp8"), ("fp8_varlen", "cudnn_fp8")
PEERS_FP16 = ("vllm_fa3_bf16", "cudnn_bf16")
#: Length of a sequence, query and KV heads.
SHAPES = {
    "gpu": [*((k * 1024, 16, 16) for k in (1, 2, 4, 8, 16)), (4096, 64, 8), (16384, 64, 8)],
    "gpu quick": [(4096, 16, 16)],
}
_QUANTIZED = {
    "gpu": [(1024, 16, 16), (4096, 16, 16), (16384, 16, 16), (16384, 64, 8)],
    "gpu quick": [(4096, 16, 16)],
}
#: Cached tokens and sequences of a chunk.
_CHUNKS = {
    "gpu": [(6144, 1), (6144, 4), (16384, 1), (16384, 4), (65536, 1)],
    "gpu quick": [(6144, 1)],
}
#: Tokens and query heads of the pass over the queries alone.
_QUERIES = {
    "gpu": [(64, 32), (256, 64), (2048, 32), (16384, 16), (16384, 64)],
    "gpu quick": [(16384, 64)],
}


class Prompts(NamedTuple):
    """Sequences of one length, of TOKENS tokens in all, or four behind a prefix."""

    length: int
    heads: int
    kv: int
    causal: bool = True
    prefix: int = 0

    @property
    def seqs(self) -> int:
        """Number of sequences."""
        return 4 if self.prefix else TOKENS // self.length

    def row(self, op: str, name: str, us: float, mark: str = "") -> Row:
        """Row of a call; the diagonal of a causal mask counts half."""
        pairs = self.length * (self.prefix + self.length / (2 if self.causal else 1))
        rate = 4.0 * self.seqs * self.heads * DIM * pairs / us / 1e6
        mask = "causal" if self.causal else "full"
        behind = f" behind {self.prefix}" if self.prefix else ""
        shape = f"prefill {name} {mask}{mark} B {self.seqs} x {self.length}{behind}"
        return Row(op, f"{shape} H {self.heads}/{self.kv} D {DIM}", us, rate, "TFLOP/s")

    def beside(self, row: Row, wanted: Sequence[str]) -> list[Row]:
        """A row beside each wanted peer, or as it is without any."""
        where = {"s": self.length, "h": self.heads, "hk": self.kv, "causal": self.causal}
        found = [o for o in peers("prefill", **where) if any(part in o["peer"] for part in wanted)]
        return [row.beside(other["peer"], other["ms"] * 1e3) for other in found] or [row]


def _both_masks(device: Gpu) -> Iterator[Prompts]:
    for causal in (True, False):
        for shape in device.of(SHAPES):
            yield Prompts(*shape, causal)


def _paged_us(device: Gpu, quant: str, prompts: Prompts, queries: str, **options: bool) -> float:
    seqs = prompts.seqs
    step = Step(device, [prompts.prefix] * seqs, [prompts.length] * seqs)
    options["causal"] = prompts.causal
    heads = (prompts.heads, prompts.kv)
    return device.us(paged_calls(device, quant, step, *heads, queries, **options))


@register("prefill", "gpu")
def prefill(device: Gpu) -> Iterator[Row]:
    """FP8 prefill: both cache types, and chunks behind a long prefix."""
    chunks = [Prompts(2048, 16, 16, causal, 32768) for causal in (True, False)]
    for prompts in (*_both_masks(device), *([] if device.quick else chunks)):
        for quant in FP8_TYPES:
            us = _paged_us(device, quant, prompts, "e4m3")
            row = prompts.row("paged_attention", quant, us)
            yield from [row] if prompts.prefix else prompts.beside(row, PAGED_FP8)


@register("prefill_fp16", "gpu")
def prefill_fp16(device: Gpu) -> Iterator[Row]:
    """Prefill with bf16 queries over every cache type."""
    for prompts in _both_masks(device):
        for quant in TYPES:
            us = _paged_us(device, quant, prompts, "bfloat16")
            name = f"bf16 q, {'bf16' if quant == 'none' else quant}"
            yield from prompts.beside(prompts.row("paged_attention", name, us), PEERS_FP16)


@register("flash_attention", "gpu")
def flash_attention(device: Gpu) -> Iterator[Row]:
    """Prefill over contiguous keys, in FP8 and in bf16."""
    for dtype, name, wanted in (
        ("e4m3", "e4m3", VARLEN_FP8),
        ("bfloat16", "bf16 q, bf16", PEERS_FP16),
    ):
        for prompts in _both_masks(device):
            length, heads, kv, causal, _ = prompts
            shapes = [(TOKENS, n, DIM) for n in (heads, kv, kv)]
            qkv = [device.random(shape, dtype, seed) for seed, shape in enumerate(shapes)]
            starts = device.int32(np.arange(prompts.seqs + 1) * length)
            lengths, out = (starts, starts, length, length), device.empty(shapes[0], "bfloat16")
            call = bind(F.flash_attention, *qkv, *lengths, causal=causal, out=out)
            row = prompts.row("flash_attention", name, device.us([call]))
            yield from prompts.beside(row, wanted)


@register("chunk", "gpu")
def chunk(device: Gpu) -> Iterator[Row]:
    """A prompt's chunk behind a prefix, beside the same over 16-bit keys that are written first.

    That is the way of who has no kernel over the codes: the cache is read and written in bf16, at
    the speed of a copy here, and then attended to.
    """
    for prefix, seqs in device.of(_CHUNKS):
        step = Step(device, [prefix] * seqs, [2048] * seqs)
        bf16_us = device.us(paged_calls(device, "none", step))
        moved = 3 * 2 * step.blocks * 64 * KV * DIM  # a byte read, two written, of K and V
        peer = "writing bf16 keys, attending to them", bf16_us + moved / cuda.floors()[0] / 1e3
        for quant in FP8_TYPES:
            for queries in ("bfloat16", "e4m3"):
                us = device.us(paged_calls(device, quant, step, queries=queries))
                rate = 4.0 * seqs * HEADS * DIM * 2048 * (prefix + 1024) / us / 1e6
                name = "bf16" if queries == "bfloat16" else queries
                shape = f"{seqs} x 2048 behind {prefix}, {name} q, {quant}, H {HEADS}/{KV} D {DIM}"
                yield Row("paged_attention", shape, us, rate, "TFLOP/s", *peer)


def _pass_alone(device: Gpu, tokens: int, heads: int) -> Row:
    """Row of a step whose tokens are all padding.

    Nothing is attended, so a call is the pass and a kernel that finds nothing to do.
    """
    moved = tokens * heads * (3 * DIM + 4)
    key, no_seqs = device.random((64, heads, DIM), "e4m3"), device.int32([0])
    rest = (key, key, no_seqs, no_seqs, tokens, 64)
    options = {"quantize_q": True, "out": device.empty((tokens, heads, DIM), "bfloat16")}
    queries = [device.random((tokens, heads, DIM)) for _ in range(device.copies(moved))]
    calls = [bind(F.flash_attention, q, *rest, **options) for q in queries]
    shape = f"quantize_q alone T {tokens} H {heads} D {DIM}"
    return device.memory_row("flash_attention", shape, calls, moved)


@register("quantize_q", "gpu")
def quantize_q(device: Gpu) -> Iterator[Row]:
    """16-bit queries that the operators quantise: the pass alone, and prefill beside e4m3 ones."""
    for tokens, heads in device.of(_QUERIES):
        yield _pass_alone(device, tokens, heads)
    for quant in FP8_TYPES:
        for shape in device.of(_QUANTIZED):
            prompts = Prompts(*shape)
            codes_us = _paged_us(device, quant, prompts, "e4m3")
            us = _paged_us(device, quant, prompts, "bfloat16", quantize_q=True)
            row = prompts.row("paged_attention", quant, us, " quantize_q")
            yield row.beside("e4m3 queries", codes_us)
