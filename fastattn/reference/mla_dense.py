"""NumPy model of dense attention over a paged latent cache, in float64."""

from __future__ import annotations

import numpy as np

from fastattn.reference import mla
from fastattn.reference.numerics import Array

VALUE_DIM = 512


def softmax_of(scores: Array) -> tuple[Array, Array]:
    """Weights of each row of scores, and their LSE. A score of -inf means no key."""
    with np.errstate(all="ignore"):
        top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
        weights = np.exp(scores - np.where(np.isneginf(top), 0, top))
        total = weights.sum(axis=-1, keepdims=True)
        return weights / np.where(total == 0, 1, total), (top + np.log(total))[..., 0]


def mla_attention(
    q: Array,
    cache: Array,
    block_tables: Array,
    cu_seqlens_q: Array,
    seq_lens_decoder: Array,
    seq_lens_this_time: Array,
    *,
    cache_format: str,
    scale: Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    sinks: Array | None = None,
    out: Array | None = None,
    page_size: int | None = None,
) -> tuple[Array, Array]:
    """See :func:`fastattn.functional.mla_attention`.

    Returns
    -------
    out : array of float64, shape [T, H, 512]
        Not rounded to bfloat16.
    lse : array of float64, shape [H, T]
    """
    tokens, heads, dim = q.shape
    fmt = mla.FORMATS[cache_format]
    pages, size = mla.pages_of(np.ascontiguousarray(cache), fmt, page_size)
    factor = dim**-0.5 if softmax_scale is None else softmax_scale
    result = np.zeros((tokens, heads, VALUE_DIM))
    if out is not None:
        result[...] = out
    lse = np.full((heads, tokens), -np.inf)
    for b in range(len(seq_lens_this_time)):
        begin = min(max(int(cu_seqlens_q[b]), 0), tokens)
        end = min(max(int(cu_seqlens_q[b + 1]), begin), tokens)
        new = min(max(int(seq_lens_this_time[b]), 0), end - begin)
        count = max(int(seq_lens_decoder[b]), 0) + new
        if not new:
            continue
        slots, positions = mla.assigned_slots(block_tables[b], count, len(pages), size)
        stored = mla.bytes_at(slots, pages, size, fmt)
        keys = mla.token_values(*stored, cache_format, scale).astype(np.float64)
        for i in range(new):
            seen = positions <= count - new + i if causal else np.ones(len(positions), bool)
            result[begin + i] = 0
            with np.errstate(all="ignore"):
                query = q[begin + i].astype(np.float64)
                weights, lse[:, begin + i] = softmax_of(query @ keys[seen].T * factor)
                if sinks is not None:
                    own = lse[:, begin + i]
                    share = 1 / (1 + np.exp(np.asarray(sinks, np.float64) - own))
                    weights = weights * np.where(np.isneginf(own), 1, share)[:, None]
                result[begin + i] = weights @ keys[seen, :VALUE_DIM]
    return result, lse
