"""Tensors in other shapes over the same memory, which takes Paddle longer than a call should.

``fastattn._direct`` makes them in dygraph; Paddle does in programs, and where that was not built.
"""

from __future__ import annotations

import math
from typing import Any

import paddle

from fastattn import _ops


def flat(tensor: Any) -> Any:
    """A contiguous tensor [T, ..] as [T, rest], over the same memory in dygraph."""
    dynamic = paddle.in_dynamic_mode()
    helper = _ops.helpers() if dynamic else None
    result = None if helper is None else helper.flat(tensor)
    if result is not None:
        return result
    tokens, *rest = tensor.shape
    shape = [tokens, math.prod(rest)]
    return paddle._C_ops.reshape(tensor, shape) if dynamic else tensor.reshape(shape)


def view(tensor: Any, shape: list[int]) -> Any:
    """A tensor in another shape; the tensor itself where it has that shape in dygraph.

    Over the same memory in dygraph, if the tensor is contiguous. A gradient passes. A size may be
    -1: what the others leave.
    """
    if not paddle.in_dynamic_mode():
        return tensor.reshape(shape)
    helper = _ops.helpers()
    result = None if helper is None else helper.view(tensor, shape)
    return paddle._C_ops.reshape(tensor, shape) if result is None else result


def strided_view(tensor: Any, shape: list[int], strides: list[int], first: int = 0) -> Any:
    """Elements of a tensor from number `first` on, over the same memory; in dygraph.

    The tensor is contiguous and no view of another, where Paddle would count from its beginning.
    Not by slices: Paddle 2.6 may copy those.
    """
    helper = _ops.helpers()
    result = None if helper is None else helper.view(tensor, shape, strides, first)
    if result is not None:
        return result
    return paddle.as_strided(tensor, shape, strides, first * tensor.element_size())  # in bytes
