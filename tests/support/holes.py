"""Masks with holes: trees of drafts, and windows and block tables for each KV head."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np

from fastattn.reference.attention import attention_mask
from tests.support.attention import PagedProblem


def random_tree(rng, size: int) -> np.ndarray:
    """What each token of a random tree sees: itself and its ancestors, [size, size]. Parents come
    before their children.
    """
    sees = np.eye(size, dtype=bool)
    for token in range(1, size):
        sees[token] |= sees[rng.integers(max(0, token - 5), token)]
    return sees


def tree_masks(rng, new, size: int, padding: bool = True) -> np.ndarray:
    """Trees [B, size, size] of sequences of `new` tokens; what lies past a tree is random."""
    masks = (
        rng.random((len(new), size, size)) < 0.5 if padding else np.zeros((len(new), size, size))
    )
    masks = masks.astype(bool)
    for mask, count in zip(masks, new):
        if 0 < count <= size:
            mask[:count, :count] = random_tree(rng, int(count))
    return masks


def visible_of(problem: PagedProblem, seq: int) -> np.ndarray:
    """Keys that each query of a sequence sees, of each KV head: [KV, n, keys]."""
    options, new = problem.options, int(problem.seq_lens_this_time[seq])
    first, kv_heads = int(problem.cu_seqlens_q[seq]), problem.k.elements.shape[1]
    offsets, trees = options.get("mask_offsets"), options.get("tree_mask")
    windows = options.get("head_windows")
    return np.stack(
        [
            attention_mask(
                new,
                int(problem.seq_lens_decoder[seq]) + new,
                causal=options.get("causal", True),
                window_size=options.get("window_size", (-1, -1)),
                mask_offsets=None if offsets is None else offsets[first : first + new],
                tree_mask=None if trees is None else trees[seq],
                head_window=(-1, 0) if windows is None else tuple(windows[head]),
            )
            for head in range(kv_heads)
        ]
    )


def slots_of(problem: PagedProblem, seq: int, head: int, positions) -> tuple:
    """Where keys of a head lie in `elements` and `scales` of K and V."""
    table = problem.block_tables[seq]
    table = table[head] if table.ndim == 2 else table
    positions = np.asarray(positions)
    return table[positions // 64], head, positions % 64


def hide(problem: PagedProblem) -> None:
    """NaN in every key that no query of its sequence and KV head sees."""
    for seq, new in enumerate(problem.seq_lens_this_time):
        if new <= 0:
            continue
        for head, visible in enumerate(visible_of(problem, seq)):
            where = slots_of(problem, seq, head, np.flatnonzero(~visible.any(axis=0)))
            problem.k.poison(where)
            problem.v.poison(where)


def with_tables_of_heads(problem: PagedProblem, seed: int = 0) -> PagedProblem:
    """The same keys and values, where each KV head's blocks lie in an order of their own."""
    rng = np.random.default_rng(seed)
    other = copy.deepcopy(problem)
    num_blocks, kv_heads = problem.k.elements.shape[:2]
    tables = np.repeat(problem.block_tables[:, None], kv_heads, axis=1)
    for head in range(kv_heads):
        order = rng.permutation(num_blocks)
        for stored, given in ((other.k, problem.k), (other.v, problem.v)):
            stored.elements[order, head] = given.elements[:, head]
            if problem.kind.dynamic:
                stored.scales[order, head] = given.scales[:, head]
        mine = tables[:, head]
        known = (mine >= 0) & (mine < num_blocks)
        mine[known] = order[mine[known]]
    return dataclasses.replace(other, block_tables=tables)


def with_pool_of_heads(problem: PagedProblem, seed: int = 1) -> PagedProblem:
    """The same keys and values in a pool of blocks of one head that all KV heads share."""
    problem = problem if problem.block_tables.ndim == 3 else with_tables_of_heads(problem)
    other = copy.deepcopy(problem)
    num_blocks, kv_heads = problem.k.elements.shape[:2]
    order = np.random.default_rng(seed).permutation(num_blocks * kv_heads)
    tables = other.block_tables
    for head in range(kv_heads):
        mine = tables[:, head]
        known = (mine >= 0) & (mine < num_blocks)
        mine[known] = order[mine[known] * kv_heads + head]
    for stored in (other.k, other.v):
        for name in ("elements", "scales") if problem.kind.dynamic else ("elements",):
            given = getattr(stored, name)
            planes = given.reshape(num_blocks * kv_heads, 1, *given.shape[2:])
            pool = np.empty_like(planes)
            pool[order] = planes
            setattr(stored, name, pool)
    return other
