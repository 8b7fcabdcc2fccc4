"""FastDeploy's two operators on the CPU, against a copy of as many bytes in the same run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import paddle

from fastattn.bench import compat_steps
from fastattn.bench.common import Row, register
from fastattn.bench.compat_steps import Place, RowOfStep
from fastattn.bench.operators_cpu import _bfloat16, _row

PLACE = Place(
    array=paddle.to_tensor,
    bfloat16=lambda shape: _bfloat16(np.random.default_rng(2), shape),
    codes=lambda shape: paddle.to_tensor(
        np.random.default_rng(3).integers(0, 126, shape, dtype=np.uint8)
    ),
)


def _steps(quick: bool) -> list[list[RowOfStep]]:
    new = 128 if quick else 512
    decode: RowOfStep = (0, 300, 1)
    return [[(new, 0, new)], [(new, 3 * new, new)], [(new, 0, new), *[decode] * 16]]


@register("gqa_rope_write_cache")
def gqa(quick: bool) -> Iterator[Row]:
    """Prefill rows, with cached tokens before them and with decode rows beside them."""
    for quant in ("none", "cache_int8", "cache_fp8", "block_wise_fp8"):
        for rows in _steps(quick):
            calls, moved = compat_steps.gqa_calls(PLACE, quant, rows, lambda _: 1)
            shape = f"{quant}, {compat_steps.describe(rows)}"
            yield _row("gqa_rope_write_cache", shape, calls[0], moved, quick)


@register("merge_prefill_decode_output")
def merge_decode(quick: bool) -> Iterator[Row]:
    """The bytes are those of the decode rows, read and written."""
    rows: list[RowOfStep] = [(512, 0, 512), *[(0, 300, 1 if quick else 8)] * 64]
    calls, moved = compat_steps.merge_calls(PLACE, rows, lambda _: 1)
    shape = f"bf16, {compat_steps.describe(rows)}"
    yield _row("merge_prefill_decode_output", shape, calls[0], moved, quick)
