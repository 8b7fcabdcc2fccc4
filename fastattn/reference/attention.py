"""NumPy model of ``flash_attention`` and ``paged_attention``: dense attention over a boolean mask.

Nothing is tiled, and no softmax is online. Each sequence forms its whole score matrix, takes a
softmax over the visible keys and multiplies by V. The default arithmetic is fp64. The other
precisions compute like a plain implementation in that precision; a kernel may have twice their
error.
"""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np

from fastattn.reference.cache import DYNAMIC_TYPES, code_of, dynamic_scales
from fastattn.reference.hadamard import rotate_keys
from fastattn.reference.layout import BLOCK_SIZE, unpack
from fastattn.reference.numerics import NIBBLES, Array, from_codes, quantize, round_to
from fastattn.reference.quantize import quantize_query

#: Arithmetic of the model. ``bfloat16`` and ``float16`` compute in fp32 and round Q, K, V (after
#: dequantisation) and P to that type, as 16-bit matrix products do.
PRECISIONS = ("float64", "float32", "bfloat16", "float16")

_ROUNDED = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def attention_mask(
    num_queries: int,
    num_keys: int,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    mask_offsets: Array | None = None,
    tree_mask: Array | None = None,
    head_window: tuple[int, int] = (-1, 0),
) -> Array:
    """Keys that each query of one sequence sees.

    Parameters
    ----------
    num_queries, num_keys : int
        The queries are the last tokens: query i has position ``i + num_keys - num_queries``.
    causal : bool
        Mask the keys after a query's position.
    window_size : (left, right)
        Number of keys before and after a query's position that stay visible; a negative side is
        unlimited.
    mask_offsets : array of int, shape [num_queries, 2], optional
        Query i sees keys ``[start, end)`` at most.
    tree_mask : array, shape [N, N], optional
        The queries' own keys are the last ``num_queries`` ones. Query i sees the j-th of them only
        if ``tree_mask[i, j]`` is not 0. Earlier keys are not concerned. Nothing is masked if
        ``num_queries > N``.
    head_window : (left, first)
        What one KV head's queries see: the last `left` keys before a position and the position's
        own, and the first `first` keys of the sequence. A negative `left` is unlimited.

    Returns
    -------
    array of bool, shape [num_queries, num_keys]
    """
    position = np.arange(num_queries)[:, None] + (num_keys - num_queries)
    key = np.arange(num_keys)[None, :]
    visible = np.ones((num_queries, num_keys), bool)
    if causal:
        visible &= key <= position
    left, right = window_size
    if left >= 0:
        visible &= key >= position - left
    if right >= 0:
        visible &= key <= position + right
    if mask_offsets is not None:
        start, end = np.asarray(mask_offsets).T
        visible &= (key >= start[:, None]) & (key < end[:, None])
    if tree_mask is not None and num_queries <= len(tree_mask):
        own = np.asarray(tree_mask)[:num_queries, :num_queries] != 0
        visible[:, num_keys - num_queries :] &= own
    left, first = head_window
    if left >= 0:
        visible &= (key >= position - left) | (key < first)
    return visible


def _weighted_values(p: Array, v: Array, visible: Array) -> Array:
    """``p @ v``, [G, n, m] by [m, D], without the V of masked keys, which may be NaN.

    A plain product would turn 0 * NaN into NaN.
    """
    finite = np.asarray(np.isfinite(v).all(axis=-1))
    out = p @ np.where(finite[:, None], v, 0)
    for key in np.flatnonzero(~finite):
        sees = visible[:, key]
        out[:, sees] += p[:, sees, key, None] * v[key]
    return out


def dense_attention(
    q: Array,
    k: Array,
    v: Array,
    visible: Array,
    *,
    softmax_scale: float,
    softcap: float = 0.0,
    sinks: Array | None = None,
    shifts: Array | None = None,
    precision: str = "float64",
) -> tuple[Array, Array]:
    r"""Attention of one sequence.

    .. math:: s_{ij} = \mathrm{cap} \tanh(\lambda q_i k_j / \mathrm{cap}), \qquad
              o_i = \frac{\sum_j e^{s_{ij}} v_j}{e^{\mathrm{sink}} + \sum_j e^{s_{ij}}}

    Parameters
    ----------
    q : array, shape [n, H, D]
    k, v : array, shape [m, KV, D]
        Query head h reads KV head ``h // (H / KV)``. V, and therefore the output, may have another
        number of channels.
    visible : array of bool, shape [n, m]
    softmax_scale : float
    softcap : float
        Bound of the logits; 0 means none.
    sinks : array, shape [H], optional
        A logit for each head. It counts in the denominator, but has no value.
    shifts : array, shape [n, H], optional
        Number that all scores of a query lack. Sinks and LSE are computed as if they had it.
    precision : str
        One of :data:`PRECISIONS`.

    Returns
    -------
    out : array, shape [n, H, D]
        Not rounded. 0 for a query that sees no key.
    lse : array, shape [H, n]
        Natural logarithm of the denominator; -inf for a query that sees no key.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    work = np.float64 if precision == "float64" else np.float32
    rounded = _ROUNDED.get(precision)
    operands = [np.asarray(x, work) for x in (q, k, v)]
    if rounded is not None:
        operands = [round_to(x, rounded) for x in operands]
    q, k, v = operands

    tokens, heads, _ = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    out = np.zeros((tokens, heads, v.shape[2]), work)
    lse = np.full((heads, tokens), -np.inf, work)
    seeing = np.asarray(visible.any(axis=1))
    for kv_head in range(kv_heads if seeing.any() else 0):
        of_group = slice(kv_head * group, (kv_head + 1) * group)
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            s = np.swapaxes(q[:, of_group], 0, 1) @ k[:, kv_head].T * work(softmax_scale)
            if softcap > 0:
                s = work(softcap) * np.tanh(s / work(softcap))
            s = np.where(visible, s, -np.inf).astype(work)
            largest = s.max(axis=-1)
            if sinks is not None:
                sink = np.asarray(sinks, work)[of_group, None]
                if shifts is not None:
                    sink = sink - np.asarray(shifts.T, work)[of_group]
                largest = np.maximum(largest, sink)
            largest = np.where(np.isneginf(largest), work(0), largest)
            p = np.exp(s - largest[..., None])
            denominator = p.sum(axis=-1)
            if sinks is not None:
                denominator = denominator + np.exp(sink - largest)
            p = p / np.where(denominator == 0, work(1), denominator)[..., None]
            if rounded is not None:
                p = round_to(p, rounded)
            values = _weighted_values(p, v[:, kv_head], visible)
            logs = np.log(np.where(denominator == 0, work(1), denominator)) + largest
        values = np.where(seeing[:, None], values, 0)
        out[:, of_group] = np.swapaxes(values, 0, 1)
        if shifts is not None:
            logs = logs + np.asarray(shifts.T, work)[of_group]
        lse[of_group] = np.where(seeing & (denominator != 0), logs, -np.inf)
    return out, lse


def as_values(x: Array) -> Array:
    """Values (fp32) of Q, K or V. uint8 holds e4m3 codes; other dtypes hold values."""
    x = np.asarray(x)
    return from_codes(x, "e4m3") if x.dtype == np.uint8 else x.astype(np.float32)


def _descaled_query(q: Array, descale: Array | None, cu_seqlens_q: Array, kv_heads: int) -> Array:
    """Q times its descale of shape [1], [T, H], or [B, KV] (shared by a KV head's query heads)."""
    values = as_values(q).astype(np.float64)
    if descale is None:
        return values
    descale = np.asarray(descale, np.float64)
    if descale.shape == (1,):
        return values * descale
    if descale.shape != q.shape[:2]:
        of_seqs = np.repeat(descale, q.shape[1] // kv_heads, axis=1)
        descale = np.ones(q.shape[:2])
        for b, (begin, end) in enumerate(zip(cu_seqlens_q, cu_seqlens_q[1:])):
            descale[int(begin) : int(end)] = of_seqs[b]
    return values * descale[:, :, None]


def _seq_descale(descale: Array | None, batch_idx: int) -> Array:
    """Descale [1], [KV] or [B, KV] of one sequence, shaped to multiply [m, KV, D]."""
    if descale is None:
        return np.ones((1, 1, 1))
    descale = np.asarray(descale, np.float64)
    return (descale[batch_idx] if descale.ndim == 2 else descale)[None, :, None]


def _store(out: Array, out_scale: Array | None) -> Array:
    return out if out_scale is None else quantize(out.astype(np.float32), out_scale, "e4m3")


def flash_attention(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    *,
    q_descale: Array | None = None,
    k_descale: Array | None = None,
    v_descale: Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Array | None = None,
    mask_offsets: Array | None = None,
    out_scale: Array | None = None,
    quantize_q: bool = False,
    precision: str = "float64",
) -> tuple[Array, Array]:
    """Attention of ragged sequences; see :func:`fastattn.functional.flash_attention`.

    Parameters
    ----------
    q : array, shape [T, H, D]
    k, v : array, shape [sum k, KV, D]
        Floating point, int8, or uint8 holding e4m3 bits (e5m2 as the ml_dtypes type).
    precision : str
        Arithmetic, one of :data:`PRECISIONS`.

    Returns
    -------
    out : array, shape [T, H, D]
        fp64 (or fp32), not rounded; uint8 e4m3 codes if `out_scale` is given. 0 for tokens of no
        sequence.
    lse : array, shape [H, T]
    """
    tokens, heads, head_dim = q.shape
    if quantize_q:
        q, q_descale = quantize_query(q)
    queries = _descaled_query(q, q_descale, cu_seqlens_q, k.shape[1])
    out = np.zeros((tokens, heads, v.shape[2]))
    lse = np.full((heads, tokens), -np.inf)
    for b in range(len(cu_seqlens_q) - 1):
        at = slice(int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1]))
        keys = slice(int(cu_seqlens_k[b]), int(cu_seqlens_k[b + 1]))
        visible = attention_mask(
            at.stop - at.start,
            keys.stop - keys.start,
            causal=causal,
            window_size=window_size,
            mask_offsets=None if mask_offsets is None else mask_offsets[at],
        )
        out[at], lse[:, at] = dense_attention(
            queries[at],
            as_values(k[keys]) * _seq_descale(k_descale, b),
            as_values(v[keys]) * _seq_descale(v_descale, b),
            visible,
            softmax_scale=head_dim**-0.5 if softmax_scale is None else softmax_scale,
            softcap=softcap,
            sinks=sinks,
            precision=precision,
        )
    return _store(out, out_scale), lse


def _dequantize_blocks(
    cache: Array, kind: str, scales: Array | None, quant_type: str, fp8_format: str, blocks: Array
) -> Array:
    """Values (fp64) [len(blocks), KV, 64, D] of some physical blocks of a K or V cache."""
    if quant_type == "none":
        return cache[blocks].astype(np.float64)
    code = code_of(quant_type, fp8_format, kind)
    logical = unpack(cache[blocks], kind, "fastattn", int8=code == "int8", nibbles=code in NIBBLES)
    values = from_codes(logical, code).astype(np.float64)
    assert scales is not None, "a quantised cache has scales"
    if quant_type in DYNAMIC_TYPES:
        return values * dynamic_scales(scales[blocks], quant_type).astype(np.float64)
    multiplier = scales.astype(np.float64)
    kv_heads, head_dim = values.shape[1], values.shape[3]
    if multiplier.size == kv_heads * head_dim and quant_type == "cache_int8":
        return values * multiplier.reshape(kv_heads, 1, head_dim)
    return values * multiplier.reshape(-1, 1, 1)


def _head_dim(cache: Array, cache_quant_type: str, kind: str) -> int:
    """Channels of a K ("k") or V ("v") cache, with tokens in one of its last two dimensions."""
    row = int(cache.shape[2]) * int(cache.shape[3]) // BLOCK_SIZE
    nibbles = cache_quant_type != "none" and code_of(cache_quant_type, kind=kind) in NIBBLES
    return 2 * row if nibbles else row


def gather_seq(
    key_cache: Array,
    value_cache: Array,
    block_table: Array,
    num_keys: int,
    *,
    cache_k_scales: Array | None = None,
    cache_v_scales: Array | None = None,
    cache_quant_type: str = "none",
    fp8_format: str = "e4m3",
) -> tuple[Array, Array, Array]:
    """K and V of one sequence from its blocks, dequantised.

    Returns
    -------
    k, v : array of float64, shape [num_keys, KV, D]
        0 for an unassigned block. V has 128 channels if K has 192.
    assigned : array of bool, shape [num_keys]
        Whether the key's block is assigned: its id is in ``[0, num_blocks)``.
    """
    num_blocks, kv_heads = key_cache.shape[:2]
    needed = -(-num_keys // BLOCK_SIZE)
    ids = np.full(needed, -1)
    ids[: len(block_table)] = np.asarray(block_table)[:needed]
    known = (ids >= 0) & (ids < num_blocks)
    gathered = []
    for kind, cache, scales in (
        ("k", key_cache, cache_k_scales),
        ("v", value_cache, cache_v_scales),
    ):
        head_dim = _head_dim(cache, cache_quant_type, kind)
        blocks = np.zeros((needed, kv_heads, BLOCK_SIZE, head_dim))
        if known.any():
            blocks[known] = _dequantize_blocks(
                cache, kind, scales, cache_quant_type, fp8_format, ids[known]
            )
        tokens = blocks.transpose(0, 2, 1, 3).reshape(needed * BLOCK_SIZE, kv_heads, head_dim)
        gathered.append(tokens[:num_keys])
    return gathered[0], gathered[1], np.repeat(known, BLOCK_SIZE)[:num_keys]


class _Heads(NamedTuple):
    """Heads that one attention over a sequence takes."""

    query: slice
    stored: slice  # of the cache
    pooled: tuple[int, int] | None  # (KV head, their number) in a cache of one head for all


def _heads_of(index: int, count: int, kv_heads: int, heads: int, stored: int) -> _Heads:
    """Those of part `index` of `count`: of one KV head, or of all."""
    group = heads // count
    pooled = (index, kv_heads) if stored != kv_heads else None
    own = slice(None) if count == 1 or pooled else slice(index, index + 1)
    return _Heads(slice(index * group, (index + 1) * group), own, pooled)


def _scales_of(scales: Array | None, of: _Heads, cache_quant_type: str) -> Array | None:
    """Scales for :func:`gather_seq`: in a pool, a head's own of a static type."""
    if scales is None or of.pooled is None or cache_quant_type in DYNAMIC_TYPES or len(scales) == 1:
        return scales
    head, kv_heads = of.pooled
    return scales.reshape(kv_heads, -1)[head]


def paged_attention(
    q: Array,
    key_cache: Array,
    value_cache: Array,
    block_tables: Array,
    cu_seqlens_q: Array,
    seq_lens_decoder: Array,
    seq_lens_this_time: Array,
    *,
    cache_k_scales: Array | None = None,
    cache_v_scales: Array | None = None,
    cache_quant_type: str = "none",
    fp8_format: str = "e4m3",
    q_descale: Array | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Array | None = None,
    mask_offsets: Array | None = None,
    out_scale: Array | None = None,
    quantize_q: bool = False,
    k_rotation: str = "none",
    k_center: Array | None = None,
    tree_mask: Array | None = None,
    head_windows: Array | None = None,
    precision: str = "float64",
) -> tuple[Array, Array]:
    """Attention of new tokens over a paged cache; see :func:`fastattn.functional.paged_attention`.

    Sequence b has ``n = min(seq_lens_this_time[b], cu_seqlens_q[b + 1] - cu_seqlens_q[b])`` new
    tokens and ``seq_lens_decoder[b] + n`` keys, which are read from the bytes of the cache.

    Parameters
    ----------
    block_tables : array of int, shape [B, max_blocks] or [B, KV, max_blocks]
        With three dimensions each KV head has blocks of its own: the key at position p of head h
        lies in slot ``p % 64`` of head h of block ``block_tables[b, h, p // 64]``. In a cache of
        one head, a pool that all heads share, that is the block's only head.
    tree_mask : array, shape [B, N, N], optional
        That of each sequence; see :func:`attention_mask`.
    head_windows : array of int, shape [KV, 2], optional
        The `head_window` of each KV head.

    Returns
    -------
    out : array, shape [T, H, D]
        D as in V. fp64 (or fp32), not rounded; uint8 e4m3 codes if `out_scale` is given. 0 for
        tokens of no sequence.
    lse : array, shape [H, T]
    """
    tokens, heads, head_dim = q.shape
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    shifts = None
    if k_center is not None:
        given = _descaled_query(q, q_descale, cu_seqlens_q, key_cache.shape[1])
        centers = np.repeat(np.asarray(k_center, np.float64), heads // len(k_center), axis=0)
        shifts = (given * centers).sum(-1) * scale
    if k_rotation != "none":
        q = round_to(rotate_keys(q, k_rotation), q.dtype).astype(q.dtype)
    if quantize_q:
        q, q_descale = quantize_query(q)
    queries = _descaled_query(q, q_descale, cu_seqlens_q, key_cache.shape[1])
    out = np.zeros((tokens, heads, _head_dim(value_cache, cache_quant_type, "v")))
    lse = np.full((heads, tokens), -np.inf)
    own_tables = np.ndim(block_tables) == 3
    kv_heads = np.shape(block_tables)[1] if own_tables else key_cache.shape[1]
    # Each KV head alone where heads differ in what they see, else all of them together.
    count = kv_heads if head_windows is not None or own_tables else 1
    for b in range(len(block_tables)):
        first = int(cu_seqlens_q[b])
        span = min(int(cu_seqlens_q[b + 1]), tokens) - first
        new = min(max(int(seq_lens_this_time[b]), 0), span)
        if new <= 0:
            continue
        at = slice(first, first + new)
        num_keys = max(int(seq_lens_decoder[b]), 0) + new
        table = block_tables[b]
        for kv_head in range(count):
            of = _heads_of(kv_head, count, kv_heads, heads, key_cache.shape[1])
            k, v, assigned = gather_seq(
                key_cache,
                value_cache,
                table[kv_head] if own_tables else table,
                num_keys,
                cache_k_scales=_scales_of(cache_k_scales, of, cache_quant_type),
                cache_v_scales=_scales_of(cache_v_scales, of, cache_quant_type),
                cache_quant_type=cache_quant_type,
                fp8_format=fp8_format,
            )
            visible = attention_mask(
                new,
                num_keys,
                causal=causal,
                window_size=window_size,
                mask_offsets=None if mask_offsets is None else mask_offsets[at],
                tree_mask=None if tree_mask is None else tree_mask[b],
                head_window=(-1, 0) if head_windows is None else tuple(head_windows[kv_head]),
            )
            out[at, of.query], lse[of.query, at] = dense_attention(
                queries[at, of.query],
                k[:, of.stored],
                v[:, of.stored],
                visible & assigned,
                softmax_scale=scale,
                softcap=softcap,
                sinks=None if sinks is None else sinks[of.query],
                shifts=None if shifts is None else shifts[at, of.query],
                precision=precision,
            )
    return _store(out, out_scale), lse
