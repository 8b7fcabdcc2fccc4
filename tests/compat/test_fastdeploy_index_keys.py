"""Index keys with float32 scales have the bytes that FastDeploy's operator writes: it divides."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import reference
from fastattn.compat.fastdeploy import indexer_k_quant_and_cache
from tests.support.compare import assert_same_bits
from tests.support.static import run_all_modes
from tests.support.tensors import BF16, to_numpy, to_paddle

FP16 = np.dtype(np.float16)
PAGE, DIM = 64, 128


def fastdeploys_bytes(key):
    """Codes [T, 128] and scales [T]: plain fp32 division, then a clip and a conversion."""
    x = key.astype(np.float32)
    scale = np.maximum(np.abs(x).max(axis=1), np.float32(1e-4)) / np.float32(448)
    quotient = np.clip(x / scale[:, None], np.float32(-448), np.float32(448))
    return quotient.astype(ml_dtypes.float8_e4m3fn).view(np.uint8), scale


def in_pages(codes, scales, pages):
    """The pages [pages, 64, 132] of tokens in order."""
    flat = np.zeros((pages, PAGE * 132), np.uint8)
    for page in range(pages):
        rows = slice(page * PAGE, (page + 1) * PAGE)
        flat[page, : PAGE * DIM] = codes[rows].reshape(-1)
        flat[page, PAGE * DIM :] = scales[rows].view(np.uint8)
    return flat.reshape(pages, PAGE, 132)


def some_keys(tokens, dtype):
    rng = np.random.default_rng(0)
    size = np.exp(rng.normal(0, 3, (tokens, 1)))
    key = (rng.normal(size=(tokens, DIM)) * size).astype(dtype)
    key[1] = 0
    key[2] = np.float32(1e-6)  # below the floor
    return key


@pytest.mark.parametrize("dtype", [BF16, FP16, np.dtype(np.float32)], ids=str)
@pytest.mark.parametrize("scale_fmt", ["", None])
def test_codes_are_fastdeploys(place, dtype, scale_fmt):
    pages = 8
    key = some_keys(pages * PAGE, dtype)
    cache = to_paddle(np.zeros((pages, PAGE, 132), np.uint8), place)
    slots = to_paddle(np.arange(pages * PAGE), place)
    indexer_k_quant_and_cache(to_paddle(key, place), cache, slots, DIM, scale_fmt)
    codes, scales = fastdeploys_bytes(key)
    assert_same_bits(to_numpy(cache), in_pages(codes, scales, pages))


def test_the_reciprocal_gives_other_codes(place):
    """`amax` and `amax_div` have the same scales, and differ in few codes of ten thousand."""
    key = some_keys(PAGE * 4, BF16)
    slots = to_paddle(np.arange(PAGE * 4), place)
    caches = {}
    for rule in ("amax", "amax_div"):
        cache = np.zeros((4, PAGE, 132), np.uint8)
        tensor = to_paddle(cache, place)
        F.indexer_k_write_cache(to_paddle(key, place), tensor, slots, scale_rule=rule)
        want = reference.indexer_k_write_cache(key, cache, np.arange(PAGE * 4), scale_rule=rule)
        assert_same_bits(to_numpy(tensor), want)
        caches[rule] = want.reshape(4, -1)
    same_scales = [caches[rule][:, PAGE * DIM :] for rule in caches]
    assert_same_bits(*same_scales)
    differ = caches["amax"][:, : PAGE * DIM] != caches["amax_div"][:, : PAGE * DIM]
    assert 0 < differ.sum() < 1e-3 * differ.size


def test_special_values(place):
    """A NaN makes a token NaN; an infinity counts as the largest number, as with `amax`."""
    key = np.ones((3, DIM), np.float32)
    key[0, 5], key[1, 6], key[2, 7] = np.nan, np.inf, -np.finfo(np.float32).max
    cache = to_paddle(np.zeros((1, PAGE, 132), np.uint8), place)
    indexer_k_quant_and_cache(
        to_paddle(key, place), cache, to_paddle(np.arange(3), place), DIM, None
    )
    flat = to_numpy(cache).reshape(-1)
    codes, scales = flat[: 3 * DIM].reshape(3, DIM), flat[PAGE * DIM :].view(np.float32)[:3]
    most = np.finfo(np.float32).max / np.float32(448)
    assert np.isnan(scales[0]) and scales[1] == scales[2] == most
    assert (codes[0] == 0x7F).all()
    assert codes[1, 6] == 0x7E and codes[2, 7] == 0xFE  # 448 and -448
    assert not np.delete(codes[1], 6).any() and not np.delete(codes[2], 7).any()


def write(key, cache, slots):
    return F.indexer_k_write_cache(key, cache, slots, scale_rule="amax_div")


def test_traced_and_saved(place):
    key, slots = some_keys(5, BF16), np.arange(5)
    cache = np.zeros((1, PAGE, 132), np.uint8)
    outputs, _ = run_all_modes(write, [key, cache, slots], place)
    codes, scales = fastdeploys_bytes(key)
    got = outputs[0].reshape(-1)
    assert_same_bits(got[: 5 * DIM], codes.reshape(-1))
    assert_same_bits(got[PAGE * DIM :][:20], scales.view(np.uint8))


@pytest.mark.parametrize("traced", [False, True])
def test_mxfp4_has_no_such_rule(traced):
    def call(key):
        cache = paddle.zeros([1, PAGE, 68], "uint8")
        slots = paddle.zeros([1], "int32")
        return F.indexer_k_write_cache(key, cache, slots, quant="mxfp4", scale_rule="amax_div")

    run = paddle.jit.to_static(call, full_graph=True) if traced else call
    with pytest.raises(ValueError, match="scale_rule: expected pow2 with mxfp4, got 'amax_div'"):
        run(paddle.ones([1, DIM]))
