"""Caches of 4-bit codes: the scale's rule, what is refused, layouts, and steps that share bytes."""

from __future__ import annotations

import numpy as np
import pytest

import fastattn.functional as F
from fastattn import reference
from fastattn.reference.layout import unpack
from fastattn.reference.numerics import from_codes
from tests.support.cache import make_cache, make_step, make_values, write
from tests.support.compare import assert_same_bits
from tests.support.tensors import BF16, int32, to_numpy, to_paddle

KIND = "block_wise_int4"


def written(x, place):
    """Logical codes [T, KV, D] and scales [T, KV] of K = V = x in an empty cache."""
    tokens, heads, dim = x.shape
    step, num_blocks = make_step([0], [tokens])
    cache = write(make_cache(KIND, num_blocks, heads, dim), x, x, step, place)
    blocks = step.block_tables[0, np.arange(tokens) // 64], np.arange(tokens) % 64
    found = []
    for kind, codes, scales in (
        ("k", cache.key, cache.k_scales),
        ("v", cache.value, cache.v_scales),
    ):
        logical = unpack(codes, kind, "fastattn", int8=False, nibbles=True)
        found.append((logical[blocks[0], :, blocks[1]], scales[blocks[0], :, blocks[1]]))
    assert_same_bits(found[0][0], found[1][0], "K and V have the same codes")
    assert_same_bits(found[0][1], found[1][1], "K and V have the same scales")
    return found[0]


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_the_largest_magnitude_is_code_minus_8(place, dim):
    x = make_values((130, 2, dim), np.float32, 3)
    codes, scales = written(x, place)
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
    codes, scales = written(x, place)
    np.testing.assert_array_equal(scales[:, 0], [0.5, 0.5, -0.5])
    np.testing.assert_array_equal(codes[:2, 0, [5, 60]], [[15, 0], [0, 15]])
    assert codes[2, 0, 63] == 0 and (codes[2, 0, :63] == 8).all()


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_one_token_at_a_time_is_the_prompt(place, scale_dtype):
    """Decode steps write the bytes that a prompt does, and leave those of other tokens alone."""
    key, value = (make_values((70, 2, 64), np.float32, seed) for seed in (1, 2))
    dtype = {"float32": np.float32, "bfloat16": BF16}[scale_dtype]
    step, num_blocks = make_step([0], [70])
    whole = write(make_cache(KIND, num_blocks, 2, 64, scale_dtype=dtype), key, value, step, place)
    cache = make_cache(KIND, num_blocks, 2, 64, scale_dtype=dtype)
    for i in range(70):
        one = type(step)(step.block_tables, np.int32([0, 1]), np.int32([i]), np.int32([1]))
        cache = write(cache, key[i : i + 1], value[i : i + 1], one, place)
    for name in ("key", "value", "k_scales", "v_scales"):
        assert_same_bits(getattr(cache, name), getattr(whole, name), name)


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("kind", ["k", "v"])
def test_logical_and_back(place, kind, dim):
    cache = make_cache(KIND, 3, 2, dim)
    stored = cache.key if kind == "k" else cache.value
    options = {"kind": kind, "cache_quant_type": KIND}
    logical = F.convert_cache_layout(
        to_paddle(stored, place), src="fastattn", dst="logical", **options
    )
    codes = unpack(stored, kind, "fastattn", int8=False, nibbles=True)
    assert_same_bits(to_numpy(logical), codes[..., ::2] | codes[..., 1::2] << 4)
    back = F.convert_cache_layout(logical, src="logical", dst="fastattn", **options)
    assert_same_bits(to_numpy(back), stored)
    modelled = reference.convert_cache_layout(stored, src="fastattn", dst="logical", **options)
    assert_same_bits(to_numpy(logical), modelled)


def write_with(**changes):
    cache = make_cache(KIND, 3, 2, 64)
    arguments = {
        "key": to_paddle(make_values((5, 2, 64), np.float32)),
        "value": to_paddle(make_values((5, 2, 64), np.float32)),
        "key_cache": to_paddle(cache.key),
        "value_cache": to_paddle(cache.value),
        "block_tables": int32([[0]]),
        "cu_seqlens_q": int32([0, 5]),
        "seq_lens_decoder": int32([0]),
        "seq_lens_this_time": int32([5]),
        "cache_k_scales": to_paddle(cache.k_scales),
        "cache_v_scales": to_paddle(cache.v_scales),
        "cache_quant_type": KIND,
    }
    return F.write_cache_kv(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        (
            {"key_cache": np.zeros((3, 2, 64, 80), np.uint8)},
            NotImplementedError,
            "key_cache: head_dim 160 is not supported; supported: 64, 96, 128, 256",
        ),
        (
            {"key_cache": np.zeros((3, 2, 32, 32), np.uint8)},
            ValueError,
            r"key_cache: expected blocks of 64 tokens, shape \[num_blocks, KV, 64, D / 2\]",
        ),
        (
            {"value_cache": np.zeros((3, 2, 64, 64), np.uint8)},
            ValueError,
            r"value_cache: expected shape \[3, 2, 32, 64\], got \[3, 2, 64, 64\]",
        ),
        (
            {"key_cache": np.zeros((3, 2, 64, 32), np.int8)},
            TypeError,
            "key_cache: expected dtype uint8, got int8",
        ),
        (
            {"key": np.zeros((5, 2, 32), np.float32)},
            ValueError,
            r"key: expected shape \[\?, 2, 64\], got \[5, 2, 32\]",
        ),
    ],
)
def test_what_is_refused(changes, error, text):
    write_with()
    with pytest.raises(error, match=f"write_cache_kv: {text}"):
        write_with(**{name: to_paddle(value) for name, value in changes.items()})


def test_fastdeploy_has_no_such_layout():
    cache = to_paddle(make_cache(KIND, 3, 2, 64).key)
    options = {"kind": "k", "cache_quant_type": KIND}
    with pytest.raises(NotImplementedError, match="src: 'fastdeploy' has no order for block_wise"):
        F.convert_cache_layout(cache, src="fastdeploy", dst="logical", **options)
    with pytest.raises(NotImplementedError, match="dst: 'fastdeploy' has no order for block_wise"):
        F.convert_cache_blocks(cache, src="logical", dst="fastdeploy", **options)
