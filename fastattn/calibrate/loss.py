"""Types of layers by what they cost the model: its loss, not an error of attention outputs.

The divergence of the model's next token from that with a 16-bit cache, in nats, is about the rise
of its loss: the logarithm of its perplexity. Errors of layers are small and independent, so their
divergences add, and each grows with the square of the relative error of the layer's attention
outputs. One pass a layer, with that layer's cache alone quantised, gives the factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastattn.calibrate.calibration import Calibration, LayerCalibration
from fastattn.calibrate.choose import (
    Candidate,
    as_stored,
    sampled_rows,
    transforms_of,
    try_candidate,
)
from fastattn.calibrate.samples import LayerSamples
from fastattn.evaluate.score import Scores, rows_at_a_time, score
from fastattn.functional._cache_types import (
    BLOCK_SIZE,
    DYNAMIC_TYPES,
    cache_shapes,
    token_scales,
    value_dim,
)
from fastattn.models import LanguageModel, exact
from fastattn.reference.numerics import Array

#: Gets a number of units of work, and a word on what was done.
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Choice:
    """What was chosen, and the divergence that it is expected to cost.

    Attributes
    ----------
    calibration : Calibration
    divergence : dict
        By layer, in nats a token.
    """

    calibration: Calibration
    divergence: dict[int, float]

    @property
    def total(self) -> float:
        """Of all layers."""
        return sum(self.divergence.values())


def bytes_of(cache_quant_type: str, head_dim: int) -> int:
    """Bytes of a token and KV head: codes of K and V, and dynamic scales."""
    width = 2 if cache_quant_type == "none" else 1
    shapes = cache_shapes(cache_quant_type, 1, 1, head_dim)
    total = width * sum(map(math.prod, shapes)) // BLOCK_SIZE
    for dim in (head_dim, value_dim(head_dim)):
        if cache_quant_type in DYNAMIC_TYPES:
            shape, dtype = token_scales(cache_quant_type, dim)
            total += int(np.prod(shape, dtype=int)) * np.dtype(dtype).itemsize
    return total


def layer_divergences(
    model: LanguageModel,
    texts: Sequence[Array],
    probes: Mapping[int, LayerCalibration],
    progress: Progress | None = None,
) -> dict[int, float]:
    """Divergence of the next token when one layer's cache is stored as its probe, in nats.

    Parameters
    ----------
    model : LanguageModel
    texts : sequence of array of int, shape [T]
    probes : dict
        By layer.
    progress : callable, optional
        Gets the number of tokens of each pass.

    Returns
    -------
    dict
        By layer, the mean over all tokens.
    """
    every = slice(None)
    found = _divergences(model, texts, {n: (n, every, x) for n, x in probes.items()}, progress)
    return {n: found[n] for n in probes}


def head_divergences(
    model: LanguageModel,
    texts: Sequence[Array],
    probes: Mapping[int, LayerCalibration],
    progress: Progress | None = None,
) -> Array:
    """The same for one KV head of one layer at a time.

    Returns
    -------
    array of float64, shape [layers, KV]
        Layers in the order of `probes`.
    """
    heads = range(model.config.kv_heads)
    passes = {(n, h): (n, slice(h, h + 1), x) for n, x in probes.items() for h in heads}
    found = _divergences(model, texts, passes, progress)
    return np.array([[found[n, h] for h in heads] for n in probes])


def joint_loss(
    model: LanguageModel, texts: Sequence[Array], calibration: Calibration
) -> tuple[float, float]:
    """What all layers cost when they are stored as calibrated, in nats a token.

    Returns
    -------
    divergence : float
        Of the next token's distribution.
    rise : float
        Of the negative log-likelihood of the texts. It is the divergence where the model's
        distribution is that of the texts, has far more noise, and may be below 0.
    """

    def change(layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        return _stored(calibration.layers[layer], slice(None), k, v)

    divergence = rise = 0.0
    for tokens in texts:
        base = exact.forward(model.dense, tokens)
        hidden = exact.forward(model.dense, tokens, change=change)
        for before, after in _scores(model, base, hidden, tokens):
            divergence += float(after.divergence.sum())
            rise += float((after.loss - before.loss).sum())
    count = sum(len(tokens) - 1 for tokens in texts)
    return divergence / count, rise / count


def _stored(probe: LayerCalibration, heads: slice, k: Array, v: Array) -> tuple[Array, Array]:
    """K and V, some heads of them as a cache would return them."""
    key, value = as_stored(probe, k, v)
    k, v = k.copy(), v.copy()
    k[:, heads], v[:, heads] = key[:, heads], value[:, heads]
    return k, v


#: A layer, the heads that are stored, and how.
_Pass = tuple[int, slice, LayerCalibration]


def _divergences(
    model: LanguageModel,
    texts: Sequence[Array],
    passes: Mapping[Any, _Pass],
    progress: Progress | None,
) -> dict[Any, float]:
    sums = dict.fromkeys(passes, 0.0)
    for tokens in texts:
        entering: list[Array] = []
        base = exact.forward(model.dense, tokens, entering=entering)
        for name, (n, heads, probe) in passes.items():

            def change(
                layer: int,
                k: Array,
                v: Array,
                n: int = n,
                heads: slice = heads,
                probe: LayerCalibration = probe,
            ) -> tuple[Array, Array]:
                return _stored(probe, heads, k, v) if layer == n else (k, v)

            hidden = exact.forward(model.dense, tokens, change=change, start=(n, entering[n]))
            sums[name] += _divergence(model, base, hidden, tokens)
            if progress is not None:
                progress(len(tokens), f"layer {n}")
    count = sum(len(tokens) - 1 for tokens in texts)
    return {name: value / count for name, value in sums.items()}


def _divergence(model: LanguageModel, base: Array, hidden: Array, tokens: Array) -> float:
    """Sum over the tokens of a text."""
    found = _scores(model, base, hidden, tokens)
    return max(sum(float(after.divergence.sum()) for _, after in found), 0.0)


def _scores(
    model: LanguageModel, base: Array, hidden: Array, tokens: Array
) -> Iterator[tuple[Scores, Scores]]:
    """Scores of a text, some tokens at a time: of the base, and against it."""
    step = rows_at_a_time(model.config.vocabulary)
    for at in range(0, len(tokens) - 1, step):
        end = min(at + step, len(tokens) - 1)
        logits = [model.dense.logits(x[at:end]) for x in (base, hidden)]
        before, (after,) = score(logits[0], logits[1:], tokens[at + 1 : end + 1])
        yield before, after


def best_of_types(
    samples: Sequence[LayerSamples],
    types: Sequence[str],
    transforms: Sequence[str],
    granularity: str = "head",
    queries: int = 64,
    seed: int = 0,
) -> dict[str, LayerCalibration]:
    """Of each type, the transform with the least error of a layer's attention outputs."""
    rows = sampled_rows(samples, queries, seed)
    found: dict[str, LayerCalibration] = {}
    for kind in types:
        tried = [
            try_candidate(samples, Candidate(kind, transform), granularity, rows)
            for transform in transforms_of(kind, transforms)
        ]
        best = min(tried, key=lambda layer: layer.error or 0.0)
        best.errors = {layer.name: layer.error or 0.0 for layer in tried}
        found[kind] = best
    return found


def choose_types(
    options: Mapping[int, Mapping[str, LayerCalibration]],
    probed: Mapping[int, tuple[LayerCalibration, float]],
    head_dim: int,
    *,
    most_loss: float = 0.0,
    most_bytes: float = math.inf,
) -> Choice:
    """Types of layers within a loss, with the fewest bytes; or within bytes, with the least loss.

    Starts with the smallest type everywhere, then changes the layer where a byte saves most, until
    the divergences add up to the loss at most, nothing saves any more, or no change fits the bytes.

    Parameters
    ----------
    options : dict
        By layer and type.
    probed : dict
        By layer, what it was probed with, and the divergence that this cost.
    head_dim : int
    most_loss : float
        In nats a token.
    most_bytes : float
        Of a token and KV head, K and V together, the mean over the layers.
    """
    expected: dict[int, dict[str, float]] = {}
    for n, by_type in options.items():
        probe, divergence = probed[n]
        factor = divergence / max((probe.error or 0.0) ** 2, 1e-30)
        expected[n] = {kind: factor * (x.error or 0.0) ** 2 for kind, x in by_type.items()}
    size = {kind: bytes_of(kind, head_dim) for by_type in options.values() for kind in by_type}
    chosen = {
        n: min(by_type, key=lambda kind: (size[kind], expected[n][kind]))
        for n, by_type in options.items()
    }
    room = most_bytes * len(options) - sum(size[kind] for kind in chosen.values())

    def total() -> float:
        return sum(expected[n][kind] for n, kind in chosen.items())

    while total() > most_loss:
        steps = [
            ((expected[n][now] - expected[n][kind]) / max(size[kind] - size[now], 1), n, kind)
            for n, now in chosen.items()
            for kind in options[n]
            if expected[n][kind] < expected[n][now] and size[kind] - size[now] <= room
        ]
        if not steps:
            break
        _, n, kind = max(steps)
        room -= size[kind] - size[chosen[n]]
        chosen[n] = kind
    return Choice(
        Calibration({n: options[n][kind] for n, kind in chosen.items()}),
        {n: expected[n][kind] for n, kind in chosen.items()},
    )
