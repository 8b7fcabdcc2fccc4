"""quantize_fp8 against the NumPy model: codes and scales bit by bit."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import reference
from tests.support.compare import assert_same_bits
from tests.support.tensors import DTYPES, EMPTY_OUTPUTS, to_numpy, to_paddle

RNG = np.random.default_rng


@pytest.mark.parametrize("granularity", ["tensor", "token", "group"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 128), (7, 256), (3, 5, 384), (0, 128)])
def test_dynamic(place, shape, dtype, granularity):
    if 0 in shape and not EMPTY_OUTPUTS:
        pytest.skip("this Paddle has no empty outputs")
    rows = np.exp(RNG(0).normal(size=(*shape[:-1], 1)))
    x = (RNG(1).normal(size=shape) * rows).astype(DTYPES[dtype])
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


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: F.quantize_fp8(None), TypeError, "quantize_fp8: x: expected a tensor, got None"),
        (
            lambda: F.quantize_fp8(paddle.ones([2, 4], "int32")),
            TypeError,
            "x: expected dtype float32",
        ),
        (
            lambda: F.quantize_fp8(paddle.ones([2, 4]), paddle.ones([2])),
            ValueError,
            r"scale: expected shape \[1\], got \[2\]",
        ),
        (
            lambda: F.quantize_fp8(paddle.ones([2, 4]), granularity="group", group_size=3),
            ValueError,
            "group_size: expected a divisor of the last dimension 4, got 3",
        ),
        (
            lambda: F.quantize_fp8(paddle.ones([2, 4]), granularity="row"),
            ValueError,
            "granularity: expected tensor, token or group, got 'row'",
        ),
    ],
)
def test_errors_name_the_argument(make, error, text):
    with pytest.raises(error, match=text):
        make()
