"""The demo's model: a GPT with RMSNorm, interleaved RoPE, grouped queries and SwiGLU.

Weights are a dictionary of fp32 arrays (see ``weight_shapes``). :class:`Model` is the model in
Paddle, in parts that leave the attention to the caller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F

from fastattn.demo.text import VOCABULARY
from fastattn.reference import numerics
from fastattn.reference.numerics import Array

Weights = dict[str, Array]

NORM_EPS = 1e-6


@dataclass(frozen=True)
class Sizes:
    """Sizes of models with any attention. `context` is the length of the longest sequence.

    Each model has a subclass, which adds the sizes of its attention.
    """

    layers: int = 4
    hidden: int = 128
    heads: int = 4
    mlp: int = 256
    context: int = 256
    vocabulary: int = VOCABULARY
    rope_theta: float = 10000.0

    @property
    def rotary_dim(self) -> int:
        """Number of rotated channels of a head."""
        raise NotImplementedError

    def attention_shapes(self, i: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights of layer i's attention."""
        raise NotImplementedError


@dataclass(frozen=True)
class Config(Sizes):
    """Sizes of a model with grouped queries."""

    kv_heads: int = 2
    head_dim: int = 64

    @property
    def qkv_width(self) -> int:
        """Number of columns of the fused projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Number of rotated channels of a head: all."""
        return self.head_dim

    def attention_shapes(self, i: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights of layer i's attention."""
        return {
            f"{i}.qkv": (self.hidden, self.qkv_width),
            f"{i}.attention_out": (self.heads * self.head_dim, self.hidden),
        }


def weight_shapes(config: Sizes) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights. Matrices are ``[in, out]``; the embedding is tied."""
    shapes: dict[str, tuple[int, ...]] = {"embedding": (config.vocabulary, config.hidden)}
    for i in range(config.layers):
        shapes[f"{i}.attention_norm"] = (config.hidden,)
        shapes.update(config.attention_shapes(i))
        shapes[f"{i}.mlp_norm"] = (config.hidden,)
        shapes[f"{i}.gate_up"] = (config.hidden, 2 * config.mlp)
        shapes[f"{i}.down"] = (config.mlp, config.hidden)
    shapes["norm"] = (config.hidden,)
    return shapes


def initial_weights(config: Sizes, seed: int = 0) -> Weights:
    """Random weights. Matrices that add to the residual stream start smaller."""
    rng = np.random.default_rng(seed)
    weights: Weights = {}
    for name, shape in weight_shapes(config).items():
        if len(shape) == 1:
            weights[name] = np.ones(shape, np.float32)
            continue
        deviation = 0.02 if name == "embedding" else 1 / math.sqrt(shape[0])
        if name.endswith((".attention_out", ".down")):
            deviation *= 0.3
        weights[name] = (rng.standard_normal(shape) * deviation).astype(np.float32)
    return weights


def rotary_angles(config: Sizes) -> Array:
    """Angle of every position and channel pair, fp64 ``[context, rotary_dim / 2]``."""
    frequencies = config.rope_theta ** (-np.arange(0, config.rotary_dim, 2) / config.rotary_dim)
    return np.arange(config.context)[:, None] * frequencies


def rotary_table(config: Config) -> Array:
    """Cosines and sines as the operators take them, fp32 ``[2, 1, context, 1, head_dim / 2]``."""
    angles = rotary_angles(config)
    return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)[:, None, :, None, :]


class Trunk:
    """All of a model except its attention, on a Paddle place, fp32.

    Parameters
    ----------
    config : Sizes
    weights : dict of arrays
    place : optional
        Default: CPU.
    """

    def __init__(self, config: Sizes, weights: Weights, place: Any = None) -> None:
        self.config = config
        self.place = paddle.CPUPlace() if place is None else place
        self.weights = {k: paddle.to_tensor(v, place=self.place) for k, v in weights.items()}

    def tensor(self, array: Array) -> Any:
        """A tensor on the place of the weights."""
        return paddle.to_tensor(np.ascontiguousarray(array), place=self.place)

    def embed(self, tokens: Array) -> Any:
        """Embeddings ``[..., hidden]`` of int64 tokens ``[...]``."""
        return F.embedding(self.tensor(tokens), self.weights["embedding"])

    def finish(self, layer: int, x: Any, attention: Any) -> Any:
        """Residual stream after a layer whose attention gave `attention`, ``[..., H * D]``."""
        x = x + paddle.matmul(attention, self.weights[f"{layer}.attention_out"])
        normed = rms_norm(x, self.weights[f"{layer}.mlp_norm"])
        gate, up = paddle.matmul(normed, self.weights[f"{layer}.gate_up"]).chunk(2, axis=-1)
        return x + paddle.matmul(F.silu(gate) * up, self.weights[f"{layer}.down"])

    def logits(self, x: Any) -> Any:
        """Logits ``[..., vocabulary]`` of the residual stream."""
        normed = rms_norm(x, self.weights["norm"])
        return paddle.matmul(normed, self.weights["embedding"], transpose_y=True)


class Model(Trunk):
    """The model with grouped queries; see :class:`Trunk`."""

    config: Config

    def qkv(self, layer: int, x: Any) -> Any:
        """Fused projection ``[..., (H + 2 KV) * D]``, not rotated."""
        normed = rms_norm(x, self.weights[f"{layer}.attention_norm"])
        return paddle.matmul(normed, self.weights[f"{layer}.qkv"])

    def forward(self, tokens: Array, *, bfloat16: bool = False) -> Any:
        """Logits of whole sequences, with plain dense attention.

        Parameters
        ----------
        tokens : array of int64, shape [B, T]
        bfloat16 : bool
            Round the inputs and outputs of the attention as serving does: the projection, Q and K
            after the rotation, and the output.

        Returns
        -------
        Tensor, shape [B, T, vocabulary], float32
        """

        def cast(x: Any) -> Any:
            return to_bfloat16(x).astype("float32") if bfloat16 else x

        config = self.config
        batch, length = tokens.shape
        heads, kv_heads, dim = config.heads, config.kv_heads, config.head_dim
        cos, sin = (self.tensor(t[:, :length]) for t in rotary_table(config))
        hidden_keys = self.tensor(np.triu(np.full((length, length), -1e30, np.float32), 1))
        x = self.embed(tokens)
        for i in range(config.layers):
            qkv = cast(self.qkv(i, x)).reshape([batch, length, heads + 2 * kv_heads, dim])
            rotated = cast(rotate(qkv[:, :, : heads + kv_heads], cos, sin))
            q = rotated[:, :, :heads].reshape([batch, length, kv_heads, heads // kv_heads, dim])
            k, v = rotated[:, :, heads:], qkv[:, :, heads + kv_heads :]
            scores = paddle.matmul(
                q.transpose([0, 2, 3, 1, 4]), k.transpose([0, 2, 3, 1]).unsqueeze(2)
            )
            p = F.softmax(scores / math.sqrt(dim) + hidden_keys, axis=-1)
            out = paddle.matmul(p, v.transpose([0, 2, 1, 3]).unsqueeze(2))
            out = out.transpose([0, 3, 1, 2, 4]).reshape([batch, length, heads * dim])
            x = self.finish(i, x, cast(out))
        return self.logits(x)


def to_bfloat16(x: Any) -> Any:
    """Round an fp32 tensor to the nearest bfloat16, because Paddle 2.6 truncates on the CPU."""
    if x.place.is_gpu_place():
        return x.astype("bfloat16")
    bits = x.numpy().astype(numerics.bfloat16).view(np.uint16)
    return paddle.to_tensor(bits, place=paddle.CPUPlace())


def rms_norm(x: Any, weight: Any) -> Any:
    """`x` divided by the root mean square of its last dimension, times `weight`."""
    return x * paddle.rsqrt((x * x).mean(axis=-1, keepdim=True) + NORM_EPS) * weight


def rotate(x: Any, cos: Any, sin: Any) -> Any:
    """Rotate channel pairs (2i, 2i + 1) of ``[..., T, heads, D]``."""
    even, odd = x[..., 0::2], x[..., 1::2]
    pairs = paddle.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return pairs.reshape(x.shape)
