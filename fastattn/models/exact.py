"""A forward pass in fp32 without a cache, by NumPy: what caches are compared with and scaled by."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastattn.models.config import ModelConfig, rotary_angles
from fastattn.models.dense import Dense
from fastattn.reference.numerics import Array

#: Gets a layer's number and its Q [T, H, D], K and V [T, KV, D], normed and rotated, fp32.
Watch = Callable[[int, Array, Array, Array], None]

#: Gets a layer's number, its K and its V; gives others in their place.
Change = Callable[[int, Array, Array], "tuple[Array, Array]"]

#: Gets what :data:`Watch` does; gives the attention's outputs [T, H, D].
Attention = Callable[[int, Array, Array, Array], Array]

_QUERIES = 256  # whose scores are in memory at a time


def rotate(x: Array, angles: Array, neox: bool) -> Array:
    """Heads ``[T, heads, D]`` rotated by ``[T, D / 2]``."""
    cos, sin = (f(angles).astype(np.float32)[:, None] for f in (np.cos, np.sin))
    half = x.shape[-1] // 2
    a, b = (x[..., :half], x[..., half:]) if neox else (x[..., ::2], x[..., 1::2])
    result = np.empty_like(x)
    c, d = (
        (result[..., :half], result[..., half:]) if neox else (result[..., ::2], result[..., 1::2])
    )
    c[...] = a * cos - b * sin
    d[...] = a * sin + b * cos
    return result


def attend(q: Array, k: Array, v: Array, scale: float, window: int = 0) -> Array:
    """Causal attention ``[T, H, D]`` over a sequence; a window counts the query's own key."""
    tokens, heads, _ = q.shape
    group = heads // k.shape[1]
    out = np.empty((tokens, heads, v.shape[2]), np.float32)
    for start in range(0, tokens, _QUERIES):
        end = min(start + _QUERIES, tokens)
        first = max(0, start - window + 1) if window else 0
        distance = np.arange(start, end)[:, None] - np.arange(first, end)[None]
        hidden = (distance < 0) | ((distance >= window) if window else False)
        for h in range(heads):
            scores = q[start:end, h] @ k[first:end, h // group].T
            scores *= np.float32(scale)
            scores[hidden] = -np.inf
            scores -= scores.max(axis=1, keepdims=True)
            np.exp(scores, out=scores)
            sums = scores.sum(axis=1, keepdims=True)
            out[start:end, h] = (scores @ v[first:end, h // group]) / sums
    return out


def head_norm(x: Array, weight: Array, eps: float) -> Array:
    """RMSNorm of each head ``[T, heads, D]``."""
    squares = np.mean(x * x, axis=-1, keepdims=True)
    result: Array = x / np.sqrt(squares + np.float32(eps)) * weight
    return result


def forward(
    dense: Dense,
    tokens: Array,
    watch: Watch | None = None,
    *,
    change: Change | None = None,
    attention: Attention | None = None,
    entering: list[Array] | None = None,
    start: tuple[int, Array] | None = None,
) -> Array:
    """Hidden states ``[T, hidden]`` of one sequence, which :meth:`Dense.logits` takes.

    Parameters
    ----------
    dense : Dense
        In NumPy.
    tokens : array of int, shape [T]
    watch : callable, optional
        Sees what each layer's cache and attention get.
    change : callable, optional
        Gives what the attention sees in place of K and V.
    attention : callable, optional
        In place of the causal attention over all keys.
    entering : list, optional
        Gets the residual stream ahead of each layer.
    start : (int, array), optional
        The layer to begin with, and the residual stream ahead of it.
    """
    config: ModelConfig = dense.config
    count = len(tokens)
    factors = dense.weights.rope_factors
    tables = {
        full: rotary_angles(config, count, full=full, factors=factors) for full in set(config.full)
    }
    first, x = (0, dense.embed(tokens)) if start is None else start
    splits = np.cumsum(config.widths)[:2]
    for n in range(first, config.layers):
        if entering is not None:
            entering.append(x)
        w = dense.weights.layers[n]
        parts = np.split(dense.project(n, x), splits, axis=1)
        q, k, v = (part.reshape(count, -1, config.head_dim) for part in parts)
        if w.q_norm is not None:
            q = head_norm(q, w.q_norm, config.norm_eps)
        if w.k_norm is not None:
            k = head_norm(k, w.k_norm, config.norm_eps)
        q, k = (rotate(part, tables[config.full[n]], config.neox) for part in (q, k))
        if watch is not None:
            watch(n, q, k, v)
        if change is not None:
            k, v = change(n, k, v)
        if attention is None:
            out = attend(q, k, v, config.softmax_scale, config.window_of(n))
        else:
            out = attention(n, q, k, v)
        x = dense.finish(n, x, out.reshape(count, -1))
    result: Array = dense.last(x)
    return result
