"""Faults of other cache operators, by the numbers of docs/faults.md: the smallest inputs."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn.reference.layout import pack, unpack
from fastattn.reference.numerics import from_codes
from tests.support.cache import Cache, Step, append, make_cache, make_values, write
from tests.support.compare import assert_same_bits, assert_within
from tests.support.static import run_all_modes
from tests.support.tensors import BF16, to_numpy, to_paddle


def _int32(values) -> np.ndarray:
    return np.asarray(values, np.int32)


def _step(cached: int, new: int, table=((0, 1),)) -> Step:
    """One sequence."""
    return Step(_int32(table), _int32([0, new]), _int32([cached]), _int32([new]))


def _read(cache: Cache, tokens: int, place: str, table=((0, 1),), dtype=BF16, layout="fastattn"):
    """Dequantised (key, value) of the first tokens of one sequence."""
    out = np.zeros((tokens, cache.key.shape[1], cache.key.shape[3]), dtype)
    seqs = (_int32(table), _int32([tokens]), _int32([0, tokens]))
    return append(cache, out, out, *seqs, place, layout)


def _fill(shape, value, dtype=BF16) -> np.ndarray:
    return np.broadcast_to(value, shape).astype(dtype)


@pytest.mark.parametrize("layout", ["fastattn", "fastdeploy"])
@pytest.mark.parametrize("cache_quant_type", ["block_wise_fp8", "block_wise_int8"])
def test_bug01_v_dynamic_scale_index(place, cache_quant_type, layout):
    """V of token r is r + 1: a scale read from another token gives another constant."""
    tokens = np.arange(1, 65)[:, None, None]
    x = _fill((64, 1, 128), tokens)
    cache = write(make_cache(cache_quant_type, 2, 1, 128), x, x, _step(0, 64), place)
    int8 = "int8" in cache_quant_type
    for kind, name in (("k", "key"), ("v", "value")):
        codes = unpack(getattr(cache, name), kind, "fastattn", int8=int8)
        setattr(cache, name, pack(codes, kind, layout, int8=int8))
    for out in _read(cache, 64, place, layout=layout):
        assert_within(out, np.broadcast_to(tokens, out.shape), tokens * 0.01)


@pytest.mark.parametrize("cache_quant_type", ["block_wise_fp8", "block_wise_int8"])
def test_bug06_all_zero_token(place, cache_quant_type):
    """The floor scale instead of 448 / 0."""
    x = _fill((8, 1, 128), 1.0)
    x[5] = 0
    cache = write(make_cache(cache_quant_type, 2, 1, 128), x, x, _step(0, 8), place)
    for kind, codes, scales in (
        ("k", cache.key, cache.k_scales),
        ("v", cache.value, cache.v_scales),
    ):
        assert not unpack(codes, kind, "fastattn", int8=False)[0, 0, 5].any()
        assert 0 < scales[0, 0, 5] < 1e-6
    for out in _read(cache, 8, place):
        assert_within(out, x, np.abs(x.astype(np.float32)) * 0.01)


@pytest.mark.parametrize("value", [0.005, 6e-8, -0.0068])
def test_bug07_fp16_token_whose_multiplier_overflows(place, value):
    """448 / 0.005 is no fp16 number; the multiplier is fp32."""
    x = _fill((1, 1, 128), value, np.float16)
    cache = write(make_cache("block_wise_fp8", 2, 1, 128), x, x, _step(0, 1), place)
    assert np.isfinite(cache.k_scales[0, 0, 0]) and cache.k_scales[0, 0, 0] > 0
    # Below the floor 1e-6 the scale is the floor's, and the smallest code step 2^-9 of it.
    bound = max(abs(value) * 0.01, 0.5 * 2.0**-9 * 1e-6 / 448)
    for out in _read(cache, 1, place, dtype=np.float16):
        assert_within(out, x, bound + 2.0**-25)


@pytest.mark.parametrize("cache_quant_type", ["cache_fp8", "cache_int8", "block_wise_fp8"])
def test_bug08_absent_zero_points(place, cache_quant_type):
    """A 64-token prefix and 1 new token, without zero points; a given one is an error."""
    cache = make_cache(cache_quant_type, 2, 1, 128, granularity="tensor")
    x = make_values((64, 1, 128), BF16)
    cache = write(cache, x, x, _step(0, 64), place)
    cache = write(cache, x[:1], x[:1], _step(64, 1), place)
    key, _ = _read(cache, 65, place)
    assert_same_bits(key[64], key[0])
    for name in ("cache_k_zp", "cache_v_zp"):
        with pytest.raises(ValueError, match=f"{name}: .* is symmetric"):
            F.write_cache_kv(
                *[None] * 8, cache_quant_type=cache_quant_type, **{name: paddle.zeros([1])}
            )


@pytest.mark.parametrize("granularity", ["head", "channel"])
def test_bug09_int8_channel_scales(place, granularity):
    """KV 2, scale[c] = 1 + c: head 1 has the scales 129..256."""
    cache = make_cache("cache_int8", 2, 2, 128, granularity=granularity)
    scales = 1 + np.arange(2 if granularity == "head" else 256, dtype=np.float32)
    cache.k_scales, cache.v_scales = scales, scales[::-1].copy()
    full = scales.reshape(2, -1) * np.ones((2, 128), np.float32)
    x = np.stack([full * 3, full * -5])
    cache = write(cache, x, x[..., ::-1].copy(), _step(0, 2), place)
    codes = unpack(cache.key, "k", "fastattn", int8=True)[0, :, :2].view(np.int8)
    assert (codes[:, 0] == 3).all() and (codes[:, 1] == -5).all()
    key, value = _read(cache, 2, place)
    assert_same_bits(key, x.astype(BF16))
    reverse = full[::-1, ::-1]
    stored = np.rint(x[..., ::-1] / reverse).clip(-127, 127) + np.float32(0)  # int8 has no -0
    assert_same_bits(value, (stored * reverse).astype(np.float32).astype(BF16))


def test_bug10_dynamic_scales_with_as_many_blocks_as_channels(place):
    """[128, 1, 64] scales are one a token, although 128 = KV * D."""
    cache = make_cache("block_wise_fp8", 128, 1, 128)
    x = make_values((70, 1, 128), BF16)
    table = ((101, 7),)
    cache = write(cache, x, x, _step(0, 70, table), place)
    x32 = x.astype(np.float32)
    top = np.abs(x32).max(axis=-1, keepdims=True)
    for out in _read(cache, 70, place, table):
        assert_within(out, x32, np.abs(x32) * (2.0**-4 + 2.0**-8) + top * 2.0**-10 / 448)


@pytest.mark.parametrize("fill", [0x7E, 0xFF])
@pytest.mark.parametrize("cache_quant_type", ["cache_fp8", "block_wise_fp8"])
def test_bug11_chunk_that_starts_inside_a_recycled_block(place, cache_quant_type, fill):
    """Old bytes 0x7E under the new code 0x01 must not become 0x7F."""
    cache = make_cache(cache_quant_type, 1, 1, 128)
    cache.key[:] = fill
    cache.value[:] = fill
    if cache_quant_type == "cache_fp8":
        cache.k_scales[:] = cache.v_scales[:] = 1
    x = _fill((59, 1, 128), 2.0**-9)
    x[:, :, 0] = 448  # the dynamic scale is 1, too
    cache = write(cache, x, x, _step(5, 59, ((0,),)), place)
    for kind, stored in (("k", cache.key), ("v", cache.value)):
        codes = unpack(stored, kind, "fastattn", int8=False)[0, 0]
        assert (codes[:5] == fill).all(), "tokens before the chunk"
        assert (codes[5:, 1:] == 0x01).all() and (codes[5:, 0] == 0x7E).all()


def test_bug12_unsupported_shapes_and_dtypes_are_errors(place):
    """Blocks of 32 tokens, fp32 outputs, odd head sizes: an error, never an untouched output."""
    seqs = [to_paddle(a, place) for a in _step(0, 1).arrays]
    x = to_paddle(np.zeros((1, 1, 128), np.float32), place)
    scale = to_paddle(np.ones(1, np.float32), place)
    options = {"cache_k_scales": scale, "cache_v_scales": scale, "cache_quant_type": "cache_fp8"}
    small = to_paddle(np.zeros((2, 1, 32, 128), np.uint8), place)
    with pytest.raises(ValueError, match="key_cache: expected blocks of 64 tokens"):
        F.write_cache_kv(x, x, small, small, *seqs, **options)
    cache = make_cache("cache_fp8", 2, 1, 128)
    caches = [to_paddle(a, place) for a in (cache.key, cache.value)]
    lengths = [seqs[0], seqs[2], seqs[1]]
    with pytest.raises(ValueError, match="key_cache: expected blocks of 64 tokens"):
        F.append_cache_kv_c8(small, small, x, x, *lengths, dynamic_quant=False, **options)
    with pytest.raises(TypeError, match="key: expected dtype bfloat16 or float16, got float32"):
        F.append_cache_kv_c8(*caches, x, x, *lengths, dynamic_quant=False, **options)
    odd = to_paddle(np.zeros((2, 1, 64, 80), np.uint8), place)
    with pytest.raises(NotImplementedError, match="head_dim 80 is not supported"):
        F.write_cache_kv(x, x, odd, odd, *seqs, **options)


def test_bug15_scales_of_all_heads_for_a_shard_of_them(place):
    """8 heads over 4 ranks: rank 1 has 2 heads and needs 2 scales, 3 and 4, not 8."""
    scales = np.arange(1, 9, dtype=np.float32)
    x = _fill((1, 2, 128), 12.0)
    cache = make_cache("cache_fp8", 2, 2, 128)
    cache.k_scales = cache.v_scales = scales
    with pytest.raises(ValueError, match=r"cache_k_scales: expected shape \[1\] or \[2\]"):
        write(cache, x, x, _step(0, 1), place)
    cache.k_scales = cache.v_scales = scales[2:4].copy()
    cache = write(cache, x, x, _step(0, 1), place)
    codes = unpack(cache.key, "k", "fastattn", int8=False)[0, :, 0, 0]
    assert from_codes(codes, "e4m3").tolist() == [4.0, 3.0]
    with pytest.raises(ValueError, match=r"cache_k_scales: expected shape \[1\] or \[2\]"):
        cache.k_scales = scales
        _read(cache, 1, place)


def _write(key, value, key_cache, value_cache, tables, cu, cached, new):
    return F.write_cache_kv(key, value, key_cache, value_cache, tables, cu, cached, new)


def _append(key_cache, value_cache, key, value, tables, cached, cu, scale):
    return F.append_cache_kv_c8(
        key_cache,
        value_cache,
        key,
        value,
        tables,
        cached,
        cu,
        cache_k_scales=scale,
        cache_v_scales=scale,
        dynamic_quant=False,
        cache_quant_type="cache_int8",
    )


def _convert(cache):
    moved = F.convert_cache_layout(
        cache, kind="v", cache_quant_type="cache_int8", src="logical", dst="fastattn"
    )
    return moved.reshape([-1, 128, 64])  # needs the traced shape


def test_bug19_shape_functions_of_every_operator(place):
    """Tracing calls them; a wrong arity ends the process there."""
    seqs = [*_step(3, 2).arrays]
    x = make_values((2, 1, 128), BF16)
    cache = make_cache("none", 2, 1, 128)
    run_all_modes(_write, [x, x, cache.key, cache.value, *seqs], place, dynamic=True)
    cache = make_cache("cache_int8", 2, 1, 128)
    lengths = [seqs[0], seqs[2], _int32([0, 2])]
    arrays = [cache.key, cache.value, x, x, *lengths, np.float32([0.3])]
    run_all_modes(_append, arrays, place, dynamic=True)
    run_all_modes(_convert, [cache.key], place, dynamic=True)


def test_bug20_write_then_append_1000_times(place):
    """The reader sees what the writer of the same step wrote, every time."""
    table = ((1, 0),)
    cache = make_cache("block_wise_fp8", 2, 2, 128)
    step = [to_paddle(a, place) for a in _step(0, 100, table).arrays]
    chunks = [make_values((100, 2, 128), BF16, seed) for seed in range(2)]
    caches = [to_paddle(a, place) for a in (cache.key, cache.value, cache.k_scales, cache.v_scales)]
    scales = {"cache_k_scales": caches[2], "cache_v_scales": caches[3]}
    expected = []
    for x in chunks:
        written = write(cache, x, x, _step(0, 100, table), place)
        expected.append(_read(written, 100, place, table))
    inputs = [to_paddle(x, place) for x in chunks]
    blocks, cu, _, tokens = step
    for i in range(1000):
        out = [to_paddle(np.zeros((100, 2, 128), BF16), place) for _ in range(2)]
        x = inputs[i % 2]
        F.write_cache_kv(x, x, *caches[:2], *step, cache_quant_type="block_wise_fp8", **scales)
        F.append_cache_kv_c8(
            *caches[:2],
            *out,
            blocks,
            tokens,
            cu,
            dynamic_quant=True,
            cache_quant_type="block_wise_fp8",
            **scales,
        )
        for tensor, array in zip(out, expected[i % 2]):
            assert_same_bits(to_numpy(tensor), array, f"repeat {i}")
