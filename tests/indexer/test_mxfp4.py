"""mxfp4_quantize and mxfp4_dequantize against the NumPy model, and the model against rationals."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import reference
from fastattn.reference import mxfp4, numerics
from tests.support.compare import assert_same_bits
from tests.support.static import MODES, run_all_modes
from tests.support.tensors import BF16, DTYPES, EMPTY_OUTPUTS, to_numpy, to_paddle

RNG = np.random.default_rng
MAGNITUDES = [Fraction(v) for v in ("0", "1/2", "1", "3/2", "2", "3", "4", "6")]


def all_bf16():
    # Not a global: Paddle's SOT inspects the globals of a traced function and knows no bfloat16.
    return np.arange(65536, dtype=np.uint16).view(BF16)


def nearest_code(x: float) -> int:
    """E2M1 code by exact rationals: least distance, then the even code."""
    if np.isnan(x):
        return 7
    sign = 8 if np.signbit(x) else 0
    if np.isinf(x):
        return sign | 7
    magnitude = abs(Fraction(float(x)))
    return sign | min(range(8), key=lambda i: (abs(magnitude - MAGNITUDES[i]), i % 2))


def quantize(x, place):
    codes, scales = F.mxfp4_quantize(to_paddle(x, place))
    return to_numpy(codes), to_numpy(scales)


def test_model_rounds_to_the_nearest_rational():
    x = all_bf16().astype(np.float32)
    expected = np.array([nearest_code(v) for v in x.tolist()], np.uint8)
    assert_same_bits(numerics.to_e2m1(x), expected)
    assert_same_bits(numerics.from_e2m1(np.arange(8)), np.array(MAGNITUDES, np.float32))
    assert_same_bits(
        numerics.from_e2m1(np.arange(8, 16)), -np.array(MAGNITUDES, np.float64).astype(np.float32)
    )


def test_model_exponent_is_the_least_that_fits():
    amax = all_bf16()[:0x7F80].astype(np.float32)
    rng = RNG(0)
    bits = rng.integers(0, 0x7F800000, 20000, dtype=np.uint32)
    near = np.float32(1.5) * 2.0 ** np.arange(-140, 128, dtype=np.float64)
    near = near.astype(np.float32)
    amax = np.concatenate(
        [amax, bits.view(np.float32), near, np.nextafter(near, np.float32(np.inf))]
    )
    amax = amax[np.isfinite(amax)]
    floor = 6 * Fraction(2) ** -126
    for value, e in zip(amax.tolist(), mxfp4.block_exponent(amax).tolist()):
        a = max(Fraction(value), floor)
        assert 6 * Fraction(2) ** e >= a > 3 * Fraction(2) ** e, (value, e)


def test_ties_signs_and_specials(place):
    x = np.zeros((1, 32), np.float32)
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 0.0, 6.0]
    x[0, :9], x[0, 9:18] = ties, -np.array(ties)
    codes, scales = quantize(x, place)
    assert scales.tolist() == [[127]]
    unpacked = mxfp4.unpack_e2m1(codes)[0, :18].tolist()
    expected = [0, 2, 2, 4, 4, 6, 6, 0, 7]
    assert unpacked == expected + [8 + c for c in expected]


def test_every_bf16_that_fits_under_scale_1(place):
    x = all_bf16()
    x = x[np.abs(x.astype(np.float32)) <= 6]
    blocks = np.zeros((-(-x.size // 31), 32), BF16)
    blocks[:, 31] = 6.0  # fixes the exponent of every block at 0
    blocks[:, :31].flat[: x.size] = x
    codes, scales = quantize(blocks, place)
    assert (scales == 127).all()
    got = mxfp4.unpack_e2m1(codes)[:, :31].reshape(-1)[: x.size]
    expected = np.array([nearest_code(v) for v in x.astype(np.float64)], np.uint8)
    assert_same_bits(got, expected)


def test_every_finite_bf16_as_amax(place):
    x = np.zeros((32640, 32), BF16)
    x[:, 5] = all_bf16()[:32640]
    x[::2, 9] = -x[::2, 5]
    codes, scales = quantize(x, place)
    expected = reference.mxfp4_quantize(x)
    assert_same_bits(codes, expected[0])
    assert_same_bits(scales, expected[1])
    assert scales.min() == 1 and scales.max() == 253


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(32,), (1, 32), (7, 128), (3, 5, 1056), (257, 64), (0, 64)])
def test_random(place, shape, dtype):
    if 0 in shape and not EMPTY_OUTPUTS:
        pytest.skip("this Paddle has no empty outputs")
    rng = RNG(1)
    x = rng.normal(size=shape) * np.exp(3 * rng.normal(size=(*shape[:-1], shape[-1])))
    x = x.astype(DTYPES[dtype])
    codes, scales = quantize(x, place)
    expected = reference.mxfp4_quantize(x)
    assert_same_bits(codes, expected[0], "codes")
    assert_same_bits(scales, expected[1], "scales")
    for out in DTYPES:
        back = F.mxfp4_dequantize(to_paddle(codes, place), to_paddle(scales, place), dtype=out)
        assert_same_bits(
            to_numpy(back), reference.mxfp4_dequantize(codes, scales, DTYPES[out]), out
        )


def test_random_bits(place):
    x = RNG(2).integers(0, 1 << 32, (400, 64), dtype=np.uint64).astype(np.uint32).view(np.float32)
    codes, scales = quantize(x, place)
    expected = reference.mxfp4_quantize(x)
    assert_same_bits(codes, expected[0], "codes")
    assert_same_bits(scales, expected[1], "scales")


def test_nan_is_code_7_and_leaves_its_block_alone(place):
    x = RNG(3).normal(size=(1, 64)).astype(np.float32)
    clean = quantize(x, place)
    index = int(np.argmin(np.abs(x[0, :32])))
    x[0, index] = -np.nan
    codes, scales = quantize(x, place)
    assert_same_bits(scales, clean[1])
    unpacked, expected = mxfp4.unpack_e2m1(codes), mxfp4.unpack_e2m1(clean[0])
    expected[0, index] = 7
    assert_same_bits(unpacked, expected)
    only_nan = quantize(np.full((1, 32), np.nan, np.float32), place)
    assert (only_nan[0] == 0x77).all() and only_nan[1].tolist() == [[1]]


def test_infinity_saturates(place):
    x = np.zeros((1, 32), np.float32)
    x[0, :3] = [np.inf, -np.inf, 1e38]
    codes, scales = quantize(x, place)
    assert scales.tolist() == [[253]]
    assert mxfp4.unpack_e2m1(codes)[0, :4].tolist() == [7, 15, 2, 0]


def test_zero_block_and_subnormals(place):
    x = np.zeros((2, 32), np.float32)
    x[1, 0], x[1, 1] = 2.0**-149, -(2.0**-126)
    codes, scales = quantize(x, place)
    assert scales.tolist() == [[1], [1]]
    assert not codes[0].any()
    assert mxfp4.unpack_e2m1(codes)[1, :3].tolist() == [0, 10, 0]


def test_round_trip_error_is_half_a_step(place):
    x = RNG(4).normal(size=(64, 256)).astype(np.float32)
    codes, scales = F.mxfp4_quantize(to_paddle(x, place))
    back = to_numpy(F.mxfp4_dequantize(codes, scales)).astype(np.float64)
    scale = np.repeat(mxfp4.block_scale(to_numpy(scales)), 32, axis=-1).astype(np.float64)
    step = np.where(np.abs(x) < 2 * scale, 0.5, np.where(np.abs(x) < 4 * scale, 1.0, 2.0))
    assert (np.abs(back - x) <= step * scale / 2).all()


def test_every_code_under_every_scale(place):
    codes = np.tile(np.arange(16, dtype=np.uint8) * 17, (256, 1))
    scales = np.arange(256, dtype=np.uint8)[:, None]
    for dtype in DTYPES:
        x = F.mxfp4_dequantize(to_paddle(codes, place), to_paddle(scales, place), dtype=dtype)
        expected = reference.mxfp4_dequantize(codes, scales, DTYPES[dtype])
        assert_same_bits(to_numpy(x), expected, dtype)
    exact = np.array(MAGNITUDES, np.float64)[:, None] * 2.0 ** (np.arange(255) - 127)
    values = reference.mxfp4_dequantize(codes, scales)[:255, ::2].T  # code i is element 2i
    with np.errstate(over="ignore"):
        assert_same_bits(values[:8], exact.astype(np.float32))
    assert np.isnan(reference.mxfp4_dequantize(codes, scales)[255]).all()


def test_strided_x():
    x = to_paddle(RNG(5).normal(size=(6, 96)).astype(np.float32))
    view = x[:, 32:64]
    codes, scales = F.mxfp4_quantize(view)
    expected = reference.mxfp4_quantize(to_numpy(view))
    assert_same_bits(to_numpy(codes), expected[0])
    assert_same_bits(to_numpy(scales), expected[1])


def both(x):
    return F.mxfp4_quantize(x)


def back(codes, scales):
    return F.mxfp4_dequantize(codes, scales, dtype="bfloat16")


def round_trip(x):
    return F.mxfp4_dequantize(*F.mxfp4_quantize(x))


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "any_rows"])
@pytest.mark.parametrize("function", [both, back, round_trip])
def test_modes(place, function, dynamic):
    x = RNG(6).normal(size=(5, 64)).astype(np.float32)
    arrays = reference.mxfp4_quantize(x) if function is back else [x]
    run_all_modes(function, arrays, place, MODES, dynamic)


U8 = paddle.zeros([2, 16], "uint8")
S8 = paddle.zeros([2, 1], "uint8")
BAD_CALLS = [
    ("mxfp4_quantize", (None,), TypeError, "x: expected a tensor, got None"),
    ("mxfp4_quantize", ("x",), TypeError, "x: expected a tensor, got str"),
    ("mxfp4_quantize", (paddle.ones([2, 32], "int32"),), TypeError, "x: expected dtype float32"),
    ("mxfp4_quantize", (paddle.ones([2, 33]),), ValueError, "x: expected a last dimension that"),
    ("mxfp4_quantize", (paddle.to_tensor(1.0),), ValueError, "x: expected a last dimension that"),
    ("mxfp4_dequantize", (None, S8), TypeError, "codes: expected a tensor, got None"),
    ("mxfp4_dequantize", (U8, None), TypeError, "scales: expected a tensor, got None"),
    (
        "mxfp4_dequantize",
        (paddle.zeros([2, 16], "int8"), S8),
        TypeError,
        "codes: expected dtype uint8, got int8",
    ),
    (
        "mxfp4_dequantize",
        (U8, paddle.zeros([2, 1])),
        TypeError,
        "scales: expected dtype uint8, got float32",
    ),
    (
        "mxfp4_dequantize",
        (paddle.zeros([2, 24], "uint8"), S8),
        ValueError,
        "codes: expected a last dimension that is a multiple of 16",
    ),
    (
        "mxfp4_dequantize",
        (U8, paddle.zeros([2, 2], "uint8")),
        ValueError,
        r"scales: expected shape \[2, 1\], got \[2, 2\]",
    ),
    (
        "mxfp4_dequantize",
        (U8, paddle.zeros([1], "uint8")),
        ValueError,
        r"scales: expected shape \[2, 1\], got \[1\]",
    ),
    (
        "mxfp4_dequantize",
        (U8, S8, "int8"),
        ValueError,
        "dtype: expected float32, float16 or",
    ),
]


@pytest.mark.parametrize(("op", "args", "error", "text"), BAD_CALLS)
def test_errors_name_the_argument(op, args, error, text):
    kwargs = {"dtype": args[2]} if len(args) > 2 else {}
    with pytest.raises(error, match=f"{op}: " + text):
        getattr(F, op)(*args[:2], **kwargs)


@pytest.mark.parametrize(("op", "args", "error", "text"), BAD_CALLS)
def test_the_raw_operators_refuse_them_too(op, args, error, text):
    attrs = () if op == "mxfp4_quantize" else (args[2] if len(args) > 2 else "float32",)
    run = paddle.base.core.eager._run_custom_op
    with pytest.raises((OSError, ValueError, TypeError, RuntimeError)):
        run("fastattn_" + op, *args[:2], *attrs)
