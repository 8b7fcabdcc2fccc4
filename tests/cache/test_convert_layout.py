"""convert_cache_layout: every pair of layouts, byte for byte, and the published byte positions."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import reference
from fastattn.reference.layout import LAYOUTS, cache_shape, pack
from tests.support.compare import assert_same_bits
from tests.support.static import run_all_modes
from tests.support.tensors import BF16, EMPTY_OUTPUTS, to_numpy, to_paddle


def _bytes(shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize(
    "kind, head_dim", [*itertools.product("kv", (64, 96, 128, 256)), ("k", 192)]
)
@pytest.mark.parametrize("cache_quant_type", ["cache_int8", "block_wise_fp8"])
@pytest.mark.parametrize("dst", LAYOUTS)
@pytest.mark.parametrize("src", LAYOUTS)
def test_every_pair(place, src, dst, cache_quant_type, kind, head_dim):
    logical = _bytes((3, 2, 64, head_dim))
    int8 = "int8" in cache_quant_type
    cache = pack(logical, kind, src, int8=int8)
    options = {"kind": kind, "cache_quant_type": cache_quant_type, "src": src, "dst": dst}
    actual = to_numpy(F.convert_cache_layout(to_paddle(cache, place), **options))
    assert actual.shape == cache_shape(kind, dst, 3, 2, head_dim)
    assert_same_bits(actual, pack(logical, kind, dst, int8=int8))
    assert_same_bits(actual, reference.convert_cache_layout(cache, **options))
    back = F.convert_cache_layout(to_paddle(actual, place), **{**options, "src": dst, "dst": src})
    assert_same_bits(to_numpy(back), cache, "there and back")


#: (token, channel): byte of K, byte of V in FastDeploy's layout for head_dim 128, as published.
FASTDEPLOY_BYTES = {
    (0, 1): (1, 64),
    (1, 0): (128, 1),
    (16, 0): (2048, 512),
    (0, 8): (2, 16),
    (8, 0): (16, 2),
    (32, 0): (4096, 32),
    (0, 16): (1024, 1024),
    (9, 17): (1169, 1091),
    (37, 91): (5831, 5369),
}


@pytest.mark.parametrize("kind", ["k", "v"])
@pytest.mark.parametrize("cache_quant_type", ["cache_int8", "cache_fp8"])
def test_fastdeploy_bytes(place, cache_quant_type, kind):
    bias = 128 if cache_quant_type == "cache_int8" else 0
    for (token, channel), positions in FASTDEPLOY_BYTES.items():
        logical = np.zeros((1, 1, 64, 128), np.uint8)
        logical[0, 0, token, channel] = 3
        moved = F.convert_cache_layout(
            to_paddle(logical, place),
            kind=kind,
            cache_quant_type=cache_quant_type,
            src="logical",
            dst="fastdeploy",
        )
        expected = np.full(64 * 128, bias, np.uint8)
        expected[positions[kind == "v"]] += 3
        assert_same_bits(to_numpy(moved).reshape(-1), expected)


def test_int8_codes_carry_128_in_fastdeploy_only(place):
    codes = np.arange(-128, 128, dtype=np.int8).repeat(32).reshape(1, 1, 64, 128)
    moved = F.convert_cache_layout(
        to_paddle(codes.view(np.uint8), place),
        kind="k",
        cache_quant_type="block_wise_int8",
        src="fastattn",
        dst="fastdeploy",
    )
    assert to_numpy(moved).reshape(-1)[0] == 0, "-128 + 128"
    assert sorted(to_numpy(moved).reshape(-1)) == sorted((codes.astype(int) + 128).reshape(-1))


@pytest.mark.parametrize("dtype", [BF16, np.float16])
@pytest.mark.parametrize("kind", ["k", "v"])
def test_type_none_has_one_order(place, kind, dtype):
    cache = _bytes((2, 3, 64, 256)).view(dtype)
    for src in LAYOUTS:
        for dst in LAYOUTS:
            moved = F.convert_cache_layout(
                to_paddle(cache, place), kind=kind, cache_quant_type="none", src=src, dst=dst
            )
            assert_same_bits(to_numpy(moved), cache)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_the_dtype_is_kept(place, dtype):
    if not hasattr(paddle, dtype):
        pytest.skip("this Paddle has no FP8 dtypes")
    cache = _bytes((2, 1, 64, 64))
    options = {
        "kind": "v",
        "cache_quant_type": "cache_int8" if dtype == "int8" else "cache_fp8",
        "src": "logical",
        "dst": "fastattn",
    }
    moved = F.convert_cache_layout(to_paddle(cache, place).view(dtype), **options)
    assert moved.dtype == getattr(paddle, dtype)
    expected = reference.convert_cache_layout(cache, **options)
    assert_same_bits(to_numpy(moved).view(np.uint8), expected)
    numpy_type = np.dtype(dtype) if dtype == "int8" else np.dtype(getattr(ml_dtypes, dtype))
    typed = reference.convert_cache_layout(cache.view(numpy_type), **options)
    assert typed.dtype == numpy_type
    assert_same_bits(typed.view(np.uint8), expected)


def test_no_blocks(place):
    if not EMPTY_OUTPUTS:
        pytest.skip("this Paddle has no empty outputs")
    for cache_quant_type, dtype in (("cache_fp8", np.uint8), ("none", BF16)):
        moved = F.convert_cache_layout(
            to_paddle(np.zeros((0, 2, 64, 128), dtype), place),
            kind="v",
            cache_quant_type=cache_quant_type,
            src="logical",
            dst="fastattn",
        )
        tail = [64, 128] if cache_quant_type == "none" else [128, 64]
        assert moved.shape == [0, 2, *tail]


def _value_to_fastattn(cache):
    return F.convert_cache_layout(
        cache, kind="v", cache_quant_type="cache_int8", src="fastdeploy", dst="fastattn"
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_all_modes_of_paddle(place, dynamic):
    cache = _bytes((3, 2, 64, 128))
    outputs, inputs = run_all_modes(_value_to_fastattn, [cache], place, dynamic=dynamic)
    assert outputs[0].shape == (3, 2, 128, 64)
    assert_same_bits(inputs[0], cache)
