"""What surrounds the attention of a DeepSeek-V4 layer, beside a copy of as many bytes and vLLM.

vLLM's writer pads queries to 64 heads for FlashMLA.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

import fastattn.functional as F
from benchmarks.cases.sparse_models import QKV_HEADS, QKV_TOKENS
from benchmarks.core.devices import Device
from benchmarks.core.peers import peers
from benchmarks.core.rows import Row, register
from benchmarks.core.timing import bind

HEAD, ROPE = 512, 64
PAGE, KEY_BYTES = 64, 584
#: Positions of the table of cosines and sines.
POSITIONS = 32768
#: Tokens and heads of a rank: V4-Flash and V4-Pro at TP8, Flash whole.
_HEADS = {
    "cpu": [(128, 8)],
    "cpu quick": [(16, 8)],
    "gpu": [(tokens, heads) for heads in QKV_HEADS for tokens in QKV_TOKENS],
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
        yield device.small_row("inverse_rope_quantize_fp8", f"T {tokens}, H {heads}", calls, moved)


@register("mla_qkv_norm_rope_write")
def queries_and_keys(device: Device) -> Iterator[Row]:
    """Queries into a tensor of their own, keys into pages that lie anywhere."""
    rng = np.random.default_rng(10)
    table = device.uniform((POSITIONS, ROPE), -1, 1)
    for tokens, heads in device.of(_HEADS):
        # Queries in and out, a key and its row; a token's angles, position and slot.
        moved = tokens * (heads * 4 * HEAD + 2 * HEAD + KEY_BYTES + 4 * ROPE + 16)
        pages = rng.permutation(-(-tokens // PAGE))
        slots = device.array((pages[:, None] * PAGE + np.arange(PAGE)).ravel()[:tokens])
        positions = device.array(rng.integers(0, POSITIONS, tokens))
        calls = []
        for _ in range(device.copies(moved)):
            inputs = device.random((tokens, heads, HEAD)), device.random((tokens, HEAD))
            cache = device.random((len(pages), PAGE, KEY_BYTES), "e4m3")
            out = device.empty((tokens, heads, HEAD), "bfloat16")
            rest = cache, slots, positions, table
            calls.append(bind(F.mla_qkv_norm_rope_write, *inputs, *rest, out=out))
        op = "mla_qkv_norm_rope_write"
        row = device.small_row(op, f"T {tokens}, H {heads}", calls, moved)
        yield row
        if device.kind == "gpu":
            for other in peers("mla_writers", op=op, heads=heads, tokens=tokens):
                yield row.beside(other["peer"], other["us"])
