"""Loss and gradients of the latent model and of its indexer, in NumPy.

The attention is dense and not absorbed: each head has its own K and V, made from the latent. The
indexer is distilled from it. Its softmax over the keys before the window approximates the attention
that all heads together give to these keys.

Arrays are fp32. N = B * T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastattn.demo.gradient import (
    MASKED,
    Layer,
    Norm,
    Trace,
    causal_softmax,
    heads_last,
    rms_norm,
    rms_norm_backward,
    rotation,
    run,
    run_back,
    scores_backward,
    softmax,
)
from fastattn.demo.latent_model import INDEX_DIM, LATENT_DIM, ROPE_DIM, LatentConfig
from fastattn.demo.model import Weights
from fastattn.reference.numerics import Array


class LatentHeads(NamedTuple):
    """Values of a layer's attention and its indexer for the backward pass."""

    query_norm: Norm
    query_in: Array  # [N, query_rank], after its norm
    latent_norm: Norm
    latent: Array  # [N, 512], after its norm
    q: Array  # [B, H, T, nope + 64], rotated and scaled
    k: Array  # [B, H, T, nope + 64], rotated
    v: Array  # [B, H, T, value]
    p: Array  # [B, H, T, T]
    out: Array  # [B, H, T, value]


def turned(x: Array, turn: Array) -> Array:
    """Rotate the last 64 channels of a copy of ``[B, T, heads, C]``."""
    x = np.array(x)
    rope = np.ascontiguousarray(x[..., -ROPE_DIM:]).view(np.complex64) * turn
    x[..., -ROPE_DIM:] = rope.view(np.float32)
    return x


def _heads_first(x: Array) -> Array:
    return np.ascontiguousarray(x.transpose(0, 2, 1, 3))


def _project(
    i: int, weights: Weights, config: LatentConfig, x: Array, shape: tuple[int, int], turn: Array
) -> tuple[tuple[Norm, Array, Norm, Array], Array, Array, Array]:
    """Normalised inputs, and Q, K and V of a layer's heads, ``[B, H, T, C]``."""
    batch, length = shape
    query_in, query_norm = rms_norm(x @ weights[f"{i}.query_down"], weights[f"{i}.query_norm"])
    down = x @ weights[f"{i}.latent_down"]
    latent, latent_norm = rms_norm(down[:, :LATENT_DIM], weights[f"{i}.latent_norm"])
    q = (query_in @ weights[f"{i}.query_up"]).reshape(batch, length, config.heads, -1)
    q = turned(q, turn) * np.float32(config.softmax_scale)
    k = np.empty((batch, length, config.heads, config.nope_dim + ROPE_DIM), np.float32)
    k[..., : config.nope_dim] = (latent @ weights[f"{i}.key_up"]).reshape(
        batch, length, config.heads, -1
    )
    k[..., config.nope_dim :] = turned(down[:, LATENT_DIM:].reshape(batch, length, 1, -1), turn)
    v = (latent @ weights[f"{i}.value_up"]).reshape(batch, length, config.heads, -1)
    saved = (query_norm, query_in, latent_norm, latent)
    return saved, _heads_first(q), _heads_first(k), _heads_first(v)


def forward(weights: Weights, config: LatentConfig, tokens: Array) -> Trace:
    """Run the model over int64 tokens ``[B, T]``, with dense attention."""
    batch, length = tokens.shape
    turn = rotation(config, length)

    def attend(i: int, entry: Array) -> tuple[LatentHeads, Array]:
        saved, q, k, v = _project(i, weights, config, entry, (batch, length), turn)
        p = causal_softmax(q @ k.swapaxes(-1, -2))
        heads = LatentHeads(*saved, q, k, v, p, p @ v)
        return heads, heads_last(heads.out, config.heads, length)

    return run(weights, config, tokens, attend)


def loss_and_gradients(
    weights: Weights, config: LatentConfig, tokens: Array, targets: Array
) -> tuple[float, Weights]:
    """Mean cross entropy of predicting `targets` ``[B, T]`` from `tokens` ``[B, T]``.

    The indexer has no gradient here, because the attention is dense.
    """
    turn_back = rotation(config, tokens.shape[1]).conj()

    def attend_back(i: int, saved: Layer, dout: Array, gradients: Weights) -> Array:
        return _attention_backward(i, weights, config, saved, dout, turn_back, gradients)

    trace = forward(weights, config, tokens)
    return run_back(weights, trace, tokens, targets, attend_back)


def _attention_backward(
    i: int,
    weights: Weights,
    config: LatentConfig,
    layer: Layer,
    dout: Array,
    turn_back: Array,
    gradients: Weights,
) -> Array:
    saved: LatentHeads = layer.attention
    batch, heads, length, _ = saved.q.shape
    tokens, nope = batch * length, config.nope_dim
    dout = _heads_first(dout.reshape(batch, length, heads, -1))
    dscores = scores_backward(dout, saved.v, saved.p, saved.out)
    dq = (dscores @ saved.k).transpose(0, 2, 1, 3) * np.float32(config.softmax_scale)
    dk = (dscores.swapaxes(-1, -2) @ saved.q).transpose(0, 2, 1, 3)
    dv = heads_last(saved.p.swapaxes(-1, -2) @ dout, heads, length)
    dq = turned(dq, turn_back).reshape(tokens, -1)
    dk_nope = np.ascontiguousarray(dk[..., :nope]).reshape(tokens, -1)
    dk_rope = turned(dk[..., nope:].sum(2, keepdims=True), turn_back).reshape(tokens, -1)
    gradients[f"{i}.query_up"] = saved.query_in.T @ dq
    dquery, gradients[f"{i}.query_norm"] = rms_norm_backward(
        dq @ weights[f"{i}.query_up"].T, weights[f"{i}.query_norm"], saved.query_norm
    )
    gradients[f"{i}.query_down"] = layer.attention_in.T @ dquery
    gradients[f"{i}.key_up"] = saved.latent.T @ dk_nope
    gradients[f"{i}.value_up"] = saved.latent.T @ dv
    dlatent, gradients[f"{i}.latent_norm"] = rms_norm_backward(
        dk_nope @ weights[f"{i}.key_up"].T + dv @ weights[f"{i}.value_up"].T,
        weights[f"{i}.latent_norm"],
        saved.latent_norm,
    )
    ddown = np.concatenate([dlatent, dk_rope], axis=1)
    gradients[f"{i}.latent_down"] = layer.attention_in.T @ ddown
    return dquery @ weights[f"{i}.query_down"].T + ddown @ weights[f"{i}.latent_down"].T


# The indexer


class _Index(NamedTuple):
    """Activations of an indexer."""

    q: Array  # [B, T, heads, 128], rotated
    key_norm: Norm
    k: Array  # [B, T, 128], rotated
    weight: Array  # [B, T, heads], scaled
    relu: Array  # [B, heads, T, T]
    logits: Array  # [B, T, T], without a mask


def _index(i: int, weights: Weights, config: LatentConfig, saved: Layer, turn: Array) -> _Index:
    heads: LatentHeads = saved.attention
    batch, _, length, _ = heads.q.shape
    q = (heads.query_in @ weights[f"{i}.index_query"]).reshape(batch, length, -1, INDEX_DIM)
    q = turned(q, turn)
    k, key_norm = rms_norm(
        saved.attention_in @ weights[f"{i}.index_key"], weights[f"{i}.index_key_norm"]
    )
    k = turned(k.reshape(batch, length, 1, INDEX_DIM), turn)[:, :, 0]
    weight = (saved.attention_in @ weights[f"{i}.index_weight"]).reshape(batch, length, -1)
    weight *= np.float32(config.index_scale)
    relu = _heads_first(q) @ k[:, None].swapaxes(-1, -2)
    np.maximum(relu, np.float32(0), out=relu)
    logits = np.matmul(weight[:, :, None], relu.transpose(0, 2, 1, 3))[:, :, 0]
    return _Index(q, key_norm, k, weight, relu, logits)


def index_logits(weights: Weights, config: LatentConfig, trace: Trace) -> list[Array]:
    """Logits of each layer's indexer for all pairs of a query and a key, ``[B, T, T]``."""
    turn = rotation(config, trace.layers[0].attention.q.shape[2])
    return [_index(i, weights, config, saved, turn).logits for i, saved in enumerate(trace.layers)]


def before_window(config: LatentConfig, length: int) -> Array:
    """Whether key s is before the window of query t, bool ``[T, T]``."""
    positions = np.arange(length)
    return positions <= positions[:, None] - config.window


def distil(weights: Weights, config: LatentConfig, tokens: Array) -> tuple[float, Weights]:
    """Mean Kullback-Leibler divergence of the indexers from the attention, and its gradients.

    The mean is over layers and over the queries that have keys before their window. Only the
    weights of the indexers have gradients.
    """
    batch, length = tokens.shape
    turn = rotation(config, length)
    seen = before_window(config, length)
    rows = seen.any(-1)
    count = config.layers * batch * int(rows.sum())
    loss = 0.0
    gradients: Weights = {}
    for i, saved in enumerate(forward(weights, config, tokens).layers):
        index = _index(i, weights, config, saved, turn)
        target = saved.attention.p.sum(1) * seen
        target /= np.maximum(target.sum(-1, keepdims=True), np.float32(1e-20))
        p = softmax(np.where(seen, index.logits, MASKED))
        divergence = target * (np.log(target + np.float32(1e-20)) - np.log(p + np.float32(1e-20)))
        loss += float(divergence[:, rows].sum()) / count
        dlogits = (p - target) * np.float32(1 / count)
        dlogits[:, ~rows] = 0
        _index_backward(i, weights, config, saved, index, dlogits, turn.conj(), gradients)
    return loss, gradients


def _index_backward(
    i: int,
    weights: Weights,
    config: LatentConfig,
    saved: Layer,
    index: _Index,
    dlogits: Array,
    turn_back: Array,
    gradients: Weights,
) -> None:
    batch, length, _ = index.k.shape
    tokens = batch * length
    dweight = np.matmul(index.relu.transpose(0, 2, 1, 3), dlogits[..., None])[..., 0]
    dweight = dweight.reshape(tokens, -1) * np.float32(config.index_scale)
    gradients[f"{i}.index_weight"] = saved.attention_in.T @ dweight
    dscores = (index.relu > 0) * dlogits[:, None]
    dscores *= index.weight.transpose(0, 2, 1)[..., None]
    dq = (dscores @ index.k[:, None]).transpose(0, 2, 1, 3)
    dq = turned(dq, turn_back).reshape(tokens, -1)
    gradients[f"{i}.index_query"] = saved.attention.query_in.T @ dq
    dk = (dscores.swapaxes(-1, -2) @ _heads_first(index.q)).sum(1)
    dk = turned(dk[:, :, None], turn_back).reshape(tokens, -1)
    dkey, gradients[f"{i}.index_key_norm"] = rms_norm_backward(
        dk, weights[f"{i}.index_key_norm"], index.key_norm
    )
    gradients[f"{i}.index_key"] = saved.attention_in.T @ dkey
