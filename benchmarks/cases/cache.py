"""Writing to the cache and reading it back, beside a copy of as many bytes.

On a CPU rounding to 8 bits takes most of the time: the rows are for comparing builds and machines.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

import fastattn.functional as F
from benchmarks.cases.inputs import (
    BF16,
    CODE,
    DIM,
    HEADS,
    KV,
    Cache,
    Step,
    is_dynamic,
    rope_write_calls,
    starts_of,
    token_bytes,
    write_calls,
)
from benchmarks.core.devices import Device
from benchmarks.core.peers import peers
from benchmarks.core.rows import Row, register
from benchmarks.core.timing import bind
from fastattn.functional._cache_types import codes_per_byte
from fastattn.reference.layout import BLOCK_SIZE
from fastattn.reference.rope import make_rotary_embs

#: Sequences, cached tokens of each, new tokens of each.
_STEPS = {
    "cpu": [(4, 0, 2048)],
    "cpu quick": [(4, 0, 256)],
    "gpu": [(1, 8000, 1), (64, 2000, 1), (256, 1000, 1), (64, 2000, 4), (1, 37, 8192),
            (8, 100, 2048), (1, 0, 1024), (1, 0, 32768), (1, 0, 65536)],
    "gpu quick": [(1, 8000, 1), (64, 2000, 1), (1, 37, 8192)],
}  # fmt: skip
_WRITTEN = {
    "cpu": ("none", "cache_int8", "cache_fp8", "block_wise_int8", "block_wise_fp8",
            "block_wise_int4", "block_wise_mxfp4", "block_wise_k8v4", "block_wise_kfp8v4"),
    "gpu": ("none", "block_wise_fp8", "cache_fp8", "cache_int8", "block_wise_int4",
            "block_wise_mxfp4", "block_wise_k8v4", "block_wise_kfp8v4"),
    "gpu quick": ("block_wise_fp8",),
}  # fmt: skip
#: Cache type, and how Q is returned.
_ROPE_WRITTEN = {
    "cpu": [("none", "none"), ("cache_int8", "none"), ("block_wise_fp8", "none"),
            ("block_wise_fp8", "per_token_head")],
    "gpu": [(quant, q) for quant in _WRITTEN["gpu"] for q in ("none", "per_token_head")],
    "gpu quick": [("block_wise_fp8", "none"), ("block_wise_fp8", "per_token_head")],
}  # fmt: skip
_READ_TYPES = (
    *("cache_int8", "cache_fp8", "block_wise_int8", "block_wise_fp8", "block_wise_int4"),
    *("block_wise_mxfp4", "block_wise_k8v4", "block_wise_kfp8v4"),
)
#: Cached tokens of all sequences.
_READ = {"cpu": (8192,), "cpu quick": (1024,), "gpu": (32768, 262144), "gpu quick": (32768,)}
#: Tokens at which other libraries' kernels were timed.
_OF_PEERS = {"gpu": (1, 16, 128, 1024, 4096, 16384), "gpu quick": (1, 128, 4096)}
#: A pool is never smaller, so that blocks lie apart.
_POOL = {"cpu": 1, "gpu": 1024}


def _written_bytes(step: Step, quant: str) -> int:
    return step.tokens * (2 * KV * DIM * BF16 + token_bytes(quant))


def _rope_written_bytes(step: Step, quant: str, q_quant: str, heads: int = HEADS) -> int:
    q_bytes = heads * (DIM * BF16 if q_quant == "none" else DIM * CODE + 4)
    projection, angles = (heads + 2 * KV) * DIM * BF16, 4 * DIM
    return step.tokens * (projection + angles + q_bytes + token_bytes(quant))


def _shape(quant: str, batch: int, new: int) -> str:
    return f"batch {batch} x {new} new, H {HEADS}, KV {KV}, D {DIM}, {quant}"


@register("write_cache_kv")
def write_cache_kv(device: Device) -> Iterator[Row]:
    """Decode, speculative and prefill steps."""
    for quant in device.of(_WRITTEN):
        for batch, cached, new in device.of(_STEPS):
            step = Step(device, [cached] * batch, [new] * batch, device.of(_POOL))
            cache, moved = Cache(device, quant, step.blocks), _written_bytes(step, quant)
            calls = write_calls(device, cache, step, device.copies(moved))
            yield device.memory_row("write_cache_kv", _shape(quant, batch, new), calls, moved)


@register("rope_write_cache_kv")
def rope_write_cache_kv(device: Device) -> Iterator[Row]:
    """The same steps from a fused projection, with rotation, and Q in bf16 or e4m3."""
    steps = device.of(_STEPS)
    angles = device.array(make_rotary_embs(max(cached + new for _, cached, new in steps), DIM))
    for quant, q_quant in device.of(_ROPE_WRITTEN):
        for batch, cached, new in steps:
            step = Step(device, [cached] * batch, [new] * batch, device.of(_POOL))
            cache, moved = (
                Cache(device, quant, step.blocks),
                _rope_written_bytes(step, quant, q_quant),
            )
            calls = rope_write_calls(
                device, cache, step, angles, device.copies(moved), q_quant=q_quant
            )
            shape = f"{_shape(quant, batch, new)}, q {q_quant}"
            yield device.memory_row("rope_write_cache_kv", shape, calls, moved)


def _beside(row: Row, peer: str, **where: int) -> Row:
    """A row beside a peer of the report that others' times are in, or as it was."""
    found = [other for other in peers("append", **where) if other["peer"].startswith(peer)]
    return row.beside(found[-1]["peer"], found[-1]["us"]) if found else row


@register("cache_peers", "gpu")
def cache_peers(device: Device) -> Iterator[Row]:
    """Both writers into an FP8 cache, at the shapes at which other libraries' were timed.

    Tokens rotate over as many inputs as theirs do: beyond the L2 cache from 4096 tokens on.
    """
    angles = device.array(make_rotary_embs(max(_OF_PEERS["gpu"]), DIM, neox=True))
    for tokens in device.of(_OF_PEERS):
        # Few tokens are sequences of a decode step, more are a prompt.
        cached, new = ([777] * tokens, [1] * tokens) if tokens < BLOCK_SIZE else ([0], [tokens])
        step = Step(device, cached, new, max(2048, 2 * tokens // BLOCK_SIZE))
        cache = Cache(device, "cache_fp8", step.blocks)
        copies = 4 if tokens >= 4096 else 16
        shape = f"{tokens} tokens, KV {KV}, D {DIM}, cache_fp8"
        calls = write_calls(device, cache, step, copies)
        row = device.memory_row("write_cache_kv", shape, calls, _written_bytes(step, "cache_fp8"))
        yield _beside(row, "vllm reshape_and_cache_flash fp8", tokens=tokens, h=32)
        for heads in (32, 64):
            calls = rope_write_calls(
                device, cache, step, angles, copies, heads, use_neox_rotary_style=True
            )
            moved = _rope_written_bytes(step, "cache_fp8", "none", heads)
            row = device.memory_row("rope_write_cache_kv", f"{shape}, H {heads}", calls, moved)
            yield _beside(row, "vllm rope + reshape_and_cache fp8", tokens=tokens, h=heads)


@register("append_cache_kv_c8")
def append_cache_kv_c8(device: Device) -> Iterator[Row]:
    """All cached tokens of 8 sequences as contiguous bf16, from either layout."""
    for tokens in device.of(_READ):
        key, value = (device.empty((tokens, KV, DIM), "bfloat16") for _ in "kv")
        lengths = np.full(8, tokens // 8)
        tables = np.random.default_rng(1).permutation(tokens // BLOCK_SIZE).reshape(8, -1)
        meta = tuple(device.int32(x) for x in (tables, lengths, starts_of(lengths)))
        for quant in _READ_TYPES:
            cache = Cache(device, quant, tokens // BLOCK_SIZE)
            moved = tokens * (2 * KV * DIM * BF16 + token_bytes(quant))
            options = {**cache.options, "dynamic_quant": is_dynamic(quant)}
            layouts = {"fastattn": cache.value}
            if 2 not in codes_per_byte(quant):
                layouts["fastdeploy"] = cache.value.reshape(cache.key.shape)  # its shape of V
            for layout, values in layouts.items():
                tensors = (cache.key, values, key, value, *meta)
                call = bind(F.append_cache_kv_c8, *tensors, cache_layout=layout, **options)
                shape = f"{tokens // 1024}k tokens, KV {KV}, D {DIM}, {quant}, {layout}"
                yield device.memory_row("append_cache_kv_c8", shape, [call], moved)
