"""Comparison of cache types: bytes, perplexity, logit error, tokens per second."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastattn import _check
from fastattn.backends.config import BLOCK_SIZE
from fastattn.demo.engine import Engine, LayerScales, Server, Statistics
from fastattn.demo.gradient import cross_entropy, forward
from fastattn.demo.model import Config, Model, Sizes, Weights
from fastattn.demo.scheduler import Request, Sampling
from fastattn.demo.text import encode
from fastattn.functional._cache_types import STATIC_TYPES
from fastattn.reference.numerics import Array, amax, dynamic_scale

#: Number of text windows for static scales, and for perplexity.
CALIBRATION_WINDOWS = 16
HELD_OUT_WINDOWS = 40

_CALIBRATION_BATCH = 4

#: Number of timed steps per check on the device.
_STEPS_A_CHECK = 8

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Score:
    """Logits of the held-out windows, fp32 ``[windows, T, vocabulary]``, and their perplexity."""

    logits: Array
    perplexity: float


@dataclass(frozen=True)
class Served:
    """A batch of requests that an engine has finished."""

    requests: list[Request]
    statistics: Statistics
    bytes_per_token: float
    tokens_per_second: float


def windows(text: str, length: int, count: int) -> Array:
    """`count` evenly spaced windows of `length` + 1 tokens, or fewer if the text is short."""
    tokens = encode(text)
    if len(tokens) < length + 1:
        raise ValueError(f"expected a text of more than {length} tokens, got {len(tokens)}")
    count = min(count, (len(tokens) - 1) // length)
    starts = np.linspace(0, len(tokens) - length - 1, count).astype(np.int64)
    return np.stack([tokens[s : s + length + 1] for s in starts])


def calibration_tokens(config: Config, text: str, cache_quant_type: str) -> int:
    """Number of tokens that :func:`static_scales` runs the model over."""
    if cache_quant_type not in STATIC_TYPES:
        return 0
    return windows(text, config.context, CALIBRATION_WINDOWS)[:, :-1].size


def static_scales(
    weights: Weights,
    config: Config,
    text: str,
    cache_quant_type: str,
    *,
    progress: Progress | None = None,
) -> list[LayerScales] | None:
    """Scales of a static type from the largest K and V in a text: per head (FP8) or per channel.

    Parameters
    ----------
    weights : dict of arrays
    config : Config
    text : str
    cache_quant_type : str
    progress : callable, optional
        Receives the number of tokens of every forward pass.

    Returns
    -------
    list of (k, v), fp32 ``[KV]`` or ``[KV * D]``
        One pair per layer; None for a type without static scales.
    """
    if cache_quant_type not in STATIC_TYPES:
        return None
    tokens = windows(text, config.context, CALIBRATION_WINDOWS)[:, :-1]
    per_channel = cache_quant_type == "cache_int8"
    code = "int8" if per_channel else "e4m3"
    axes = (0, 2) if per_channel else (0, 2, 3)  # axes of [B, KV, T, D]
    largest: list[LayerScales] = []
    for start in range(0, len(tokens), _CALIBRATION_BATCH):
        batch = tokens[start : start + _CALIBRATION_BATCH]
        seen = [
            tuple(amax(x, axis=axes).reshape(-1) for x in (layer.attention.k, layer.attention.v))
            for layer in forward(weights, config, batch).layers
        ]
        pairs = zip(seen, largest or seen)
        largest = [(np.maximum(k, old_k), np.maximum(v, old_v)) for (k, v), (old_k, old_v) in pairs]
        if progress is not None:
            progress(batch.size)
    return [(dynamic_scale(k, code), dynamic_scale(v, code)) for k, v in largest]


def perplexity(
    weights: Weights,
    config: Sizes,
    held_out: Array,
    run: Callable[[Weights, Any, Array], Any] = forward,
) -> float:
    """Perplexity of windows ``[n, T + 1]`` with plain dense fp32 attention, without a cache.

    `run` is the model's NumPy ``forward``.
    """
    losses = [
        cross_entropy(run(weights, config, window[None, :-1]).logits, window[1:])[0]
        for window in held_out
    ]
    return math.exp(sum(losses) / len(losses))


def score(
    model: Model,
    cache_quant_type: str,
    scales: Sequence[LayerScales] | None,
    held_out: Array,
    *,
    place: Any = None,
    progress: Progress | None = None,
    k_rotation: str | None = None,
) -> Score:
    """Perplexity of windows ``[n, T + 1]`` through the paged cache, in chunks of odd lengths."""
    options = {**scoring_options(model.config), "k_rotation": k_rotation}
    engine = Engine(model, cache_quant_type, scales=scales, place=place, **options)
    return score_with(engine, held_out, progress)[0]


def scoring_options(config: Sizes) -> dict[str, Any]:
    """Engine options for :func:`score_with`."""
    max_seqs = 4
    return {
        "num_blocks": max_seqs * (-(-config.context // BLOCK_SIZE)),
        "max_seqs": max_seqs,
        "chunk": 61,
        "token_budget": 167,
        "reuse_prefixes": False,  # reused tokens have no logits
    }


def score_with(
    engine: Server, held_out: Array, progress: Progress | None = None
) -> tuple[Score, list[Request]]:
    """Logits and perplexity of windows ``[n, T + 1]``, and their requests."""
    requests = [
        engine.submit(Request(list(window[:-1]), max_new_tokens=0, keep_logits=True))
        for window in held_out
    ]
    with _check.checking():
        engine.run(progress)
    logits = np.stack([np.concatenate(request.logits) for request in requests])
    loss, _ = cross_entropy(logits.reshape(-1, logits.shape[-1]), held_out[:, 1:].reshape(-1))
    return Score(logits, math.exp(loss)), requests


def serve(
    model: Model,
    cache_quant_type: str,
    scales: Sequence[LayerScales] | None,
    jobs: Sequence[tuple[str, int]],
    sampling: Sampling,
    *,
    place: Any = None,
    progress: Progress | None = None,
    k_rotation: str | None = None,
) -> Served:
    """Serve jobs (prompt, number of new tokens) as one changing batch.

    `progress` receives the number of tokens that every step has generated.
    """
    engine = Engine(
        model, cache_quant_type, scales=scales, place=place, max_seqs=4, k_rotation=k_rotation
    )
    return serve_with(engine, jobs, sampling, progress)


def serve_with(
    engine: Server,
    jobs: Sequence[tuple[str, int]],
    sampling: Sampling,
    progress: Progress | None = None,
) -> Served:
    """See :func:`serve`."""
    start = time.perf_counter()
    requests = [
        engine.submit(
            Request(
                list(encode(prompt)),
                new_tokens,
                Sampling(sampling.temperature, sampling.top_k, sampling.seed + i),
            )
        )
        for i, (prompt, new_tokens) in enumerate(jobs)
    ]
    generated = 0
    for steps in itertools.count():
        with nullcontext() if steps % _STEPS_A_CHECK else _check.checking():
            if not engine.step():
                break
        before, generated = generated, sum(len(r.generated) for r in requests)
        if progress is not None:
            progress(generated - before)
    elapsed = time.perf_counter() - start
    return Served(
        requests,
        engine.statistics,
        engine.bytes_per_token,
        generated / elapsed,
    )


def warm_up(model: Model, *, place: Any = None) -> None:
    """Load the operators and run a few steps, so that measured runs exclude the start-up."""
    warm_up_with(Engine(model, num_blocks=4, place=place))


def warm_up_with(engine: Server) -> None:
    """See :func:`warm_up`."""
    engine.submit(Request([1, 2, 3], 3, Sampling(0.0)))
    engine.run()


def largest_difference(logits: Array, base: Array) -> float:
    """Largest absolute difference between two logit arrays."""
    return float(np.max(np.abs(logits - base)))
