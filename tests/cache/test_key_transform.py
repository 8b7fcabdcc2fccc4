"""k_rotation and k_center of the writers: every byte, and what they are against fp64."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import reference
from fastattn.reference.cache import static_scales
from fastattn.reference.hadamard import hadamard_matrix, hadamard_size
from fastattn.reference.layout import unpack
from fastattn.reference.numerics import from_codes
from tests.support.cache import (
    QUANTISED,
    Cache,
    assert_same_cache,
    is_dynamic,
    make_cache,
    make_step,
    make_values,
)
from tests.support.compare import assert_same_bits
from tests.support.rope import check, make_case, run
from tests.support.tensors import DTYPES, to_numpy, to_paddle, value_dim

TYPES = tuple(dict.fromkeys(name for name, _ in QUANTISED))
INT8 = ("cache_int8", "block_wise_int8")
CACHED = [0, 1, 63, 64, 65, 100, 320, 7]
NEW = [1, 0, 65, 64, 63, 1, 200, 5]


def centre(kv_heads: int, head_dim: int) -> np.ndarray:
    return np.random.default_rng(9).normal(size=(kv_heads, head_dim)).astype(np.float32)


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
def test_model_against_sylvester(head_dim):
    x = make_values((50, head_dim), np.float32, head_dim)
    matrix = hadamard_matrix(head_dim)
    size = hadamard_size(head_dim)
    np.testing.assert_allclose(matrix @ matrix, np.eye(head_dim), atol=1e-12)
    assert np.all(matrix[0, :size] > 0) and np.all(matrix[:size, 0] > 0)
    assert not matrix[:size, size:].any()
    assert {size // 2: 1 / size**0.5, 1: -1 / size**0.5}[1] == matrix[1, 1]
    exact = x.astype(np.float64) @ matrix
    got = reference.hadamard(x)
    assert got.dtype == np.float32
    largest = np.abs(exact).max(-1, keepdims=True)
    assert np.all(np.abs(got - exact) <= 2e-6 * largest)
    again = reference.hadamard(got)
    assert np.all(np.abs(again - x) <= 4e-6 * np.abs(x).max(-1, keepdims=True))


def write(cache: Cache, key, value, step, place, **options) -> Cache:
    arrays = [cache.key, cache.value, cache.k_scales, cache.v_scales]
    tensors = [to_paddle(a.copy(), place) for a in arrays]
    k_center = options.pop("k_center", None)
    F.write_cache_kv(
        to_paddle(key, place),
        to_paddle(value, place),
        *tensors[:2],
        *(to_paddle(a, place) for a in step.arrays),
        cache_k_scales=tensors[2],
        cache_v_scales=tensors[3],
        k_center=None if k_center is None else to_paddle(k_center, place),
        **cache.options,
        **options,
    )
    return Cache(*(to_numpy(t) for t in tensors), *cache.options.values())


def model(cache: Cache, key, value, step, **options) -> Cache:
    expected = cache.copy()
    reference.write_cache_kv(
        key,
        value,
        expected.key,
        expected.value,
        *step.arrays,
        cache_k_scales=expected.k_scales,
        cache_v_scales=expected.v_scales,
        **cache.options,
        **options,
    )
    return expected


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("kind", TYPES)
def test_write(place, kind, head_dim, dtype, centred, rotation):
    if not centred and rotation == "none":
        pytest.skip("no transform")
    step, num_blocks = make_step(CACHED, NEW)
    granularity = "channel" if kind == "cache_int8" else "head"
    cache = make_cache(kind, num_blocks, 3, head_dim, granularity=granularity)
    shape = (step.num_tokens, 3)
    key = make_values((*shape, head_dim), DTYPES[dtype], 1)
    value = make_values((*shape, value_dim(head_dim)), DTYPES[dtype], 2)
    options = {"k_rotation": rotation, "k_center": centre(3, head_dim) if centred else None}
    actual = write(cache, key, value, step, place, **options)
    assert_same_cache(actual, model(cache, key, value, step, **options))


@pytest.mark.parametrize("kind", TYPES)
def test_decode_steps_write_the_same(place, kind):
    cached, new = [5, 63, 64, 130, 0], [1, 2, 1, 0, 1]
    step, num_blocks = make_step(cached, new)
    cache = make_cache(kind, num_blocks, 2, 128)
    key, value = (make_values((step.num_tokens, 2, 128), DTYPES["bfloat16"], s) for s in (1, 2))
    options = {"k_rotation": "hadamard", "k_center": centre(2, 128)}
    actual = write(cache, key, value, step, place, **options)
    assert_same_cache(actual, model(cache, key, value, step, **options))


@pytest.mark.parametrize("kind", [*INT8, "block_wise_int4"])
def test_codes_are_those_of_the_product_with_the_matrix(place, kind):
    """Independent of the model: fp64 products, and no code further off than a rounding can be."""
    step, num_blocks = make_step([70], [90])
    cache = make_cache(kind, num_blocks, 2, 64, granularity="head")
    key = make_values((90, 2, 64), np.float32, 4)
    k_center = centre(2, 64)
    written = write(cache, key, key, step, place, k_rotation="hadamard", k_center=k_center)
    exact = (key.astype(np.float64) - k_center) @ hadamard_matrix(64)
    int4 = kind == "block_wise_int4"
    code, steps = ("int4", 8) if int4 else ("int8", 127)
    codes = from_codes(unpack(written.key, "k", "fastattn", int8=True, nibbles=int4), code)
    for i in range(90):
        block, slot = step.block_tables[0, (70 + i) // 64], (70 + i) % 64
        if is_dynamic(kind):
            scale = written.k_scales[block, :, slot, None].astype(np.float64)
            wanted = np.abs(exact[i]).max(-1, keepdims=True) / steps
            np.testing.assert_allclose(np.abs(scale), wanted, rtol=1e-5)
        else:
            scale = static_scales(written.k_scales, 2, 64).astype(np.float64)
        ratio = np.clip(exact[i] / scale, -steps, 7 if int4 else 127)
        assert np.all(np.abs(codes[block, :, slot] - ratio) <= 0.5 + 1e-3)


@pytest.mark.parametrize(
    ("neox", "rotary_dim", "bias", "norm", "norm_first"),
    [
        (False, None, False, False, False),
        (True, None, True, True, True),
        (False, None, False, True, False),
        (True, 32, True, False, False),
        (False, 48, False, True, True),
        (True, 20, True, True, False),
    ],
)
@pytest.mark.parametrize("lengths", [([3, 64, 200, 1], [1, 1, 2, 0]), ([0, 30, 127], [70, 1, 140])])
@pytest.mark.parametrize("kind", TYPES)
def test_rope_write(place, kind, lengths, neox, rotary_dim, bias, norm, norm_first):
    case = make_case(
        *lengths,
        cache=(kind, "e4m3", "channel" if kind == "cache_int8" else "head"),
        neox=neox,
        rotary_dim=rotary_dim,
        bias=bias,
        norm=norm,
        norm_first=norm_first,
    )
    case.options["k_rotation"] = "hadamard"
    case.tensors["k_center"] = centre(2, 64)
    check(case, place)


@pytest.mark.parametrize("q_quant", ["none", "per_tensor", "per_token_head"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("new", [[1, 1, 0], [90, 3, 1]])
def test_rotated_queries(place, new, head_dim, dtype, q_quant):
    case = make_case(
        [10, 64, 7],
        new,
        cache=("block_wise_int8", "e4m3", "head"),
        head_dim=head_dim,
        dtype=DTYPES[dtype],
        q_quant=q_quant,
        heads=6,
    )
    ids = np.repeat(np.arange(3), new).astype(np.int32)
    ids[0] = -1  # padding: q is 0
    case.tensors["batch_id_per_token"] = ids
    case.options.update(k_rotation="hadamard", q_rotation="hadamard")
    q, _, _ = check(case, place)
    if q_quant == "none":
        case.options["q_rotation"] = "none"
        plain, _, _ = run(case, place)
        exact = plain.astype(np.float64) @ hadamard_matrix(head_dim)
        step = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
        bound = step * np.abs(exact) + 1e-6 * np.abs(exact).max()
        assert np.all(np.abs(q.astype(np.float64) - exact) <= bound)


@pytest.mark.parametrize("kind", TYPES)
def test_same_as_writing_after(place, kind):
    """rope_write_cache_kv's bytes are those of rotating first and writing K of 16 bits."""
    case = make_case([5, 0], [3, 66], cache=(kind, "e4m3", "head"), norm=True, bias=True)
    case.options["k_rotation"] = "hadamard"
    case.tensors["k_center"] = centre(2, 64)
    _, _, fused = run(case, place)
    positions = np.concatenate([np.arange(5, 8), np.arange(66)])
    rope = ("q_norm_weight", "k_norm_weight", "qkv_bias")
    _, key, value = reference.rope.rope_qkv(
        case.qkv,
        positions,
        case.rotary_embs,
        num_heads=4,
        num_kv_heads=2,
        rms_norm_eps=case.options["rms_norm_eps"],
        **{name: case.tensors[name] for name in rope},
    )
    options = {"k_rotation": "hadamard", "k_center": case.tensors["k_center"]}
    assert_same_cache(fused, write(case.cache, key, value, case.step, place, **options))


def test_nan_and_infinity_stay_in_their_token(place):
    step, num_blocks = make_step([0], [8])
    cache = make_cache("block_wise_int8", num_blocks, 1, 64)
    key = make_values((8, 1, 64), np.float32, 3)
    key[2, 0, 5] = np.nan
    key[4, 0, 7] = np.inf
    written = write(cache, key, key, step, place, k_rotation="hadamard")
    block = step.block_tables[0, 0]
    scales = written.k_scales[block, 0, :8]
    assert np.isnan(scales[2]) and np.isfinite(np.delete(scales, [2, 4])).all()
    finite = [0, 1, 3, 5, 6, 7]
    clean = np.where(np.isfinite(key), key, 1)
    expected = model(cache, clean, clean, step, k_rotation="hadamard")
    assert_same_bits(
        written.key[block, 0, finite], expected.key[block, 0, finite], "codes of other tokens"
    )


def test_one_large_channel_costs_less(place):
    """What the rotation is for: the error of int8 codes of K with a channel 20 times larger."""
    step, num_blocks = make_step([0], [64])
    cache = make_cache("block_wise_int8", num_blocks, 1, 128)
    key = np.random.default_rng(0).normal(size=(64, 1, 128)).astype(np.float32)
    key[..., 17] *= 20

    def error(**options) -> float:
        written = write(cache, key, key, step, place, **options)
        block = step.block_tables[0, 0]
        codes = from_codes(unpack(written.key, "k", "fastattn", int8=True), "int8")
        stored = codes[block, 0] * written.k_scales[block, 0, :, None]
        got = reference.restore_key(
            stored[:, None], options.get("k_rotation", "none"), options.get("k_center")
        )
        return float(np.sqrt(np.mean((got - key) ** 2)))

    plain, rotated = error(), error(k_rotation="hadamard")
    assert rotated < 0.5 * plain


@pytest.mark.parametrize(
    ("kind", "options", "error", "text"),
    [
        ("cache_fp8-e5m2", {"k_rotation": "hadamard"}, NotImplementedError, "k_rotation"),
        ("cache_fp8-e5m2", {"k_center": (1, 64)}, NotImplementedError, "k_center"),
        ("none", {"k_center": (1, 64)}, NotImplementedError, "k_center"),
        ("none", {"k_rotation": "hadamard"}, NotImplementedError, "block_wise_int8"),
        ("cache_int8", {"k_rotation": "random"}, ValueError, "none or hadamard"),
        ("cache_int8", {"k_center": (1, 128)}, ValueError, r"k_center.*\[1, 64\]"),
        ("cache_int8", {"k_center": (64,)}, ValueError, "k_center"),
    ],
)
def test_errors(place, kind, options, error, text):
    step, num_blocks = make_step([0], [2])
    kind, _, code = kind.partition("-")
    cache = make_cache(kind, num_blocks, 1, 64, fp8_format=code or "e4m3")
    arrays = [cache.key, cache.value, cache.k_scales, cache.v_scales]
    tensors = [None if a is None else to_paddle(a.copy(), place) for a in arrays]
    key = to_paddle(np.ones((2, 1, 64), DTYPES["bfloat16"]), place)
    if "k_center" in options:
        options = {"k_center": to_paddle(np.ones(options["k_center"], np.float32), place)}
    with pytest.raises(error, match=text):
        F.write_cache_kv(
            key,
            key,
            *tensors[:2],
            *(to_paddle(a, place) for a in step.arrays),
            cache_k_scales=tensors[2],
            cache_v_scales=tensors[3],
            **cache.options,
            **options,
        )


def test_errors_of_rotated_queries(place):
    case = make_case([0], [2], cache=("cache_int8", "e4m3", "head"))
    case.options["q_rotation"] = "hadamard"
    with pytest.raises(ValueError, match=r"q_rotation.*k_rotation 'none'"):
        run(case, place)


def test_a_centre_of_another_dtype_is_refused(place):
    case = make_case([0], [2], cache=("cache_int8", "e4m3", "head"))
    case.tensors["k_center"] = np.zeros((2, 64), np.float16)
    with pytest.raises(TypeError, match=r"k_center.*float32"):
        run(case, place)


def test_traced(place):
    if place != "cpu":
        pytest.skip("once is enough")
    with pytest.raises((ValueError, NotImplementedError), match="k_rotation"):
        traced = paddle.jit.to_static(_traced, full_graph=True)
        cache = paddle.zeros([2, 1, 64, 64], "uint8")
        values = paddle.zeros([2, 1, 64, 64], "uint8")
        scales = paddle.ones([1])
        blocks, cu, zero, two = (paddle.to_tensor(x, "int32") for x in ([[0]], [0, 2], [0], [2]))
        traced(paddle.ones([2, 1, 64]), cache, values, scales, blocks, cu, zero, two)


def _traced(key, cache, values, scales, blocks, cu, zero, two):
    return F.write_cache_kv(
        key,
        key,
        cache,
        values,
        blocks,
        cu,
        zero,
        two,
        cache_k_scales=scales,
        cache_v_scales=scales,
        cache_quant_type="cache_fp8",
        fp8_format="e5m2",
        k_rotation="hadamard",
    )
