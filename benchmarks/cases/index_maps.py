"""Index maps between a top-k and sparse attention, beside a copy of as many bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

import fastattn.functional as F
from benchmarks.core.devices import Device
from benchmarks.core.rows import Row, register
from benchmarks.core.timing import bind
from fastattn.backends.indexer import TILE

PAGE, WINDOW, BATCH, TOKENS = 64, 128, 16, 65536
#: Rows, columns of a top-k.
_SHAPES = {
    "cpu": [(64, 2048)],
    "cpu quick": [(8, 512)],
    "gpu": [(1, 2048), (64, 2048), (4096, 2048), (4096, 512)],
    "gpu quick": [(64, 2048)],
}


def _chosen(rows: int, k: int) -> Any:
    """Ascending tokens of a sequence, as a top-k gives them."""
    rng = np.random.default_rng(9)
    few = np.stack([np.sort(rng.integers(0, TOKENS, k)) for _ in range(min(rows, 64))])
    return np.resize(few, (rows, k))


def _tables() -> Any:
    blocks = TOKENS // PAGE
    return np.random.default_rng(10).permutation(BATCH * blocks).reshape(BATCH, blocks)


def _row(device: Device, op: str, shape: str, moved: int, *arguments: Any, **options: Any) -> Row:
    """A row of a map; each of its calls has int32 tensors of the arrays of its own."""
    calls = []
    for _ in range(device.copies(moved)):
        own = [device.int32(a) if isinstance(a, np.ndarray) else a for a in arguments]
        calls.append(bind(getattr(F, op), *own, **options))
    return device.memory_row(op, shape, calls, moved)


@register("topk_to_slots")
def slots(device: Device) -> Iterator[Row]:
    """Rows of a top-k over 64k tokens a sequence, of 16 sequences."""
    for rows, k in device.of(_SHAPES):
        tables, seqs = device.int32(_tables()), device.int32(np.arange(rows) % BATCH)
        indices = _chosen(rows, k)
        yield _row(
            device,
            "topk_to_slots",
            f"{rows} rows, k {k}",
            2 * rows * k * 4,
            indices,
            tables,
            seqs,
        )


#: Sequences, new tokens of each, behind 64k - 1 cached ones.
_STEPS = {
    "cpu": [(16, 1), (1, 512)],
    "cpu quick": [(4, 1)],
    "gpu": [(1, 1), (16, 1), (128, 1), (1, 4096)],
    "gpu quick": [(16, 1)],
}


def _step(device: Device, seqs: int, new: int) -> dict[str, Any]:
    """Sequences of a step's tokens, their positions, tables, starts and cached lengths."""
    blocks = -(-(TOKENS + new) // PAGE)
    tables = np.random.default_rng(10).permutation(seqs * blocks).reshape(seqs, blocks)
    arrays = {
        "batch_ids": np.repeat(np.arange(seqs), new),
        "positions": np.tile(TOKENS - 1 + np.arange(new), seqs),
        "block_tables": tables,
        "cu_seqlens_q": np.arange(seqs + 1) * new,
        "seq_lens_decoder": np.full(seqs, TOKENS - 1),
    }
    return {name: device.int32(array) for name, array in arrays.items()}


@register("token_maps")
def tokens(device: Device) -> Iterator[Row]:
    """Of decode steps and a chunk; only the tokens' own bytes count."""
    for seqs, new in device.of(_STEPS):
        step, count = _step(device, seqs, new), seqs * new
        del step["positions"]
        call = bind(F.token_maps, **step, num_tokens=count)
        yield device.memory_row("token_maps", f"{seqs} x {new}", [call], 16 * count)


@register("query_rows")
def rows_of_queries(device: Device) -> Iterator[Row]:
    """Of the same steps; tables in and out count."""
    for seqs, new in device.of(_STEPS):
        step, tile = _step(device, seqs, new), 1 if new == 1 else TILE
        del step["seq_lens_decoder"]
        rows = seqs if new == 1 else seqs * new // tile + seqs
        moved = 4 * (2 * rows * step["block_tables"].shape[1] + 6 * seqs * new)
        call = bind(F.query_rows, **step, tile=tile)
        yield device.memory_row("query_rows", f"{seqs} x {new}", [call], moved)


@register("compact_block_tables")
def compact_tables(device: Device) -> Iterator[Row]:
    """Of the same steps, every other block there; tables in and out and the masks count."""
    for seqs, new in device.of(_STEPS):
        step, masks = _step(device, seqs, new), new > 1
        tables = step["block_tables"]
        blocks, count = math.prod(tables.shape), seqs * new
        call = bind(
            F.compact_block_tables,
            device.int32(np.where(np.arange(tables.shape[1]) % 2, -1, tables.numpy())),
            step["cu_seqlens_q"],
            step["seq_lens_decoder"],
            device.int32(np.full(seqs, new)),
            num_tokens=count,
            num_blocks=blocks,
            want_masks=masks,
        )
        moved = 4 * (2 * blocks + 2 * count * masks)
        yield device.memory_row("compact_block_tables", f"{seqs} x {new}", [call], moved)


@register("window_indices")
def windows(device: Device) -> Iterator[Row]:
    """Windows of 128 tokens as slots; only the results count."""
    for rows, k in device.of(_SHAPES):
        if k < 2048 and not device.quick:
            continue
        positions = device.int32(np.arange(rows) + 200)
        seqs = device.int32(np.arange(rows) % BATCH)
        yield _row(
            device,
            "window_indices",
            f"{rows} rows",
            rows * WINDOW * 4,
            positions,
            seqs,
            block_tables=device.int32(_tables()),
        )


@register("short_context_indices")
def short_contexts(device: Device) -> Iterator[Row]:
    """All entries of contexts of up to 4 k tokens; only the results count."""
    for rows, k in device.of(_SHAPES):
        positions = device.int32(np.linspace(0, 4 * k - 1, rows))
        yield _row(
            device,
            "short_context_indices",
            f"{rows} rows, k {k}",
            rows * k * 4,
            positions,
            k,
            compress_ratio=4,
        )


@register("combine_topk_window")
def combined(device: Device) -> Iterator[Row]:
    """A top-k and a window of 128 tokens in one list."""
    for rows, k in device.of(_SHAPES):
        topk = _chosen(rows, k)
        window = np.broadcast_to(np.arange(WINDOW), (rows, WINDOW))
        seqs = device.int32(np.arange(rows) % BATCH)
        yield _row(
            device,
            "combine_topk_window",
            f"{rows} rows, k {k}",
            2 * rows * (k + WINDOW) * 4,
            topk,
            window,
            seqs,
            seq_stride=2 * TOKENS,
            window_offset=TOKENS,
        )
