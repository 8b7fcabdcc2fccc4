"""Scales and centres of a layer, and the first type within an error bound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastattn.calibrate.calibration import LayerCalibration
from fastattn.calibrate.checks import check_head_dim, check_scales
from fastattn.calibrate.errors import CalibrationError
from fastattn.calibrate.samples import LayerSamples
from fastattn.functional._cache_types import DYNAMIC_TYPES, FEEDBACK_TYPES, STATIC_TYPES
from fastattn.reference.attention import dense_attention
from fastattn.reference.cache import code_of, dynamic_scales, static_scales, written_scales
from fastattn.reference.feedback import codes_with_feedback, feedback_of
from fastattn.reference.hadamard import restore_key, transform_key
from fastattn.reference.numerics import QMAX, Array, from_codes, quantize

GRANULARITIES = ("tensor", "head", "channel")

#: Transforms of K in the order in which they are tried: the cheapest first.
TRANSFORMS = (
    "none",
    "center",
    "hadamard",
    "center+hadamard",
    "hadamard+feedback",
    "center+hadamard+feedback",
)

#: Floor of an amax, so that a channel of zeros has a scale.
_FLOOR = 1e-6


@dataclass(frozen=True)
class Candidate:
    """A type and a transform of K."""

    cache_quant_type: str
    transform: str = "none"

    @property
    def rotation(self) -> str:
        return "hadamard" if "hadamard" in self.transform else "none"

    @property
    def centred(self) -> bool:
        return "center" in self.transform

    @property
    def feeds_back(self) -> bool:
        return "feedback" in self.transform


def candidates(types: Sequence[str], transforms: Sequence[str]) -> list[Candidate]:
    """Candidates in order of preference: by type, then by the transforms of K."""
    return [
        Candidate(kind, transform)
        for kind in types
        for transform in transforms_of(kind, transforms)
    ]


def transforms_of(cache_quant_type: str, transforms: Sequence[str]) -> list[str]:
    """Those of some transforms that a type takes."""
    if cache_quant_type == "none":
        return ["none"]
    takes = cache_quant_type in FEEDBACK_TYPES
    return [name for name in transforms if takes or "feedback" not in name]


def query_moment(samples: Sequence[LayerSamples]) -> Array:
    """Second moment of the queries that meet a KV head's keys, float64 [KV, D, D].

    Raises
    ------
    CalibrationError
        If there are no queries.
    """
    _, heads, dim = samples[0].key.shape
    total, count = np.zeros((heads, dim, dim)), 0
    for own in samples:
        if own.query is None:
            raise CalibrationError("feedback needs queries (layers.N.query)")
        q = np.asarray(own.query, np.float64).reshape(len(own.query), heads, -1, dim)
        total += np.einsum("thgi,thgj->hij", q, q, optimize=True)
        count += q.shape[0] * q.shape[2]
    return total / max(count, 1)


def centre_of(key: Array) -> Array:
    """Mean of every channel over the tokens, float32 [KV, D]."""
    mean: Array = np.asarray(key, np.float64).mean(axis=0)
    return mean.astype(np.float32)


def scales_of(x: Array, cache_quant_type: str, granularity: str) -> Array:
    """Static dequantisation multipliers of [T, KV, D], float32 [1], [KV] or [KV * D]."""
    if cache_quant_type != "cache_int8" and granularity == "channel":
        granularity = "head"  # e4m3 codes have their own exponents
    axes = {"tensor": (0, 1, 2), "head": (0, 2), "channel": (0,)}[granularity]
    largest = np.abs(np.asarray(x, np.float64)).max(axis=axes).reshape(-1)
    return (np.maximum(largest, _FLOOR) / QMAX[code_of(cache_quant_type)]).astype(np.float32)


def stored(
    x: Array,
    cache_quant_type: str,
    scales: Array | None,
    feedback: Array | None = None,
    kind: str = "k",
) -> Array:
    """Values float64 [T, KV, D] of K ("k") or V ("v") after a round trip through a cache."""
    x = np.asarray(x, np.float32)
    if cache_quant_type == "none":
        return x.astype(np.float64)
    code = code_of(cache_quant_type, kind=kind)
    if cache_quant_type in DYNAMIC_TYPES:
        own = written_scales(x, cache_quant_type, kind=kind)
        multiplier = dynamic_scales(own, cache_quant_type)
    else:
        assert scales is not None
        multiplier = static_scales(scales, *x.shape[1:])
    if feedback is None:
        codes = quantize(x, multiplier, code)
    else:
        codes = codes_with_feedback(x * (np.float32(1) / multiplier), feedback, code)
    return from_codes(codes, code).astype(np.float64) * multiplier


def as_stored(layer: LayerCalibration, key: Array, value: Array) -> tuple[Array, Array]:
    """K and V ``[T, KV, D]`` as a layer's cache gives them back, K restored; fp32 and fp64."""
    rotation, center = layer.cache_k_rotation or "none", layer.cache_k_center
    kind = layer.cache_quant_type
    written = transform_key(key, rotation, center)
    read = stored(written, kind, layer.cache_k_out_scale, layer.cache_k_feedback)
    k = restore_key(read, rotation, center)
    return k, stored(value, kind, layer.cache_v_out_scale, kind="v")


def _squares(samples: LayerSamples, key: Array, value: Array, rows: Array) -> tuple[Array, Array]:
    """Squares of attention outputs' errors over `key` and `value`, and of the outputs, by head."""
    assert samples.query is not None
    tokens, _, dim = samples.key.shape
    positions = rows + tokens - len(samples.query)
    distance = positions[:, None] - np.arange(tokens)[None, :]
    visible = (distance >= 0) & (distance < (samples.window or tokens))
    outs = [
        dense_attention(samples.query[rows], k, v, visible, softmax_scale=dim**-0.5)[0]
        for k, v in ((samples.key, samples.value), (key, value))
    ]
    with np.errstate(over="ignore", invalid="ignore"):
        error = ((outs[1] - outs[0]) ** 2).sum(axis=(0, 2))
    return error, (outs[0] ** 2).sum(axis=(0, 2))


def attention_error(
    samples: Sequence[LayerSamples], stored_as: Sequence[tuple[Array, Array]], rows: Sequence[Array]
) -> float:
    """Relative error of attention outputs over K and V as stored: RMS, of the worst query head.

    Parameters
    ----------
    samples : sequence of LayerSamples
        Of one sequence each, with queries; what the exact outputs are made of, in fp64.
    stored_as : sequence of (key, value), shape [T, KV, D]
    rows : sequence of array of int
        Which of the queries.
    """
    found = [_squares(x, *kv, own) for x, kv, own in zip(samples, stored_as, rows)]
    error, size = (sum(parts) for parts in zip(*found))
    worst = float(np.sqrt(error / np.maximum(size, 1e-30)).max())
    return math.inf if math.isnan(worst) else worst  # K or scales beyond fp32 exceed any bound


def try_candidate(
    samples: Sequence[LayerSamples],
    candidate: Candidate,
    granularity: str,
    rows: Sequence[Array] | None,
    scales: tuple[Array, Array] | None = None,
) -> LayerCalibration:
    """Scales, centre and error of a candidate; no error without `rows`.

    Parameters
    ----------
    samples : sequence of LayerSamples
        Of one sequence each.
    scales : (array, array), optional
        Static scales of K and V, instead of scales from the samples.
    """
    kind, rotation = candidate.cache_quant_type, candidate.rotation
    keys, values = [x.key for x in samples], [x.value for x in samples]
    center = centre_of(np.concatenate(keys)) if candidate.centred else None
    as_written = [transform_key(key, rotation, center) for key in keys]
    k_scales = v_scales = None
    if kind in STATIC_TYPES:
        k_scales, v_scales = scales or (
            scales_of(np.concatenate(x), kind, granularity) for x in (as_written, values)
        )
        for name, given, x in (("K", k_scales, keys[0]), ("V", v_scales, values[0])):
            check_scales(name, given.size, x.shape[1:], kind)
    feedback = feedback_of(query_moment(samples), rotation) if candidate.feeds_back else None
    found = LayerCalibration(kind, k_scales, v_scales, rotation, center, cache_k_feedback=feedback)
    if rows is not None:
        stored_as = [as_stored(found, key, value) for key, value in zip(keys, values)]
        found.error = attention_error(samples, stored_as, rows)
    return found


def sampled_rows(samples: Sequence[LayerSamples], count: int, seed: int = 0) -> list[Array] | None:
    """Queries of each sequence to try: `count` in all at random, or all if there are fewer.

    None without queries.
    """
    rng = np.random.default_rng(seed)
    each = -(-count // len(samples))
    found = []
    for own in samples:
        if own.query is None:
            return None
        total = len(own.query)
        found.append(np.sort(rng.choice(total, min(each, total), replace=False)))
    return found


def calibrate_layer(
    samples: LayerSamples | Sequence[LayerSamples],
    types: Sequence[str],
    *,
    bound: float | None,
    transforms: Sequence[str] = TRANSFORMS,
    granularity: str = "head",
    queries: int = 64,
    seed: int = 0,
    scales: tuple[Array, Array] | None = None,
) -> LayerCalibration:
    """The first candidate with an error of at most `bound`, or the one with the smallest error.

    Parameters
    ----------
    samples : LayerSamples, or a sequence of them
        Of one sequence each.
    types : sequence of str
        Types in order of preference.
    bound : float or None
        Upper bound of the relative error of attention outputs. None tries all candidates and
        takes the one with the least error.
    transforms : sequence of str
        Some of :data:`TRANSFORMS`, in the order in which they are tried.
    granularity : {"tensor", "head", "channel"}
        Granularity of static scales. e4m3 codes have at most one scale per head.
    queries : int
        Number of queries to try.
    seed : int
        Seed for the choice of queries.
    scales : (array, array), optional
        Static scales of K and V, instead of scales from the samples.

    Returns
    -------
    LayerCalibration
        `errors` has the errors of the candidates that were tried.

    Raises
    ------
    CalibrationError
        If there are no queries but several candidates, or no operator supports this head dimension.
    """
    samples = [samples] if isinstance(samples, LayerSamples) else list(samples)
    check_head_dim("K", samples[0].key.shape[2])
    rows = sampled_rows(samples, queries, seed)
    tried = candidates(types, transforms)
    if rows is None and len(tried) > 1:
        raise CalibrationError(
            "choosing among types and transforms needs queries (layers.N.query); without them name "
            "one type and one transform"
        )
    errors: dict[str, float] = {}
    best: LayerCalibration | None = None
    for candidate in tried:
        found = try_candidate(samples, candidate, granularity, rows, scales)
        if found.error is None:
            return found
        errors[found.name] = found.error
        if best is None or best.error is None or found.error < best.error:
            best = found
        if bound is not None and found.error <= bound:
            best = found
            break
    assert best is not None
    best.errors = errors
    return best


def outlier_channels(key: Array, factor: float = 8.0) -> list[tuple[int, int]]:
    """(head, channel) of K whose largest magnitude is at least `factor` times the median of its
    head.
    """
    largest = np.abs(np.asarray(key, np.float64)).max(axis=0)
    typical = np.median(largest, axis=-1, keepdims=True)
    return [(int(h), int(c)) for h, c in np.argwhere(largest > factor * np.maximum(typical, 1e-30))]


__all__ = [
    "GRANULARITIES",
    "TRANSFORMS",
    "calibrate_layer",
    "candidates",
    "outlier_channels",
]
