"""Attention of chosen keys in a decode step, beside reading them once and beside all keys.

A row counts the bytes of the chosen keys: K, V and scales, for each query and KV head once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastattn.functional as F
from benchmarks.cases.inputs import DIM, HEADS, KV, Cache, Step, token_bytes
from benchmarks.core import cuda
from benchmarks.core.devices import Cpu, Device, Gpu
from benchmarks.core.peers import READ
from benchmarks.core.rows import Row, register
from benchmarks.core.timing import Call, bind, medians

OP = "sparse_paged_attention"
DENSE = "paged_attention, all keys"
TYPES = {
    "gpu": ("none", "cache_fp8", "block_wise_int4"),
    "gpu quick": ("cache_fp8",),
    "cpu": ("none", "cache_fp8", "block_wise_int4"),
    "cpu quick": ("cache_fp8",),
}
#: Sequences, keys of each, chosen keys, and tokens of an entry.
SHAPES = {
    "gpu": [(16, 32768, 2048, 64), (64, 32768, 2048, 64), (64, 32768, 2048, 1)],
    "gpu quick": [(4, 1024, 256, 64)],
    "cpu": [(4, 8192, 1024, 64), (4, 8192, 1024, 1)],
    "cpu quick": [(2, 512, 128, 64)],
}


def _lists(batch: int, context: int, chosen: int, granularity: int, seed: int) -> NDArray[Any]:
    """Distinct entries for each sequence and KV head, in ascending order."""
    rng = np.random.default_rng(seed)
    entries = context // granularity
    first = rng.permutation(entries)[: chosen // granularity]
    moved = (first + rng.integers(0, entries, (batch, KV, 1))) % entries
    return np.sort(moved, axis=-1).astype(np.int32)


class _Decode:
    """A decode step over one cache."""

    def __init__(self, device: Device, quant: str, batch: int, context: int) -> None:
        self.device, self.batch, self.context = device, batch, context
        self.step = Step(device, [context - 1] * batch, [1] * batch)
        self.cache = Cache(device, quant, self.step.blocks)

    def dense(self) -> Call:
        """Make a call over all keys."""
        return bind(F.paged_attention, *self._common(), **self._options())

    def sparse(self, chosen: int, granularity: int, seed: int = 0) -> Call:
        """Make a call over keys that `seed` chooses."""
        lists = self.device.int32(_lists(self.batch, self.context, chosen, granularity, seed))
        options = {**self._options(), "granularity": granularity}
        return bind(F.sparse_paged_attention, *self._common(), selected=lists, **options)

    def _common(self) -> tuple[Any, ...]:
        q = self.device.random((self.batch, HEADS, DIM), seed=3)
        return q, *self.cache.tensors, *self.step.meta

    def _options(self) -> dict[str, Any]:
        out = self.device.empty((self.batch, HEADS, DIM), "bfloat16")
        lengths = {"max_seqlen_q": 1, "max_seqlen_k": self.context}
        return {**self.cache.options, **lengths, "out": out}


def _name(quant: str, batch: int, context: int, chosen: int, granularity: int) -> str:
    blocks = "single tokens" if granularity == 1 else f"blocks of {granularity}"
    shape = f"decode {quant} B {batch} ctx {context} H {HEADS}/{KV} D {DIM}"
    return f"{shape}, {chosen} keys in {blocks}"


@register(OP, "gpu")
def sparse(device: Gpu) -> Iterator[Row]:
    """Decode steps, each call with other keys."""
    for quant in device.of(TYPES):
        for batch, context, chosen, granularity in device.of(SHAPES):
            decode = _Decode(device, quant, batch, context)
            moved = batch * chosen * token_bytes(quant)
            calls = [
                decode.sparse(chosen, granularity, seed) for seed in range(device.copies(moved, 16))
            ]
            us, read_us = device.us(calls), moved / cuda.read_bandwidth() / 1e3
            name = _name(quant, batch, context, chosen, granularity)
            row = Row(OP, name, us, moved / us / 1e3, "GB/s", READ, read_us)
            yield row
            yield row.beside(DENSE, device.us([decode.dense()]))


@register(OP, "cpu")
def sparse_cpu(device: Cpu) -> Iterator[Row]:
    """The same beside attention of all keys."""
    for quant in device.of(TYPES):
        for batch, context, chosen, granularity in device.of(SHAPES):
            decode = _Decode(device, quant, batch, context)
            calls = [decode.sparse(chosen, granularity), decode.dense()]
            us, dense_us = medians(calls, 3 if device.quick else 9)
            moved = batch * chosen * token_bytes(quant)
            name = _name(quant, batch, context, chosen, granularity)
            yield Row(OP, name, us, moved / us / 1e3, "GB/s", DENSE, dense_us)
