"""NumPy model of the maps of a step of latent attention."""

from __future__ import annotations

import numpy as np

from fastattn.reference.index_maps import INT32_MAX, _or_none, _slot
from fastattn.reference.numerics import Array


def token_maps(
    batch_ids: Array,
    block_tables: Array,
    cu_seqlens_q: Array,
    seq_lens_decoder: Array,
    position_ids: Array | None = None,
    *,
    num_tokens: int,
    block_size: int = 64,
    num_blocks: int | None = None,
) -> tuple[Array, Array, Array]:
    """See :func:`fastattn.functional.token_maps`."""
    ids = np.asarray(batch_ids).reshape(-1)[:num_tokens].tolist()
    tables = np.asarray(block_tables).tolist()
    starts = np.asarray(cu_seqlens_q).tolist()
    cached = np.asarray(seq_lens_decoder).reshape(-1).tolist()
    given = None if position_ids is None else np.asarray(position_ids).reshape(-1).tolist()
    seqs, positions, slots = np.full((3, num_tokens), -1, np.int32)
    for token, seq in enumerate(ids):
        if not 0 <= seq < len(starts) - 1:
            continue
        seqs[token] = seq
        at = cached[seq] + token - starts[seq] if given is None else given[token]
        positions[token] = _or_none(at)
        if positions[token] >= 0 and seq < len(tables):
            slots[token] = _slot(tables[seq], at, block_size, block_size, num_blocks)
    return seqs, positions, slots


def query_rows(
    batch_ids: Array,
    positions: Array,
    block_tables: Array,
    cu_seqlens_q: Array,
    *,
    tile: int = 1,
) -> tuple[Array, Array, Array, Array]:
    """See :func:`fastattn.functional.query_rows`; `cu_seqlens_q` must ascend from 0."""
    positions, tables = np.asarray(positions), np.asarray(block_tables)
    seqs = np.asarray(batch_ids).reshape(-1)[: len(positions)]
    starts = np.asarray(cu_seqlens_q).astype(np.int64)
    count = len(starts) - 1
    rows = len(positions) if tile == 1 else len(positions) // tile + max(count, 1)
    tokens = np.full(rows * tile, -1, np.int32)
    queries = np.full(len(positions), -1, np.int32)
    owners = np.full(rows, -1, np.int64)
    firsts = starts[:-1] // tile + np.arange(count)  # of each sequence, ascending
    for row in range(rows):
        owner = seqs[row] if tile == 1 else np.searchsorted(firsts, row, "right") - 1
        owners[row] = owner if 0 <= owner < count else -1
    for token, seq in enumerate(seqs):
        if not 0 <= seq < count:
            continue
        if tile == 1:
            queries[token] = tokens[token] = token
        elif starts[seq] <= token < starts[seq + 1]:
            queries[token] = firsts[seq] * tile + token - starts[seq]
            tokens[queries[token]] = token
    seen = np.append(positions, -1)[tokens]
    lengths = np.where((seen >= 0) & (seen < INT32_MAX), seen + 1, 0).astype(np.int32)
    row_tables = np.full((rows, tables.shape[1]), -1, np.int32)
    known = (owners >= 0) & (owners < len(tables))
    row_tables[known] = tables[owners[known]]
    return lengths.reshape(rows, tile), row_tables, tokens, queries
