"""Attention in float64 NumPy: the required output of a FastDeploy layer with any backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np


def rotate(x: np.ndarray, table: np.ndarray, positions: np.ndarray, neox: bool) -> np.ndarray:
    """Rotate x [T, heads, D] by FastDeploy's table [2, 1, max_seq, 1, columns].

    Neox style rotates channel i with channel i + R / 2; R is the number of rotated channels. D
    columns store every angle twice (R = D). Fewer columns store it once (R = twice their number).
    The other style rotates neighbours, with one column per pair.
    """
    cos, sin = (np.asarray(part, np.float64)[0, positions, 0][:, None] for part in table)
    dim, columns = x.shape[-1], table.shape[-1]
    out = x.astype(np.float64).copy()
    if neox:
        half = dim // 2 if columns == dim else columns
        cos, sin = cos[..., :half], sin[..., :half]
        first, second = out[..., :half].copy(), out[..., half : 2 * half].copy()
        out[..., :half] = first * cos - second * sin
        out[..., half : 2 * half] = second * cos + first * sin
        return out
    first, second = out[..., 0 : 2 * columns : 2].copy(), out[..., 1 : 2 * columns : 2].copy()
    out[..., 0 : 2 * columns : 2] = first * cos - second * sin
    out[..., 1 : 2 * columns : 2] = second * cos + first * sin
    return out


def rms_norm(x: np.ndarray, weight: np.ndarray | None, eps: float) -> np.ndarray:
    """RMSNorm over the channels of each head; None means no norm."""
    if weight is None:
        return x
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def through_cache(x: np.ndarray, kind: str | None, scales: np.ndarray | None) -> np.ndarray:
    """[T, KV, D] after a round trip through a cache of FastDeploy's `kind`.

    `scales`: dequantisation multipliers, [KV] for FP8 and [KV * D] for INT8.
    """
    x = x.astype(ml_dtypes.bfloat16).astype(np.float64)  # in the dtype of the projection
    if kind is None:
        return x
    if kind == "block_wise_fp8":
        scale = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-6) / 448
        scale = scale.astype(ml_dtypes.bfloat16).astype(np.float64)
    else:
        assert scales is not None
        scale = np.broadcast_to(scales.reshape(x.shape[1], -1), x.shape[1:])[None]
    # 8-bit values and scales make ties, and the arithmetic determines their rounding.
    codes = x.astype(np.float32) * (np.float32(1) / np.asarray(scale, np.float32))
    if kind == "int8":
        return np.clip(np.rint(codes), -127, 127) * scale
    codes = np.clip(codes, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return codes.astype(np.float64) * scale


@dataclass
class LayerModel:
    """Parameters of a layer as NumPy arrays.

    Attributes
    ----------
    heads, kv_heads, dim : int
    table : array [2, 1, max_seq, 1, columns]
    kind : str or None
        FastDeploy's ``kv_cache_quant_type``.
    scales : pair of array or None
        Dequantisation multipliers of K and V.
    window : int
        Number of keys that a query sees, including its own; 0 means all.
    window_heads : float
        Part of the query heads, the last ones, that have the window; 0 means all of them.
    first : int
        Tokens at the start of a sequence that stay visible beside a window.
    """

    heads: int
    kv_heads: int
    dim: int
    table: np.ndarray
    neox: bool
    kind: str | None = None
    scales: tuple[np.ndarray | None, np.ndarray | None] = (None, None)
    norms: tuple[np.ndarray | None, np.ndarray | None] = (None, None)
    eps: float = 1e-6
    sinks: np.ndarray | None = None
    window: int = 0
    causal: bool = True
    window_heads: float = 0.0
    first: int = 0

    def attend(
        self, qkv: np.ndarray, first: int, ends: Any = None, tree: np.ndarray | None = None
    ) -> np.ndarray:
        """Outputs [n - first, heads * D] of a sequence's tokens from `first` on.

        `ends`: number of leading keys that each of these queries sees, instead of a causal mask.
        `tree`: which of the tokens from `first` on see each other, [n - first, n - first].
        """
        tokens = len(qkv)
        rows = qkv.astype(np.float64).reshape(tokens, -1, self.dim)
        q, k, v = np.split(rows, [self.heads, self.heads + self.kv_heads], axis=1)
        positions = np.arange(tokens)
        q = rms_norm(rotate(q, self.table, positions, self.neox), self.norms[0], self.eps)
        k = rms_norm(rotate(k, self.table, positions, self.neox), self.norms[1], self.eps)
        k = through_cache(k, self.kind, self.scales[0])
        v = through_cache(v, self.kind, self.scales[1])
        q = q[first:].astype(ml_dtypes.bfloat16).astype(np.float64)
        group = self.heads // self.kv_heads
        k, v = (np.repeat(x, group, axis=1) for x in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(self.dim)
        query, key = np.arange(first, tokens)[:, None], np.arange(tokens)[None]
        seen = np.ones((tokens - first, tokens), bool)
        if ends is not None:
            seen = key < np.asarray(ends)[:, None]
        elif self.causal:
            seen = key <= query
        if tree is not None:
            seen[:, first:] &= tree
        seen = np.repeat(seen[None], self.heads, axis=0)
        if ends is None and self.causal and self.window > 0:
            whole = int((1 - self.window_heads) * self.heads) if self.window_heads else 0
            seen[whole:] &= (key > query - self.window) | (key < self.first)
        scores = np.where(seen, scores, -np.inf)
        most = scores.max(-1, keepdims=True)
        if self.sinks is not None:
            most = np.maximum(most, self.sinks[:, None, None])
        weights = np.exp(scores - most)
        total = weights.sum(-1, keepdims=True)
        if self.sinks is not None:
            total = total + np.exp(self.sinks[:, None, None] - most)
        return np.einsum("hqk,khd->qhd", weights / total, v).reshape(tokens - first, -1)


def relative_error(actual: np.ndarray, exact: np.ndarray) -> float:
    """Root mean square error relative to the exact values; inf if a value is not finite."""
    actual = np.asarray(actual, np.float64)
    if actual.shape != exact.shape or not np.isfinite(actual).all():
        return float("inf")
    size = np.sqrt(np.mean(exact**2)) if exact.size else 1.0
    return float(np.sqrt(np.mean((actual - exact) ** 2)) / size) if exact.size else 0.0
