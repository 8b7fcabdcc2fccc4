"""The demo's model with outliers in K, and its samples for the calibrator."""

from __future__ import annotations

import math

import numpy as np

from fastattn.calibrate.samples import LayerSamples
from fastattn.demo.gradient import forward
from fastattn.demo.model import Config, Weights
from fastattn.reference.numerics import Array


def with_large_keys(weights: Weights, config: Config, factor: float) -> Weights:
    """Weights of the same function, in which two channels of every K head are `factor` times
    larger.

    The two channels form a rotated pair. Q has them smaller by the same factor, so scores are the
    same except for rounding.
    """
    changed = dict(weights)
    channels = np.array([10, 11])
    for i in range(config.layers):
        qkv = weights[f"{i}.qkv"].copy()
        for head in range(config.heads + config.kv_heads):
            columns = head * config.head_dim + channels
            qkv[:, columns] *= factor if head >= config.heads else 1 / factor
        changed[f"{i}.qkv"] = qkv
    return changed


def samples_of(weights: Weights, config: Config, tokens: Array) -> dict[int, LayerSamples]:
    """Q, K and V of every layer over concatenated windows of text, int64 [windows, T].

    Queries are returned only for a single window, because queries of several windows do not see one
    sequence.
    """
    batch, length = tokens.shape
    samples = {}
    for i, layer in enumerate(forward(weights, config, tokens).layers):
        k, v = (
            x.transpose(0, 2, 1, 3).reshape(batch * length, config.kv_heads, config.head_dim)
            for x in (layer.attention.k, layer.attention.v)
        )
        query = None
        if batch == 1:
            by_head = layer.attention.q.reshape(config.heads, length, config.head_dim)
            query = by_head.transpose(1, 0, 2) * np.float32(math.sqrt(config.head_dim))
        samples[i] = LayerSamples(k, v, query)
    return samples
