"""quantize_fp8 against the NumPy model: codes and scales bit by bit."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import reference
from tests.support.compare import assert_same_bits
from tests.support.static import MODES, run_all_modes
from tests.support.tensors import DTYPES, EMPTY_OUTPUTS, to_numpy, to_paddle

RNG = np.random.default_rng


def rows_of_unequal_size(shape, dtype="float32"):
    rows = np.exp(RNG(0).normal(size=(*shape[:-1], 1)))
    return (RNG(1).normal(size=shape) * rows).astype(DTYPES[dtype])


@pytest.mark.parametrize("granularity", ["tensor", "token", "group"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 128), (7, 256), (3, 5, 384), (0, 128)])
def test_dynamic(place, shape, dtype, granularity):
    if 0 in shape and not EMPTY_OUTPUTS:
        pytest.skip("this Paddle has no empty outputs")
    x = rows_of_unequal_size(shape, dtype)
    codes, scales = F.quantize_fp8(to_paddle(x, place), granularity=granularity)
    expected_codes, expected_scales = reference.quantize_fp8(x, granularity=granularity)
    assert_same_bits(to_numpy(codes), expected_codes, "codes")
    assert_same_bits(to_numpy(scales), expected_scales, "scales")


def test_static_scale_saturates_and_keeps_nan(place):
    x = np.array([[0.0, -0.0, 1e9, -np.inf, np.inf, np.nan, 0.3, -7.7]], np.float32)
    scale = np.array([0.0137], np.float32)
    codes, scales = F.quantize_fp8(to_paddle(x, place), to_paddle(scale, place))
    assert_same_bits(to_numpy(codes), reference.quantize_fp8(x, scale)[0])
    assert to_numpy(codes)[0, :6].tolist() == [0x00, 0x80, 0x7E, 0xFE, 0x7E, 0x7F]
    assert_same_bits(to_numpy(scales), scale)


def test_all_zero_row_has_codes_0_and_the_floor_scale(place):
    codes, scales = F.quantize_fp8(
        to_paddle(np.zeros((2, 128), np.float32), place), granularity="token"
    )
    assert not to_numpy(codes).any()
    assert_same_bits(to_numpy(scales), np.full((2, 1), np.float32(1e-10) / np.float32(448)))


def test_nan_and_infinity_stay_in_their_group(place):
    x = rows_of_unequal_size((4, 64))
    x[1, 3], x[2, 40] = np.nan, -np.inf
    codes, scales = F.quantize_fp8(to_paddle(x, place), granularity="group", group_size=32)
    expected = reference.quantize_fp8(x, granularity="group", group_size=32)
    assert_same_bits(to_numpy(codes), expected[0])
    assert_same_bits(to_numpy(scales), expected[1])
    assert np.isnan(to_numpy(scales)).sum() == 1
    assert (to_numpy(codes)[1, :32] == 0x7F).all()
    assert to_numpy(scales)[2, 1] == np.finfo(np.float32).max / np.float32(448)
    assert to_numpy(codes)[2, 40] == 0xFE


def test_x_is_near_code_times_scale(place):
    x = rows_of_unequal_size((16, 128))
    codes, scales = F.quantize_fp8(to_paddle(x, place), granularity="token")
    values = reference.numerics.from_codes(to_numpy(codes), "e4m3") * to_numpy(scales)
    # Half a step of the largest binade relative to x, and half a step of the subnormals.
    assert (np.abs(values - x) <= np.abs(x) * 2**-4 + to_numpy(scales) * 2**-10).all()


@pytest.mark.parametrize("dtype", ["uint8", "float8_e4m3fn"])
@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_output_is_written_in_place(place, granularity, dtype):
    if dtype != "uint8" and not hasattr(paddle, "float8_e4m3fn"):
        pytest.skip("this Paddle has no FP8 dtype")
    x = rows_of_unequal_size((5, 96))
    device = paddle.get_device()
    paddle.set_device(place)
    output = paddle.empty([5, 96], dtype)
    paddle.set_device(device)
    codes, scales = F.quantize_fp8(to_paddle(x, place), granularity=granularity, output=output)
    expected = reference.quantize_fp8(x, granularity=granularity)
    assert codes.dtype == output.dtype
    assert_same_bits(to_numpy(codes).view(np.uint8), expected[0])
    assert_same_bits(to_numpy(output).view(np.uint8), expected[0])
    assert_same_bits(to_numpy(scales), expected[1])


def test_output_may_be_a_slice(place):
    codes = to_paddle(np.zeros((3, 32), np.uint8), place)
    x = rows_of_unequal_size((1, 32))
    F.quantize_fp8(to_paddle(x, place), granularity="token", output=codes[1:2])
    expected = np.zeros((3, 32), np.uint8)
    expected[1:2] = reference.quantize_fp8(x, granularity="token")[0]
    assert_same_bits(to_numpy(codes), expected)


@pytest.mark.skipif(not EMPTY_OUTPUTS, reason="this Paddle has no empty outputs")
def test_output_may_be_empty(place):
    none = to_paddle(np.zeros((0, 32), np.uint8), place)
    x, scale = np.zeros((0, 32), np.float32), np.ones(1, np.float32)
    codes, _ = F.quantize_fp8(to_paddle(x, place), to_paddle(scale, place), output=none)
    assert list(codes.shape) == [0, 32]


@pytest.mark.parametrize("view", ["columns", "transposed", "every_other_row", "expanded"])
def test_strided_x(view):
    x = to_paddle(rows_of_unequal_size((6, 4, 64)))
    strided = {
        "columns": lambda: x[:, :, 16:48],
        "transposed": lambda: x.transpose([1, 2, 0]),
        "every_other_row": lambda: x[::2],
        "expanded": lambda: x[:, :1].expand([6, 4, 64]),
    }[view]()
    codes, scales = F.quantize_fp8(strided, granularity="token")
    expected = reference.quantize_fp8(to_numpy(strided), granularity="token")
    assert_same_bits(to_numpy(codes), expected[0])
    assert_same_bits(to_numpy(scales), expected[1])


def dynamic_groups(x):
    return F.quantize_fp8(x, granularity="group", group_size=32)


def static_scale(x, scale):
    return F.quantize_fp8(x, scale)


def into_output(x, codes):
    return F.quantize_fp8(x, granularity="token", output=codes)


def between_other_operators(x):
    codes, scales = F.quantize_fp8(paddle.nn.functional.relu(x), granularity="token")
    return codes, scales * 2.0


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "any_rows"])
@pytest.mark.parametrize(
    "function", [dynamic_groups, static_scale, into_output, between_other_operators]
)
def test_modes(place, function, dynamic):
    x = rows_of_unequal_size((5, 64))
    if place != "cpu" and function is between_other_operators and not EMPTY_OUTPUTS:
        pytest.skip("this Paddle's own operators may be missing on the GPU")
    more = {
        static_scale: [np.array([0.1], np.float32)],
        into_output: [np.zeros((5, 64), np.uint8)],
    }.get(function, [])
    run_all_modes(function, [x, *more], place, MODES, dynamic)


BAD_CALLS = [
    ((None,), {}, TypeError, "x: expected a tensor, got None"),
    (([[1.0]],), {}, TypeError, "x: expected a tensor, got list"),
    ((paddle.ones([2, 4], "int32"),), {}, TypeError, "x: expected dtype float32"),
    (
        (paddle.ones([2, 4]), paddle.ones([2])),
        {},
        ValueError,
        r"scale: expected shape \[1\], got \[2\]",
    ),
    (
        (paddle.ones([2, 4]), paddle.ones([1], "float16")),
        {},
        TypeError,
        "scale: expected dtype float32, got float16",
    ),
    (
        (paddle.ones([2, 4]),),
        {"granularity": "group", "group_size": 3},
        ValueError,
        "group_size: expected a divisor of the last dimension 4, got 3",
    ),
    (
        (paddle.ones([2, 4]),),
        {"granularity": "group", "group_size": 0},
        ValueError,
        "group_size: expected a divisor of the last dimension 4, got 0",
    ),
    (
        (paddle.ones([2, 4]),),
        {"granularity": "row"},
        ValueError,
        "granularity: expected tensor, token or group, got 'row'",
    ),
    (
        (paddle.to_tensor(1.0),),
        {"granularity": "token"},
        ValueError,
        "x: expected at least 1 dimension",
    ),
    (
        (paddle.ones([2, 4]),),
        {"output": paddle.zeros([4, 2], "uint8")},
        ValueError,
        r"output: expected shape \[2, 4\], got \[4, 2\]",
    ),
    (
        (paddle.ones([2, 4]),),
        {"output": paddle.zeros([2, 4], "int8")},
        TypeError,
        "output: expected dtype uint8 or float8_e4m3fn, got int8",
    ),
    (
        (paddle.ones([2, 4]),),
        {"output": paddle.zeros([4, 2], "uint8").t()},
        ValueError,
        "output: expected a contiguous tensor",
    ),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "text"), BAD_CALLS)
def test_errors_name_the_argument(args, kwargs, error, text):
    with pytest.raises(error, match="quantize_fp8: " + text):
        F.quantize_fp8(*args, **kwargs)


def test_an_empty_scale_is_no_absent_one():
    with pytest.raises(ValueError, match="quantize_fp8: scale: expected a tensor with elements"):
        F.quantize_fp8(paddle.ones([2, 4]), paddle.zeros([0]))


def test_a_row_without_elements_has_no_scale():
    with pytest.raises(ValueError, match="quantize_fp8: x: expected rows with elements"):
        F.quantize_fp8(paddle.zeros([3, 0]), granularity="token")


# Paddle hands a contiguous copy of a strided tensor to the raw operator: only Python can refuse it.
@pytest.mark.parametrize(("args", "kwargs", "error", "text"), BAD_CALLS[:-1])
def test_the_raw_operator_refuses_them_too(args, kwargs, error, text):
    scale = args[1] if len(args) > 1 else None
    attrs = (kwargs.get("granularity", "tensor"), kwargs.get("group_size", 128))
    run = paddle.base.core.eager._run_custom_op
    with pytest.raises((OSError, ValueError, TypeError, RuntimeError)):
        run("fastattn_quantize_fp8", args[0], scale, kwargs.get("output"), *attrs)
