"""Comparison of the latent model's attention variants: bytes, perplexity, recall of the indexer."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastattn.demo import latent_gradient
from fastattn.demo.evaluate import Progress, Score, score_with, scoring_options
from fastattn.demo.latent_engine import Attention, LatentEngine
from fastattn.demo.latent_model import LatentConfig, LatentModel
from fastattn.demo.model import Weights
from fastattn.reference.numerics import Array


def variants(config: LatentConfig) -> list[Attention]:
    """Rows of the table: all keys, the same number of recent keys, and selected keys in both
    formats.
    """
    window, topk = config.window, config.topk
    return [
        Attention("dense", "bf16"),
        Attention("window", "bf16", window + topk),
        Attention("sparse", "bf16", window, topk),
        Attention("sparse", "fp8_656", window, topk),
    ]


def dense_attention(
    weights: Weights, config: LatentConfig, held_out: Array, progress: Progress | None = None
) -> Array:
    """Weights of each query for each key in dense fp32 attention, without a cache.

    Parameters
    ----------
    weights : dict of arrays
    config : LatentConfig
    held_out : array of int64, shape [n, T + 1]
    progress : callable, optional
        Receives the number of tokens of every window.

    Returns
    -------
    array of float32, shape [n, layers, T, T]
        Mean over all heads.
    """
    attention = []
    for window in held_out:
        layers = latent_gradient.forward(weights, config, window[None, :-1]).layers
        attention.append([layer.attention.p[0].mean(0) for layer in layers])
        if progress is not None:
            progress(len(window) - 1)
    return np.asarray(attention)


class Fidelity(NamedTuple):
    """See :class:`fastattn.demo.report.LatentResult`."""

    recall: float | None
    attention_seen: float


def score(
    model: LatentModel,
    attention: Attention,
    held_out: Array,
    *,
    place: Any = None,
    progress: Progress | None = None,
) -> tuple[Score, Array | None]:
    """Perplexity of windows ``[n, T + 1]`` through the paged cache, and the indexer's selections.

    Returns
    -------
    score : Score
    choices : array of int32, shape [windows, layers, T, topk]
        Positions; -1 means none. None without an indexer.
    """
    config = model.config
    sparse = attention.keys == "sparse"
    engine = LatentEngine(
        model, attention, place=place, keep_choices=sparse, **scoring_options(config)
    )
    scored, requests = score_with(engine, held_out, progress)
    if not sparse:
        return scored, None
    length = held_out.shape[1] - 1
    choices = np.full((len(held_out), config.layers, length, attention.topk), -1, np.int32)
    window_of = {id(request): i for i, request in enumerate(requests)}
    for request, position, layer, indices in engine.choices:
        choices[window_of[id(request)], layer, position] = indices
    return scored, choices


def fidelity(weights: Array, attention: Attention, choices: Array | None) -> Fidelity:
    """Fraction of the dense attention that a variant's queries see.

    Parameters
    ----------
    weights : array, shape [windows, layers, T, T]
        From :func:`dense_attention`.
    attention : Attention
    choices : array, optional
        From :func:`score`.
    """
    length = weights.shape[-1]
    if attention.keys == "dense":
        return Fidelity(None, 1.0)
    positions = np.arange(length)
    before = positions <= positions[:, None] - attention.window
    visible = np.broadcast_to(np.tri(length, dtype=bool) & ~before, weights.shape)
    queries = slice(attention.window + attention.topk, None)  # queries that do not see all keys
    if choices is None:
        return Fidelity(None, float(_covered(weights, visible)[:, :, queries].mean()))
    chosen = _members(choices, length)
    order = np.argsort(np.where(before, -weights, np.inf), axis=-1, kind="stable")
    wanted = _members(order[..., : attention.topk], length)
    hits = (chosen & wanted)[:, :, queries].sum(-1) / attention.topk
    return Fidelity(
        float(hits.mean()), float(_covered(weights, visible | chosen)[:, :, queries].mean())
    )


def _covered(weights: Array, visible: Array) -> Array:
    return np.asarray((weights * visible).sum(-1))


def _members(indices: Array, length: int) -> Array:
    """Whether a position is in a query's indices, bool ``[..., T]``; -1 means no position."""
    result = np.zeros((*indices.shape[:-1], length + 1), bool)
    np.put_along_axis(result, np.where(indices < 0, length, indices), True, axis=-1)
    return result[..., :length]


def rms_difference(logits: Array, base: Array) -> float:
    """Root mean square difference of two logit arrays."""
    return float(np.sqrt(np.mean(np.square(logits - base, dtype=np.float64))))


def most_keys(attention: Attention, config: LatentConfig) -> int:
    """Maximum number of keys that a query sees."""
    return config.context if attention.keys == "dense" else attention.window + attention.topk
