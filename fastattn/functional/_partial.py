"""Helpers for functions that merge partial results of attention and store the output."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import paddle
from paddle import Tensor

from fastattn._foreign import not_a_tensor
from fastattn._ops import is_tensor
from fastattn.functional._cache_types import value_dim

FLOATS = ("float32", "float16", "bfloat16")


@functools.cache
def dtype_name(dtype: Any) -> str:
    """The name of a dtype, such as ``"float32"`` for ``paddle.float32``."""
    return str(dtype).rpartition(".")[2]


def empty(shape: list[int], dtype: Any, place: Any) -> Tensor:
    """``paddle.empty`` on the given place."""
    return paddle._C_ops.empty(shape, dtype, place)


def output_shape(q: Tensor) -> list[int]:
    """Shape of the output for queries [T, H, D]: it has the channels of V."""
    tokens, heads, head_dim = q.shape
    return [int(tokens), int(heads), value_dim(int(head_dim))]


def value_dtype(
    op: str, q: Tensor, out: Tensor | None, out_scale: Tensor | None, out_dtype: str
) -> str:
    """Dtype of the output before FP8 quantisation, as in :func:`paged_attention`.

    Raises
    ------
    TypeError, ValueError
        If `out_dtype` does not match the other arguments.
    """
    if out_scale is not None:
        if out_dtype != "auto":
            raise ValueError(f"{op}: out_dtype: expected auto with out_scale, got {out_dtype!r}")
        out = None
    if out_dtype not in ("auto", *FLOATS):
        raise ValueError(f"{op}: out_dtype: expected auto, {', '.join(FLOATS)}, got {out_dtype!r}")
    own = dtype_name(q.dtype)
    if own not in FLOATS:  # q holds e4m3 codes
        given = dtype_name(out.dtype) if out is not None and is_tensor(out) else ""
        return out_dtype if out_dtype != "auto" else given if given in FLOATS else "bfloat16"
    if out_dtype not in ("auto", own, "float32"):
        raise TypeError(f"{op}: out_dtype: expected {own} as q has, or float32, got {out_dtype}")
    return own if out_dtype == "auto" else out_dtype


def check_tensor(
    op: str, name: str, tensor: Any, shape: list[int], dtypes: tuple[str, ...]
) -> None:
    """Run the merge's checks before the first operator runs, under the caller's name."""
    if tensor is None:
        return
    if not is_tensor(tensor):
        raise not_a_tensor(op, name, tensor)
    if list(tensor.shape) != shape:
        raise ValueError(f"{op}: {name}: expected shape {shape}, got {list(tensor.shape)}")
    if dtype_name(tensor.dtype) not in dtypes:
        raise TypeError(
            f"{op}: {name}: expected dtype {' or '.join(dtypes)}, got {dtype_name(tensor.dtype)}"
        )


def check_results(
    op: str, q: Tensor, out: Tensor | None, out_scale: Tensor | None, dtype: str
) -> None:
    """Check `out` and `out_scale`; `dtype` is the result of :func:`value_dtype`."""
    if len(q.shape) != 3:
        raise ValueError(f"{op}: q: expected 3 dimensions, got shape {list(q.shape)}")
    if out is not None:
        allowed = (dtype,) if out_scale is None else ("uint8", "float8_e4m3fn")
        check_tensor(op, "out", out, output_shape(q), allowed)
    check_tensor(op, "out_scale", out_scale, [1], ("float32",))


def _span(tensor: Tensor) -> tuple[int, int]:
    """Addresses of a tensor's first byte and after its last byte; equal if it is empty."""
    shape, size = tensor.shape, tensor.element_size()
    if 0 in shape:
        return 0, 0
    if tensor.is_contiguous():
        begin = tensor.data_ptr()
        return begin, begin + size * math.prod(shape)
    reach = [(count - 1) * stride for count, stride in zip(shape, tensor.strides)]
    begin = tensor.data_ptr() + size * sum(x for x in reach if x < 0)
    return begin, begin + size * (sum(abs(x) for x in reach) + 1)


def check_apart(op: str, out: Tensor, inputs: Iterable[tuple[str, Any]]) -> None:
    """Refuse an `out` that shares memory with an input, as the operators do.

    The check compares the ranges from first to last element and ignores gaps between strides.
    """
    first, last = _span(out)
    for name, tensor in inputs:
        if tensor is None or not is_tensor(tensor):
            continue
        begin, end = _span(tensor)
        if begin < last and first < end and begin < end:
            raise ValueError(f"{op}: out: it is written and must not share memory with {name}")
