"""The demo's model with latent attention (MLA) and a lightning indexer, as in DeepSeek-V3.2.

The sizes of the cache contents are the real ones: 512 latent and 64 rotated channels per token, and
128 channels of an index key. All other sizes are small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import paddle

from fastattn.demo.model import Sizes, Trunk, Weights, rms_norm, rotary_angles, rotate
from fastattn.reference.numerics import Array

#: Channels of an index key. The operators support no other number.
INDEX_DIM = 128
LATENT_DIM = 512
ROPE_DIM = 64


@dataclass(frozen=True)
class LatentConfig(Sizes):
    """Sizes of a model with latent attention.

    Attributes
    ----------
    nope_dim, value_dim : int
        Channels of a head before absorption: of Q and K without rotation, and of V.
    query_rank : int
        Channels from which queries, including the indexer's, are projected.
    window : int
        Number of last keys that a query always sees, including itself.
    topk : int
        Number of keys before the window that the indexer selects.
    """

    nope_dim: int = 32
    value_dim: int = 32
    query_rank: int = 64
    index_heads: int = 8
    window: int = 16
    topk: int = 32

    @property
    def rotary_dim(self) -> int:
        """Number of rotated channels of a head and of an index head."""
        return ROPE_DIM

    @property
    def softmax_scale(self) -> float:
        """Softmax scale of a head before absorption."""
        return 1 / math.sqrt(self.nope_dim + ROPE_DIM)

    @property
    def index_scale(self) -> float:
        """Factor of the indexer's logits."""
        return 1 / math.sqrt(INDEX_DIM * self.index_heads)

    def attention_shapes(self, i: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights of layer i's attention."""
        return {
            f"{i}.query_down": (self.hidden, self.query_rank),
            f"{i}.query_norm": (self.query_rank,),
            f"{i}.query_up": (self.query_rank, self.heads * (self.nope_dim + ROPE_DIM)),
            f"{i}.latent_down": (self.hidden, LATENT_DIM + ROPE_DIM),
            f"{i}.latent_norm": (LATENT_DIM,),
            f"{i}.key_up": (LATENT_DIM, self.heads * self.nope_dim),
            f"{i}.value_up": (LATENT_DIM, self.heads * self.value_dim),
            f"{i}.attention_out": (self.heads * self.value_dim, self.hidden),
            **self.indexer_shapes(i),
        }

    def indexer_shapes(self, i: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights of layer i's indexer."""
        return {
            f"{i}.index_query": (self.query_rank, self.index_heads * INDEX_DIM),
            f"{i}.index_key": (self.hidden, INDEX_DIM),
            f"{i}.index_key_norm": (INDEX_DIM,),
            f"{i}.index_weight": (self.hidden, self.index_heads),
        }


def cos_sin_table(config: LatentConfig) -> Array:
    """Cosines, then sines of every position, fp32 ``[context, 64]``, as the indexer takes them."""
    angles = rotary_angles(config)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


class AttentionInputs(NamedTuple):
    """Inputs of a layer's attention for T tokens, fp32.

    Attributes
    ----------
    q : Tensor, shape [T, H, 576]
        Absorbed: 512 channels for the latent, then 64 rotated channels.
    latent, rope : Tensor, shapes [T, 512] and [T, 64]
        Contents of the cache; `rope` is rotated.
    index_q : Tensor, shape [T, heads of the indexer, 128]
        Not rotated, because the operator that quantises it also rotates it.
    index_key : Tensor, shape [T, 128]
        Rotated.
    index_weight : Tensor, shape [T, heads of the indexer]
    """

    q: Any
    latent: Any
    rope: Any
    index_q: Any
    index_key: Any
    index_weight: Any


class LatentModel(Trunk):
    """The model on a Paddle place, fp32, in the absorbed form for latent caches.

    The K and V of a head are never computed. Its query is multiplied by the key projection instead,
    and its output, 512 channels, by the value projection.

    Parameters
    ----------
    config : LatentConfig
    weights : dict of arrays
    place : optional
        Default: CPU.
    """

    config: LatentConfig

    def __init__(self, config: LatentConfig, weights: Weights, place: Any = None) -> None:
        absorbed = dict(weights)
        for i in range(config.layers):
            for name, order in (("key_up", (1, 2, 0)), ("value_up", (1, 0, 2))):
                heads = weights[f"{i}.{name}"].reshape(LATENT_DIM, config.heads, -1)
                absorbed[f"{i}.{name}"] = np.ascontiguousarray(heads.transpose(order))
        super().__init__(config, absorbed, place)
        angles = rotary_angles(config)[:, None]
        self._cos, self._sin = np.cos(angles).astype("f4"), np.sin(angles).astype("f4")

    def attention_inputs(self, layer: int, x: Any, positions: Array) -> AttentionInputs:
        """Projections of the residual stream ``[T, hidden]`` of tokens at `positions` ``[T]``."""
        config, tokens = self.config, len(positions)
        cos, sin = self.tensor(self._cos[positions]), self.tensor(self._sin[positions])

        def project(name: str, y: Any) -> Any:
            return paddle.matmul(y, self.weights[f"{layer}.{name}"])

        def norm(name: str, y: Any) -> Any:
            return rms_norm(y, self.weights[f"{layer}.{name}"])

        entry = norm("attention_norm", x)
        query = norm("query_norm", project("query_down", entry))
        q = project("query_up", query).reshape([tokens, config.heads, -1])
        content = project("key_up", q[..., : config.nope_dim].transpose([1, 0, 2]))
        turned = rotate(q[..., config.nope_dim :], cos, sin)
        down = project("latent_down", entry)
        rope = rotate(down[:, LATENT_DIM:].unsqueeze(1), cos, sin).squeeze(1)
        key = norm("index_key_norm", project("index_key", entry))
        still = INDEX_DIM - ROPE_DIM
        key_rope = rotate(key[:, still:].unsqueeze(1), cos, sin).squeeze(1)
        return AttentionInputs(
            q=paddle.concat([content.transpose([1, 0, 2]), turned], axis=-1),
            latent=norm("latent_norm", down[:, :LATENT_DIM]),
            rope=rope,
            index_q=project("index_query", query).reshape([tokens, -1, INDEX_DIM]),
            index_key=paddle.concat([key[:, :still], key_rope], axis=-1),
            index_weight=project("index_weight", entry),
        )

    def finish(self, layer: int, x: Any, attention: Any) -> Any:
        """Residual stream after a layer whose attention gave `attention`, ``[T, H, 512]``."""
        values = paddle.matmul(attention.transpose([1, 0, 2]), self.weights[f"{layer}.value_up"])
        return super().finish(layer, x, values.transpose([1, 0, 2]).flatten(1))
