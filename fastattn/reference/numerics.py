"""Rounding, FP8 and integer codes, and scales: the arithmetic that all operators share.

All roundings are to nearest, ties to even. FP8 saturates, including infinities, and NaN has the
code 0x7F. The CPU and CUDA kernels must agree with these definitions bit by bit.
"""

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fastattn._formats import FORMATS

Array = NDArray[Any]

#: Largest finite value of each format (for int4, the value of the lowest code): the ``QMAX`` of a
#: scale.
QMAX = {"e4m3": 448.0, "e5m2": 57344.0, "int8": 127.0, "int4": 8.0}

#: Magnitude of each E2M1 code 0..7; code 8 + i is its negative.
E2M1_VALUES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)

#: Formats with 4-bit codes, two per byte.
NIBBLES = tuple({row.value_code for row in FORMATS if row.value_bits == 4})

#: Smallest amax of a cache token. It keeps the scale of an all-zero token above 0.
CACHE_AMAX_FLOOR = 1e-6

_FP8 = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}

bfloat16 = np.dtype(ml_dtypes.bfloat16)


def to_e2m1(x: Array) -> Array:
    """E2M1 codes 0..15 (uint8, one per byte) of fp32 values.

    Codes are the nearest values, ties to the even code. Infinities and large values saturate. The
    sign is the sign bit, so -0 is code 8. NaN is code 7.
    """
    x = np.asarray(x, np.float32)
    magnitude = np.abs(x)
    code = np.zeros(x.shape, np.uint8)
    for low in range(7):
        tie = (E2M1_VALUES[low] + E2M1_VALUES[low + 1]) / np.float32(2)
        goes_up = magnitude >= tie if low % 2 else magnitude > tie
        code += goes_up.astype(np.uint8)
    code = np.where(np.signbit(x), code + np.uint8(8), code)
    return np.where(np.isnan(x), np.uint8(7), code)


def from_e2m1(codes: Array) -> Array:
    """Values (float32) of E2M1 codes 0..15."""
    codes = np.asarray(codes, np.uint8)
    magnitude = E2M1_VALUES[codes & 7]
    return np.where(codes & 8, -magnitude, magnitude)


def to_codes(x: Array, code: str) -> Array:
    """Round fp32 values to codes, one per byte.

    Parameters
    ----------
    x : array of float32
    code : {"e4m3", "e5m2", "int8", "int4", "e2m1"}

    Returns
    -------
    array of uint8
        The bits of the codes. int8 codes are in [-127, 127] and NaN becomes 0. FP8 saturates and
        NaN becomes 0x7F. int4 codes are in [-8, 7] plus 8, and NaN becomes 8. See :func:`to_e2m1`
        for e2m1.
    """
    x = np.asarray(x, np.float32)
    if code == "e2m1":
        return to_e2m1(x)
    if code == "int4":
        rounded = np.rint(np.where(np.isnan(x), np.float32(0), np.clip(x, -8, 7)))
        return (rounded + 8).astype(np.uint8)
    limit = np.float32(QMAX[code])
    clipped = np.clip(x, -limit, limit)
    if code == "int8":
        rounded = np.rint(np.where(np.isnan(x), np.float32(0), clipped))
        return rounded.astype(np.int8).view(np.uint8)
    codes = clipped.astype(_FP8[code]).view(np.uint8)
    return np.where(np.isnan(x), np.uint8(0x7F), codes)


def from_codes(codes: Array, code: str) -> Array:
    """Values (float32) of 8-bit codes given as uint8 bits; the inverse of :func:`to_codes`."""
    codes = np.asarray(codes)
    if codes.dtype.itemsize != 1:
        raise TypeError(f"expected 8-bit codes, got {codes.dtype}")
    return np.asarray(np.take(_values_of(code), np.ascontiguousarray(codes).view(np.uint8)))


@functools.lru_cache(maxsize=8)
def _values_of(code: str) -> Array:
    """Values of the codes 0..255. A lookup is several times faster than a conversion."""
    bits = np.arange(256, dtype=np.uint8)
    if code == "int4":
        return bits.astype(np.float32) - np.float32(8)
    if code == "e2m1":
        return from_e2m1(bits)
    return bits.view(np.int8 if code == "int8" else _FP8[code]).astype(np.float32)


def amax(x: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """Largest magnitude along `axis`, fp32. Any NaN makes it NaN."""
    magnitude = np.abs(np.asarray(x, np.float32))
    return np.asarray(np.max(magnitude, axis=axis, initial=np.float32(0)), np.float32)


def dynamic_scale(group_amax: Array, code: str, floor: float = CACHE_AMAX_FLOOR) -> Array:
    """Dequantisation scale ``max(amax, floor) / QMAX`` in fp32.

    An infinite amax counts as the largest finite fp32 value. NaN stays NaN.
    """
    group_amax = np.asarray(group_amax, np.float32)
    finite = np.where(np.isinf(group_amax), np.finfo(np.float32).max, group_amax)
    floored = np.maximum(finite, np.float32(floor))  # np.maximum propagates NaN
    return (floored / np.float32(QMAX[code])).astype(np.float32)


def group_scale(x: Array, code: str) -> Array:
    """Dynamic scales (fp32) of the groups along the last axis of `x`.

    An int4 scale has a sign: the value with the largest magnitude (the negative one of an equal
    pair) gets code -8, which has no positive counterpart.
    """
    x = np.asarray(x, np.float32)
    largest = amax(x, axis=-1)
    scale = dynamic_scale(largest, code)
    if code != "int4":
        return scale
    reached = np.any(x == -largest[..., None], axis=-1)
    return np.where(reached | np.isnan(largest), scale, -scale)


def quantize(x: Array, scale: Array, code: str) -> Array:
    """Codes ``round(saturate(x * (1 / scale)))``; `scale` broadcasts against `x`.

    The reciprocal is one fp32 division, and the product is one fp32 multiplication.
    """
    with np.errstate(all="ignore"):
        inverse = np.float32(1.0) / np.asarray(scale, np.float32)
        return to_codes(np.asarray(x, np.float32) * inverse, code)


def round_to(x: Array, dtype: Any) -> Array:
    """Round fp32 values to `dtype` (e.g. bfloat16) and return them as fp32."""
    with np.errstate(over="ignore"):
        return np.asarray(x, np.float32).astype(dtype).astype(np.float32)


def exp_non_positive(x: Array) -> Array:
    """exp(x) for x <= 0 in plain fp32 steps: 0 below -87, within 2 ulp above. NaN stays NaN.

    ``x = n ln2 + r``, and exp(r) is its Taylor polynomial of degree 7. The exp of a library differs
    between platforms in the last bit, and then so would the codes of values that it weights.
    """
    f = np.float32
    x = np.asarray(x, np.float32)
    safe = np.where(x < f(-87), f(0), x)
    n = np.rint(safe * f(1.44269504))
    r = (safe - n * f(0.693359375)) - n * f(-2.12194440e-4)
    p = f(1) / f(5040)
    for denominator in (720, 120, 24, 6, 2, 1, 1):
        p = p * r + f(1) / f(denominator)
    result = np.ldexp(p, np.where(np.isnan(n), 0, n).astype(np.int32))
    return np.where(x < f(-87), f(0), result).astype(np.float32)
