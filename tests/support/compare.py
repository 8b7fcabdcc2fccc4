"""Comparators. Each has a test in test_compare.py that it can fail."""

from __future__ import annotations

import numpy as np


def assert_same_bits(actual, expected, what: str = "") -> None:
    """Equal shape, dtype and bits; the message gives count, first index and both values.

    NaN equals NaN whatever its payload: payloads differ between processors.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape} != {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype} != {expected.dtype}"
    raw = np.dtype(f"u{actual.dtype.itemsize}")
    differs = np.ascontiguousarray(actual).view(raw) != np.ascontiguousarray(expected).view(raw)
    if actual.dtype.kind in "fV":
        with np.errstate(invalid="ignore"):
            wide_a, wide_e = actual.astype(np.float64), expected.astype(np.float64)
        differs &= ~(np.isnan(wide_a) & np.isnan(wide_e))
    if differs.any():
        first = tuple(int(i) for i in np.argwhere(differs)[0])
        raise AssertionError(
            f"{what}: {int(differs.sum())} of {differs.size} elements differ; first at {first}: "
            f"got {actual[first]!r}, expected {expected[first]!r}"
        )


def assert_within(actual, expected, bound, what: str = "") -> None:
    """|actual - expected| <= bound elementwise (`bound` broadcasts), non-finite positions equal."""
    actual = np.asarray(actual).astype(np.float64)
    expected = np.asarray(expected).astype(np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape} != {expected.shape}"
    special = ~np.isfinite(expected) | ~np.isfinite(actual)
    same_special = (np.isnan(actual) & np.isnan(expected)) | (actual == expected)
    with np.errstate(invalid="ignore"):
        error = np.where(special, np.where(same_special, 0.0, np.inf), np.abs(actual - expected))
    excess = error - np.broadcast_to(np.asarray(bound, np.float64), error.shape)
    if excess.size and not (excess <= 0).all():
        worst = np.unravel_index(int(np.argmax(excess)), excess.shape)
        worst = tuple(int(i) for i in worst)
        raise AssertionError(
            f"{what}: {int((excess > 0).sum())} of {error.size} elements out of bound; worst at "
            f"{worst}: got {actual[worst]!r}, expected {expected[worst]!r}"
        )


def relative_error(actual, expected) -> float:
    """||actual - expected|| / ||expected|| in fp64 (NaN if any element is)."""
    actual = np.asarray(actual).astype(np.float64)
    expected = np.asarray(expected).astype(np.float64)
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-300))
