"""write_cache_kv against the NumPy model: every byte and scale of the cache."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import reference
from fastattn.functional._cache_types import TYPES
from fastattn.reference.cache import code_of
from fastattn.reference.layout import unpack
from fastattn.reference.numerics import from_codes
from tests.support.cache import (
    QUANTISED,
    Cache,
    Step,
    assert_same_cache,
    is_dynamic,
    make_cache,
    make_step,
    make_values,
    write,
)
from tests.support.compare import assert_same_bits, assert_within
from tests.support.static import run_all_modes
from tests.support.tensors import BF16, DTYPES, EMPTY_OUTPUTS, to_numpy, to_paddle, value_dim

CACHED = [0, 1, 63, 64, 65, 100, 320, 7]
NEW = [1, 0, 65, 64, 63, 1, 200, 5]


def model(cache: Cache, key, value, step: Step, batch_id_per_token=None) -> Cache:
    expected = cache.copy()
    reference.write_cache_kv(
        key,
        value,
        expected.key,
        expected.value,
        *step.arrays,
        cache_k_scales=expected.k_scales,
        cache_v_scales=expected.v_scales,
        batch_id_per_token=batch_id_per_token,
        **cache.options,
    )
    return expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize(("cache_quant_type", "fp8_format"), QUANTISED)
def test_quantised(place, cache_quant_type, fp8_format, head_dim, dtype):
    step, num_blocks = make_step(CACHED, NEW)
    cache = make_cache(cache_quant_type, num_blocks, 2, head_dim, fp8_format=fp8_format)
    shape = (step.num_tokens, 2)
    key = make_values((*shape, head_dim), DTYPES[dtype], 1)
    value = make_values((*shape, value_dim(head_dim)), DTYPES[dtype], 2)
    assert_same_cache(write(cache, key, value, step, place), model(cache, key, value, step))


@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("scale_dtype", [np.float32, BF16])
@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
@pytest.mark.parametrize("cache_quant_type", ["cache_int8", "cache_fp8"])
def test_static_scale_granularity(place, cache_quant_type, granularity, scale_dtype, kv_heads):
    if granularity == "channel" and cache_quant_type != "cache_int8":
        pytest.skip("channel scales are for int8")
    step, num_blocks = make_step([3], [9])
    cache = make_cache(
        cache_quant_type,
        num_blocks,
        kv_heads,
        128,
        scale_dtype=scale_dtype,
        granularity=granularity,
    )
    key = make_values((9, kv_heads, 128), BF16, 1)
    value = make_values((9, kv_heads, 128), BF16, 2)
    actual = write(cache, key, value, step, place)
    assert_same_cache(actual, model(cache, key, value, step))
    assert_same_bits(actual.k_scales, cache.k_scales, "static scales are only read")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("cache_quant_type", ["block_wise_int8", "block_wise_fp8"])
def test_dynamic_scales_in_bfloat16_are_rounded_before_the_codes(place, cache_quant_type, dtype):
    step, num_blocks = make_step([60], [70])
    cache = make_cache(cache_quant_type, num_blocks, 2, 128, scale_dtype=BF16)
    key = make_values((70, 2, 128), dtype, 1)
    value = make_values((70, 2, 128), dtype, 2)
    actual = write(cache, key, value, step, place)
    assert_same_cache(actual, model(cache, key, value, step))
    # The largest element decodes to itself within half a step of the code, although the stored
    # scale is up to 2^-9 off.
    block, slot = step.block_tables[0, 0], 60
    int8 = "int8" in cache_quant_type
    codes = unpack(actual.key, "k", "fastattn", int8=int8)[block, :, slot]
    decoded = from_codes(codes, "int8" if int8 else "e4m3")
    decoded = decoded * actual.k_scales[block, :, slot, None].astype(np.float32)
    x = key[0].astype(np.float32)
    step_of_code = np.abs(x).max(axis=-1, keepdims=True) * (0.51 / 127 if int8 else 0.51 / 14)
    assert_within(decoded, x, step_of_code)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize(
    ("cache_dtype", "dtype"),
    [(BF16, BF16), (np.float16, np.float16), (BF16, np.float32), (np.float16, np.float32)],
)
def test_none_stores_values(place, cache_dtype, dtype, head_dim):
    step, num_blocks = make_step(CACHED, NEW)
    cache = make_cache("none", num_blocks, 2, head_dim, dtype=cache_dtype)
    shape = (step.num_tokens, 2)
    key = make_values((*shape, head_dim), dtype, 1)
    value = make_values((*shape, value_dim(head_dim)), dtype, 2)
    key[0, 0, :4] = [np.nan, np.inf, -np.inf, -0.0]
    assert_same_cache(write(cache, key, value, step, place), model(cache, key, value, step))


@pytest.mark.parametrize(("cache_quant_type", "fp8_format"), QUANTISED)
def test_an_all_zero_token_has_codes_0_and_the_floor_scale(place, cache_quant_type, fp8_format):
    step, num_blocks = make_step([5], [3])
    cache = make_cache(cache_quant_type, num_blocks, 2, 128, fp8_format=fp8_format)
    key = make_values((3, 2, 128), BF16)
    key[1] = 0
    actual = write(cache, key, key, step, place)
    assert_same_cache(actual, model(cache, key, key, step))
    block = step.block_tables[0, 0]
    for kind, bytes_, scales in (
        ("k", actual.key, actual.k_scales),
        ("v", actual.value, actual.v_scales),
    ):
        code = code_of(cache_quant_type, fp8_format, kind)
        zero = 0x88 if code == "int4" else 0
        assert (unpack(bytes_, kind, "fastattn", int8=False)[block, :, 6] == zero).all()
        if TYPES[cache_quant_type].scheme == "group":
            byte = {"ue8m0": 1}[TYPES[cache_quant_type].scale_type]
            assert (scales[block, :, 6] == byte).all()
        elif is_dynamic(cache_quant_type):
            qmax = {"int8": 127, "int4": 8, "e4m3": 448}[code]
            floor = np.full(2, np.float32(1e-6) / np.float32(qmax), np.float32)
            assert_same_bits(scales[block, :, 6], floor)


@pytest.mark.parametrize(("cache_quant_type", "fp8_format"), QUANTISED)
def test_nan_and_infinity(place, cache_quant_type, fp8_format):
    step, num_blocks = make_step([0], [4])
    cache = make_cache(cache_quant_type, num_blocks, 2, 64, fp8_format=fp8_format)
    key = make_values((4, 2, 64), np.float32)
    key[0, 0, 6:8] = [40, np.nan]
    key[1, 1, 7] = np.inf
    key[1, 1, 8] = -np.inf
    key[2, 0] = 1e-30
    key[3, 1, 63] = -np.nan
    actual = write(cache, key, key, step, place)
    assert_same_cache(actual, model(cache, key, key, step))
    block = step.block_tables[0, 0]
    for kind, bytes_, scales in (
        ("k", actual.key, actual.k_scales),
        ("v", actual.value, actual.v_scales),
    ):
        code = code_of(cache_quant_type, fp8_format, kind)
        int8, int4, mxfp4 = (code == name for name in ("int8", "int4", "e2m1"))
        codes = unpack(bytes_, kind, "fastattn", int8=int8, nibbles=int4 or mxfp4)[block]
        largest = 127 if int8 else 0x7B if code == "e5m2" else 0x7E
        lowest = 0x81 if int8 else largest | 0x80
        zero = 0 if int8 else 8 if int4 else 0x7F  # of a NaN
        if int4:
            largest, lowest = 15, 0
        if mxfp4:
            zero, largest, lowest = 7, 7, 15
        assert codes[1, 1, 7:9].tolist() == [largest, lowest]
        if mxfp4:  # a NaN does not count in its block
            assert codes[0, 0, 7] == zero and codes[1, 3, 63] == zero
            assert codes[0, 0, 6] == 6 and (scales[block][:, :4] != 255).all()
        elif is_dynamic(cache_quant_type):
            assert np.isnan(scales[block, 0, 0]) and np.isnan(scales[block, 1, 3])
            assert np.isfinite(scales[block, 1, 0]) and np.isfinite(scales[block, 1, 1])
            assert (codes[0, 0] == zero).all()
        else:
            assert codes[0, 0, 7] == zero
            assert codes[0, 0, 6] != codes[0, 0, 7], "a static scale keeps the other channels"


def test_a_chunk_from_the_middle_of_a_recycled_block(place):
    """Bytes of earlier owners neither survive in the written slots nor change elsewhere."""
    for cache_quant_type, fp8_format in QUANTISED:
        step, num_blocks = make_step([5, 62], [70, 1])
        key = make_values((71, 2, 128), BF16, 1)
        value = make_values((71, 2, 128), BF16, 2)
        results = []
        for fill in (0x00, 0x7E, 0xFF):
            cache = make_cache(cache_quant_type, num_blocks, 2, 128, fp8_format=fp8_format)
            cache.key[:] = fill
            cache.value[:] = fill
            actual = write(cache, key, value, step, place)
            assert_same_cache(actual, model(cache, key, value, step))
            codes = unpack(actual.value, "v", "fastattn", int8=False)
            first = codes[step.block_tables[0, 0]]
            assert (first[:, :5] == fill).all(), "slots before the chunk keep their bytes"
            results.append(first[:, 5:])
        assert_same_bits(results[1], results[0])
        assert_same_bits(results[2], results[0])


def test_any_split_into_chunks_gives_the_same_bytes(place):
    total = 150
    key = make_values((total, 2, 128), BF16, 1)
    value = make_values((total, 2, 128), BF16, 2)
    for cache_quant_type, fp8_format in (*QUANTISED, ("none", "e4m3")):
        whole, num_blocks = make_step([0], [total])
        cache = make_cache(cache_quant_type, num_blocks, 2, 128, fp8_format=fp8_format)
        expected = write(cache, key, value, whole, place)
        actual = cache
        for start, end in ((0, 1), (1, 63), (63, 64), (64, 130), (130, total)):
            step = Step(
                whole.block_tables,
                np.asarray([0, end - start], np.int32),
                np.asarray([start], np.int32),
                np.asarray([end - start], np.int32),
            )
            actual = write(actual, key[start:end], value[start:end], step, place)
        assert_same_cache(actual, expected)


def test_seqs_give_fewer_tokens_than_their_room(place):
    """seq_lens_this_time decides; the rest of a sequence's room and the tail are padding."""
    step, num_blocks = make_step([10, 20, 30], [8, 8, 8])
    step.seq_lens_this_time[:] = [3, 0, 100]
    cache = make_cache("block_wise_fp8", num_blocks, 2, 64)
    key = make_values((30, 2, 64), BF16)  # 6 tokens past cu_seqlens_q[-1]
    assert_same_cache(write(cache, key, key, step, place), model(cache, key, key, step))


@pytest.mark.parametrize("cache_quant_type", ["none", "cache_int8", "block_wise_fp8"])
@pytest.mark.parametrize(("seqs", "most"), [(1100, 1), (50, 30)])
def test_many_seqs_of_which_some_rest(place, seqs, most, cache_quant_type):
    rng = np.random.default_rng(seqs)
    new = rng.integers(0, most + 1, seqs)
    new[: seqs // 3] = 0
    step, num_blocks = make_step(list(rng.integers(0, 70, seqs)), list(new))
    cache = make_cache(cache_quant_type, num_blocks, 1, 64)
    key, value = (make_values((step.num_tokens, 1, 64), BF16, seed) for seed in (1, 2))
    assert_same_cache(write(cache, key, value, step, place), model(cache, key, value, step))


def test_batch_id_per_token_skips_padding(place):
    step, num_blocks = make_step([10, 20], [4, 4])
    ids = np.asarray([0, 0, -1, 0, 1, -1, 1, 1, -1, -1], np.int32)
    cache = make_cache("block_wise_int8", num_blocks, 2, 64)
    key = make_values((10, 2, 64), BF16)
    actual = write(cache, key, key, step, place, ids)
    assert_same_cache(actual, model(cache, key, key, step, ids))
    without = write(cache, key, key, step, place)
    assert (actual.key != without.key).any()


BIG = np.iinfo(np.int32).max


@pytest.mark.parametrize("cache_quant_type", ["none", "cache_fp8", "block_wise_int8"])
@pytest.mark.parametrize(
    "change",
    [
        {"block_tables": [[-1, 5], [BIG, -BIG]]},
        {"block_tables": [[4, 99], [2, 3]]},
        {"cu_seqlens_q": [0, 3, BIG]},
        {"cu_seqlens_q": [-5, 2, 4]},
        {"cu_seqlens_q": [4, 2, 0]},
        {"cu_seqlens_q": [50, 60, 70]},
        {"seq_lens_decoder": [BIG, -7]},
        {"seq_lens_decoder": [126, 127]},
        {"seq_lens_this_time": [BIG, -BIG]},
        {"batch_id_per_token": [BIG, -BIG, 1, 0, 7, 0, 1]},
    ],
)
def test_values_out_of_range_are_skipped(place, change, cache_quant_type):
    step = Step(
        np.asarray([[0, 1], [2, 3]], np.int32),
        np.asarray([0, 3, 7], np.int32),
        np.asarray([60, 0], np.int32),
        np.asarray([3, 4], np.int32),
    )
    change = {name: np.asarray(values, np.int32) for name, values in change.items()}
    ids = change.pop("batch_id_per_token", None)
    for name, values in change.items():
        setattr(step, name, values)
    cache = make_cache(cache_quant_type, 5, 1, 64)
    key = make_values((7, 1, 64), BF16)
    assert_same_cache(write(cache, key, key, step, place, ids), model(cache, key, key, step, ids))


def test_no_tokens_no_seqs_no_blocks(place):
    for tokens, seqs, max_blocks, num_blocks in (
        (0, 2, 3, 4),
        (5, 0, 0, 4),
        (5, 2, 0, 4),
        (5, 2, 3, 0),
        (0, 0, 0, 0),
    ):
        step = Step(
            np.zeros((seqs, max_blocks), np.int32),
            np.arange(seqs + 1, dtype=np.int32),
            np.zeros(seqs, np.int32),
            np.ones(seqs, np.int32),
        )
        if num_blocks == 0 and not EMPTY_OUTPUTS:
            continue  # Paddle 2.6 refuses an empty output, written in place or not
        for cache_quant_type in ("none", "cache_int8", "block_wise_fp8"):
            cache = make_cache(cache_quant_type, num_blocks, 2, 64)
            key = make_values((tokens, 2, 64), BF16)
            actual = write(cache, key, key, step, place)
            assert_same_cache(actual, model(cache, key, key, step))


def test_key_and_value_may_be_slices_of_qkv(place):
    if place == "gpu" and not EMPTY_OUTPUTS:
        pytest.skip("Paddle 2.6 has no kernel for this GPU that makes a slice contiguous")
    step, num_blocks = make_step([7], [20])
    cache = make_cache("block_wise_fp8", num_blocks, 2, 64)
    qkv = make_values((20, 8, 64), np.float32)
    expected = model(cache, qkv[:, 4:6], qkv[:, 6:], step)
    tensors = [to_paddle(a, place) for a in (cache.key, cache.value)]
    scales = [to_paddle(a, place) for a in (cache.k_scales, cache.v_scales)]
    fused = to_paddle(qkv, place)
    F.write_cache_kv(
        fused[:, 4:6],
        fused[:, 6:],
        *tensors,
        *(to_paddle(a, place) for a in step.arrays),
        cache_k_scales=scales[0],
        cache_v_scales=scales[1],
        **cache.options,
    )
    assert_same_bits(to_numpy(tensors[0]), expected.key)
    assert_same_bits(to_numpy(tensors[1]), expected.value)
    assert_same_bits(to_numpy(scales[1]), expected.v_scales)


@pytest.mark.parametrize(
    ("dtype", "cache_quant_type", "fp8_format"),
    [
        ("int8", "cache_int8", "e4m3"),
        ("int8", "block_wise_int8", "e4m3"),
        ("float8_e4m3fn", "cache_fp8", "e4m3"),
        ("float8_e4m3fn", "block_wise_fp8", "e4m3"),
        ("float8_e5m2", "cache_fp8", "e5m2"),
    ],
)
def test_caches_with_a_dtype_of_their_own(place, dtype, cache_quant_type, fp8_format):
    if not hasattr(paddle, dtype):
        pytest.skip("this Paddle has no FP8 dtypes")
    step, num_blocks = make_step([7], [20])
    cache = make_cache(cache_quant_type, num_blocks, 2, 64, fp8_format=fp8_format)
    key = make_values((20, 2, 64), BF16)
    expected = model(cache, key, key, step)
    tensors = [to_paddle(a, place).view(dtype) for a in (cache.key, cache.value)]
    F.write_cache_kv(
        to_paddle(key, place),
        to_paddle(key, place),
        *tensors,
        *(to_paddle(a, place) for a in step.arrays),
        cache_k_scales=to_paddle(cache.k_scales, place),
        cache_v_scales=to_paddle(cache.v_scales, place),
        **cache.options,
    )
    assert_same_bits(to_numpy(tensors[0]).view(np.uint8), expected.key)
    assert_same_bits(to_numpy(tensors[1]).view(np.uint8), expected.value)


def _write_dynamic(key, value, key_cache, value_cache, k_scales, v_scales, tables, cu, old, new):
    return F.write_cache_kv(
        key,
        value,
        key_cache,
        value_cache,
        tables,
        cu,
        old,
        new,
        cache_k_scales=k_scales,
        cache_v_scales=v_scales,
        cache_quant_type="block_wise_fp8",
    )


def _write_none(key, value, key_cache, value_cache, tables, cu, old, new):
    return F.write_cache_kv(key, value, key_cache, value_cache, tables, cu, old, new)


@pytest.mark.parametrize("dynamic", [False, True])
def test_all_modes_of_paddle(place, dynamic):
    step, num_blocks = make_step([60, 0], [9, 3])
    key = make_values((12, 2, 64), BF16, 1)
    value = make_values((12, 2, 64), BF16, 2)
    cache = make_cache("block_wise_fp8", num_blocks, 2, 64)
    arrays = [key, value, cache.key, cache.value, cache.k_scales, cache.v_scales, *step.arrays]
    expected = model(cache, key, value, step)
    _, inputs = run_all_modes(_write_dynamic, arrays, place, dynamic=dynamic)
    assert_same_cache(Cache(*inputs[2:6], *cache.options.values()), expected)

    cache = make_cache("none", num_blocks, 2, 64)
    expected = model(cache, key, value, step)
    arrays = [key, value, cache.key, cache.value, *step.arrays]
    outputs, inputs = run_all_modes(_write_none, arrays, place, dynamic=dynamic)
    assert_same_bits(inputs[2], expected.key)
    assert_same_bits(outputs[1], expected.value)


class _Layer(paddle.nn.Layer):
    """Holds static scales, as a server's attention layer does."""

    def __init__(self, scales):
        super().__init__()
        self.scales = self.create_parameter([len(scales)], dtype="float32")
        self.scales.set_value(scales)

    def forward(self, key, value, key_cache, value_cache, tables, cu, old, new):
        _, written = F.write_cache_kv(
            key,
            value,
            key_cache,
            value_cache,
            tables,
            cu,
            old,
            new,
            cache_k_scales=self.scales,
            cache_v_scales=self.scales,
            cache_quant_type="cache_int8",
        )
        return written


def test_static_scales_may_be_a_layer_s_parameters():
    step, num_blocks = make_step([60, 0], [9, 3])
    key = make_values((12, 2, 64), BF16, 1)
    cache = make_cache("cache_int8", num_blocks, 2, 64)
    cache.v_scales = cache.k_scales
    expected = model(cache, key, key, step)
    layer = _Layer(cache.k_scales)
    layer.eval()
    arrays = [key, key, cache.key, cache.value, *step.arrays]
    for run in (layer, paddle.jit.to_static(layer, full_graph=True)):
        tensors = [to_paddle(a.copy()) for a in arrays]
        out = run(*tensors)
        assert_same_bits(to_numpy(out), expected.value)
        assert_same_bits(to_numpy(tensors[2]), expected.key)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("cache_quant_type", "fp8_format"), [q for q in QUANTISED if not is_dynamic(q[0])]
)
def test_every_16_bit_value(place, cache_quant_type, fp8_format, dtype):
    """At scale 1, as they are and a little off, so that ties and both neighbours occur."""
    values = np.arange(1 << 16, dtype=np.uint16).view(DTYPES[dtype]).reshape(512, 1, 128)
    step, num_blocks = make_step([0], [512])
    cache = make_cache(cache_quant_type, num_blocks, 1, 128, fp8_format=fp8_format)
    cache.k_scales[:] = 1
    cache.v_scales[:] = 1
    with np.errstate(all="ignore"):
        off = values.astype(np.float32) * np.float32(1 + 2.0**-20)
        wide = values.astype(np.float32)
    assert_same_cache(write(cache, values, values, step, place), model(cache, values, values, step))
    assert_same_cache(write(cache, off, wide, step, place), model(cache, off, wide, step))


@pytest.mark.parametrize("cache_dtype", [np.float16, BF16])
def test_fp32_is_rounded_to_the_cache_at_ties_and_limits(place, cache_dtype):
    middle = np.arange(1 << 16, dtype=np.uint32) << 16 | 0x8000  # ties of bfloat16
    bits = np.stack([middle - 1, middle, middle + 1]).astype(np.uint32)
    half = np.arange(1 << 15, dtype=np.uint16).view(np.float16).astype(np.float64)
    with np.errstate(all="ignore"):
        ties = np.nan_to_num((half[1:] + half[:-1]) / 2, posinf=65520).astype(np.float32)
    x = np.concatenate([bits.view(np.float32).reshape(-1), ties, ties * np.float32(1 + 2.0**-20)])
    x = np.concatenate([x, -x])
    x = x[: x.size // 128 * 128].reshape(-1, 1, 128)
    step, num_blocks = make_step([0], [len(x)])
    cache = make_cache("none", num_blocks, 1, 128, dtype=cache_dtype)
    assert_same_cache(write(cache, x, x[::-1].copy(), step, place), model(cache, x, x[::-1], step))
