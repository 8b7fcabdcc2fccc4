"""FastDeploy's operators and its cache's bytes, beside a copy of as many bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import fastattn.functional as F
from benchmarks.cases.inputs import (
    BF16,
    DIM,
    HEADS,
    KV,
    Cache,
    Step,
    is_dynamic,
    starts_of,
    token_bytes,
)
from benchmarks.core.devices import Device
from benchmarks.core.rows import Row, register
from benchmarks.core.timing import Call, bind
from fastattn.compat.fastdeploy import gqa_rope_write_cache, merge_prefill_decode_output
from fastattn.reference.layout import BLOCK_SIZE
from fastattn.reference.rope import make_rotary_embs

#: A sequence's new tokens if they are a prompt's, else 0; its cached tokens; its new tokens.
Seq = tuple[int, int, int]
_DECODE: Seq = (0, 2000, 1)


def _cpu_steps(new: int) -> list[list[Seq]]:
    return [[(new, 0, new)], [(new, 3 * new, new)], [(new, 0, new), *[(0, 300, 1)] * 16]]


_STEPS: dict[str, list[list[Seq]]] = {
    "cpu": _cpu_steps(512),
    "cpu quick": _cpu_steps(128),
    "gpu": [
        [(8192, 0, 8192)],
        [(2048, 0, 2048)] * 8,
        [(2048, 6144, 2048)] * 4,
        [(2048, 0, 2048), *[_DECODE] * 64],
    ],
    "gpu quick": [[(8192, 0, 8192)]],
}
_ALL = ("none", "cache_int8", "cache_fp8", "block_wise_fp8")
_TYPES = {"cpu": _ALL, "gpu": _ALL, "gpu quick": ("block_wise_fp8",)}
_MERGED: dict[str, list[list[Seq]]] = {
    "cpu": [[(512, 0, 512), *[(0, 300, 8)] * 64]],
    "cpu quick": [[(512, 0, 512), *[(0, 300, 1)] * 64]],
    "gpu": [
        [(2048, 0, 2048), *[_DECODE] * 64],
        [(8192, 0, 8192), *[_DECODE] * 256],
        [(2048, 0, 2048), *[(0, 2000, 8)] * 512],
    ],
    "gpu quick": [[(2048, 0, 2048), *[_DECODE] * 64]],
}
_BLOCKS = {"cpu": 128, "cpu quick": 16, "gpu": 16384, "gpu quick": 2048}
#: Blocks that convert_cache_blocks converts at once.
_RANGES = {"cpu": (128,), "cpu quick": (16,), "gpu": (256, 2048)}


def _lengths(seqs: Sequence[Seq]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    encoder, cached, new = (np.array(x, np.int64) for x in zip(*seqs))
    return encoder, cached, new


def gqa_calls(device: Device, quant: str, seqs: Sequence[Seq]) -> tuple[list[Call], int]:
    """Calls of gqa_rope_write_cache over projections of their own, and the bytes of one.

    Each call keeps outputs as large as its inputs, so there are at most four.
    """
    encoder, cached, new = _lengths(seqs)
    prefix = np.where(encoder > 0, cached, 0)
    step = Step(device, cached, new)
    cache = Cache(device, quant, step.blocks)
    # Multipliers of quantisation, then of dequantisation, which static types give.
    scales = [*cache.scales, None, None] if is_dynamic(quant) else [None, None, *cache.scales]
    tokens, kv_tokens = step.tokens, int((prefix + new).sum())
    tables, starts, _, _ = step.meta
    arguments = (
        cache.key,
        cache.value.reshape(cache.key.shape),
        starts,
        device.int32(starts_of(prefix + new)),
        device.array(make_rotary_embs(step.longest, DIM)),
        *(device.int32(x) for x in (new, encoder, cached, np.repeat(np.arange(len(seqs)), new))),
        tables,
        *[None] * 8,  # lists of tiles, norms
        *(*scales, *[None] * 3),  # then zero points, PD signals
        *(kv_tokens, 0, 1e-6, False, quant),
    )
    width = (HEADS + 2 * KV) * DIM
    moved = tokens * (2 * width * BF16 + HEADS * DIM * BF16 + 4 * DIM)  # q, qkv_out, angles
    moved += kv_tokens * 2 * KV * DIM * BF16
    moved += int(prefix.sum() + new[encoder > 0].sum()) * token_bytes(quant)
    qkvs = [device.random((tokens, width)) for _ in range(device.copies(moved, 4))]
    return [bind(gqa_rope_write_cache, qkv, *arguments) for qkv in qkvs], moved


def merge_calls(device: Device, seqs: Sequence[Seq]) -> tuple[list[Call], int]:
    """Calls of merge_prefill_decode_output over outputs of their own, and the bytes of one.

    They are those of the decoding sequences, read and written.
    """
    encoder, cached, new = _lengths(seqs)
    meta = [device.int32(x) for x in (encoder, cached, new, starts_of(new))]
    shape = (int(new.sum()), HEADS * DIM)
    moved = 2 * int(new[encoder == 0].sum()) * HEADS * DIM * BF16
    rest = (*meta, HEADS, DIM, int(new.max()))
    pairs = [[device.random(shape) for _ in "ab"] for _ in range(device.copies(moved, 16))]
    return [bind(merge_prefill_decode_output, *pair, *rest) for pair in pairs], moved


def describe(seqs: Sequence[Seq]) -> str:
    """Such as ``1 x 2048 prefill after 2048, 64 x 1 decode, H 32, KV 8, D 128``."""
    parts = []
    for seq in dict.fromkeys(seqs):
        encoder, cached, new = seq
        behind = f" after {cached}" if encoder and cached else ""
        kind = "prefill" if encoder else "decode"
        parts.append(f"{list(seqs).count(seq)} x {new} {kind}{behind}")
    return f"{', '.join(parts)}, H {HEADS}, KV {KV}, D {DIM}"


@register("gqa_rope_write_cache")
def gqa(device: Device) -> Iterator[Row]:
    """Prompts, with cached tokens before them and with decoding sequences beside them."""
    for quant in device.of(_TYPES):
        for seqs in device.of(_STEPS):
            calls, moved = gqa_calls(device, quant, seqs)
            shape = f"{quant}, {describe(seqs)}"
            yield device.memory_row("gqa_rope_write_cache", shape, calls, moved)


@register("merge_prefill_decode_output")
def merge_decode(device: Device) -> Iterator[Row]:
    """Outputs of decoding sequences into those of prompts."""
    for seqs in device.of(_MERGED):
        calls, moved = merge_calls(device, seqs)
        shape = f"bf16, {describe(seqs)}"
        yield device.memory_row("merge_prefill_decode_output", shape, calls, moved)


def _conversions(device: Device) -> Iterator[tuple[str, Any, dict[str, str], int]]:
    """Name, cache, settings and bytes of whole caches that change their layout."""
    blocks = device.of(_BLOCKS)
    cache = device.random((blocks, KV, BLOCK_SIZE, DIM), "int8")
    for kind in ("k", "v"):
        for src in ("fastdeploy", "logical"):
            options = {"kind": kind, "cache_quant_type": "block_wise_int8"}
            name = f"{blocks} blocks, {kind}, {src} to fastattn"
            moved = 2 * blocks * KV * BLOCK_SIZE * DIM
            yield name, cache, {**options, "src": src, "dst": "fastattn"}, moved


@register("convert_cache_layout")
def convert_layout(device: Device) -> Iterator[Row]:
    """A whole cache into a new tensor."""
    for name, cache, options, moved in _conversions(device):
        call = bind(F.convert_cache_layout, cache, **options)
        yield device.memory_row("convert_cache_layout", name, [call], moved)


@register("convert_cache_blocks")
def convert_blocks(device: Device) -> Iterator[Row]:
    """A whole cache in place, range by range; the time is that of all."""
    for name, cache, options, moved in _conversions(device):
        for size in device.of(_RANGES):

            def convert_all(
                cache: Any = cache, options: dict[str, Any] = options, size: int = size
            ) -> None:
                for i in range(0, cache.shape[0], size):
                    F.convert_cache_blocks(cache, **options, begin=i, end=i + size)

            shape = f"{name}, in place in ranges of {size}"
            yield device.memory_row("convert_cache_blocks", shape, [convert_all], moved)
