"""Tensors of other shapes over the same memory, faster than with Paddle.

``fastattn._direct`` makes them in dygraph. Paddle makes them in programs, and if ``_direct`` was
not built.
"""

from __future__ import annotations

import math
from typing import Any

import paddle

from fastattn import _ops


def flat(tensor: Any) -> Any:
    """View a contiguous tensor [T, ..] as [T, rest], over the same memory in dygraph."""
    dynamic = paddle.in_dynamic_mode()
    helper = _ops.helpers() if dynamic else None
    result = None if helper is None else helper.flat(tensor)
    if result is not None:
        return result
    tokens, *rest = tensor.shape
    shape = [tokens, math.prod(rest)]
    return paddle._C_ops.reshape(tensor, shape) if dynamic else tensor.reshape(shape)


def view(tensor: Any, shape: list[int]) -> Any:
    """A tensor with another shape; in dygraph, the tensor itself if it already has that shape.

    In dygraph a contiguous tensor keeps its memory. A gradient passes. One size may be -1, which is
    then inferred.
    """
    if not paddle.in_dynamic_mode():
        return tensor.reshape(shape)
    helper = _ops.helpers()
    result = None if helper is None else helper.view(tensor, shape)
    return paddle._C_ops.reshape(tensor, shape) if result is None else result


def strided_view(tensor: Any, shape: list[int], strides: list[int], first: int = 0) -> Any:
    """View the elements of a tensor from number `first` on, over the same memory, in dygraph.

    The tensor must be contiguous and not a view, because Paddle would count from the beginning of
    the base tensor. Slices are not used, because Paddle 2.6 may copy them.
    """
    helper = _ops.helpers()
    result = None if helper is None else helper.view(tensor, shape, strides, first)
    if result is not None:
        return result
    return paddle.as_strided(tensor, shape, strides, first * tensor.element_size())  # in bytes
