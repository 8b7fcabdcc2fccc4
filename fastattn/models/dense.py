"""All of a decoder but its attention, in fp32: by NumPy, or by Paddle where weights are on a GPU.

NumPy's matrix products are more than twice as fast as a CPU build of Paddle's: 100 against 40
GFLOP/s a core of an Intel Xeon.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastattn.models.config import ModelConfig
from fastattn.models.weights import LayerWeights, Weights
from fastattn.reference.numerics import Array


class Dense:
    """The pieces of a model around its attention. Rows are tokens.

    Parameters
    ----------
    config : ModelConfig
    weights : Weights
    """

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config, self.weights = config, weights

    def embed(self, tokens: Array) -> Any:
        """Residual stream ``[T, hidden]`` of tokens ``[T]``."""
        x = self.weights.embedding[np.asarray(tokens, np.int64)]
        scale = self.config.embedding_scale
        return x if scale == 1 else x * np.float32(scale)

    def project(self, layer: int, x: Any) -> Any:
        """Fused projection ``[T, (H + 2 KV) * D]``: Q, K, V, neither normed nor rotated."""
        w = self.weights.layers[layer]
        qkv = self._norm(x, w.attention_norm) @ w.qkv
        return qkv if w.qkv_bias is None else qkv + w.qkv_bias

    def finish(self, layer: int, x: Any, attention: Any) -> Any:
        """Residual stream after a layer whose attention gave ``[T, H * D]``."""
        w = self.weights.layers[layer]
        x = x + self._post(attention @ w.attention_out, w.attention_post_norm)
        return x + self._post(self._mlp(self._norm(x, w.mlp_norm), w), w.mlp_post_norm)

    def last(self, x: Any) -> Any:
        """What the logits are made of, ``[T, hidden]``."""
        return self._norm(x, self.weights.norm)

    def logits(self, hidden: Any) -> Array:
        """``[n, vocabulary]`` of rows of :meth:`last`."""
        result: Array = hidden @ self.weights.head.T
        return result

    def _post(self, x: Any, weight: Any) -> Any:
        return x if weight is None else self._norm(x, weight)

    def _mlp(self, x: Any, w: LayerWeights) -> Any:
        both = x @ w.gate_up
        half = both.shape[1] // 2
        return (self._gate(both[:, :half]) * both[:, half:]) @ w.down

    def _norm(self, x: Any, weight: Any) -> Any:
        squares = np.einsum("ij,ij->i", x, x) / x.shape[1]
        return x * (1 / np.sqrt(squares + np.float32(self.config.norm_eps)))[:, None] * weight

    def _gate(self, x: Any) -> Any:
        if self.config.gelu:
            inner = np.float32(0.7978845608028654) * (x + np.float32(0.044715) * x * x * x)
            return np.float32(0.5) * x * (1 + np.tanh(inner))
        with np.errstate(over="ignore"):  # exp(-x) beyond fp32: x / inf is 0
            return x / (1 + np.exp(-x))


class PaddleDense(Dense):
    """The same in Paddle, on a place.

    Parameters
    ----------
    config : ModelConfig
    weights : Weights
    place : paddle.Place
    """

    def __init__(self, config: ModelConfig, weights: Weights, place: Any) -> None:
        import paddle

        self._place = place

        def on(x: Array | None) -> Any:
            return None if x is None else paddle.to_tensor(x, place=place)

        embedding = on(weights.embedding)
        head = embedding if weights.head is weights.embedding else on(weights.head)
        layers = [LayerWeights(**{k: on(v) for k, v in vars(x).items()}) for x in weights.layers]
        super().__init__(
            config, Weights(embedding, layers, on(weights.norm), head, weights.rope_factors)
        )

    def embed(self, tokens: Array) -> Any:
        """See :class:`Dense`."""
        import paddle

        index = paddle.to_tensor(np.asarray(tokens, np.int64), place=self._place)
        return paddle.nn.functional.embedding(index, self.weights.embedding) * float(
            self.config.embedding_scale
        )

    def logits(self, hidden: Any) -> Array:
        """See :class:`Dense`."""
        import paddle

        result: Array = paddle.matmul(hidden, self.weights.head, transpose_y=True).numpy()
        return result

    def _norm(self, x: Any, weight: Any) -> Any:
        import paddle

        squares = (x * x).mean(axis=-1, keepdim=True)
        return x * paddle.rsqrt(squares + self.config.norm_eps) * weight

    def _gate(self, x: Any) -> Any:
        import paddle.nn.functional as functional

        return functional.gelu(x, approximate=True) if self.config.gelu else functional.silu(x)
