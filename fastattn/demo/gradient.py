"""Loss and gradients of the demo's model, in NumPy.

Written out by hand because the BLAS inside a CPU build of Paddle can be several times slower than
NumPy's: a matrix product of this model ran at 34 against 230 GFLOP/s on two cores of an AMD EPYC
(defaults of both; Paddle uses one thread). A test holds it to Paddle's own gradients.

Arrays are fp32; N = B * T tokens, G = heads / kv_heads queries a KV head.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fastattn.demo.model import NORM_EPS, Config, Sizes, Weights, rotary_angles
from fastattn.reference.numerics import Array


class Norm(NamedTuple):
    """What the backward pass of a norm needs."""

    normed: Array  # [N, hidden], before the weight
    inverse: Array  # [N, 1]


class Mlp(NamedTuple):
    """Activations of a layer's SwiGLU that the backward pass needs."""

    norm: Norm
    input: Array  # [N, hidden]
    gate: Array  # [N, mlp]
    sigmoid: Array  # [N, mlp]
    up: Array  # [N, mlp]


class _Layer(NamedTuple):
    """Activations of a layer that the backward pass needs."""

    attention_norm: Norm
    attention_in: Array  # [N, hidden]
    q: Array  # [B, KV, G * T, D], rotated and scaled by 1 / sqrt(D)
    k: Array  # [B, KV, T, D], rotated
    v: Array  # [B, KV, T, D]
    p: Array  # [B, KV, G * T, T]
    out: Array  # [B, KV, G * T, D]
    flat_out: Array  # [N, H * D]
    mlp: Mlp


class Trace(NamedTuple):
    """A forward pass."""

    layers: list[_Layer]
    final_norm: Norm
    hidden: Array  # [N, hidden]
    logits: Array  # [N, vocabulary]


def rotation(config: Sizes, length: int) -> Array:
    """``exp(i * angle)`` of positions and channel pairs, complex64 ``[T, 1, D / 2]``."""
    angles = rotary_angles(config)[:length]
    return np.exp(1j * angles).astype(np.complex64)[:, None, :]


def rms_norm(x: Array, weight: Array) -> tuple[Array, Norm]:
    """``[N, C]`` divided by the root of its mean square, times `weight`."""
    mean = np.einsum("nc,nc->n", x, x) / np.float32(x.shape[1])
    inverse = (1 / np.sqrt(mean + np.float32(NORM_EPS)))[:, None]
    normed = x * inverse
    return normed * weight, Norm(normed, inverse)


def rms_norm_backward(dy: Array, weight: Array, saved: Norm) -> tuple[Array, Array]:
    """Gradients of the input and of the weight."""
    dweight = np.einsum("nc,nc->c", dy, saved.normed)
    dn = dy * weight
    mean = np.einsum("nc,nc->n", dn, saved.normed) / np.float32(dn.shape[1])
    return (dn - saved.normed * mean[:, None]) * saved.inverse, dweight


def _attention(config: Config, qkv: Array, turn: Array) -> tuple[Array, ...]:
    """Q, K, V, P and output of causal attention over ``[B, T, H + 2 KV, D]``."""
    batch, length = qkv.shape[:2]
    heads, kv_heads, dim = config.heads, config.kv_heads, config.head_dim
    rows = heads // kv_heads * length
    turned = (qkv[:, :, : heads + kv_heads].view(np.complex64) * turn).view(np.float32)
    q = (turned[:, :, :heads] * np.float32(1 / math.sqrt(dim))).transpose(0, 2, 1, 3)
    q = np.ascontiguousarray(q).reshape(batch, kv_heads, rows, dim)
    k = np.ascontiguousarray(turned[:, :, heads:].transpose(0, 2, 1, 3))
    v = np.ascontiguousarray(qkv[:, :, heads + kv_heads :].transpose(0, 2, 1, 3))
    p = q @ k.swapaxes(-1, -2)
    scores = p.reshape(batch, heads, length, length)
    scores += np.triu(np.full((length, length), -1e30, np.float32), 1)
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(-1, keepdims=True)
    return q, k, v, p, p @ v


def heads_last(x: Array, heads: int, length: int) -> Array:
    """``[B, KV, G * T, D]`` to ``[N, H * D]``."""
    batch, dim = x.shape[0], x.shape[-1]
    by_token = x.reshape(batch, heads, length, dim).transpose(0, 2, 1, 3)
    return by_token.reshape(batch * length, heads * dim)


def mlp_forward(i: int, weights: Weights, x: Array) -> tuple[Array, Mlp]:
    """Residual stream behind layer i's SwiGLU."""
    entry, norm = rms_norm(x, weights[f"{i}.mlp_norm"])
    gate_up = entry @ weights[f"{i}.gate_up"]
    width = gate_up.shape[1] // 2
    gate, up = gate_up[:, :width], gate_up[:, width:]
    with np.errstate(over="ignore"):  # exp(-gate) = inf gives the right 0
        sigmoid = 1 / (1 + np.exp(-gate))
    return x + (gate * sigmoid * up) @ weights[f"{i}.down"], Mlp(norm, entry, gate, sigmoid, up)


def mlp_backward(i: int, weights: Weights, saved: Mlp, dx: Array, gradients: Weights) -> Array:
    """Gradient of the residual stream before it; those of its weights go into `gradients`."""
    activated = saved.gate * saved.sigmoid
    gradients[f"{i}.down"] = (activated * saved.up).T @ dx
    d = dx @ weights[f"{i}.down"].T
    width = d.shape[1]
    dgate_up = np.empty((len(d), 2 * width), np.float32)
    np.multiply(d, activated, out=dgate_up[:, width:])
    slope = saved.sigmoid + activated * (1 - saved.sigmoid)
    np.multiply(d * saved.up, slope, out=dgate_up[:, :width])
    gradients[f"{i}.gate_up"] = saved.input.T @ dgate_up
    din, gradients[f"{i}.mlp_norm"] = rms_norm_backward(
        dgate_up @ weights[f"{i}.gate_up"].T, weights[f"{i}.mlp_norm"], saved.norm
    )
    return dx + din


def forward(weights: Weights, config: Config, tokens: Array) -> Trace:
    """Run the model over int64 tokens ``[B, T]``."""
    batch, length = tokens.shape
    turn = rotation(config, length)
    x = weights["embedding"][tokens.reshape(-1)]
    layers = []
    for i in range(config.layers):
        attention_in, attention_norm = rms_norm(x, weights[f"{i}.attention_norm"])
        qkv = (attention_in @ weights[f"{i}.qkv"]).reshape(batch, length, -1, config.head_dim)
        q, k, v, p, out = _attention(config, qkv, turn)
        flat_out = heads_last(out, config.heads, length)
        x = x + flat_out @ weights[f"{i}.attention_out"]
        x, mlp = mlp_forward(i, weights, x)
        layers.append(_Layer(attention_norm, attention_in, q, k, v, p, out, flat_out, mlp))
    hidden, final_norm = rms_norm(x, weights["norm"])
    return Trace(layers, final_norm, hidden, hidden @ weights["embedding"].T)


def cross_entropy(logits: Array, targets: Array) -> tuple[float, Array]:
    """Mean loss in nats, and its gradient with respect to the logits ``[N, vocabulary]``."""
    rows = np.arange(len(targets))
    shifted = logits - logits.max(-1, keepdims=True)
    e = np.exp(shifted)
    total = e.sum(-1, keepdims=True)
    loss = float(np.mean(np.log(total[:, 0]) - shifted[rows, targets]))
    dlogits = e / total
    dlogits[rows, targets] -= 1
    dlogits *= np.float32(1 / len(targets))
    return loss, dlogits


def loss_and_gradients(
    weights: Weights, config: Config, tokens: Array, targets: Array
) -> tuple[float, Weights]:
    """Mean cross entropy of predicting `targets` ``[B, T]`` from `tokens` ``[B, T]``."""
    length = tokens.shape[1]
    trace = forward(weights, config, tokens)
    loss, dlogits = cross_entropy(trace.logits, targets.reshape(-1))
    gradients: Weights = {"embedding": dlogits.T @ trace.hidden}
    dx, gradients["norm"] = rms_norm_backward(
        dlogits @ weights["embedding"], weights["norm"], trace.final_norm
    )
    turn_back = rotation(config, length).conj()
    for i in reversed(range(config.layers)):
        saved = trace.layers.pop()
        dx = mlp_backward(i, weights, saved.mlp, dx, gradients)
        dx = _attention_backward(i, weights, config, saved, dx, turn_back, gradients)
    np.add.at(gradients["embedding"], tokens.reshape(-1), dx)
    return loss, gradients


def _attention_backward(
    i: int,
    weights: Weights,
    config: Config,
    saved: _Layer,
    dx: Array,
    turn_back: Array,
    gradients: Weights,
) -> Array:
    batch, kv_heads, length, dim = saved.k.shape
    heads = config.heads
    gradients[f"{i}.attention_out"] = saved.flat_out.T @ dx
    dout = (dx @ weights[f"{i}.attention_out"].T).reshape(batch, length, heads, dim)
    dout = np.ascontiguousarray(dout.transpose(0, 2, 1, 3)).reshape(saved.out.shape)
    dscores = dout @ saved.v.swapaxes(-1, -2)
    dscores -= np.einsum("bkmd,bkmd->bkm", dout, saved.out)[..., None]
    dscores *= saved.p
    dqkv = np.empty((batch, length, heads + 2 * kv_heads, dim), np.float32)
    dq = (dscores @ saved.k).reshape(batch, heads, length, dim)
    dq *= np.float32(1 / math.sqrt(dim))
    dqkv[:, :, :heads] = dq.transpose(0, 2, 1, 3)
    dk = dscores.swapaxes(-1, -2) @ saved.q
    dqkv[:, :, heads : heads + kv_heads] = dk.transpose(0, 2, 1, 3)
    dv = saved.p.swapaxes(-1, -2) @ dout
    dqkv[:, :, heads + kv_heads :] = dv.transpose(0, 2, 1, 3)
    rotated = dqkv[:, :, : heads + kv_heads].view(np.complex64)
    rotated *= turn_back
    flat = dqkv.reshape(batch * length, -1)
    gradients[f"{i}.qkv"] = saved.attention_in.T @ flat
    din, gradients[f"{i}.attention_norm"] = rms_norm_backward(
        flat @ weights[f"{i}.qkv"].T, weights[f"{i}.attention_norm"], saved.attention_norm
    )
    return dx + din
