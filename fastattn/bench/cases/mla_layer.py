"""What surrounds the attention of a DeepSeek-V4 layer, beside a copy of as many bytes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

import fastattn.functional as F
from fastattn.bench.core.devices import Device
from fastattn.bench.core.rows import Row, register
from fastattn.bench.core.timing import bind

HEAD, ROPE = 512, 64
#: Positions of the table of cosines and sines.
POSITIONS = 32768
#: Tokens and heads of a rank: V4-Flash and V4-Pro at TP8, Flash whole.
_HEADS = {
    "cpu": [(128, 8)],
    "cpu quick": [(16, 8)],
    "gpu": [(tokens, heads) for heads in (8, 16, 64) for tokens in (1, 128, 1024, 4096, 16384)],
    "gpu quick": [(128, 8), (4096, 8), (4096, 64)],
}


@register("inverse_rope_quantize_fp8")
def outputs(device: Device) -> Iterator[Row]:
    """The attention's output, 8 heads a group."""
    rng = np.random.default_rng(9)
    table = device.uniform((POSITIONS, ROPE), -1, 1)
    for tokens, heads in device.of(_HEADS):
        # bf16 in, codes and 4 scales out; a token's angles and position.
        moved = tokens * (heads * (3 * HEAD + 16) + 4 * ROPE + 8)
        positions = device.array(rng.integers(0, POSITIONS, tokens))
        calls = []
        for _ in range(device.copies(moved)):
            x = device.random((tokens, heads, HEAD))
            options = {"num_groups": heads // 8}
            calls.append(bind(F.inverse_rope_quantize_fp8, x, positions, table, **options))
        yield device.memory_row("inverse_rope_quantize_fp8", f"T {tokens}, H {heads}", calls, moved)
