"""Tokens and caches of latent attention."""

from __future__ import annotations

import numpy as np

from fastattn.reference import mla as model
from tests.support.tensors import BF16

#: Format and scale rule.
KINDS = [
    ("bf16", "pow2"),
    ("fp8", "pow2"),
    ("fp8_656", "pow2"),
    ("fp8_656", "amax"),
    ("fp8_584", "pow2"),
]
SCALE = np.array([0.0123], np.float32)


def tokens(rng, count, cache_format):
    """Latents whose tiles differ in magnitude, and rotated channels."""
    latent = model.FORMATS[cache_format].latent
    x = rng.normal(size=(count, latent)) * np.exp2(rng.integers(-20, 6, (count, latent // 64, 1)))[
        ..., 0
    ].repeat(64, axis=1)
    return x.astype(BF16), rng.normal(size=(count, model.ROPE_DIM)).astype(BF16)


def width(cache_format):
    """Elements of a token in the cache's tensor, and their dtype."""
    size = model.FORMATS[cache_format].token_bytes
    return (size // 2, BF16) if cache_format == "bf16" else (size, np.dtype(np.uint8))


def random_cache(rng, shape, cache_format):
    """A cache [*shape, W] of random bytes: NaN codes, NaN scales and infinities among them."""
    elements, dtype = width(cache_format)
    count = int(np.prod(shape)) * elements * dtype.itemsize
    return rng.integers(0, 256, count).astype(np.uint8).view(dtype).reshape(*shape, elements)


def scale_of(cache_format):
    return SCALE if cache_format == "fp8" else None


def bits(array):
    """Bytes, so that one NaN is not another."""
    return np.ascontiguousarray(array).view(np.uint8)
