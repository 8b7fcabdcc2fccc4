"""Caches of int4 codes: the rule of their scales."""

from __future__ import annotations

import numpy as np
import pytest

from fastattn.reference.layout import unpack
from fastattn.reference.numerics import from_codes
from tests.support.cache import make_cache, make_step, make_values, write
from tests.support.compare import assert_same_bits
from tests.support.tensors import value_dim

KIND = "block_wise_int4"


def written(key, value, place):
    """Logical codes [T, KV, D] and scales [T, KV], of K and of V, of an empty cache's tokens."""
    tokens, heads, dim = key.shape
    step, num_blocks = make_step([0], [tokens])
    cache = write(make_cache(KIND, num_blocks, heads, dim), key, value, step, place)
    blocks = step.block_tables[0, np.arange(tokens) // 64], np.arange(tokens) % 64
    found = []
    for kind, codes, scales in (
        ("k", cache.key, cache.k_scales),
        ("v", cache.value, cache.v_scales),
    ):
        logical = unpack(codes, kind, "fastattn", int8=False, nibbles=True)
        found.append((logical[blocks[0], :, blocks[1]], scales[blocks[0], :, blocks[1]]))
    return found


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_the_largest_magnitude_is_code_minus_8(place, dim):
    key = make_values((130, 2, dim), np.float32, 3)
    value = make_values((130, 2, value_dim(dim)), np.float32, 4)
    for x, (codes, scales) in zip((key, value), written(key, value, place)):
        at = np.abs(x).argmax(-1)[..., None]
        assert (np.take_along_axis(codes, at, -1) == 0).all()
        top = np.take_along_axis(x, at, -1)[..., 0]
        np.testing.assert_array_equal(scales, -top / 8)
        values = from_codes(codes, "int4") * scales[..., None]
        error = np.abs(values - x)
        clipped = x / scales[..., None] > 7.5  # beyond the last code of the other sign
        step = np.abs(scales)[..., None]
        assert (error <= np.where(clipped, 1.0, 0.5) * step * (1 + 1e-5)).all()
        assert clipped.any() and not clipped.all()


def test_both_signs_of_the_largest_magnitude(place):
    """The scale is positive then, wherever they lie, and the positive one becomes 7."""
    x = np.zeros((3, 1, 64), np.float32)
    x[0, 0, [5, 60]] = [4, -4]
    x[1, 0, [5, 60]] = [-4, 4]
    x[2, 0, 63] = 4
    (codes, scales), own = written(x, x, place)
    assert_same_bits(codes, own[0], "K and V have the same codes")
    assert_same_bits(scales, own[1], "K and V have the same scales")
    np.testing.assert_array_equal(scales[:, 0], [0.5, 0.5, -0.5])
    np.testing.assert_array_equal(codes[:2, 0, [5, 60]], [[15, 0], [0, 15]])
    assert codes[2, 0, 63] == 0 and (codes[2, 0, :63] == 8).all()
