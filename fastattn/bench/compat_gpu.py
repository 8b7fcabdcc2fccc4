"""FastDeploy's two operators on a GPU, against the copy bandwidth of the same run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fastattn.bench import compat_steps, gpu_timing
from fastattn.bench.cache_gpu import _bf16, _copies, _gpu
from fastattn.bench.common import Row, register
from fastattn.bench.compat_steps import Place, RowOfStep

_CODES = np.random.default_rng(0).integers(0, 126, size=1 << 20, dtype=np.uint8)
PLACE = Place(
    array=_gpu,
    bfloat16=lambda shape: _bf16(np.random.default_rng(2), shape),
    codes=lambda shape: gpu_timing.filled(shape, "uint8", _CODES),
)

_DECODE: RowOfStep = (0, 2000, 1)
STEPS: list[list[RowOfStep]] = [
    [(8192, 0, 8192)],
    [(2048, 0, 2048)] * 8,
    [(2048, 6144, 2048)] * 4,
    [(2048, 0, 2048), *[_DECODE] * 64],
]
MERGED: list[list[RowOfStep]] = [
    [(2048, 0, 2048), *[_DECODE] * 64],
    [(8192, 0, 8192), *[_DECODE] * 256],
    [(2048, 0, 2048), *[(0, 2000, 8)] * 512],
]


@register("gqa_rope_write_cache")
def gqa_rows(quick: bool) -> Iterator[Row]:
    """Prefill rows, with cached tokens before them and with decode rows beside them."""
    for quant in ("block_wise_fp8",) if quick else ("none", "cache_int8", "cache_fp8",
                                                    "block_wise_fp8"):  # fmt: skip
        for rows in STEPS[:1] if quick else STEPS:
            # Each call keeps outputs as large as its inputs.
            calls, moved = compat_steps.gqa_calls(PLACE, quant, rows, lambda n: min(_copies(n), 4))
            us = gpu_timing.median_us(calls)
            shape = f"{quant}, {compat_steps.describe(rows)}"
            yield gpu_timing.row("gqa_rope_write_cache", shape, us, moved)


@register("merge_prefill_decode_output")
def merge_decode_rows(quick: bool) -> Iterator[Row]:
    """The bytes are those of the decode rows, read and written."""
    for rows in MERGED[:1] if quick else MERGED:
        calls, moved = compat_steps.merge_calls(PLACE, rows, lambda n: min(_copies(n), 16))
        us = gpu_timing.steady_us(calls)
        shape = f"bf16, {compat_steps.describe(rows)}"
        yield gpu_timing.row("merge_prefill_decode_output", shape, us, moved)
