"""What is done to K before it is stored: each beside the step that stores it as it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.cases.inputs import (
    BF16,
    DIM,
    HEADS,
    KV,
    Cache,
    Step,
    rope_write_calls,
    token_bytes,
)
from benchmarks.core.devices import Device
from benchmarks.core.rows import Row, register
from fastattn.reference.rope import make_rotary_embs

#: Sequences, cached tokens of each, new tokens of each.
_STEPS = {
    "cpu": [(4, 0, 512)],
    "cpu quick": [(4, 0, 64)],
    "gpu": [(1, 8000, 1), (16, 8000, 1), (64, 2000, 1), (256, 1000, 1), (1, 0, 8192)],
    "gpu quick": [(64, 2000, 1), (1, 0, 8192)],
}
_TYPES = {
    "cpu": ("block_wise_int4", "block_wise_int8"),
    "cpu quick": ("block_wise_int4",),
    "gpu": ("block_wise_int4", "block_wise_fp8", "block_wise_int8", "cache_fp8"),
    "gpu quick": ("block_wise_int4",),
}
_PLAIN = "K as it is"


def _transforms(device: Device) -> dict[str, dict[str, Any]]:
    both = {"k_rotation": "hadamard", "q_rotation": "hadamard"}
    center = {"k_center": device.uniform((KV, DIM), -1, 1)}
    feedback = {"k_feedback": device.uniform((KV, DIM, DIM), -0.2, 0.2)}
    return {
        "K and Q rotated": both,
        "centred and rotated": {**both, **center},
        "centred, rotated, with feedback": {**both, **center, **feedback},
    }


@register("key_transforms")
def key_transforms(device: Device) -> Iterator[Row]:
    """rope_write_cache_kv: decode steps and a prompt; a ratio of 0.5 is twice the time."""
    steps = device.of(_STEPS)
    longest = max(cached + new for _, cached, new in steps)
    angles = device.array(make_rotary_embs(longest, DIM))
    for quant in device.of(_TYPES):
        for batch, cached, new in steps:
            step = Step(device, [cached] * batch, [new] * batch, 1024)
            cache = Cache(device, quant, step.blocks)
            moved = 2 * (HEADS + KV) * DIM * BF16 + 4 * DIM + token_bytes(quant)
            moved *= step.tokens
            plain_us = 0.0
            for name, options in {_PLAIN: {}, **_transforms(device)}.items():
                calls = rope_write_calls(
                    device, cache, step, angles, device.copies(moved), **options
                )
                shape = f"{quant}, batch {batch} x {new} new, {name}"
                row = device.memory_row("rope_write_cache_kv", shape, calls, moved)
                if name == _PLAIN:
                    plain_us = row.us
                else:
                    row = row.beside(_PLAIN, plain_us)
                yield row
