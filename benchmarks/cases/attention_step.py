"""A layer's step in one operator, beside the two operators that it stands for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fastattn.functional as F
from benchmarks.cases.inputs import DIM, HEADS, KV, Cache, Step
from benchmarks.core.devices import Device, Gpu
from benchmarks.core.rows import Row, register
from benchmarks.core.timing import Call, bind, medians
from fastattn.reference.rope import make_rotary_embs

#: Sequences, cached tokens of each, new tokens of each.
_STEPS = {
    "cpu": [(1, 1000, 1), (16, 1000, 1), (1, 0, 512)],
    "cpu quick": [(2, 100, 1)],
    "gpu": [(1, 8000, 1), (16, 8000, 1), (64, 8000, 1), (1, 1000, 1), (4, 0, 2048)],
    "gpu quick": [(1, 8000, 1)],
}
_QUANTS = {
    "cpu": ("none", "block_wise_fp8", "block_wise_int4"),
    "cpu quick": ("block_wise_fp8",),
    "gpu": ("none", "cache_fp8", "block_wise_fp8", "block_wise_int4"),
    "gpu quick": ("block_wise_fp8",),
}
_COPIES = {"cpu": 1, "gpu": 4}


def _calls(device: Device, quant: str, step: Step) -> tuple[list[Call], list[Call]]:
    """Steps in one operator and in two, over caches and projections of their own."""
    angles = device.array(make_rotary_embs(step.longest, DIM))
    heads = {"num_heads": HEADS, "num_kv_heads": KV}
    longest = int(step.new.max()), step.longest
    one: list[Call] = []
    two: list[Call] = []
    for _ in range(device.of(_COPIES)):
        cache = Cache(device, quant, step.blocks)
        qkv = device.random((step.tokens, (HEADS + 2 * KV) * DIM))
        options = {**heads, **cache.options}
        whole = (qkv, *cache.tensors, angles, *step.meta, *longest)
        one.append(bind(F.attention_step, *whole, **options))

        def apart(qkv: Any = qkv, cache: Any = cache, options: Any = options) -> None:
            rest: Any = (*cache.tensors, angles, *step.meta)
            q, _ = F.rope_write_cache_kv(qkv, *rest, **options)
            rest = (*cache.tensors, *step.meta, *longest)
            F.paged_attention(q, *rest, **cache.options)

        two.append(apart)
    return one, two


@register("attention_step")
def attention_step(device: Device) -> Iterator[Row]:
    """Decode steps and a prompt; a ratio above 1 is less time than the two operators take."""
    for quant in device.of(_QUANTS):
        for batch, cached, new in device.of(_STEPS):
            step = Step(device, [cached] * batch, [new] * batch)
            one, two = _calls(device, quant, step)
            if isinstance(device, Gpu):
                us, apart = (device.us(calls) for calls in (one, two))
            else:
                us, apart = medians([one[0], two[0]], 3 if device.quick else 9)
            shape = f"batch {batch} x {new} new, {cached} cached, H {HEADS}, KV {KV}, D {DIM}"
            row = Row("attention_step", f"{shape}, {quant}", us)
            yield row.beside("two operators", apart)
