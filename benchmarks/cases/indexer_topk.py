"""The indexer's choice of keys in one call, beside its logits and their top-k in turn.

64 heads of 128 channels, 2048 keys a query; FP8. In turn there is a matrix of all logits: 2 GiB for
4096 queries over 128k keys.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

import fastattn.functional as F
from benchmarks.cases.indexer_shapes import (
    DIM,
    HEADS,
    PAGE,
    TOPK_CHUNKS,
    TOPK_STEPS,
    selected,
)
from benchmarks.core.devices import Device, Gpu
from benchmarks.core.peers import peers
from benchmarks.core.rows import Row, register
from benchmarks.core.timing import Call, bind, medians

IN_TURN = "logits, then top-k"
OTHERS = "DeepGEMM, then vLLM's top-k"


def _row(device: Device, op: str, shape: str, call: Call, in_turn: Call) -> Row:
    if isinstance(device, Gpu):
        us, turn_us = device.us([call]), device.us([in_turn])
    else:
        us, turn_us = medians([call, in_turn], 3 if device.quick else 9)
    return Row(op, shape, us, peer=IN_TURN, peer_us=turn_us)


def _beside(row: Row, name: str, rows: int, keys: int, k: int, **shape: int) -> Iterator[Row]:
    """The row, and beside it the sum of DeepGEMM's logits and of vLLM's fastest top-k."""
    yield row
    logits = [other["us"] for other in peers("logits", peer=name, **shape)]
    selections = [
        other["us"]
        for other in peers("topk", rows=rows, columns=keys, k=k)
        if other["peer"].startswith("vllm")
    ]
    if logits and selections:
        yield row.beside(OTHERS, logits[0] + min(selections))


def _heads(device: Device) -> int:
    return HEADS if device.kind == "gpu" else 8


def _in_turn(logits: Call, select: Call) -> Call:
    def call() -> None:
        logits()
        select()

    return call


@register("indexer_topk")
def chunks(device: Device) -> Iterator[Row]:
    """Chunks of a prompt, whose queries see all keys up to their own."""
    for tokens, thousands in device.of(TOPK_CHUNKS):
        keys, heads = thousands * 1024, _heads(device)
        k = selected(keys)
        ends = device.int32(np.arange(keys - tokens + 1, keys + 1))
        inputs = (
            device.random((tokens, heads, DIM), "e4m3"),
            device.random((keys, DIM), "e4m3", seed=1),
            device.uniform((tokens, heads)),
            device.int32(np.zeros(tokens)),
            ends,
        )
        scales = device.uniform((keys,))
        logits, out = device.empty((tokens, keys), "float32"), device.empty((tokens, k), "int32")
        in_turn = _in_turn(
            bind(F.mqa_logits, *inputs, k_scales=scales, out=logits),
            bind(F.topk_indices, logits, ends, k, out=out),
        )
        call = bind(F.indexer_topk, *inputs, k, k_scales=scales, out=out)
        shape = f"{tokens} tokens, {thousands}k keys, k {k}"
        row = _row(device, "indexer_topk", shape, call, in_turn)
        yield from _beside(row, f"mqa_logits q{tokens}", tokens, keys, k, s=tokens, kv=keys)
        del call, in_turn, logits


@register("paged_indexer_topk")
def steps(device: Device) -> Iterator[Row]:
    """Decode steps over pages of 64 tokens."""
    for batch, thousands, next_n in device.of(TOPK_STEPS):
        keys, heads, rows = thousands * 1024, _heads(device), batch * next_n
        k, pages = selected(keys), batch * keys // PAGE
        table = np.random.default_rng(0).permutation(pages).reshape(batch, -1)
        lengths = device.int32(keys - next_n + 1 + np.tile(np.arange(next_n), batch))
        inputs = (
            device.random((batch, next_n, heads, DIM), "e4m3"),
            device.random((pages, PAGE, DIM + 4), "e4m3", seed=1),
            device.uniform((rows, heads)),
            device.int32(np.full(batch, keys)),
            device.int32(table),
            keys,
        )
        logits, out = device.empty((rows, keys), "float32"), device.empty((rows, k), "int32")
        in_turn = _in_turn(
            bind(F.paged_mqa_logits, *inputs, out=logits),
            bind(F.topk_indices, logits, lengths, k, out=out),
        )
        call = bind(F.paged_indexer_topk, *inputs, k, out=out)
        shape = f"batch {batch}, {thousands}k keys, {next_n} queries, k {k}"
        row = _row(device, "paged_indexer_topk", shape, call, in_turn)
        name, fields = f"paged_mqa_logits q{next_n}", {"b": batch, "ctx": keys, "next_n": next_n}
        yield from _beside(row, name, rows, keys, k, **fields)
