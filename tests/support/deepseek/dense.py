"""The layers in fp64: all keys of a prompt at once, and a mask of those that a token attends to.

Written from the models' formulas and independent of the layers beside it and of
`fastattn.reference`: rotations are complex products, channels keep the models' order, groups are
those of the positions. Numbers are rounded where a model's are: bf16 before an operator, and the
codes of caches and index keys, whose scales come of `frexp`.
"""

from __future__ import annotations

import copy
from typing import Any

import ml_dtypes
import numpy as np

from tests.support.deepseek.weights import V4Config, V32Config, Weights, frequencies


def _rounded(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def _coded(x: np.ndarray, tile: int) -> np.ndarray:
    """Values of e4m3 codes; each `tile` channels share the least power of two that holds them."""
    tiles = x.reshape(*x.shape[:-1], x.shape[-1] // tile, tile)
    largest = np.maximum(np.abs(tiles).max(axis=-1, keepdims=True), 1e-4)
    fraction, exponent = np.frexp(largest / 448.0)
    scale = np.ldexp(1.0, np.where(fraction == 0.5, exponent - 1, exponent))
    codes = (tiles / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return (codes * scale).reshape(x.shape)


def _turn(x: np.ndarray, angles: np.ndarray, halves: bool = False) -> np.ndarray:
    """Turn pairs of channels of x [T, ..., 64] as complex numbers by angles [T, 32]."""
    turns = np.exp(1j * angles).reshape(len(x), *[1] * (x.ndim - 2), 32)
    if halves:
        z = (x[..., :32] + 1j * x[..., 32:]) * turns
        return np.concatenate([z.real, z.imag], axis=-1)
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * turns
    made = np.empty_like(x)
    made[..., 0::2], made[..., 1::2] = z.real, z.imag
    return made


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-6)


def _weights(scores: np.ndarray, mask: np.ndarray, sinks: np.ndarray | None = None) -> np.ndarray:
    """Softmax of scores [T, H, N] where mask [T, N], with a sink of each head; 0 elsewhere."""
    scores = np.where(mask[:, None], scores, -np.inf)
    sink = np.full(scores.shape[1], -np.inf) if sinks is None else sinks.astype(np.float64)
    largest = np.maximum(scores.max(axis=-1), sink)
    weights = np.exp(scores - largest[..., None])
    return weights / (weights.sum(axis=-1) + np.exp(sink - largest))[..., None]


def _dots(q: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Products of q [T, H, C] with keys [N, C]: [T, H, N]."""
    return (q.reshape(-1, q.shape[-1]) @ keys.T).reshape(*q.shape[:2], len(keys))


def _index_logits(
    q: np.ndarray, keys: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Logits [T, N] of the indexer, and what they would be if nothing cancelled."""
    q, keys = _coded(_rounded(q), 128), _coded(_rounded(keys), 128)
    weights = weights * (128.0 * q.shape[1]) ** -0.5
    scores = np.maximum(_dots(q, keys), 0)
    sizes = (np.abs(weights)[:, None] @ np.abs(q))[:, 0] @ np.abs(keys).T
    return (weights[:, None] @ scores)[:, 0], sizes


def mask_of(indices: np.ndarray, columns: int) -> np.ndarray:
    """Boolean [T, columns] of indices [T, k]; refuses an index twice, or one out of range."""
    mask = np.zeros((len(indices), columns + 1), np.int64)
    for row, chosen in zip(mask, np.asarray(indices)):
        real = chosen[chosen >= 0]
        assert (chosen[len(real) :] == -1).all(), "indices behind the first -1"
        assert (np.diff(real) > 0).all(), "indices that do not ascend"
        np.add.at(row, real, 1)
    assert not mask[:, columns].any()
    return mask[:, :columns] > 0


class DenseV32:
    """V3.2 or GLM-5 over one prompt x [T, 256]."""

    def __init__(self, config: V32Config, w: Weights, x: np.ndarray) -> None:
        self.config, self.w, self.x = config, w, x
        tokens = len(x)
        self.angles = np.outer(np.arange(tokens), frequencies(config))
        qr = _rounded(_unit(x @ w["qa"]) * w["qa_norm"])
        kv = x @ w["kva"]
        self.latent = _coded(_rounded(_unit(kv[:, :512]) * w["kva_norm"]), 128)
        self.rope = _rounded(_turn(kv[:, 512:], self.angles))
        q = (qr @ w["qb"]).reshape(tokens, -1, config.nope + 64)
        self.q_nope, self.q_rope = q[..., : config.nope], _turn(q[..., config.nope :], self.angles)
        iq = (qr.astype(np.float32) @ w["iq"]).reshape(tokens, config.index_heads, 128)
        ik = x @ w["ik"]
        ik = (ik - ik.mean(axis=-1, keepdims=True)) / np.sqrt(ik.var(axis=-1)[:, None] + 1e-6)
        ik = ik * w["ik_norm"] + w["ik_bias"]
        halves = not config.index_interleaved
        # The operator turns queries that a model has rounded; keys are rounded once.
        iq = _rounded(iq)  # fp64 from here on
        iq[..., :64] = _turn(iq[..., :64].copy(), self.angles, halves)
        ik[..., :64] = _turn(ik[..., :64].copy(), self.angles, halves)
        self.logits, self.logit_sizes = _index_logits(iq, ik, x @ w["iw"])
        self.visible = np.tril(np.ones((tokens, tokens), bool))

    def first(self, tokens: int) -> DenseV32:
        """The same for the first tokens of the prompt."""
        made, n = copy.copy(self), slice(tokens)
        for name in ("x", "angles", "latent", "rope", "q_nope", "q_rope"):
            setattr(made, name, getattr(self, name)[n])
        for name in ("logits", "logit_sizes", "visible"):
            setattr(made, name, getattr(self, name)[n, n])
        return made

    def cached(self) -> np.ndarray:
        """Channels of each token as the cache has them [T, 576]."""
        return np.concatenate([self.latent, self.rope], axis=1)

    def attention(self, mask: np.ndarray) -> np.ndarray:
        """Absorbed: [T, H, 512]."""
        absorbed = (self.q_nope.transpose(1, 0, 2) @ self.w["uk"]).transpose(1, 0, 2)
        q = _rounded(np.concatenate([absorbed, self.q_rope], axis=-1))
        scores = _dots(q, self.cached()) * self.config.softmax_scale
        return _weights(scores, mask & self.visible) @ self.latent

    def plain(self, mask: np.ndarray) -> np.ndarray:
        """Multi-head attention with each head's own keys and values; the layer's output."""
        keys = self.latent @ self.w["uk"].transpose(0, 2, 1)  # [H, N, nope]
        values = self.latent @ self.w["uv"]  # [H, N, v]
        scores = (self.q_nope.transpose(1, 0, 2) @ keys.transpose(0, 2, 1)).transpose(1, 0, 2)
        scores += _dots(self.q_rope, self.rope)
        weights = _weights(scores * self.config.softmax_scale, mask & self.visible)
        heads = (weights.transpose(1, 0, 2) @ values).transpose(1, 0, 2)
        return heads.reshape(len(heads), -1) @ self.w["o"]


class DenseV4:
    """V4 over one prompt x [T, 256]. Keys are the tokens, then the compressed entries."""

    def __init__(self, config: V4Config, w: Weights, x: np.ndarray) -> None:
        self.config, self.w, self.x = config, w, x
        tokens = len(x)
        self.tokens, self.angles = tokens, np.outer(np.arange(tokens), frequencies(config))
        qr = _rounded(_unit(x @ w["qa"]) * w["qa_norm"])
        q = _unit(_rounded((qr @ w["qb"]).reshape(tokens, -1, 512)))
        self.q = _rounded(self._last(q, np.arange(tokens)))
        kv = _rounded(_unit(x @ w["kv"]) * w["kv_norm"])
        self.window_keys = self._cache(self._last(kv, np.arange(tokens)))
        self.entries = self._cache(self._compress("latent")) if config.ratio else np.zeros((0, 512))
        at = np.arange(tokens)
        self.window = (at <= at[:, None]) & (at > at[:, None] - config.window)
        self.visible = np.zeros((tokens, 0), bool)
        if config.ratio:
            ends = (np.arange(len(self.entries)) + 1) * config.ratio - 1
            self.visible = ends <= at[:, None]
        if config.ratio == 4:
            iq = (qr.astype(np.float32) @ w["iq"]).reshape(tokens, config.index_heads, 128)
            iq = self._last(_rounded(iq), np.arange(tokens))
            self.index_keys = self._compress("index")
            self.logits, self.logit_sizes = _index_logits(iq, self.index_keys, x @ w["iw"])

    def first(self, tokens: int) -> DenseV4:
        """The same for the first tokens of the prompt."""
        made, n = copy.copy(self), slice(tokens)
        made.tokens = tokens
        for name in ("x", "angles", "q", "window_keys"):
            setattr(made, name, getattr(self, name)[n])
        made.window = self.window[n, n]
        entries = slice(tokens // self.config.ratio if self.config.ratio else 0)
        made.entries, made.visible = self.entries[entries], self.visible[n, entries]
        if self.config.ratio == 4:
            made.logits, made.logit_sizes = self.logits[n, entries], self.logit_sizes[n, entries]
        return made

    def _last(self, x: np.ndarray, positions: np.ndarray, sign: int = 1) -> np.ndarray:
        """Turn the last 64 channels."""
        turned = _turn(x[..., -64:], sign * self.angles[positions])
        return np.concatenate([x[..., :-64], turned], axis=-1)

    @staticmethod
    def _cache(x: np.ndarray) -> np.ndarray:
        x = _rounded(x)
        return np.concatenate([_coded(x[:, :448], 64), x[:, 448:]], axis=1)

    def _compress(self, name: str) -> np.ndarray:
        """Entries of the prompt's complete groups."""
        ratio, norm = self.config.ratio, self.w[f"{name}_norm"].astype(np.float64)
        head = len(norm)
        values, scores = np.split(self.x @ self.w[f"{name}_kv_score"], 2, axis=1)
        scores = scores + self.w[f"{name}_ape"].astype(np.float64)[np.arange(len(scores)) % ratio]
        made = []
        for first in range(0, self.tokens - ratio + 1, ratio):
            own = slice(first, first + ratio)
            if ratio == 4:  # the group before, by its own channels, and this one by the others
                before = slice(max(0, first - ratio), first)
                group = np.concatenate([values[before, :head], values[own, head:]])
                score = np.concatenate([scores[before, :head], scores[own, head:]])
            else:
                group, score = values[own], scores[own]
            weights = np.exp(score - score.max(axis=0))
            made.append((weights * group).sum(axis=0) / weights.sum(axis=0))
        entries = np.array(made).reshape(-1, head)
        return self._last(_unit(entries) * norm, np.arange(len(entries)) * ratio)

    def attention(self, mask: np.ndarray) -> np.ndarray:
        """Over the window and the entries of the mask [T, entries]: [T, H, 512]."""
        keys = np.concatenate([self.window_keys, self.entries])
        scores = _dots(self.q, keys) * self.config.softmax_scale
        seen = np.concatenate([self.window, mask & self.visible], axis=1)
        return _weights(scores, seen, self.w["sinks"]) @ keys

    def turned_back(self, attention: np.ndarray) -> np.ndarray:
        """The attention's output as the projection gets it, [T, H, 512]."""
        return self._last(attention, np.arange(self.tokens), -1)

    def output(self, attention: np.ndarray) -> np.ndarray:
        """Of the layer [T, 256]."""
        config, w = self.config, self.w
        grouped = self.turned_back(attention).reshape(self.tokens, config.groups, -1)
        mixed = (grouped.transpose(1, 0, 2) @ w["wo_a"]).transpose(1, 0, 2)
        return mixed.reshape(self.tokens, -1) @ w["wo_b"]


def make_dense(config: Any, w: Weights, x: np.ndarray) -> Any:
    return (DenseV4 if isinstance(config, V4Config) else DenseV32)(config, w, x)
