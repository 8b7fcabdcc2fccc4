"""A whole decoder in float64 NumPy: the required hidden states of FastDeploy's model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np

from fastdeploy_check.checkpoints import Spec, bfloat16
from fastdeploy_check.oracle import through_cache

Round = Callable[[np.ndarray], np.ndarray]


def exact(x: np.ndarray) -> np.ndarray:
    """No rounding."""
    return x


def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """RMSNorm over the last axis."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight


class Decoder:
    """A model of :func:`checkpoints.spec_of`.

    Parameters
    ----------
    spec : Spec
    weights : dict of array
    kind : str or None
        FastDeploy's ``kv_cache_quant_type``.
    """

    def __init__(self, spec: Spec, weights: dict[str, np.ndarray], kind: str | None) -> None:
        self.spec, self.weights, self.kind = spec, weights, kind
        self.heads = spec.fields["num_attention_heads"]
        self.kv_heads = spec.fields["num_key_value_heads"]
        self.dim = spec.fields["head_dim"]

    def hidden(self, ids: Sequence[int], rounded: Round = exact) -> np.ndarray:
        """Hidden states [T, hidden] of a sequence, before ``lm_head``.

        `rounded` is applied to every result. With :func:`checkpoints.bfloat16` the difference is
        the error that 16 bits cause in any implementation.
        """
        x = self.weights["model.embed_tokens.weight"][np.asarray(ids)]
        for index in range(self.spec.fields["num_hidden_layers"]):
            own = self._of_layer(index)
            attend = self._grouped if self.spec.attention == "gqa" else self._latent
            normed = rounded(rms(x, own["input_layernorm.weight"]))
            x = rounded(x + rounded(attend(index, own, normed, rounded)))
            normed = rounded(rms(x, own["post_attention_layernorm.weight"]))
            gate = normed @ own["mlp.gate_proj.weight"].T
            inner = gate / (1 + np.exp(-gate)) * (normed @ own["mlp.up_proj.weight"].T)
            x = rounded(x + rounded(inner @ own["mlp.down_proj.weight"].T))
        return rounded(rms(x, self.weights["model.norm.weight"]))

    def _of_layer(self, index: int) -> dict[str, np.ndarray]:
        prefix = f"model.layers.{index}."
        found = {k.removeprefix(prefix): v for k, v in self.weights.items() if prefix in k}
        return {k.removeprefix("self_attn."): v for k, v in found.items()}

    def _rotate(self, x: np.ndarray, channels: int) -> np.ndarray:
        """Rotate the first channels of x [T, heads, D] by the positions 0 to T - 1."""
        places = 10000.0 ** (-np.arange(0, channels, 2) / channels)
        angles = (np.arange(len(x))[:, None] * places)[:, None]
        half = channels // 2
        first = slice(0, half) if self.spec.neox else slice(0, channels, 2)
        second = slice(half, channels) if self.spec.neox else slice(1, channels, 2)
        out = x.copy()
        out[..., first] = x[..., first] * np.cos(angles) - x[..., second] * np.sin(angles)
        out[..., second] = x[..., second] * np.cos(angles) + x[..., first] * np.sin(angles)
        return out

    def _grouped(
        self, index: int, own: dict[str, np.ndarray], x: np.ndarray, rounded: Round
    ) -> np.ndarray:
        """Attention of a GQA layer, through a cache of its type."""
        made = {}
        for name, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
            out = rounded(x @ own[f"{name}_proj.weight"].T + own.get(f"{name}_proj.bias", 0.0))
            made[name] = out.reshape(len(x), heads, self.dim)
        for name in "qk":
            if self.spec.norm:
                made[name] = rounded(rms(made[name], own[f"{name}_norm.weight"]))
            made[name] = rounded(self._rotate(made[name], int(self.dim * self.spec.partial)))
        for name in "kv":
            scales = self.spec.scales.get((index, name))
            stored = through_cache(made[name], self.kind, scales)
            made[name] = np.repeat(stored, self.heads // self.kv_heads, axis=1)
        scores = np.einsum("qhd,khd->hqk", made["q"], made["k"]) / np.sqrt(self.dim)
        return rounded(_weighted(scores, made["v"])) @ own["o_proj.weight"].T

    def _latent(
        self, index: int, own: dict[str, np.ndarray], x: np.ndarray, rounded: Round
    ) -> np.ndarray:
        """Attention of a layer of latent attention, whose indexer selects all keys."""
        tokens = len(x)
        down = rounded(rms(rounded(x @ own["q_a_proj.weight"].T), own["q_a_layernorm.weight"]))
        q = rounded(down @ own["q_b_proj.weight"].T).reshape(tokens, self.heads, 192)
        both = x @ own["kv_a_proj_with_mqa.weight"].T
        latent = rounded(rms(both[:, :512], own["kv_a_layernorm.weight"]))
        rotated = bfloat16(self._rotate(both[:, None, 512:], 64))
        if self.spec.attention == "dsa":
            latent = _through_656_bytes(latent)
        up = (latent @ own["kv_b_proj.weight"].T).reshape(tokens, self.heads, 256)
        scores = np.einsum("qhd,khd->hqk", q[..., :128], up[..., :128])
        scores += np.einsum("qhd,kd->hqk", self._rotate(q[..., 128:], 64), rotated[:, 0])
        return _weighted(scores / np.sqrt(192), up[..., 128:]) @ own["o_proj.weight"].T


def _weighted(scores: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values [T, heads * D], weighted by the softmax of causal scores [heads, T, T]."""
    places = np.arange(scores.shape[-1])
    scores = np.where(places[None] <= places[:, None], scores, -np.inf)
    found = np.exp(scores - scores.max(-1, keepdims=True))
    out = np.einsum("hqk,khd->qhd", found / found.sum(-1, keepdims=True), values)
    return out.reshape(len(out), -1)


def _through_656_bytes(latent: np.ndarray) -> np.ndarray:
    """Latents [T, 512] after a round trip through e4m3 with a power of two for 128 channels."""
    tiles = bfloat16(latent).reshape(len(latent), 4, 128)
    most = np.maximum(np.abs(tiles).max(-1, keepdims=True), 1e-4)
    scale = 2.0 ** np.ceil(np.log2(most / 448))
    codes = (tiles / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    return (codes.astype(np.float64) * scale).reshape(len(latent), 512)
