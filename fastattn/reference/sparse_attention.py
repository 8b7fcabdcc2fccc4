"""NumPy model of ``sparse_paged_attention``: dense attention over the mask of the chosen keys."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastattn.reference.attention import (
    _descaled_query,
    _head_dim,
    _store,
    dense_attention,
    gather_seq,
)
from fastattn.reference.hadamard import rotate_keys
from fastattn.reference.numerics import Array, round_to

#: Tokens for which an entry of a list may stand.
GRANULARITIES = (1, 4, 16, 32, 64, 128)


def selected_mask(
    selected: Array, position: int, granularity: int, *, window: int = 0, sink_tokens: int = 0
) -> Array:
    """Keys that one query sees.

    Parameters
    ----------
    selected : array of int, shape [n]
        Entry i stands for the keys ``i * granularity`` to ``(i + 1) * granularity - 1``. Negative
        entries are holes.
    position : int
        Position of the query in its sequence.
    granularity : int
        Tokens of an entry.
    window, sink_tokens : int
        The last `window` keys up to the query, its own included, and the first `sink_tokens` keys
        are seen besides.

    Returns
    -------
    array of bool, shape [position + 1]
        The query's own key and the keys before it. Later keys are never seen.
    """
    visible = np.zeros(position + 1, bool)
    for entry in np.asarray(selected, np.int64).tolist():
        if entry >= 0:
            visible[entry * granularity : (entry + 1) * granularity] = True
    visible[: max(sink_tokens, 0)] = True
    visible[max(position + 1 - max(window, 0), 0) :] = True
    return visible


def sparse_paged_attention(
    q: Array,
    key_cache: Array,
    value_cache: Array,
    block_tables: Array,
    cu_seqlens_q: Array,
    seq_lens_decoder: Array,
    seq_lens_this_time: Array,
    selected: Array,
    *,
    granularity: int,
    selected_lens: Array | None = None,
    window: int = 0,
    sink_tokens: int = 0,
    cache_k_scales: Array | None = None,
    cache_v_scales: Array | None = None,
    cache_quant_type: str = "none",
    fp8_format: str = "e4m3",
    q_descale: Array | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: Array | None = None,
    out_scale: Array | None = None,
    k_rotation: str = "none",
    k_center: Array | None = None,
    precision: str = "float64",
) -> tuple[Array, Array]:
    """Attention over chosen keys; see :func:`fastattn.functional.sparse_paged_attention`.

    Parameters
    ----------
    selected : array of int, shape [T, groups, width]
        Lists of the queries, for all KV heads (1 group) or for each.
    selected_lens : array of int, shape [T, groups], optional
        Entries of each list.
    precision : str
        Arithmetic, one of :data:`fastattn.reference.attention.PRECISIONS`.

    Returns
    -------
    out : array, shape [T, H, D]
        D as in V. fp64 (or fp32), not rounded; uint8 e4m3 codes if `out_scale` is given. 0 for
        tokens of no sequence and for queries that see no key.
    lse : array, shape [H, T]
    """
    tokens, heads, head_dim = q.shape
    kv_heads = key_cache.shape[1]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    shifts = np.zeros((tokens, heads))
    if k_center is not None:
        given = _descaled_query(q, q_descale, cu_seqlens_q, kv_heads)
        centers = np.repeat(np.asarray(k_center, np.float64), heads // kv_heads, axis=0)
        shifts = (given * centers).sum(-1) * scale
    if k_rotation != "none":
        q = round_to(rotate_keys(q, k_rotation), q.dtype).astype(q.dtype)
    queries = _descaled_query(q, q_descale, cu_seqlens_q, kv_heads)
    out = np.zeros((tokens, heads, _head_dim(value_cache, cache_quant_type, "v")))
    lse = np.full((heads, tokens), -np.inf)
    lists = _Lists(selected, selected_lens, granularity, window, sink_tokens)
    for b in range(len(cu_seqlens_q) - 1):
        first = int(cu_seqlens_q[b])
        span = min(int(cu_seqlens_q[b + 1]), tokens) - first
        new = min(max(int(seq_lens_this_time[b]), 0), span)
        cached = max(int(seq_lens_decoder[b]), 0)
        if new <= 0:
            continue
        k, v, assigned = gather_seq(
            key_cache,
            value_cache,
            block_tables[b],
            cached + new,
            cache_k_scales=cache_k_scales,
            cache_v_scales=cache_v_scales,
            cache_quant_type=cache_quant_type,
            fp8_format=fp8_format,
        )
        for kv_head in range(kv_heads):
            own = slice(kv_head * heads // kv_heads, (kv_head + 1) * heads // kv_heads)
            at = slice(first, first + new)
            options: dict[str, Any] = {
                "softmax_scale": scale,
                "softcap": softcap,
                "sinks": None if sinks is None else sinks[own],
                "shifts": None if k_center is None else shifts[at, own],
                "precision": precision,
            }
            visible = lists.visible(first, cached, new, kv_head) & assigned
            out[at, own], lse[own, at] = dense_attention(
                queries[at, own], k[:, [kv_head]], v[:, [kv_head]], visible, **options
            )
    return _store(out, out_scale), lse


class _Lists:
    """The lists of a call, and the keys that they name."""

    def __init__(
        self, selected: Array, lens: Array | None, granularity: int, window: int, sink_tokens: int
    ) -> None:
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity: expected one of {GRANULARITIES}, got {granularity}")
        self.selected, self.lens, self.granularity = np.asarray(selected), lens, granularity
        self.window, self.sink_tokens = window, sink_tokens

    def visible(self, first: int, cached: int, new: int, kv_head: int) -> Array:
        """Mask [new, cached + new] of the keys that the queries of a sequence see.

        `first` is the sequence's first token.
        """
        width = self.selected.shape[2]
        group = kv_head if self.selected.shape[1] > 1 else 0
        mask = np.zeros((new, cached + new), bool)
        for i in range(new):
            count = width if self.lens is None else int(self.lens[first + i, group])
            mask[i, : cached + i + 1] = selected_mask(
                self.selected[first + i, group, : max(min(count, width), 0)],
                cached + i,
                self.granularity,
                window=self.window,
                sink_tokens=self.sink_tokens,
            )
        return mask
