"""Loss and gradients of the demo's model, in NumPy.

The gradients are written by hand, because the BLAS in a CPU build of Paddle can be several times
slower than NumPy's. A matrix product of this model ran at 34 GFLOP/s in Paddle and 230 in NumPy on
two cores of an AMD EPYC (with the defaults of both; Paddle uses one thread). A test compares them
with Paddle's own gradients.

Arrays are fp32. N = B * T tokens; G = heads / kv_heads queries per KV head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fastattn.demo.model import NORM_EPS, Config, Sizes, Weights, rotary_angles
from fastattn.reference.numerics import Array

#: Number added to a score if the query does not see the key.
MASKED = np.float32(-1e30)


class Norm(NamedTuple):
    """Values of a norm for the backward pass."""

    normed: Array  # [N, hidden], before the weight
    inverse: Array  # [N, 1]


class Mlp(NamedTuple):
    """Activations of a layer's SwiGLU for the backward pass."""

    norm: Norm
    input: Array  # [N, hidden]
    gate: Array  # [N, mlp]
    sigmoid: Array  # [N, mlp]
    up: Array  # [N, mlp]


class Layer(NamedTuple):
    """Activations of a layer for the backward pass."""

    attention_norm: Norm
    attention_in: Array  # [N, hidden]
    attention: Any  # specific to the kind of attention
    flat_out: Array  # [N, H * D]
    mlp: Mlp


class Trace(NamedTuple):
    """A forward pass."""

    layers: list[Layer]
    final_norm: Norm
    hidden: Array  # [N, hidden]
    logits: Array  # [N, vocabulary]


#: Attention of layer i over its input [N, hidden]. It returns the values for the backward pass, and
#: the output [N, H * D] before the last product.
Attend = Callable[[int, Array], tuple[Any, Array]]
#: The backward pass, from the gradient of that output to the gradient of the input. The gradients
#: of the weights go into the last argument.
AttendBack = Callable[[int, Layer, Array, Weights], Array]


class _Heads(NamedTuple):
    """Values of an attention for the backward pass."""

    q: Array  # [B, KV, G * T, D], rotated and scaled by 1 / sqrt(D)
    k: Array  # [B, KV, T, D], rotated
    v: Array  # [B, KV, T, D]
    p: Array  # [B, KV, G * T, T]
    out: Array  # [B, KV, G * T, D]


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


def causal_softmax(scores: Array) -> Array:
    """Probabilities of ``[..., T, T]``, in place."""
    length = scores.shape[-1]
    scores += np.triu(np.full((length, length), MASKED, np.float32), 1)
    return softmax(scores)


def softmax(scores: Array) -> Array:
    """Softmax over the last dimension, in place."""
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(-1, keepdims=True)
    return scores


def scores_backward(dout: Array, v: Array, p: Array, out: Array) -> Array:
    """Gradient of the scores of ``out = softmax(scores) @ v``."""
    dscores = dout @ v.swapaxes(-1, -2)
    dscores -= np.einsum("bhmd,bhmd->bhm", dout, out)[..., None]
    dscores *= p
    return dscores


def _attention(config: Config, qkv: Array, turn: Array) -> _Heads:
    """Causal attention over ``[B, T, H + 2 KV, D]``."""
    batch, length = qkv.shape[:2]
    heads, kv_heads, dim = config.heads, config.kv_heads, config.head_dim
    rows = heads // kv_heads * length
    turned = (qkv[:, :, : heads + kv_heads].view(np.complex64) * turn).view(np.float32)
    q = (turned[:, :, :heads] * np.float32(1 / math.sqrt(dim))).transpose(0, 2, 1, 3)
    q = np.ascontiguousarray(q).reshape(batch, kv_heads, rows, dim)
    k = np.ascontiguousarray(turned[:, :, heads:].transpose(0, 2, 1, 3))
    v = np.ascontiguousarray(qkv[:, :, heads + kv_heads :].transpose(0, 2, 1, 3))
    p = q @ k.swapaxes(-1, -2)
    causal_softmax(p.reshape(batch, heads, length, length))
    return _Heads(q, k, v, p, p @ v)


def heads_last(x: Array, heads: int, length: int) -> Array:
    """``[B, KV, G * T, D]`` to ``[N, H * D]``."""
    batch, dim = x.shape[0], x.shape[-1]
    by_token = x.reshape(batch, heads, length, dim).transpose(0, 2, 1, 3)
    return by_token.reshape(batch * length, heads * dim)


def mlp_forward(i: int, weights: Weights, x: Array) -> tuple[Array, Mlp]:
    """Residual stream after layer i's SwiGLU."""
    entry, norm = rms_norm(x, weights[f"{i}.mlp_norm"])
    gate_up = entry @ weights[f"{i}.gate_up"]
    width = gate_up.shape[1] // 2
    gate, up = gate_up[:, :width], gate_up[:, width:]
    with np.errstate(over="ignore"):  # exp(-gate) = inf gives the correct 0
        sigmoid = 1 / (1 + np.exp(-gate))
    return x + (gate * sigmoid * up) @ weights[f"{i}.down"], Mlp(norm, entry, gate, sigmoid, up)


def mlp_backward(i: int, weights: Weights, saved: Mlp, dx: Array, gradients: Weights) -> Array:
    """Gradient of the residual stream before layer i's SwiGLU; adds its weights' to `gradients`."""
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


def run(weights: Weights, config: Sizes, tokens: Array, attend: Attend) -> Trace:
    """Run a model over int64 tokens ``[B, T]``."""
    x = weights["embedding"][tokens.reshape(-1)]
    layers = []
    for i in range(config.layers):
        entry, norm = rms_norm(x, weights[f"{i}.attention_norm"])
        attention, flat_out = attend(i, entry)
        x = x + flat_out @ weights[f"{i}.attention_out"]
        x, mlp = mlp_forward(i, weights, x)
        layers.append(Layer(norm, entry, attention, flat_out, mlp))
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


def run_back(
    weights: Weights, trace: Trace, tokens: Array, targets: Array, attend_back: AttendBack
) -> tuple[float, Weights]:
    """Mean cross entropy of predicting `targets` ``[B, T]``, and the gradients of all weights.

    This consumes the layers of `trace`.
    """
    loss, dlogits = cross_entropy(trace.logits, targets.reshape(-1))
    gradients: Weights = {"embedding": dlogits.T @ trace.hidden}
    dx, gradients["norm"] = rms_norm_backward(
        dlogits @ weights["embedding"], weights["norm"], trace.final_norm
    )
    for i in reversed(range(len(trace.layers))):
        saved = trace.layers.pop()
        dx = mlp_backward(i, weights, saved.mlp, dx, gradients)
        gradients[f"{i}.attention_out"] = saved.flat_out.T @ dx
        dentry = attend_back(i, saved, dx @ weights[f"{i}.attention_out"].T, gradients)
        din, gradients[f"{i}.attention_norm"] = rms_norm_backward(
            dentry, weights[f"{i}.attention_norm"], saved.attention_norm
        )
        dx = dx + din
    np.add.at(gradients["embedding"], tokens.reshape(-1), dx)
    return loss, gradients


def forward(weights: Weights, config: Config, tokens: Array) -> Trace:
    """Run the model over int64 tokens ``[B, T]``."""
    turn = rotation(config, tokens.shape[1])

    def attend(i: int, entry: Array) -> tuple[_Heads, Array]:
        qkv = (entry @ weights[f"{i}.qkv"]).reshape(*tokens.shape, -1, config.head_dim)
        heads = _attention(config, qkv, turn)
        return heads, heads_last(heads.out, config.heads, tokens.shape[1])

    return run(weights, config, tokens, attend)


def loss_and_gradients(
    weights: Weights, config: Config, tokens: Array, targets: Array
) -> tuple[float, Weights]:
    """Mean cross entropy of predicting `targets` ``[B, T]`` from `tokens` ``[B, T]``."""
    turn_back = rotation(config, tokens.shape[1]).conj()

    def attend_back(i: int, saved: Layer, dout: Array, gradients: Weights) -> Array:
        flat = _attention_backward(config, saved.attention, dout, turn_back)
        gradients[f"{i}.qkv"] = saved.attention_in.T @ flat
        return flat @ weights[f"{i}.qkv"].T

    trace = forward(weights, config, tokens)
    return run_back(weights, trace, tokens, targets, attend_back)


def _attention_backward(config: Config, saved: _Heads, dout: Array, turn_back: Array) -> Array:
    """Gradient of Q, K and V before their rotation, ``[N, (H + 2 KV) * D]``."""
    batch, kv_heads, length, dim = saved.k.shape
    heads = config.heads
    dout = dout.reshape(batch, length, heads, dim)
    dout = np.ascontiguousarray(dout.transpose(0, 2, 1, 3)).reshape(saved.out.shape)
    dscores = scores_backward(dout, saved.v, saved.p, saved.out)
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
    return dqkv.reshape(batch * length, -1)
