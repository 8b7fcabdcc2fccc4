"""What bias, qk-norm and other rotations cost: each beside the step that only rotates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.cases.inputs import (
    BF16,
    CODE,
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
    "gpu": [(1, 0, 8192), (1, 0, 65536), (1, 8000, 1), (64, 2000, 1), (256, 1000, 1)],
    "gpu quick": [(1, 0, 8192), (1, 8000, 1), (64, 2000, 1)],
}  # fmt: skip
_TYPES = {
    "gpu": ("block_wise_fp8", "block_wise_int8", "cache_fp8", "cache_int8", "none"),
    "gpu quick": ("block_wise_fp8",),
}
_Q_QUANTS = {"gpu": ("none", "per_token_head"), "gpu quick": ("none",)}
_PLAIN = "rotation alone"
_OWN = "a table for each sequence"


def _options(device: Device) -> dict[str, dict[str, Any]]:
    """What each row asks for beyond the rotation of whole heads."""
    weights = {f"{name}_norm_weight": device.uniform((DIM,)) for name in "qk"}
    norm = {**weights, "qk_norm_before_rope": True}
    bias = {"qkv_bias": device.random(((HEADS + 2 * KV) * DIM,), seed=7)}
    half = {"rotary_dim": DIM // 2, "use_neox_rotary_style": True}
    return {
        "norm": norm,
        "norm after": weights,
        "bias": bias,
        "norm and bias": {**norm, **bias},
        "half rotated": half,
        "half rotated, norm and bias": {**norm, **bias, **half},
    }


@register("rope_options", "gpu")
def rope_options(device: Device) -> Iterator[Row]:
    """rope_write_cache_kv: prompts and decode steps; a ratio of 0.97 is 3 % slower."""
    steps = device.of(_STEPS)
    longest = max(cached + new for _, cached, new in steps)
    whole = device.array(make_rotary_embs(longest, DIM))
    half = device.array(make_rotary_embs(longest, DIM // 2, neox=True))
    for quant in device.of(_TYPES):
        for batch, cached, new in steps:
            step = Step(device, [cached] * batch, [new] * batch, 1024)
            cache = Cache(device, quant, step.blocks)
            for q_quant in device.of(_Q_QUANTS):
                q_bytes = HEADS * (DIM * BF16 if q_quant == "none" else DIM * CODE + 4)
                moved = (HEADS + 2 * KV) * DIM * BF16 + 4 * DIM + q_bytes + token_bytes(quant)
                moved *= step.tokens
                plain_us = 0.0
                for name, options in {_PLAIN: {}, _OWN: {}, **_options(device)}.items():
                    angles = half if "rotary_dim" in options else whole
                    if name == _OWN:
                        angles = device.uniform((batch, 2, 1, cached + new, 1, DIM // 2))
                    copies = device.copies(moved)
                    calls = rope_write_calls(
                        device, cache, step, angles, copies, q_quant=q_quant, **options
                    )
                    shape = f"{quant}, q {q_quant}, batch {batch} x {new} new, {name}"
                    row = device.memory_row("rope_write_cache_kv", shape, calls, moved)
                    if name == _PLAIN:
                        plain_us = row.us
                    else:
                        row = row.beside(_PLAIN, plain_us)
                    yield row
