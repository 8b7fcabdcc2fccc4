"""NumPy model of sparse attention over latent caches, in fp64 on the dequantised tokens."""

from __future__ import annotations

import math

import numpy as np

from fastattn.reference import mla
from fastattn.reference.numerics import Array

VALUE_DIM = 512


def key_values(
    cache: Array,
    slots: Array,
    cache_format: str,
    *,
    scale: Array | None = None,
    page_size: int | None = None,
    channels: int = 576,
) -> Array:
    """Channels of the tokens at `slots`, float64 [n, 576 or 512]: exact codes times scales.

    Parameters
    ----------
    cache : array, shape [num_pages, page_size, W], with a dimension of 1 or [num_pages, page_bytes]
        Contiguous.
    slots : array of int, shape [n]
        Within the cache.
    cache_format, scale, page_size
        As for :func:`fastattn.functional.mla_sparse_attention`.
    channels : int
        Number of channels of a "bf16" cache.
    """
    fmt = mla.format_of(cache_format, channels)
    pages, size = mla.pages_of(np.ascontiguousarray(cache), fmt, page_size)
    return mla.exact_values(*mla.bytes_at(slots, pages, size, fmt), cache_format, scale)


def selected_keys(
    cache: Array | None,
    indices: Array | None,
    length: int | None,
    cache_format: str,
    scale: Array | None,
    page_size: int | None,
    dim: int,
) -> Array:
    """Keys [n, dim] that a query names in one cache; `indices` are the query's own."""
    if cache is None or indices is None or cache.size == 0:
        return np.zeros((0, dim))
    size = math.prod(cache.shape[1:-1]) if cache.ndim > 2 else page_size
    assert size is not None
    named = indices if length is None else indices[: max(0, length)]
    named = named[(named >= 0) & (named < len(cache) * size)]
    return key_values(cache, named, cache_format, scale=scale, page_size=page_size, channels=dim)


def mla_sparse_attention(
    q: Array,
    cache: Array,
    indices: Array,
    *,
    cache_format: str,
    topk_length: Array | None = None,
    extra_cache: Array | None = None,
    extra_indices: Array | None = None,
    extra_topk_length: Array | None = None,
    extra_cache_format: str | None = None,
    scale: Array | None = None,
    extra_scale: Array | None = None,
    sinks: Array | None = None,
    softmax_scale: float | None = None,
    page_size: int | None = None,
    extra_page_size: int | None = None,
) -> tuple[Array, Array, Array]:
    """See :func:`fastattn.functional.mla_sparse_attention`.

    Returns
    -------
    out : array of float64, shape [T, H, 512]
        Not rounded.
    lse : array of float64, shape [H, T]
        Without the sink.
    max_logits : array of float64, shape [H, T]
    """
    tokens, heads, dim = q.shape
    softmax_scale = dim**-0.5 if softmax_scale is None else softmax_scale
    out, lse = np.zeros((tokens, heads, VALUE_DIM)), np.full((heads, tokens), -np.inf)
    max_logits = lse.copy()
    for t in range(tokens):
        keys = np.concatenate(
            [
                selected_keys(
                    cache,
                    indices[t],
                    None if topk_length is None else int(topk_length[t]),
                    cache_format,
                    scale,
                    page_size,
                    dim,
                ),
                selected_keys(
                    extra_cache,
                    None if extra_indices is None else extra_indices[t],
                    None if extra_topk_length is None else int(extra_topk_length[t]),
                    extra_cache_format or cache_format,
                    extra_scale,
                    extra_page_size,
                    dim,
                ),
            ]
        )
        if not len(keys):
            continue
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            scores = np.asarray(q[t], np.float64) @ keys.T * softmax_scale
            top = np.max(scores, axis=1, keepdims=True)
            weights = np.exp(scores - np.where(np.isneginf(top), 0, top))
            total = weights.sum(axis=1)
            lse[:, t] = top[:, 0] + np.log(total)
            max_logits[:, t] = np.where(np.isnan(total), np.nan, top[:, 0])
            # A score of -inf means no key. If all are -inf, the weights add up to 0, with or
            # without sinks.
            none = total == 0
            out[t] = weights @ keys[:, :VALUE_DIM] / np.where(none, 1, total)[:, None]
            if sinks is not None:
                added = np.exp(np.asarray(sinks, np.float64) - np.where(none, 0, lse[:, t]))
                out[t] /= 1 + np.where(none, 0, added)[:, None]
    return out, lse, max_logits
