"""The comparators can fail: each kind of difference that they are there for is seen."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.compare import assert_same_bits, assert_within, relative_error
from tests.support.tensors import BF16, E4M3

X = np.arange(12, dtype=np.float32).reshape(3, 4)


def changed(array, index, value):
    array = array.copy()
    array[index] = value
    return array


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16, E4M3, np.uint8, np.int32])
def test_same_bits_accepts_equal_arrays(dtype):
    assert_same_bits(X.astype(dtype), X.astype(dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_same_bits_takes_any_nan_for_any_other(dtype):
    quiet = changed(X, (1, 1), np.nan).astype(dtype)
    assert_same_bits(quiet, -quiet * -1)
    assert_same_bits(changed(quiet, (1, 1), -quiet[1, 1]), quiet)


@pytest.mark.parametrize(
    ("actual", "text"),
    [
        (changed(X, (2, 3), np.nextafter(np.float32(11), np.float32(12))), r"1 of 12 .*\(2, 3\)"),
        (changed(X, (0, 0), -0.0), "1 of 12"),
        (changed(X, (1, 2), np.nan), "1 of 12"),
        (X[:2], "shape"),
        (X.reshape(4, 3), "shape"),
        (X.astype(np.float64), "dtype"),
        (X.view(np.uint32), "dtype"),
        (X + 1, "12 of 12"),
    ],
    ids=["one_ulp", "minus_zero", "nan", "rows", "reshaped", "wider", "bits", "all"],
)
def test_same_bits_fails(actual, text):
    with pytest.raises(AssertionError, match=text):
        assert_same_bits(actual, X, "what")


def test_same_bits_fails_where_a_number_came_for_a_nan():
    with pytest.raises(AssertionError, match="1 of 12"):
        assert_same_bits(X, changed(X, (1, 2), np.nan))


def test_same_bits_tells_integers_apart_that_would_be_nan():
    codes = np.full(4, 0x7F, np.uint8)
    with pytest.raises(AssertionError):
        assert_same_bits(codes, changed(codes, 0, 0xFF))


def test_same_bits_sees_one_wrong_row_of_many():
    many = np.tile(X, (4096, 1))
    with pytest.raises(AssertionError, match=r"4 of 49152 .*first at \(7777, 0\)"):
        assert_same_bits(changed(many, 7777, 100.0), many)


def test_same_bits_compares_empty_arrays_by_shape():
    assert_same_bits(np.empty((0, 4), np.float32), np.empty((0, 4), np.float32))
    with pytest.raises(AssertionError, match="shape"):
        assert_same_bits(np.empty((0, 4), np.float32), np.empty((0, 3), np.float32))


def test_within_accepts_the_bound_itself_and_equal_specials():
    special = changed(changed(X, (0, 0), np.nan), (0, 1), -np.inf)
    assert_within(special, special, 0.0)
    assert_within(X + np.float32(0.5), X, 0.5)


@pytest.mark.parametrize(
    ("actual", "bound", "text"),
    [
        (changed(X, (2, 3), 11.51), 0.5, r"1 of 12 .*worst at \(2, 3\)"),
        (changed(X, (1, 2), np.nan), 1e30, "1 of 12"),
        (changed(X, (1, 2), np.inf), 1e30, "1 of 12"),
        (X[:2], 1e30, "shape"),
        (X + 1, np.where(X == 5, 0.5, 2.0), r"1 of 12 .*\(1, 1\)"),
    ],
    ids=["over", "nan", "inf", "shape", "bound_by_element"],
)
def test_within_fails(actual, bound, text):
    with pytest.raises(AssertionError, match=text):
        assert_within(actual, X, bound, "what")


def test_within_fails_where_a_number_came_for_a_special():
    for special in (np.nan, np.inf, -np.inf):
        with pytest.raises(AssertionError, match="1 of 12"):
            assert_within(X, changed(X, (1, 2), special), 1e30)
    with pytest.raises(AssertionError, match="1 of 12"):
        assert_within(changed(X, (1, 2), np.inf), changed(X, (1, 2), -np.inf), 1e30)


def test_within_fails_on_a_nan_bound():
    with pytest.raises(AssertionError):
        assert_within(X, X, np.nan)


def test_within_sees_one_wrong_row_of_many():
    many = np.tile(X, (4096, 1))
    with pytest.raises(AssertionError, match="4 of 49152"):
        assert_within(changed(many, 7777, 100.0), many, 1e-3)


def test_relative_error():
    assert relative_error(X, X) == 0.0
    assert relative_error(X * 1.25, X) == pytest.approx(0.25)
    assert relative_error(-X, X) == pytest.approx(2.0)
    assert np.isnan(relative_error(changed(X, (1, 1), np.nan), X))
    assert relative_error(X, X * 0) > 1e6
