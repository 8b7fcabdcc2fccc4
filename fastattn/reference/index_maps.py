"""NumPy model of the index maps between a top-k and sparse attention."""

from __future__ import annotations

import numpy as np

from fastattn.reference.numerics import Array

INT32_MAX = 2**31 - 1


def _rows(rows: list[list[int]], width: int) -> tuple[Array, Array]:
    """Rows padded with -1, and for each row one more than the column of its last index."""
    out = np.full((len(rows), width), -1, np.int32)
    lengths = np.zeros(len(rows), np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
        lengths[i] = max((j + 1 for j, index in enumerate(row) if index >= 0), default=0)
    return out, lengths


def _or_none(index: int) -> int:
    return index if 0 <= index <= INT32_MAX else -1


def _slot(
    table: list[int], token: int, block_size: int, stride: int, num_blocks: int | None
) -> int:
    """Slot of a token; -1 if the table has no block for it."""
    index, row = divmod(token, block_size)
    if index >= len(table) or table[index] < 0:
        return -1
    if num_blocks is not None and table[index] >= num_blocks:
        return -1
    return _or_none(table[index] * stride + row)


def _ids(batch_ids: Array | None, rows: int) -> list[int]:
    return list(range(rows)) if batch_ids is None else np.asarray(batch_ids).tolist()


def topk_to_slots(
    indices: Array,
    block_tables: Array,
    batch_ids: Array | None = None,
    *,
    row_ids: Array | None = None,
    block_size: int = 64,
    block_stride: int | None = None,
    num_blocks: int | None = None,
    compact: bool = True,
    rank: int = 0,
    world_size: int = 1,
    interleave: int = 1,
) -> tuple[Array, Array]:
    """See :func:`fastattn.functional.topk_to_slots`."""
    indices = np.asarray(indices)
    if row_ids is not None:
        ids = np.asarray(row_ids).astype(np.int64)
        known = (ids >= 0) & (ids < len(indices))
        chosen = np.full((len(ids), indices.shape[1]), -1, np.int32)
        chosen[known] = indices[ids[known]]
        indices = chosen
    tables = np.asarray(block_tables).tolist()
    stride = block_size if block_stride is None else block_stride
    rows = []
    for seq, tokens in zip(_ids(batch_ids, len(indices)), indices.tolist()):
        row = []
        for token in tokens:
            owner = token // interleave % world_size
            if token < 0 or not 0 <= seq < len(tables) or owner != rank:
                row.append(-1)
                continue
            local = token // (interleave * world_size) * interleave + token % interleave
            row.append(_slot(tables[seq], local, block_size, stride, num_blocks))
        rows.append([slot for slot in row if slot >= 0] if compact else row)
    return _rows(rows, indices.shape[1])


def window_indices(
    positions: Array,
    batch_ids: Array | None = None,
    *,
    window: int = 128,
    block_tables: Array | None = None,
    starts: Array | None = None,
    block_size: int = 64,
    num_blocks: int | None = None,
) -> tuple[Array, Array]:
    """See :func:`fastattn.functional.window_indices`."""
    positions = np.asarray(positions).tolist()
    tables = None if block_tables is None else np.asarray(block_tables).tolist()
    firsts = None if starts is None else np.asarray(starts).tolist()
    rows: list[list[int]] = []
    for seq, position in zip(_ids(batch_ids, len(positions)), positions):
        known = [len(x) for x in (tables, firsts) if x is not None]
        if not 0 <= position <= INT32_MAX or seq < 0 or any(seq >= n for n in known):
            rows.append([])
            continue
        tokens = range(max(position - window + 1, 0), position + 1)
        if tables is None:
            first = 0 if firsts is None else firsts[seq]
            rows.append([_or_none(token - first) for token in tokens])
        else:
            rows.append([_slot(tables[seq], t, block_size, block_size, num_blocks) for t in tokens])
    return _rows(rows, window)


def short_context_indices(
    positions: Array, k: int, batch_ids: Array | None = None, *, compress_ratio: int = 1
) -> tuple[Array, Array]:
    """See :func:`fastattn.functional.short_context_indices`."""
    positions = np.asarray(positions).tolist()
    rows: list[list[int]] = []
    for seq, position in zip(_ids(batch_ids, len(positions)), positions):
        real = 0 <= position <= INT32_MAX and seq >= 0
        rows.append(list(range(min((position + 1) // compress_ratio, k))) if real else [])
    return _rows(rows, k)


def combine_topk_window(
    topk: Array,
    window: Array,
    batch_ids: Array | None = None,
    *,
    topk_lengths: Array | None = None,
    window_lengths: Array | None = None,
    seq_stride: int = 0,
    window_offset: int = 0,
    multiple: int = 128,
) -> tuple[Array, Array]:
    """See :func:`fastattn.functional.combine_topk_window`."""
    topk, window = np.asarray(topk), np.asarray(window)
    ids = [0] * len(topk) if batch_ids is None else np.asarray(batch_ids).tolist()
    rows = []
    for i, seq in enumerate(ids):
        row: list[int] = []
        for part, lengths, offset in (
            (topk[i].tolist(), topk_lengths, 0),
            (window[i].tolist(), window_lengths, window_offset),
        ):
            length = len(part) if lengths is None else max(int(lengths[i]), 0)
            row += [seq * seq_stride + offset + index for index in part[:length] if index >= 0]
        real = 0 <= seq <= INT32_MAX
        rows.append([index for index in row if 0 <= index <= INT32_MAX] if real else [])
    columns = topk.shape[1] + window.shape[1]
    return _rows(rows, -(-columns // multiple) * multiple)
