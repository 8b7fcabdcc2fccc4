"""Selection of the largest logits, beside reading them once and beside vLLM's kernels.

Logits are normal, or three quarters zeros as a ReLU leaves them: equal values are the hard case of
a selection that is exact.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

import fastattn.functional as F
from benchmarks.core import cuda
from benchmarks.core.devices import Cpu, Gpu
from benchmarks.core.peers import READ, peers
from benchmarks.core.rows import Row, register
from benchmarks.core.timing import bind, medians

#: Rows and thousands of columns; k.
_SHAPES = [(1, 8), (1, 160), (4, 64), (64, 8), (64, 64), (4096, 8), (4096, 64), (4096, 160)]
SHAPES = {"gpu": _SHAPES, "gpu quick": [(1, 8)]}
KS = {"gpu": (2048, 512), "gpu quick": (2048,)}
_CPU_SHAPES = {"cpu": [(1, 8), (1, 160), (64, 64)], "cpu quick": [(1, 8)]}


@register("topk_indices", "gpu")
def topk_indices(device: Gpu) -> Iterator[Row]:
    """One token to a chunk of 4096, over contexts to 160k."""
    for rows, thousands in device.of(SHAPES):
        columns = thousands * 1024
        moved = rows * columns * 4
        lengths = device.int32(np.full(rows, columns))
        for kind in ("normal", "zeros"):
            copies = device.copies(moved, 16)
            inputs = [device.random((rows, columns), "float32") for _ in range(copies)]
            if kind == "zeros":
                values = np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32)
                for tensor in inputs:
                    cuda.fill(tensor, np.maximum(values - 0.67, 0))
            for k in device.of(KS):
                out = device.empty((rows, k), "int32")
                us = device.us([bind(F.topk_indices, x, lengths, k, out=out) for x in inputs])
                shape = f"{rows} x {thousands}k, k {k}, {kind}"
                read_us = moved / cuda.read_bandwidth() / 1e3
                row = Row("topk_indices", shape, us, moved / us / 1e3, "GB/s", READ, read_us)
                yield row
                for other in peers("topk", rows=rows, columns=columns, k=k):
                    if kind == "normal":
                        yield row.beside(other["peer"], other["us"])
            del inputs


@register("topk_indices", "cpu")
def topk_indices_cpu(device: Cpu) -> Iterator[Row]:
    """Beside NumPy's argpartition, which leaves ties to chance and sorts nothing."""
    for rows, thousands in device.of(_CPU_SHAPES):
        columns, k = thousands * 1024, 2048
        logits = device.random((rows, columns), "float32")
        values, lengths = logits.numpy(), device.int32(np.full(rows, columns))
        calls = [
            bind(F.topk_indices, logits, lengths, k),
            bind(np.argpartition, values, columns - k, axis=-1),
        ]
        us, numpy_us = medians(calls, 3 if device.quick else 9)
        row = Row("topk_indices", f"{rows} x {thousands}k, k {k}", us)
        yield row.beside("NumPy argpartition", numpy_us)
