"""Attention calls that could be several: mixed steps, and sequences behind one prefix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

import fastattn.functional as F
from benchmarks.cases.inputs import DIM, HEADS, KV, Cache, Step, paged_calls
from benchmarks.core.devices import Cpu, Device, Gpu
from benchmarks.core.rows import Row, register
from benchmarks.core.timing import Call, bind, medians
from fastattn.reference.layout import BLOCK_SIZE

#: Sequences, the cached tokens of each, the new tokens of each.
Part = tuple[int, int, int]

#: Cache, and type of the queries.
KINDS = {
    "gpu": (("none", "bfloat16"), ("cache_fp8", "e4m3"), ("cache_fp8", "bfloat16")),
    "gpu quick": (("none", "bfloat16"),),
}
_DECODE: Part = (32, 4095, 1)
_SPECULATIVE: Part = (16, 8188, 4)
_STEPS: list[list[Part]] = [
    [(1, 8192, chunk), *others]
    for chunk in (2048, 512)
    for others in ([_DECODE], [_SPECULATIVE], [_DECODE, _SPECULATIVE])
]
STEPS = {"gpu": _STEPS, "gpu quick": _STEPS[:1]}
#: Sequences, tokens of their prefix, tokens of their own.
_CASCADES = {"cpu": [(16, 2048, 128)], "cpu quick": [(4, 512, 64)]}


def describe(parts: Sequence[Part]) -> str:
    """Name of a step, for a table."""
    texts = (f"{seqs} x {new} behind {cached}" for seqs, cached, new in parts)
    return f"{' + '.join(texts)}, H {HEADS}/{KV} D {DIM}"


def attention(device: Device, quant: str, queries: str, parts: Sequence[Part]) -> Call:
    """One call of paged_attention for the sequences of all parts."""
    counts = [part[0] for part in parts]
    cached, new = (np.repeat([part[i] for part in parts], counts) for i in (1, 2))
    return paged_calls(device, quant, Step(device, cached, new), queries=queries)[0]


@register("mixed", "gpu")
def mixed(device: Gpu) -> Iterator[Row]:
    """The ratio is what a step gains over one call for each kind of sequence."""
    for quant, queries in device.of(KINDS):
        for parts in device.of(STEPS):
            steps = (parts, *([part] for part in parts))
            calls = [attention(device, quant, queries, step) for step in steps]
            us, *alone = (device.us([call] * 3) for call in calls)
            q = "bf16" if queries == "bfloat16" else queries
            shape = f"mixed {quant}, {q} q, {describe(parts)}"
            yield Row("paged_attention", shape, us, peer="its parts alone", peer_us=sum(alone))


@register("cascade_attention", "cpu")
def cascade(device: Cpu) -> Iterator[Row]:
    """Sequences that decode behind one prefix, beside `paged_attention` of all their tokens."""
    for seqs, prefix, own in device.of(_CASCADES):
        shared, private = prefix // BLOCK_SIZE, own // BLOCK_SIZE
        of_prefix = np.tile(np.arange(shared), (seqs, 1))
        tables = np.concatenate(
            [of_prefix, shared + np.arange(seqs * private).reshape(seqs, private)], axis=1
        )
        cache = Cache(device, "cache_fp8", shared + seqs * private)
        decoder, new = np.full(seqs, prefix + own - 1), np.ones(seqs, np.int64)
        plan = F.plan_cascade(tables, decoder, new, prefix)
        query = device.random((seqs, HEADS, DIM))
        starts, this_time = device.int32(np.arange(seqs + 1)), device.int32(new)
        lengths = (device.int32(tables), starts, device.int32(decoder), this_time)
        tensors, longest = (query, *cache.tensors), (1, prefix + own)
        calls: list[Call] = [
            bind(F.cascade_attention, *tensors, plan, starts, this_time, *longest, **cache.options),
            bind(F.paged_attention, *tensors, *lengths, *longest, **cache.options),
        ]
        us, whole_us = medians(calls, 3 if device.quick else 9)
        shape = f"{seqs} x 1 behind {prefix} shared, {own} of their own, H 32/8 D 128, cache_fp8"
        row = Row("cascade_attention", shape, us, seqs / us * 1e3, "tokens/ms")
        yield row.beside("paged_attention", whole_us)
