"""A rotation of V that costs nothing: half of it is in V's projection, half in the output's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fastattn.models.config import ModelConfig
from fastattn.models.weights import LayerWeights, Weights
from fastattn.reference.hadamard import hadamard_matrix
from fastattn.reference.numerics import Array


def rotate_value_projection(projection: Array, head_dim: int) -> Array:
    """V's projection with the heads of V rotated, float32.

    Parameters
    ----------
    projection : array, shape [hidden, KV * D], or [KV * D] for a bias
    head_dim : int
    """
    heads = np.asarray(projection, np.float64).reshape(*projection.shape[:-1], -1, head_dim)
    rotated = heads @ hadamard_matrix(head_dim)
    return rotated.reshape(projection.shape).astype(np.float32)


def restore_output_projection(projection: Array, head_dim: int) -> Array:
    """The projection of attention outputs ``[H * D, hidden]`` for heads whose V is rotated."""
    heads = np.asarray(projection, np.float64).reshape(-1, head_dim, projection.shape[-1])
    restored = hadamard_matrix(head_dim) @ heads
    return restored.reshape(projection.shape).astype(np.float32)


def rotate_values(weights: Weights, config: ModelConfig) -> Weights:
    """The same model with V rotated by a Hadamard matrix in each head.

    V is stored with smaller errors then: outliers of a head's channels spread over all of them. The
    attention need not know, since its output is a mean of V.

    Parameters
    ----------
    weights : Weights
        Not changed; what is not rotated is shared.
    config : ModelConfig
    """
    first, dim = sum(config.widths[:2]), config.head_dim

    def rotated(layer: LayerWeights) -> LayerWeights:
        qkv = layer.qkv.copy()
        qkv[:, first:] = rotate_value_projection(qkv[:, first:], dim)
        bias = layer.qkv_bias
        if bias is not None:
            bias = bias.copy()
            bias[first:] = rotate_value_projection(bias[first:], dim)
        out = restore_output_projection(layer.attention_out, dim)
        return replace(layer, qkv=qkv, qkv_bias=bias, attention_out=out)

    return replace(weights, layers=[rotated(layer) for layer in weights.layers])
