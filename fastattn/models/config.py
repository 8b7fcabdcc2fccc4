"""Sizes and options of a decoder: Llama, Qwen2, Qwen3 and Gemma 3."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastattn.reference.numerics import Array

#: Architectures that this package runs.
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")


class ModelError(ValueError):
    """A file is not a model that this package runs; the message says why."""


@dataclass(frozen=True)
class ModelConfig:
    """What the weights do not tell.

    Attributes
    ----------
    architecture : str
        One of :data:`ARCHITECTURES`.
    layers, hidden, heads, kv_heads, head_dim, vocabulary : int
    context : int
        Positions that the model was trained for.
    norm_eps : float
        Of every RMSNorm.
    softmax_scale : float
    neox : bool
        Whether RoPE pairs channels that are half of the head apart, in these weights.
    rope_theta, rope_factor : float
        Base of the frequencies of layers that see all keys, and what divides their angles.
    local_rope_theta : float
        Base of layers that see a window.
    window : int
        Keys that such a layer sees, its own included; 0 if the model has none.
    full : tuple of bool
        For each layer, whether it sees all keys.
    gelu : bool
        GELU by tanh in the gated layer; else SiLU.
    embedding_scale : float
        What embeddings are multiplied with.
    """

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    norm_eps: float
    softmax_scale: float
    neox: bool
    rope_theta: float
    rope_factor: float = 1.0
    local_rope_theta: float = 1e4
    window: int = 0
    full: tuple[bool, ...] = ()
    gelu: bool = False
    embedding_scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.full:
            object.__setattr__(self, "full", (True,) * self.layers)
        self.check()

    def check(self) -> None:
        """Refuse sizes that do not fit each other.

        Raises
        ------
        ModelError
        """
        if self.architecture not in ARCHITECTURES:
            raise ModelError(
                f"architecture {self.architecture!r} is not supported; supported: "
                + ", ".join(ARCHITECTURES)
            )
        sizes = (self.layers, self.hidden, self.heads, self.kv_heads, self.vocabulary, self.context)
        if min(sizes) < 1 or self.heads % self.kv_heads:
            raise ModelError(f"sizes {sizes} are no model's")
        if self.head_dim not in (64, 96, 128, 256):
            raise ModelError(f"heads have {self.head_dim} channels; expected 64, 96, 128 or 256")
        if len(self.full) != self.layers or not (self.window > 0 or all(self.full)):
            raise ModelError("layers with a window, but no window")

    @property
    def widths(self) -> tuple[int, int, int]:
        """Columns of Q, K and V in the fused projection."""
        kv = self.kv_heads * self.head_dim
        return self.heads * self.head_dim, kv, kv

    def window_of(self, layer: int) -> int:
        """Keys that a layer's query sees, its own included; 0 is all."""
        return 0 if self.full[layer] else self.window


def rotary_angles(
    config: ModelConfig, length: int, *, full: bool = True, factors: Array | None = None
) -> Array:
    """Angle of each position and pair of channels, float64 ``[length, head_dim / 2]``.

    Parameters
    ----------
    config : ModelConfig
    length : int
    full : bool
        Of the layers that see all keys, or of those with a window.
    factors : array, shape [head_dim / 2], optional
        What divides the frequency of each pair (Llama 3.1); for layers that see all keys.
    """
    theta = config.rope_theta if full else config.local_rope_theta
    frequencies = theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    if full:
        frequencies = frequencies / config.rope_factor
        if factors is not None:
            frequencies = frequencies / factors
    return np.arange(length)[:, None] * frequencies
