"""NumPy model of ``update_block_summaries`` and ``select_key_blocks``.

Arithmetic is in fp32, in the order that the operators have, so lists are the same in every bit.
"""

from __future__ import annotations

import numpy as np

from fastattn.reference.attention import _dequantize_blocks, _descaled_query
from fastattn.reference.hadamard import restore_key
from fastattn.reference.layout import BLOCK_SIZE
from fastattn.reference.numerics import Array
from fastattn.reference.topk import topk_indices

#: Tokens of a key block.
GRANULARITIES = (16, 32, 64, 128)
#: Summaries of a key block's keys.
KINDS = ("mean", "minmax", "pooled")
#: Sums of a score.
LANES = 32


def summary_shape(
    num_blocks: int, kv_heads: int, head_dim: int, granularity: int, kind: str
) -> tuple[int, ...]:
    """Shape of a cache's summaries, ``[num_blocks, KV, n, rows, D]``.

    A physical block has n = 64 / `granularity` of them, at least 1. ``minmax`` has 2 rows, the
    least and the largest; the other kinds have 1.

    Parameters
    ----------
    num_blocks, kv_heads, head_dim : int
    granularity : {16, 32, 64, 128}
    kind : {"mean", "minmax", "pooled"}
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity: expected one of {GRANULARITIES}, got {granularity}")
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    count = max(BLOCK_SIZE // granularity, 1)
    return num_blocks, kv_heads, count, 2 if kind == "minmax" else 1, head_dim


def summarise(keys: Array, kind: str, weights: Array | None = None) -> Array:
    """Summary ``[rows, D]`` of the keys ``[n, D]`` of a key block, in fp32.

    Parameters
    ----------
    keys : array, shape [n, D]
        In the order of the tokens.
    kind : {"mean", "minmax", "pooled"}
    weights : array, shape [n, D], optional
        Of ``pooled``.
    """
    x = np.asarray(keys, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        if kind == "minmax":
            x = x + np.float32(0)  # -0 is +0
            return np.stack([np.minimum.reduce(x), np.maximum.reduce(x)])
        if kind == "pooled":
            x = x * np.asarray(weights, np.float32)
        total: Array = np.cumsum(x, axis=0, dtype=np.float32)[-1:]  # one token after the other
        return total / np.float32(len(x)) if kind == "mean" else total


def update_block_summaries(
    summaries: Array,
    key_cache: Array,
    block_tables: Array,
    cu_seqlens_q: Array,
    seq_lens_decoder: Array,
    seq_lens_this_time: Array,
    *,
    granularity: int,
    kind: str = "mean",
    pool_weights: Array | None = None,
    cache_k_scales: Array | None = None,
    cache_quant_type: str = "none",
    fp8_format: str = "e4m3",
    k_rotation: str = "none",
    k_center: Array | None = None,
) -> Array:
    """Summaries after a step; see :func:`fastattn.functional.update_block_summaries`.

    Returns
    -------
    array, shape and dtype of `summaries`
        A copy, in which the summaries that hold new tokens are those of the keys up to the last
        one.
    """
    out = np.array(summaries)
    num_blocks = len(out)
    tokens = min(granularity, BLOCK_SIZE)
    for b, table in enumerate(np.asarray(block_tables).tolist()[: len(seq_lens_this_time)]):
        span = max(int(cu_seqlens_q[b + 1]), 0) - int(cu_seqlens_q[b])
        new = min(int(seq_lens_this_time[b]), span)
        if new <= 0 or cu_seqlens_q[b] < 0:
            continue
        cached = max(int(seq_lens_decoder[b]), 0)
        end = min(cached + new, len(table) * BLOCK_SIZE)
        for begin in range(cached // tokens * tokens, end, tokens):
            block, slot = table[begin // BLOCK_SIZE], begin % BLOCK_SIZE
            if not 0 <= block < num_blocks:
                continue
            count = min(tokens, end - begin)
            stored = _dequantize_blocks(
                key_cache, "k", cache_k_scales, cache_quant_type, fp8_format, np.array([block])
            )[0]
            keys = restore_key(
                stored[:, slot : slot + count].transpose(1, 0, 2).astype(np.float32),
                k_rotation,
                k_center,
            )
            place = begin % granularity
            for head in range(keys.shape[1]):
                weights = None
                if pool_weights is not None:
                    weights = pool_weights[head, place : place + count]
                found = summarise(keys[:, head], kind, weights)
                out[block, head, slot // tokens] = found.astype(out.dtype)
    return out


def block_score(q: Array, summary: Array) -> Array:
    """Scores ``[G]`` of query heads ``[G, D]`` with a summary ``[rows, D]``, in fp32.

    With one row it is the inner product. With two, the sum of each channel's larger product with
    the least and the largest key: no key of the block has a larger inner product.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        products = (q[:, None].astype(np.float32) * summary.astype(np.float32)).max(axis=1)
        lanes = products.reshape(len(q), -1, LANES)
        sums: Array = np.cumsum(lanes, axis=1, dtype=np.float32)[:, -1]
        while sums.shape[1] > 1:
            half = sums.shape[1] // 2
            sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0]


def _joined(parts: list[Array], kind: str) -> Array:
    """The summary of a key block from those of its physical blocks."""
    if len(parts) == 1:
        return parts[0]
    a, b = (part.astype(np.float32) for part in parts)
    with np.errstate(over="ignore", invalid="ignore"):
        if kind == "minmax":
            return np.stack([np.minimum(a[0], b[0]), np.maximum(a[1], b[1])])
        return np.float32(0.5) * (a + b) if kind == "mean" else a + b


def select_key_blocks(
    q: Array,
    summaries: Array,
    block_tables: Array,
    cu_seqlens_q: Array,
    seq_lens_decoder: Array,
    seq_lens_this_time: Array,
    k: int,
    *,
    granularity: int,
    kind: str = "mean",
    reduction: str = "max",
    first_blocks: int = 0,
    last_blocks: int = 1,
    q_descale: Array | None = None,
) -> Array:
    """Lists of key blocks; see :func:`fastattn.functional.select_key_blocks`.

    Returns
    -------
    array of int32, shape [T, KV, k]
    """
    tokens, heads, _ = q.shape
    num_blocks, kv_heads, count = summaries.shape[:3]
    out = np.full((tokens, kv_heads, k), -1, np.int32)
    group, size = heads // kv_heads, BLOCK_SIZE // count
    scored = k - first_blocks - last_blocks
    x = _descaled_query(q, q_descale, cu_seqlens_q, kv_heads).astype(np.float32)

    def score(table: list[int], queries: Array, head: int, key_block: int) -> np.float32:
        parts = []
        for position in range(key_block * granularity, (key_block + 1) * granularity, size):
            index = position // BLOCK_SIZE
            block = table[index] if index < len(table) else -1
            if 0 <= block < num_blocks:
                parts.append(summaries[block, head, position % BLOCK_SIZE // size])
        if not parts:
            return np.float32(np.nan)  # after all others
        each = block_score(queries, _joined(parts, kind))
        if reduction == "max":
            return np.float32(np.maximum.reduce(each))
        with np.errstate(over="ignore", invalid="ignore"):
            return np.float32(np.cumsum(each, dtype=np.float32)[-1])

    for b in range(len(cu_seqlens_q) - 1):
        first = int(cu_seqlens_q[b])
        new = min(int(seq_lens_this_time[b]), min(int(cu_seqlens_q[b + 1]), tokens) - first)
        table = np.asarray(block_tables[b]).tolist()
        for i in range(max(new, 0)):
            token, position = first + i, max(int(seq_lens_decoder[b]), 0) + i
            end = position // granularity + 1
            begin = min(first_blocks, end)
            stop = max(end - last_blocks, begin)
            for head in range(kv_heads):
                queries = x[token, head * group : (head + 1) * group]
                middle = np.arange(begin, stop)
                if len(middle) > scored:
                    scores = [score(table, queries, head, int(j)) for j in middle]
                    chosen = (
                        topk_indices([scores], [len(scores)], scored)[0] if scored else middle[:0]
                    )
                    middle = middle[chosen]
                found = np.concatenate([np.arange(begin), middle, np.arange(stop, end)])
                out[token, head, : len(found)] = found
    return out
