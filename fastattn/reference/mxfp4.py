"""NumPy model of MXFP4: E2M1 codes, two per byte, with one UE8M0 exponent for 32 elements."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastattn.reference.numerics import Array, from_e2m1, to_e2m1

#: Number of elements that share an exponent.
BLOCK = 32

#: Smallest amax of a block.
AMAX_FLOOR = np.float32(6.0) * np.float32(2.0**-126)

#: The UE8M0 byte that means NaN.
UE8M0_NAN = 255


def block_exponent(amax: Array) -> Array:
    """``ceil(log2(max(amax, 6 * 2**-126) / 6))`` as int32, without rounding.

    An infinite amax counts as the largest finite fp32 value.
    """
    amax = np.minimum(np.asarray(amax, np.float32), np.finfo(np.float32).max)
    mantissa, exponent = np.frexp(np.maximum(amax, AMAX_FLOOR))  # amax = mantissa * 2**exponent
    exact = exponent - np.where(mantissa <= 0.75, 3, 2)  # 6 = 0.75 * 2**3
    return np.clip(exact, -127, 127).astype(np.int32)


def block_scale(scales: Array) -> Array:
    """Multiplier (float32) of UE8M0 bytes: ``2**(byte - 127)``, NaN for 255."""
    scales = np.asarray(scales, np.uint8)
    value = np.ldexp(np.float32(1), scales.astype(np.int32) - 127).astype(np.float32)
    return np.where(scales == UE8M0_NAN, np.float32(np.nan), value)


def pack_e2m1(codes: Array) -> Array:
    """Codes [..., C] as bytes [..., C / 2], with the even index in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_e2m1(pairs: Array) -> Array:
    """Bytes [..., C / 2] as codes [..., C]; the inverse of :func:`pack_e2m1`."""
    codes = np.stack([pairs & 0xF, pairs >> 4], axis=-1)
    return codes.reshape(*pairs.shape[:-1], 2 * pairs.shape[-1])


def block_amax(x: Array, block: int = BLOCK) -> Array:
    """Largest magnitudes [..., C / block] of fp32 values [..., C]. NaNs are ignored."""
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // block, block)
    largest: Array = np.where(np.isnan(blocks), np.float32(0), np.abs(blocks)).max(axis=-1)
    return largest


def block_scales(x: Array) -> Array:
    """UE8M0 bytes (uint8) [..., C / 32] of fp32 values [..., C]. NaNs are ignored."""
    return (block_exponent(block_amax(x)) + 127).astype(np.uint8)


def spread_scales(scales: Array) -> Array:
    """Multipliers (float32) [..., C] of the elements whose UE8M0 bytes are [..., C / 32]."""
    return np.repeat(block_scale(scales), BLOCK, axis=-1)


def mxfp4_quantize(x: Array) -> tuple[Array, Array]:
    """Quantise to MXFP4; see :func:`fastattn.functional.mxfp4_quantize`.

    Returns
    -------
    codes : array of uint8, shape [..., C / 2]
    scales : array of uint8, shape [..., C / 32]
    """
    x = np.asarray(x, np.float32)
    scales = block_scales(x)
    with np.errstate(invalid="ignore"):
        scaled = x * (np.float32(1) / spread_scales(scales))
    return pack_e2m1(to_e2m1(scaled)), scales


def mxfp4_dequantize(codes: Array, scales: Array, dtype: Any = np.float32) -> Array:
    """Values of MXFP4 codes; see :func:`fastattn.functional.mxfp4_dequantize`."""
    values = from_e2m1(unpack_e2m1(np.asarray(codes, np.uint8)))
    with np.errstate(over="ignore", invalid="ignore"):
        return (values * spread_scales(scales)).astype(dtype)
