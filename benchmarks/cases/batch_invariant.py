"""What `batch_invariant` and `split_invariant` cost: calls beside the same ones without them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from benchmarks.cases.decode import ragged_lengths
from benchmarks.cases.inputs import DIM, HEADS, KV, Step, paged_calls, token_bytes
from benchmarks.core.devices import Device, Gpu
from benchmarks.core.rows import Row, register
from benchmarks.core.timing import Call, bind, medians

OP, DEFAULT = "paged_attention, batch_invariant", "default"
SPLIT_OP = "paged_attention, split_invariant"
TYPES = {
    "cpu": ("block_wise_fp8", "none"),
    "cpu quick": ("block_wise_fp8",),
    "gpu": ("cache_fp8", "block_wise_fp8", "none"),
    "gpu quick": ("cache_fp8",),
}
#: Sequences, keys of each, new tokens of each among them.
SHAPES = {
    "cpu": [(b, 1024, new) for b in (1, 4) for new in (1, 4)],
    "cpu quick": [(2, 128, 1)],
    "gpu": [(b, k * 1024, new) for new in (1, 4) for k in (1, 8) for b in (1, 16, 64, 128)],
    "gpu quick": [(1, 1024, 1), (64, 1024, 1)],
}
#: A few shapes more, over one type of cache.
MORE = [*((b, 32768, 1) for b in (1, 16, 64, 128)), (4, 8192, 16), (1, 8192, 2048)]
#: Of `split_invariant`: decode, short and long steps after a cached prefix, and whole prompts.
SPLIT_TYPES = {
    "cpu": ("block_wise_fp8",),
    "gpu": ("none", "cache_fp8", "block_wise_int8", "block_wise_int4"),
    "gpu quick": ("cache_fp8",),
}
SPLIT_SHAPES = {
    "cpu": [(2, 1024, 1)],
    "cpu quick": [(2, 128, 1)],
    "gpu": [
        *((16, 8192, 1), (64, 8192, 1), (128, 8192, 1), (64, 1024, 1), (1, 8192, 1)),
        *((1, 32768, 1), (1, 131072, 1), (16, 8192, 4), (4, 8192, 16), (1, 8192, 256)),
        *((1, 8192, 2048), (4, 4096, 4096), (1, 16384, 16384)),
    ],
    "gpu quick": [(64, 1024, 1)],
}
#: Most caches of a measurement.
_COPIES = 16


def _medians(device: Device, calls: Sequence[Call], others: Sequence[Call]) -> list[float]:
    if isinstance(device, Gpu):
        return [device.us(calls), device.us(others)]
    return medians([calls[0], others[0]], 3 if device.quick else 9)


def pair(
    device: Device,
    quant: str,
    lengths: Sequence[int],
    new: int,
    option: str = "batch_invariant",
) -> tuple[list[Call], list[Call]]:
    """Calls with an option and without, over the same tensors."""
    step = Step(device, np.asarray(lengths) - new, [new] * len(lengths))
    copies = device.copies(sum(lengths) * token_bytes(quant), _COPIES)
    plain = paged_calls(device, quant, step, copies=copies)
    return [bind(call, **{option: True}) for call in plain], plain


def _row(
    device: Device, quant: str, name: str, lengths: Sequence[int], new: int, op: str = OP
) -> Row:
    calls = pair(device, quant, lengths, new, op.partition(", ")[2])
    us, plain_us = _medians(device, *calls)
    shape = f"{quant} {name} new {new} H {HEADS}/{KV} D {DIM}"
    return Row(op, shape, us, peer=DEFAULT, peer_us=plain_us)


@register("batch_invariant")
def batch_invariant(device: Device) -> Iterator[Row]:
    """Decode and a few new tokens; a ratio of 0.97 is 3 % slower than the default."""
    for quant in device.of(TYPES):
        for batch, context, new in device.of(SHAPES):
            yield _row(device, quant, f"B {batch} ctx {context}", [context] * batch, new)
    if device.kind == "gpu" and not device.quick:
        for batch, context, new in MORE:
            yield _row(device, "cache_fp8", f"B {batch} ctx {context}", [context] * batch, new)
        yield _row(device, "cache_fp8", "B 64 ctx 64..32768 ragged", ragged_lengths(), 1)


@register("split_invariant")
def split_invariant(device: Device) -> Iterator[Row]:
    """The same for `split_invariant`, prompts included."""
    for quant in device.of(SPLIT_TYPES):
        for batch, context, new in device.of(SPLIT_SHAPES):
            name = f"B {batch} ctx {context}"
            yield _row(device, quant, name, [context] * batch, new, SPLIT_OP)
