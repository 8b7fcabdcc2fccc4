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
from fastattn.functional._cache_types import DYNAMIC_TYPES, NIBBLE_TYPES, STATIC_TYPES
from fastattn.reference.attention import dense_attention
from fastattn.reference.cache import code_of, dynamic_scales, static_scales, written_scales
from fastattn.reference.hadamard import restore_key, transform_key
from fastattn.reference.numerics import QMAX, Array, from_codes, quantize

GRANULARITIES = ("tensor", "head", "channel")

#: Transforms of K in the order in which they are tried: the cheapest first.
TRANSFORMS = ("none", "center", "hadamard", "center+hadamard")

#: Types that benefit from a rotation. Codes with exponents do not: a large channel does not affect
#: the other channels there, and a rotation makes all of them large.
ROTATED_TYPES = ("cache_int8", "block_wise_int8", *NIBBLE_TYPES)

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


def candidates(types: Sequence[str], transforms: Sequence[str]) -> list[Candidate]:
    """Candidates in order of preference: by type, then by the transforms that may help it."""
    found = []
    for kind in types:
        allowed = ["none"] if kind == "none" else transforms
        of_kind = [Candidate(kind, transform) for transform in allowed]
        found += [c for c in of_kind if kind in ROTATED_TYPES or c.rotation == "none"]
    return found


def centre_of(key: Array) -> Array:
    """Mean of every channel over the tokens, float32 [KV, D]."""
    return np.asarray(key, np.float64).mean(axis=0).astype(np.float32)


def scales_of(x: Array, cache_quant_type: str, granularity: str) -> Array:
    """Static dequantisation multipliers of [T, KV, D], float32 [1], [KV] or [KV * D]."""
    if cache_quant_type != "cache_int8" and granularity == "channel":
        granularity = "head"  # e4m3 codes have their own exponents
    axes = {"tensor": (0, 1, 2), "head": (0, 2), "channel": (0,)}[granularity]
    largest = np.abs(np.asarray(x, np.float64)).max(axis=axes).reshape(-1)
    return (np.maximum(largest, _FLOOR) / QMAX[code_of(cache_quant_type)]).astype(np.float32)


def stored(x: Array, cache_quant_type: str, scales: Array | None) -> Array:
    """Values float64 [T, KV, D] after a round trip through a cache of this type."""
    x = np.asarray(x, np.float32)
    if cache_quant_type == "none":
        return x.astype(np.float64)
    code = code_of(cache_quant_type)
    if cache_quant_type in DYNAMIC_TYPES:
        multiplier = dynamic_scales(written_scales(x, cache_quant_type), cache_quant_type)
    else:
        assert scales is not None
        multiplier = static_scales(scales, *x.shape[1:])
    return from_codes(quantize(x, multiplier, code), code).astype(np.float64) * multiplier


def attention_error(samples: LayerSamples, key: Array, value: Array, rows: Array) -> float:
    """Relative error of attention outputs over `key` and `value`: RMS of the worst query head.

    Parameters
    ----------
    samples : LayerSamples
        Samples with queries, which give the exact outputs in fp64.
    key, value : array, shape [T, KV, D]
    rows : array of int
        Queries to use.
    """
    assert samples.query is not None
    tokens, _, dim = samples.key.shape
    positions = rows + tokens - len(samples.query)
    visible = np.arange(tokens)[None, :] <= positions[:, None]
    outs = [
        dense_attention(samples.query[rows], k, v, visible, softmax_scale=dim**-0.5)[0]
        for k, v in ((samples.key, samples.value), (key, value))
    ]
    with np.errstate(over="ignore", invalid="ignore"):
        error = ((outs[1] - outs[0]) ** 2).sum(axis=(0, 2))
    size = (outs[0] ** 2).sum(axis=(0, 2))
    worst = float(np.sqrt(error / np.maximum(size, 1e-30)).max())
    return math.inf if math.isnan(worst) else worst  # K or scales beyond fp32 exceed any bound


def try_candidate(
    samples: LayerSamples,
    candidate: Candidate,
    granularity: str,
    rows: Array | None,
    scales: tuple[Array, Array] | None = None,
) -> LayerCalibration:
    """Scales, centre and error of a candidate; no error without `rows`.

    Parameters
    ----------
    scales : (array, array), optional
        Static scales of K and V, instead of scales from the samples.
    """
    kind, rotation = candidate.cache_quant_type, candidate.rotation
    center = centre_of(samples.key) if candidate.centred else None
    key = transform_key(samples.key, rotation, center)
    k_scales = v_scales = None
    if kind in STATIC_TYPES:
        k_scales, v_scales = scales or (
            scales_of(x, kind, granularity) for x in (key, samples.value)
        )
        for name, given, x in (("K", k_scales, samples.key), ("V", v_scales, samples.value)):
            check_scales(name, given.size, x.shape[1:], kind)
    found = LayerCalibration(kind, k_scales, v_scales, rotation, center)
    if rows is not None:
        k = restore_key(stored(key, kind, k_scales), rotation, center)
        found.error = attention_error(samples, k, stored(samples.value, kind, v_scales), rows)
    return found


def sampled_rows(samples: LayerSamples, count: int, seed: int = 0) -> Array | None:
    """Queries to try: `count` random ones, or all if there are fewer; None without queries."""
    if samples.query is None:
        return None
    total = len(samples.query)
    rng = np.random.default_rng(seed)
    chosen = rng.choice(total, min(count, total), replace=False)
    return np.sort(chosen)


def calibrate_layer(
    samples: LayerSamples,
    types: Sequence[str],
    *,
    bound: float,
    transforms: Sequence[str] = TRANSFORMS,
    granularity: str = "head",
    queries: int = 64,
    seed: int = 0,
    scales: tuple[Array, Array] | None = None,
) -> LayerCalibration:
    """The first candidate with an error of at most `bound`, or the one with the smallest error.

    Parameters
    ----------
    samples : LayerSamples
    types : sequence of str
        Types in order of preference.
    bound : float
        Upper bound of the relative error of attention outputs.
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
    check_head_dim("K", samples.key.shape[2])
    rows = sampled_rows(samples, queries, seed)
    tried = candidates(types, transforms)
    if not tried:
        raise CalibrationError(f"{', '.join(types)}: none gains by {', '.join(transforms)}")
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
        if found.error <= bound:
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
