"""NumPy model of :func:`fastattn.functional.compact_block_tables`."""

from __future__ import annotations

import numpy as np

from fastattn.reference.numerics import Array


def compact_block_tables(
    block_tables: Array,
    cu_seqlens_q: Array,
    seq_lens_decoder: Array,
    seq_lens_this_time: Array,
    *,
    num_tokens: int,
    num_blocks: int,
    block_size: int = 64,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    mask_offsets: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Compacted tables; see :func:`fastattn.functional.compact_block_tables`.

    Returns
    -------
    tables : array of int32, shape [B, max_blocks]
    seq_lens : array of int32, shape [B]
    masks : array of int32, shape [num_tokens, 2]
    """
    block_tables = np.asarray(block_tables)
    batch = min(len(seq_lens_this_time), len(block_tables))
    tables = np.full((batch, block_tables.shape[1]), -1, np.int32)
    seq_lens = np.zeros(batch, np.int32)
    masks = np.zeros((num_tokens, 2), np.int32)
    left, right = window_size
    for b in range(batch):
        begin = int(np.clip(cu_seqlens_q[b], 0, num_tokens))
        end = int(np.clip(cu_seqlens_q[b + 1], begin, num_tokens))
        new = int(np.clip(seq_lens_this_time[b], 0, end - begin))
        cached = max(int(seq_lens_decoder[b]), 0)
        # One entry per key, up to the table's end: whether its block is assigned.
        there = (block_tables[b] >= 0) & (block_tables[b] < num_blocks)
        mine = np.repeat(there, block_size)[: cached + new]
        first = 0 if left < 0 else min(max(cached - left, 0) // block_size, len(there))
        mine[: first * block_size] = False
        used = first + np.flatnonzero(there[first : -(-len(mine) // block_size)])
        tables[b, : len(used)] = block_tables[b, used]
        seq_lens[b] = max(int(mine.sum()) - new, 0)
        local = np.concatenate([[0], np.cumsum(mine)])  # number of local keys before each position
        for i in range(new):
            position, t = cached + i, begin + i
            see = [0, len(mine)]
            if causal:
                see[1] = min(see[1], position + 1)
            if right >= 0:
                see[1] = min(see[1], position + right + 1)
            if left >= 0:
                see[0] = max(see[0], position - left)
            if mask_offsets is not None:
                see = [max(see[0], mask_offsets[t][0]), min(see[1], mask_offsets[t][1])]
            start = int(np.clip(see[0], 0, len(mine)))
            masks[t] = local[start], local[int(np.clip(see[1], start, len(mine)))]
    return tables, seq_lens, masks
