"""Summaries of key blocks after a step, and the choice of blocks by them, beside attention.

A row of the choice counts the bytes of the summaries, for each sequence and KV head once. A row of
an update counts those of the keys that it reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fastattn.functional as F
from benchmarks.cases.inputs import BF16, CODE, DIM, HEADS, KV, Cache, Step
from benchmarks.core import cuda
from benchmarks.core.devices import Cpu, Device, Gpu
from benchmarks.core.peers import READ
from benchmarks.core.rows import Row, register
from benchmarks.core.timing import Call, bind, medians
from fastattn.reference.block_selection import summary_shape

UPDATE, SELECT = "update_block_summaries", "select_key_blocks"
DENSE = "paged_attention, all keys"
TYPES = {
    "gpu": ("none", "block_wise_int8"),
    "gpu quick": ("block_wise_int8",),
    "cpu": ("none", "block_wise_int8"),
    "cpu quick": ("block_wise_int8",),
}
#: Sequences, keys of each, tokens of a key block, and the summary.
SHAPES = {
    "gpu": [(64, 32768, 16, "mean"), (64, 32768, 64, "mean"), (64, 32768, 64, "minmax")],
    "gpu quick": [(4, 1024, 64, "minmax")],
    "cpu": [(4, 8192, 16, "mean"), (4, 8192, 64, "mean"), (4, 8192, 64, "minmax")],
    "cpu quick": [(2, 512, 64, "minmax")],
}
#: Chosen keys.
CHOSEN = 1024


class _Decode:
    """A decode step over one cache with summaries."""

    def __init__(self, device: Device, quant: str, shape: tuple[int, int, int, str]) -> None:
        self.batch, self.context, self.granularity, self.kind = shape
        self.device = device
        self.step = Step(device, [self.context - 1] * self.batch, [1] * self.batch)
        self.cache = Cache(device, quant, self.step.blocks)
        of = summary_shape(self.cache.blocks, KV, DIM, self.granularity, self.kind)
        self.rows = of[3]
        self.summaries = device.uniform(of, -1.0, 1.0)
        self.q = device.random((self.batch, HEADS, DIM), seed=3)
        self.options: dict[str, Any] = {"granularity": self.granularity, "kind": self.kind}

    @property
    def name(self) -> str:
        shape = f"decode {self.cache.quant} B {self.batch} ctx {self.context}"
        return f"{shape} H {HEADS}/{KV} D {DIM}, {self.kind} of {self.granularity}"

    def update(self) -> Call:
        """Make a call after the step's write."""
        rest = (*self.cache.tensors, *self.step.meta)
        options = {**self.options, **self.cache.options}
        return bind(F.update_block_summaries, self.summaries, *rest, **options)

    def select(self) -> Call:
        """Make a call that chooses for every query."""
        k = max(min(CHOSEN, self.context // 2) // self.granularity, 1)
        rest = (self.summaries, *self.step.meta, k)
        return bind(F.select_key_blocks, self.q, *rest, **self.options)

    def dense(self) -> Call:
        """Make a call of attention over all keys."""
        lengths = {"max_seqlen_q": 1, "max_seqlen_k": self.context}
        rest = (*self.cache.tensors, *self.step.meta)
        return bind(F.paged_attention, self.q, *rest, **self.cache.options, **lengths)

    def read_by_update(self) -> int:
        """Bytes of keys: the step's token ends a key block, whose keys are all there."""
        keys = self.batch * KV * min(self.granularity, 64)
        return keys * DIM * (BF16 if self.cache.quant == "none" else CODE)

    def read_by_select(self) -> int:
        """Bytes of summaries."""
        blocks = self.context // self.granularity
        return self.batch * KV * blocks * self.rows * DIM * 4


def _on_gpu(device: Gpu, op: str, decode: _Decode, call: Call, moved: int) -> Iterator[Row]:
    us, read_us = device.us([call]), moved / cuda.read_bandwidth() / 1e3
    row = Row(op, decode.name, us, moved / us / 1e3, "GB/s", READ, read_us)
    yield row
    yield row.beside(DENSE, device.us([decode.dense()]))


def _on_cpu(device: Cpu, op: str, decode: _Decode, call: Call, moved: int) -> Row:
    us, dense_us = medians([call, decode.dense()], 3 if device.quick else 9)
    return Row(op, decode.name, us, moved / us / 1e3, "GB/s", DENSE, dense_us)


@register(UPDATE, "gpu")
def update(device: Gpu) -> Iterator[Row]:
    """After a decode step."""
    for quant in device.of(TYPES):
        for shape in device.of(SHAPES):
            decode = _Decode(device, quant, shape)
            yield from _on_gpu(device, UPDATE, decode, decode.update(), decode.read_by_update())


@register(SELECT, "gpu")
def select(device: Gpu) -> Iterator[Row]:
    """For a decode step; the cache's type does not matter."""
    for shape in device.of(SHAPES):
        decode = _Decode(device, device.of(TYPES)[0], shape)
        yield from _on_gpu(device, SELECT, decode, decode.select(), decode.read_by_select())


@register(UPDATE, "cpu")
def update_cpu(device: Cpu) -> Iterator[Row]:
    """After a decode step."""
    for quant in device.of(TYPES):
        for shape in device.of(SHAPES):
            decode = _Decode(device, quant, shape)
            yield _on_cpu(device, UPDATE, decode, decode.update(), decode.read_by_update())


@register(SELECT, "cpu")
def select_cpu(device: Cpu) -> Iterator[Row]:
    """For a decode step; the cache's type does not matter."""
    for shape in device.of(SHAPES):
        decode = _Decode(device, device.of(TYPES)[0], shape)
        yield _on_cpu(device, SELECT, decode, decode.select(), decode.read_by_select())
