"""Checks of number arguments."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def as_float(op: str, name: str, value: Any) -> float:
    """Value of a real number of any type, NumPy's included.

    Paddle's own conversion takes a NumPy string for a number and ends the process.

    Raises
    ------
    TypeError
        For anything else, booleans and tensors included.
    """
    if type(value) is float:
        return value
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    raise TypeError(f"{op}: {name}: expected float, got {type(value).__name__}")


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
