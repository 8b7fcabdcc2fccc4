"""Checks of numeric arguments."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MOST = 2**31 - 1

#: Upper bound of any length, for a size that a traced program does not know.
ANY_LENGTH = _MOST

#: kDefaultScale of custom_ops/api/softmax_scale.h, the lowest float.
DEFAULT_SCALE = float(np.finfo(np.float32).min)


def as_float(op: str, name: str, value: Any) -> float:
    """The value of a real number of any type, including NumPy types.

    Paddle's own conversion accepts a NumPy string as a number and ends the process.

    Raises
    ------
    TypeError
        For any other type, including booleans and tensors.
    ValueError
        For an integer that does not fit a float.
    """
    if type(value) is float:
        return value
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:  # for an integer
            raise ValueError(f"{op}: {name}: expected a finite float, got {value}") from None
    raise TypeError(f"{op}: {name}: expected float, got {type(value).__name__}")


def check_int(op: str, name: str, value: Any, least: int, most: int = _MOST) -> int:
    """Check an integer that determines the size of a result, or is used in arithmetic on the
    device.

    Raises
    ------
    TypeError
        If it is not a Python integer.
    ValueError
        If it is not in `least` to `most` (by default the largest int32).
    """
    if type(value) is not int:
        raise TypeError(f"{op}: {name}: expected int, got {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{op}: {name}: expected {least} to {most}, got {value}")
    return value


def block_count(op: str, num_blocks: int | None) -> int:
    """Number of blocks of a cache as operators take it: -1 for None."""
    return -1 if num_blocks is None else check_int(op, "num_blocks", num_blocks, 0)


def scale_of(op: str, softmax_scale: float | None) -> float:
    """The given `softmax_scale`, or the value that stands for a missing one.

    The operator resolves the default: a traced program may not know the channels of its queries.
    """
    return DEFAULT_SCALE if softmax_scale is None else as_float(op, "softmax_scale", softmax_scale)


def as_int32(
    op: str, name: str, values: ArrayLike, shape: tuple[int, ...], text: str
) -> NDArray[np.int32]:
    """Convert host integers to an array whose values fit an int32 tensor.

    Parameters
    ----------
    op, name : str
        For messages.
    values : array_like of int
    shape : tuple of int
        -1 allows any size.
    text : str
        The shape for the message.

    Raises
    ------
    TypeError
        If the values are not integers. No value is truncated.
    ValueError
        If the shape differs, or a value does not fit int32 and could wrap to a valid id.
    """
    array = np.asarray(values)
    fits = array.ndim == len(shape) and all(n in (-1, m) for n, m in zip(shape, array.shape))
    if not fits:
        raise ValueError(f"{op}: {name}: expected shape {text}, got {list(array.shape)}")
    if array.dtype == object and all(type(value) is int for value in array.flat):
        pass  # Python integers of which some do not fit 64 bits
    elif array.size and not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{op}: {name}: expected integers, got {array.dtype}")
    limits = np.iinfo(np.int32)
    beyond = (array < limits.min) | (array > limits.max)
    if beyond.any():
        raise ValueError(f"{op}: {name}: expected int32 values, got {array[beyond].flat[0]}")
    return np.array(array, np.int32, order="C")
