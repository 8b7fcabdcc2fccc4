"""append_cache_kv_c8 against the NumPy model: every bit of the dequantised K and V."""

from __future__ import annotations

import numpy as np
import pytest

import fastattn.functional as F
from fastattn import reference
from fastattn.functional._cache_types import codes_per_byte
from fastattn.reference.cache import code_of
from fastattn.reference.layout import BLOCK_SIZE, pack, token_slot, unpack
from fastattn.reference.numerics import from_codes
from tests.support.cache import (
    QUANTISED,
    Cache,
    append,
    is_dynamic,
    make_cache,
    make_step,
    make_values,
)
from tests.support.compare import assert_same_bits, assert_within
from tests.support.static import run_all_modes
from tests.support.tensors import BF16, EMPTY_OUTPUTS

CACHED = [0, 1, 63, 64, 65, 200, 320, 7]


def in_layout(cache: Cache, layout: str) -> Cache:
    """The same codes in another byte order."""
    int8 = "int8" in cache.cache_quant_type
    moved = cache.copy()
    moved.key = pack(unpack(cache.key, "k", "fastattn", int8=int8), "k", layout, int8=int8)
    moved.value = pack(unpack(cache.value, "v", "fastattn", int8=int8), "v", layout, int8=int8)
    return moved


def model(cache: Cache, key, value, tables, cached, cu, layout: str = "fastattn"):
    outputs = [key.copy(), value.copy()]
    reference.append_cache_kv_c8(
        cache.key,
        cache.value,
        *outputs,
        tables,
        cached,
        cu,
        cache_k_scales=cache.k_scales,
        cache_v_scales=cache.v_scales,
        cache_layout=layout,
        **cache.options,
    )
    return outputs


def outputs(cache: Cache, tokens: int, dtype) -> list[np.ndarray]:
    """Outputs for K and V of a cache in layout fastattn, full of a marker."""
    heads, codes = cache.key.shape[1], codes_per_byte(cache.cache_quant_type)
    dims = (cache.key.shape[3] * codes[0], cache.value.shape[2] * codes[1])
    return [np.full((tokens, heads, d), x, dtype) for d, x in zip(dims, (77, -77))]


def check(cache: Cache, tables, cached, cu, tokens: int, place: str, dtype=BF16, layout="fastattn"):
    """Compare with the model on outputs that are full of a marker."""
    key, value = outputs(cache, tokens, dtype)
    moved = in_layout(cache, layout)
    seqs = [np.asarray(a, np.int32) for a in (tables, cached, cu)]
    actual = append(moved, key, value, *seqs, place, layout)
    expected = model(moved, key, value, *seqs, layout)
    assert_same_bits(actual[0], expected[0], "key")
    assert_same_bits(actual[1], expected[1], "value")
    return actual


def _seqs(cached):
    step, num_blocks = make_step(cached, [0] * len(cached), seed=0)
    return step.block_tables, step.seq_lens_decoder, np.cumsum([0, *cached]), num_blocks


@pytest.mark.parametrize("dtype", [np.float16, BF16])
@pytest.mark.parametrize("layout", ["fastattn", "fastdeploy"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize(("cache_quant_type", "fp8_format"), QUANTISED)
def test_ragged_seqs(place, cache_quant_type, fp8_format, head_dim, layout, dtype):
    """Random bytes: every code, NaN ones included, and infinities from the product."""
    if layout == "fastdeploy" and 2 in codes_per_byte(cache_quant_type):
        pytest.skip("FastDeploy has no such cache")
    tables, cached, cu, num_blocks = _seqs(CACHED)
    cache = make_cache(cache_quant_type, num_blocks, 2, head_dim, fp8_format=fp8_format)
    check(cache, tables, cached, cu, sum(CACHED), place, dtype, layout)


@pytest.mark.parametrize("layout", ["fastattn", "fastdeploy"])
@pytest.mark.parametrize("scale_dtype", [np.float32, BF16])
@pytest.mark.parametrize(
    ("cache_quant_type", "granularity"),
    [
        ("cache_int8", "tensor"),
        ("cache_int8", "head"),
        ("cache_int8", "channel"),
        ("cache_fp8", "tensor"),
        ("cache_fp8", "head"),
        ("block_wise_int8", "token"),
        ("block_wise_fp8", "token"),
    ],
)
def test_scales(place, cache_quant_type, granularity, scale_dtype, layout):
    tables, cached, cu, num_blocks = _seqs([70, 3])
    cache = make_cache(
        cache_quant_type, num_blocks, 3, 128, scale_dtype=scale_dtype, granularity=granularity
    )
    check(cache, tables, cached, cu, 73, place, BF16, layout)


def test_against_a_plain_loop(place):
    """Independent of the reference's indexing: byte by byte from the description of the layout."""
    cache = make_cache("block_wise_int8", 3, 2, 64)
    tables, cached, cu = (np.asarray(a, np.int32) for a in ([[2, 0]], [100], [0, 100]))
    zeros = np.zeros((100, 2, 64), np.float16)
    key, value = append(cache, zeros, zeros, tables, cached, cu, place)
    for token in (0, 1, 8, 63, 64, 99):
        block, slot = int(tables[0, token // 64]), token % 64
        for head in range(2):
            for channel in (0, 1, 33, 63):
                k_code = np.int8(cache.key[block, head, slot, channel].view(np.int8))
                v_code = cache.value[block, head, channel, token_slot(np.array(slot))].view(np.int8)
                k = np.float32(k_code) * cache.k_scales[block, head, slot]
                v = np.float32(v_code) * cache.v_scales[block, head, slot]
                assert key[token, head, channel] == np.float16(k)
                assert value[token, head, channel] == np.float16(v)


@pytest.mark.parametrize(("cache_quant_type", "fp8_format"), QUANTISED)
def test_reads_back_what_was_written(place, cache_quant_type, fp8_format):
    """Within half a step of each code: relative for FP8, absolute for integers."""
    cached = [130, 65]
    step, num_blocks = make_step([0, 0], cached)
    cache = make_cache(cache_quant_type, num_blocks, 2, 128, fp8_format=fp8_format)
    key, value = (make_values((195, 2, 128), np.float32, seed) for seed in (1, 2))
    if not is_dynamic(cache_quant_type):
        code_max = {"cache_int8": 127, "e4m3": 448, "e5m2": 57344}
        top = code_max.get(cache_quant_type) or code_max[fp8_format]
        cache.k_scales, cache.v_scales = (
            (np.abs(x).max(axis=(0, 2)) / top * 1.1).astype(np.float32) for x in (key, value)
        )
    reference.write_cache_kv(
        key,
        value,
        cache.key,
        cache.value,
        *step.arrays,
        cache_k_scales=cache.k_scales,
        cache_v_scales=cache.v_scales,
        **cache.options,
    )
    zeros = np.zeros(key.shape, BF16)
    decoded = append(
        cache, zeros, zeros, step.block_tables, np.int32(cached), step.cu_seqlens_q, place
    )
    if is_dynamic(cache_quant_type):
        limit = [np.abs(x).max(axis=-1, keepdims=True) for x in (key, value)]
    else:
        limit = [np.abs(x).max(axis=(0, 2))[None, :, None] * 1.1 for x in (key, value)]
    for kind, out, x, top in zip("kv", decoded, (key, value), limit):
        code = code_of(cache_quant_type, fp8_format, kind)
        if code == "e2m1":  # steps of 2 below the largest power of two, of 6 at most
            block = np.abs(x.reshape(*x.shape[:-1], -1, 32)).max(-1).repeat(32, -1)
            unit = 2.0 ** np.ceil(np.log2(block / 6))
            bound = np.maximum(np.abs(x) / 4, 0.25 * unit) * 1.001 + np.abs(x) * 2.0**-8
        elif code == "int4":  # beyond 7.5 steps the sign without code 8 loses up to one
            bound = top * 0.501 / 8 + np.abs(x) * 2.0**-8
            bound += np.where(np.abs(x) > top * 7.5 / 8, top / 8, 0)
        elif code == "int8":
            bound = top * 0.501 / 127 + np.abs(x) * 2.0**-8
        else:
            half_step = 2.0 ** (-3 if code == "e5m2" else -4)
            tiny = 2.0**-17 / 57344 if code == "e5m2" else 2.0**-10 / 448
            bound = np.abs(x) * (half_step + 2.0**-8) * 1.001 + top * tiny * 1.001
        assert_within(out, x, bound)


def test_tokens_that_stay_untouched(place):
    """Room beyond a sequence's cached tokens, gaps, unassigned blocks, tokens of no sequence."""
    cache = make_cache("block_wise_fp8", 4, 2, 64)
    tables = [[3, -1, 1], [99, 2, 0]]
    key, value = check(cache, tables, [150, 100], [2, 160, 300], 310, place)
    for out, marker in ((key, 77), (value, -77)):
        kept = (out.astype(np.float32) == marker).all(axis=(1, 2))
        assert kept[:2].all() and kept[66:130].all() and kept[152:224].all() and kept[260:].all()
        assert not kept[2:66].all() and not kept[130:152].all() and not kept[224:260].all()


BIG = np.iinfo(np.int32).max


@pytest.mark.parametrize("layout", ["fastattn", "fastdeploy"])
@pytest.mark.parametrize(
    ("tables", "cached", "cu"),
    [
        ([[-1, BIG], [-BIG, 1]], [100, 100], [0, 100, 150]),
        ([[0, 1], [2, 3]], [BIG, -BIG], [0, 100, 150]),
        ([[0, 1], [2, 3]], [BIG, BIG], [0, 100, BIG]),
        ([[0, 1], [2, 3]], [100, 100], [-70, 30, 150]),
        ([[0, 1], [2, 3]], [100, 100], [150, 100, 0]),
        ([[0, 1], [2, 3]], [100, 100], [140, 240, 340]),
        ([[0, 1], [2, 3]], [100, 100], [BIG, BIG, BIG]),
        ([[0, 1], [2, 3]], [100, 100], [-BIG, BIG, BIG]),
        ([[0, 1], [2, 3]], [100, 100], [20, -BIG - 1, 150]),  # differences wrap in 32 bits
        ([[0, 1], [2, 3]], [BIG, 100], [149, -BIG, BIG]),
        ([[], []], [100, 100], [0, 100, 150]),
        (np.zeros((0, 3)), [], [0]),
    ],
)
def test_values_out_of_range_are_skipped(place, tables, cached, cu, layout):
    cache = make_cache("block_wise_fp8", 4, 2, 64)
    check(cache, tables, cached, cu, 150, place, BF16, layout)


def test_no_blocks_and_no_tokens(place):
    for cache_quant_type in ("cache_int8", "block_wise_fp8"):
        if EMPTY_OUTPUTS:
            cache = make_cache(cache_quant_type, 3, 2, 64)
            check(cache, [[0, 1]], [100], [0, 0], 0, place)
        cache = make_cache(cache_quant_type, 0, 2, 64)
        check(cache, [[0, 1]], [100], [0, 100], 100, place)


def test_stale_slots_do_not_matter(place):
    """Slots past a sequence's length may hold NaN codes and NaN scales."""
    cached = [5, 64, 70]
    tables, lengths, cu, num_blocks = _seqs(cached)
    cache = make_cache("block_wise_fp8", num_blocks, 2, 64)
    dirty = cache.copy()
    key = unpack(dirty.key, "k", "fastattn", int8=False)
    value = unpack(dirty.value, "v", "fastattn", int8=False)
    used = np.zeros((num_blocks, BLOCK_SIZE), bool)
    for seq, length in enumerate(cached):
        for i in range(length):
            used[tables[seq, i // BLOCK_SIZE], i % BLOCK_SIZE] = True
    for codes in (key, value):
        codes.swapaxes(1, 2)[~used] = 0x7F
    for scales in (dirty.k_scales, dirty.v_scales):
        scales.swapaxes(1, 2)[~used] = np.nan
    dirty.key = pack(key, "k", "fastattn", int8=False)
    dirty.value = pack(value, "v", "fastattn", int8=False)
    clean_out = check(cache, tables, lengths, cu, sum(cached), place)
    dirty_out = check(dirty, tables, lengths, cu, sum(cached), place)
    for a, b in zip(dirty_out, clean_out):
        assert_same_bits(a, b)


def test_every_code_times_a_scale_is_one_rounded_product(place):
    """All 256 codes, scales of all magnitudes, against fp64 rounded once to fp32, then to T."""
    scales = np.float32([2.0**-120, 1.7e-38, 3e-5, 0.0137, 1.0, 7.7, 6e4, 1e30])
    for cache_quant_type, fp8_format in (
        ("cache_int8", "e4m3"),
        ("cache_fp8", "e4m3"),
        ("cache_fp8", "e5m2"),
    ):
        code = "int8" if cache_quant_type == "cache_int8" else fp8_format
        codes = np.arange(256, dtype=np.uint8).repeat(8 * 64 * 128 // 256)
        logical = np.random.default_rng(0).permutation(codes).reshape(1, 8, 64, 128)
        cache = Cache(
            logical,
            pack(logical, "v", "fastattn", int8=False),
            scales,
            scales[::-1].copy(),
            cache_quant_type,
            fp8_format,
        )
        for dtype in (np.float16, BF16):
            zeros = np.zeros((64, 8, 128), dtype)
            seqs = [np.asarray(a, np.int32) for a in ([[0]], [64], [0, 64])]
            outputs = append(cache, zeros, zeros, *seqs, place)
            for out, scale in zip(outputs, (scales, scales[::-1])):
                exact = from_codes(logical[0], code).astype(np.float64) * scale[:, None, None]
                with np.errstate(over="ignore"):
                    expected = exact.astype(np.float32).astype(dtype).swapaxes(0, 1)
                assert_same_bits(out, np.ascontiguousarray(expected))


def _append_dynamic(key_cache, value_cache, key, value, k_scales, v_scales, tables, cached, cu):
    return F.append_cache_kv_c8(
        key_cache,
        value_cache,
        key,
        value,
        tables,
        cached,
        cu,
        cache_k_scales=k_scales,
        cache_v_scales=v_scales,
        dynamic_quant=True,
        cache_quant_type="block_wise_fp8",
        cache_layout="fastdeploy",
    )


def _write_then_append(x, key_cache, value_cache, scales, out, tables, cu, zero, new):
    """As a server's program: the second operator reads what the first one wrote."""
    key_cache, value_cache = F.write_cache_kv(
        x,
        x,
        key_cache,
        value_cache,
        tables,
        cu,
        zero,
        new,
        cache_k_scales=scales,
        cache_v_scales=scales,
        cache_quant_type="cache_fp8",
    )
    return F.append_cache_kv_c8(
        key_cache,
        value_cache,
        out,
        out * 1,
        tables,
        new,
        cu,
        cache_k_scales=scales,
        cache_v_scales=scales,
        dynamic_quant=False,
        cache_quant_type="cache_fp8",
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_all_modes_of_paddle(place, dynamic):
    tables, cached, cu, num_blocks = _seqs([70, 3])
    cache = in_layout(make_cache("block_wise_fp8", num_blocks, 2, 64), "fastdeploy")
    outputs = [np.full((73, 2, 64), x, BF16) for x in (1, 2)]
    seqs = (tables, cached, cu.astype(np.int32))
    arrays = [cache.key, cache.value, *outputs, cache.k_scales, cache.v_scales, *seqs]
    _, inputs = run_all_modes(_append_dynamic, arrays, place, dynamic=dynamic)
    expected = model(cache, *outputs, *seqs, "fastdeploy")
    assert_same_bits(inputs[2], expected[0])
    assert_same_bits(inputs[3], expected[1])


def test_a_program_that_writes_and_reads(place):
    x = make_values((73, 2, 64), np.float16)
    step, num_blocks = make_step([0, 0], [70, 3])
    cache = make_cache("cache_fp8", num_blocks, 2, 64)
    arrays = [x, cache.key, cache.value, cache.k_scales, np.zeros_like(x), *step.arrays]
    outputs, _ = run_all_modes(_write_then_append, arrays, place)
    cache.v_scales = cache.k_scales
    reference.write_cache_kv(
        x,
        x,
        cache.key,
        cache.value,
        *step.arrays,
        cache_k_scales=cache.k_scales,
        cache_v_scales=cache.k_scales,
        **cache.options,
    )
    zeros = np.zeros_like(x)
    expected = model(
        cache, zeros, zeros, step.block_tables, step.seq_lens_this_time, step.cu_seqlens_q
    )
    assert_same_bits(outputs[0], expected[0])
    assert_same_bits(outputs[1], expected[1])
