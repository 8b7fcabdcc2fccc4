"""A model's weights in fp32, in the order in which they are used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fastattn.models.config import ModelConfig, ModelError
from fastattn.reference.numerics import Array


@dataclass
class LayerWeights:
    """One layer. Matrices are ``[in, out]``, norms are multiplied with, not added to 1.

    Attributes
    ----------
    attention_norm, mlp_norm : array, shape [hidden]
    qkv : array, shape [hidden, (H + 2 KV) * D]
    attention_out : array, shape [H * D, hidden]
    gate_up : array, shape [hidden, 2 * mlp]
        The gate's columns, then those that it multiplies.
    down : array, shape [mlp, hidden]
    qkv_bias : array, shape [(H + 2 KV) * D], optional
    q_norm, k_norm : array, shape [D], optional
        RMSNorm of a head, before its rotation.
    attention_post_norm, mlp_post_norm : array, shape [hidden], optional
        RMSNorm of what a block adds to the residual stream.
    """

    attention_norm: Array
    qkv: Array
    attention_out: Array
    mlp_norm: Array
    gate_up: Array
    down: Array
    qkv_bias: Array | None = None
    q_norm: Array | None = None
    k_norm: Array | None = None
    attention_post_norm: Array | None = None
    mlp_post_norm: Array | None = None


@dataclass
class Weights:
    """All layers, and what is around them.

    Attributes
    ----------
    embedding, head : array, shape [vocabulary, hidden]
        One array where they are tied.
    layers : list of LayerWeights
    norm : array, shape [hidden]
    rope_factors : array, shape [head_dim / 2], optional
    """

    embedding: Array
    layers: list[LayerWeights]
    norm: Array
    head: Array
    rope_factors: Array | None = None

    @property
    def parameters(self) -> int:
        """Number of weights; tied ones count once."""
        arrays = [self.embedding, self.norm]
        if self.head is not self.embedding:
            arrays.append(self.head)
        for layer in self.layers:
            arrays += [x for x in vars(layer).values() if x is not None]
        return sum(int(x.size) for x in arrays)


#: Gives an array of a name, or None if the file has none.
Reader = Callable[[str], "Array | None"]


class NamedReader:
    """Arrays of a file by name, with their shapes checked.

    Parameters
    ----------
    read : callable
    """

    def __init__(self, read: Reader) -> None:
        self._read = read

    def get(self, name: str, *shape: int) -> Array:
        """The array, float32.

        Raises
        ------
        ModelError
            If it is missing, or its shape is another one.
        """
        found = self.find(name, *shape)
        if found is None:
            raise ModelError(f"{name} is missing")
        return found

    def find(self, name: str, *shape: int) -> Array | None:
        """The same, or None."""
        found = self._read(name)
        if found is not None and found.shape != shape:
            raise ModelError(f"{name}: expected shape {list(shape)}, got {list(found.shape)}")
        return found


@dataclass(frozen=True)
class LayerNames:
    """A format's names of a layer's tensors, with ``{}`` for its number. Empty: it has none."""

    attention_norm: str
    q: str
    k: str
    v: str
    attention_out: str
    mlp_norm: str
    gate: str
    up: str
    down: str
    q_norm: str
    k_norm: str
    attention_post_norm: str = ""
    mlp_post_norm: str = ""


def _stack(reader: NamedReader, names: list[str], rows: tuple[int, ...], columns: int) -> Array:
    """Matrices ``[rows, columns]`` one after the other, as ``[columns, sum of rows]``."""
    parts = [reader.get(name, n, columns) for name, n in zip(names, rows)]
    return np.ascontiguousarray(np.concatenate(parts).T)


def read_weights(
    reader: NamedReader,
    config: ModelConfig,
    names: LayerNames,
    mlp: int,
    ends: tuple[str, str, str],
    rope_factors: Array | None,
) -> Weights:
    """Weights of a model; `ends` names its embedding, its last norm and its head.

    Raises
    ------
    ModelError
        If one is missing or has another shape. Without a head the embedding is the head, too.
    """
    table = (config.vocabulary, config.hidden)
    embedding, head = reader.get(ends[0], *table), reader.find(ends[2], *table)
    return Weights(
        embedding=embedding,
        layers=[read_layer(reader, config, names, n, mlp) for n in range(config.layers)],
        norm=reader.get(ends[1], config.hidden),
        head=embedding if head is None else head,
        rope_factors=rope_factors,
    )


def read_layer(
    reader: NamedReader, config: ModelConfig, names: LayerNames, number: int, mlp: int
) -> LayerWeights:
    """Weights of a layer.

    Raises
    ------
    ModelError
        If one is missing or has another shape.
    """
    hidden, dim = config.hidden, config.head_dim
    widths = config.widths

    def name(pattern: str, kind: str = "weight") -> str:
        return f"{pattern.format(number)}.{kind}"

    qkv = [names.q, names.k, names.v]
    bias = None
    parts = [reader.find(name(x, "bias"), width) for x, width in zip(qkv, widths)]
    if any(part is not None for part in parts):
        bias = np.concatenate(
            [np.zeros(w, np.float32) if p is None else p for p, w in zip(parts, widths)]
        )

    def norm(pattern: str, size: int, wanted: bool) -> Array | None:
        return reader.get(name(pattern), size) if wanted else None

    qk_norm = config.architecture in ("qwen3", "gemma3")
    post_norm = config.architecture == "gemma3"
    return LayerWeights(
        attention_norm=reader.get(name(names.attention_norm), hidden),
        qkv=_stack(reader, [name(x) for x in qkv], widths, hidden),
        qkv_bias=bias,
        q_norm=norm(names.q_norm, dim, qk_norm),
        k_norm=norm(names.k_norm, dim, qk_norm),
        attention_out=_stack(reader, [name(names.attention_out)], (hidden,), widths[0]),
        attention_post_norm=norm(names.attention_post_norm, hidden, post_norm),
        mlp_norm=reader.get(name(names.mlp_norm), hidden),
        gate_up=_stack(reader, [name(names.gate), name(names.up)], (mlp, mlp), hidden),
        down=_stack(reader, [name(names.down)], (hidden,), mlp),
        mlp_post_norm=norm(names.mlp_post_norm, hidden, post_norm),
    )
