"""The demo's latent model written out in fp64: own K and V a head, no absorption, no cache."""

from __future__ import annotations

import ml_dtypes
import numpy as np


def norm(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def rotated(x, positions, theta):
    """Pairs (2i, 2i + 1) of ``[T, 64]`` turned by ``position * theta ** (-i / 32)``."""
    out = np.array(x)
    for i in range(32):
        angle = positions * theta ** (-i / 32)
        even, odd = x[:, 2 * i], x[:, 2 * i + 1]
        out[:, 2 * i] = even * np.cos(angle) - odd * np.sin(angle)
        out[:, 2 * i + 1] = even * np.sin(angle) + odd * np.cos(angle)
    return out


def bf16(x):
    return x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def stored(latent, cache_format):
    """A latent ``[T, 512]`` as a cache gives it back; None: as it is."""
    if cache_format is None:
        return latent
    latent = bf16(latent)
    if cache_format == "bf16":
        return latent
    tiles = latent.reshape(len(latent), 4, 128)
    scale = 2.0 ** np.ceil(np.log2(np.abs(tiles).max(-1, keepdims=True) / 448))
    codes = (tiles / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    return (codes.astype(np.float64) * scale).reshape(latent.shape)


def index_logits(weights, config, i, h, query, positions):
    """Logits of layer i's indexer, ``[T, T]``, from its inputs."""

    def turned(x):
        return np.concatenate([x[:, :64], rotated(x[:, 64:], positions, config.rope_theta)], 1)

    key = turned(norm(h @ weights[f"{i}.index_key"], weights[f"{i}.index_key_norm"]))
    factors = h @ weights[f"{i}.index_weight"] / np.sqrt(128 * config.index_heads)
    q = query @ weights[f"{i}.index_query"]
    logits = np.zeros((len(h), len(h)))
    for head in range(config.index_heads):
        own = turned(q[:, 128 * head : 128 * (head + 1)])
        logits += factors[:, [head]] * np.maximum(own @ key.T, 0)
    return logits


def run(weights, config, tokens, visible=None, cache_format=None):
    """Run one sequence.

    Parameters
    ----------
    weights : dict of arrays
    config : LatentConfig
    tokens : array of int, shape [T]
    visible : array of bool, shape [layers, T, T], optional
        Keys that a query sees; default: all up to it.
    cache_format : {"bf16", "fp8_656"}, optional
        Round latents and rotated keys as this cache does.

    Returns
    -------
    logits : array, shape [T, vocabulary]
    attention : array, shape [layers, H, T, T]
    index : array, shape [layers, T, T]
        Logits of the indexers.
    """
    weights = {name: np.asarray(array, np.float64) for name, array in weights.items()}
    length, nope, value = len(tokens), config.nope_dim, config.value_dim
    positions = np.arange(length)
    x = weights["embedding"][tokens]
    attention, index = [], []
    for i in range(config.layers):
        own = {n.split(".", 1)[1]: w for n, w in weights.items() if n.startswith(f"{i}.")}
        h = norm(x, own["attention_norm"])
        query = norm(h @ own["query_down"], own["query_norm"])
        index.append(index_logits(weights, config, i, h, query, positions))
        q = (query @ own["query_up"]).reshape(length, config.heads, nope + 64)
        down = h @ own["latent_down"]
        latent = stored(norm(down[:, :512], own["latent_norm"]), cache_format)
        rope = rotated(down[:, 512:], positions, config.rope_theta)
        rope = rope if cache_format is None else bf16(rope)
        seen = np.tri(length, dtype=bool) if visible is None else visible[i]
        heads, probabilities = [], []
        for head in range(config.heads):
            key = latent @ own["key_up"][:, head * nope : (head + 1) * nope]
            turned = rotated(q[:, head, nope:], positions, config.rope_theta)
            scores = (q[:, head, :nope] @ key.T + turned @ rope.T) / np.sqrt(nope + 64)
            scores = np.where(seen, scores, -np.inf)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            probabilities.append(p)
            heads.append(p @ (latent @ own["value_up"][:, head * value : (head + 1) * value]))
        attention.append(probabilities)
        x = x + np.concatenate(heads, 1) @ own["attention_out"]
        gate, up = np.split(norm(x, own["mlp_norm"]) @ own["gate_up"], 2, axis=1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ own["down"]
    logits = norm(x, weights["norm"]) @ weights["embedding"].T
    return logits, np.asarray(attention), np.asarray(index)
