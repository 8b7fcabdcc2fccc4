"""Checks of number arguments."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MOST = 2**31 - 1

#: A bound of lengths beyond any: of a size that a traced program does not know.
ANY_LENGTH = _MOST

#: kDefaultScale of custom_ops/api/softmax_scale.h: the lowest float.
DEFAULT_SCALE = float(np.finfo(np.float32).min)


def as_float(op: str, name: str, value: Any) -> float:
    """Value of a real number of any type, NumPy's included.

    Paddle's own conversion takes a NumPy string for a number and ends the process.

    Raises
    ------
    TypeError
        For anything else, booleans and tensors included.
    ValueError
        For an integer beyond what a float holds.
    """
    if type(value) is float:
        return value
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:  # of an integer
            raise ValueError(f"{op}: {name}: expected a finite float, got {value}") from None
    raise TypeError(f"{op}: {name}: expected float, got {type(value).__name__}")


def check_int(op: str, name: str, value: Any, least: int, most: int = _MOST) -> int:
    """An integer that sizes of results, or arithmetic on the device, rely on.

    Raises
    ------
    TypeError
        For anything but a Python integer.
    ValueError
        If it is not from `least` to `most`, the largest int32 by default.
    """
    if type(value) is not int:
        raise TypeError(f"{op}: {name}: expected int, got {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{op}: {name}: expected {least} to {most}, got {value}")
    return value


def block_count(op: str, num_blocks: int | None) -> int:
    """Blocks of a cache as operators take them: -1 for None."""
    return -1 if num_blocks is None else check_int(op, "num_blocks", num_blocks, 0)


def scale_of(op: str, softmax_scale: float | None) -> float:
    """A `softmax_scale` that was given, or what stands for one that was not.

    The operator resolves that: a program may be traced without knowing the channels of its queries.
    """
    return DEFAULT_SCALE if softmax_scale is None else as_float(op, "softmax_scale", softmax_scale)


def as_int32(
    op: str, name: str, values: ArrayLike, shape: tuple[int, ...], text: str
) -> NDArray[np.int32]:
    """Array of integers on the host, which an int32 tensor can hold.

    Parameters
    ----------
    op, name : str
        For messages.
    values : array_like of int
    shape : tuple of int
        -1 where any size will do.
    text : str
        The shape in words.

    Raises
    ------
    TypeError
        If the values are not integers; no value is truncated.
    ValueError
        If the shape differs, or a value does not fit int32, where it could wrap to a valid id.
    """
    array = np.asarray(values)
    fits = array.ndim == len(shape) and all(n in (-1, m) for n, m in zip(shape, array.shape))
    if not fits:
        raise ValueError(f"{op}: {name}: expected shape {text}, got {list(array.shape)}")
    if array.dtype == object and all(type(value) is int for value in array.flat):
        pass  # Python integers, some of which do not fit 64 bits
    elif array.size and not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{op}: {name}: expected integers, got {array.dtype}")
    limits = np.iinfo(np.int32)
    beyond = (array < limits.min) | (array > limits.max)
    if beyond.any():
        raise ValueError(f"{op}: {name}: expected int32 values, got {array[beyond].flat[0]}")
    return np.array(array, np.int32, order="C")
