"""Quantisation of activations, beside a copy of as many bytes."""

from __future__ import annotations

from collections.abc import Iterator

import fastattn.functional as F
from benchmarks.cases.inputs import BF16, CODE
from benchmarks.core.devices import Device
from benchmarks.core.rows import Row, register
from benchmarks.core.timing import bind

_FP8 = {
    "cpu": [(1024, 4096)],
    "cpu quick": [(128, 4096)],
    "gpu": [(4096, 4096), (16384, 8192)],
    "gpu quick": [(4096, 4096)],
}
#: On a GPU 32, 64, 128 and 512 MiB of bf16.
_MXFP4 = {**_FP8, "gpu": [(4096, 4096), (8192, 4096), (8192, 8192), (16384, 16384)]}


@register("quantize_fp8")
def quantize_fp8(device: Device) -> Iterator[Row]:
    """Dynamic scales of every granularity."""
    for rows, columns in device.of(_FP8):
        moved = rows * columns * (BF16 + CODE)
        inputs = [device.random((rows, columns)) for _ in range(device.copies(moved, 8))]
        for granularity in ("tensor", "token", "group"):
            calls = [bind(F.quantize_fp8, x, granularity=granularity) for x in inputs]
            shape = f"{rows} x {columns} bf16, {granularity}"
            yield device.memory_row("quantize_fp8", shape, calls, moved)


@register("mxfp4_quantize")
def mxfp4(device: Device) -> Iterator[Row]:
    """mxfp4_quantize and mxfp4_dequantize."""
    for rows, columns in device.of(_MXFP4):
        elements = rows * columns
        shape = f"{rows} x {columns} bf16, {elements >> 19} MiB"
        copies = device.copies(elements * BF16, 8)
        inputs = [device.random((rows, columns)) for _ in range(copies)]
        calls = [bind(F.mxfp4_quantize, x) for x in inputs]
        moved = elements * BF16 + elements // 2 + elements // 32
        yield device.memory_row("mxfp4_quantize", shape, calls, moved)
        pairs = [F.mxfp4_quantize(x) for x in inputs]
        back = [bind(F.mxfp4_dequantize, *pair, dtype="bfloat16") for pair in pairs]
        yield device.memory_row("mxfp4_dequantize", shape, back, moved)
