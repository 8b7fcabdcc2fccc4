"""Attention calls of decoding, speculative and long rows beside the calls of their parts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from fastattn.bench import gpu_timing
from fastattn.bench.cache_gpu import _gpu
from fastattn.bench.common import Row, register
from fastattn.bench.compat_steps import Place
from fastattn.bench.mixed_steps import Part, attention, describe
from fastattn.bench.prefill_gpu import filled

#: Seeds of a call's keys, values, queries and output, in turn.
_SEEDS = itertools.cycle(range(4))
PLACE = Place(
    array=_gpu,
    bfloat16=lambda shape: filled("bfloat16", next(_SEEDS), *shape),
    codes=lambda shape: filled("e4m3", next(_SEEDS), *shape),
)
#: Cache, and whether the queries are e4m3.
KINDS = (("none", False), ("cache_fp8", True), ("cache_fp8", False))
_DECODE: Part = (32, 4095, 1)
_SPECULATIVE: Part = (16, 8188, 4)
STEPS: list[list[Part]] = [
    [(1, 8192, chunk), *others]
    for chunk in (2048, 512)
    for others in ([_DECODE], [_SPECULATIVE], [_DECODE, _SPECULATIVE])
]


@register("mixed")
def mixed(quick: bool) -> Iterator[Row]:
    """The ratio is what a step gains over one call for each kind of row."""
    for quant, fp8_queries in KINDS[:1] if quick else KINDS:
        for parts in STEPS[:1] if quick else STEPS:
            steps = (parts, *([part] for part in parts))
            calls = [attention(PLACE, quant, fp8_queries, step) for step in steps]
            us, *alone = (gpu_timing.median_us([call] * 3, replays=15) for call in calls)
            queries = "e4m3" if fp8_queries else "bf16"
            shape = f"mixed {quant}, {queries} q, {describe(parts)}"
            yield Row("paged_attention", shape, us, peer="its parts alone", peer_us=sum(alone))
