"""Tensors of a call as bytes, and tensors again: values, strides, shared memory."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import paddle

from fastattn import _views
from fastattn.dump.files import DTYPES, Array, DumpError, Stored
from fastattn.functional._partial import dtype_name

#: A buffer that holds several tensors, or one with gaps, may be at most so large.
MOST_SPAN = 8 << 30
#: Addresses are kept modulo this: what kernels ask of alignment stays true or false.
ALIGNMENT = 256


def place_of(tensor: Any) -> str:
    """``gpu:0``, or ``cpu`` for all memory of the host."""
    place = tensor.place
    return f"gpu:{place.gpu_device_id()}" if place.is_gpu_place() else "cpu"


def stored(tensor: Any) -> Stored:
    """Elements of a tensor; waits for the device."""
    array = np.ascontiguousarray(tensor.numpy())
    data = array.reshape(-1).view(np.uint8)
    return Stored(dtype_name(tensor.dtype), tuple(int(n) for n in tensor.shape), data)


def array_of(value: Stored) -> Array:
    """A tensor as the NumPy models take it: codes of 8 bits as uint8, bfloat16 of ml_dtypes."""
    import ml_dtypes

    types: dict[str, Any] = {
        "bfloat16": ml_dtypes.bfloat16,
        "float8_e4m3fn": np.uint8,
        "float8_e5m2": ml_dtypes.float8_e5m2,
    }
    dtype = np.dtype(types.get(value.dtype, value.dtype))
    return value.data.copy().view(dtype).reshape(value.shape)


def nans(value: Stored) -> int:
    """Number of NaN; of an 8-bit type only where the dtype itself is a float."""
    if not value.dtype.startswith(("float", "bfloat")):
        return 0
    data = value.data
    if value.dtype == "float8_e4m3fn":
        return int(((data & 0x7F) == 0x7F).sum())
    if value.dtype == "float8_e5m2":
        return int(((data & 0x7F) > 0x7C).sum())
    if value.dtype == "bfloat16":
        return int(((data.view(np.uint16) & 0x7FFF) > 0x7F80).sum())
    return int(np.isnan(data.view(value.dtype)).sum())


def _span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last one that a tensor reaches, both counted."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides))


def layout(tensors: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Layout of tensors: dtype, shape, strides, place, and the memory that they share.

    Tensors whose memory overlaps have the same ``buffer``. ``offset`` counts bytes from the
    multiple of 256 before the buffer's first byte.
    """
    facts: dict[str, dict[str, Any]] = {}
    ranges = []
    for name, tensor in tensors.items():
        dtype, shape = dtype_name(tensor.dtype), [int(n) for n in tensor.shape]
        strides = [int(n) for n in tensor.strides]
        facts[name] = {
            "dtype": dtype,
            "shape": shape,
            "strides": strides,
            "place": place_of(tensor),
        }
        size = _span(shape, strides) * DTYPES[dtype][1]
        begin = int(tensor.data_ptr()) if size else 0
        ranges.append((facts[name]["place"], begin, begin + size, name))
    buffer, end, place, base = -1, -1, "", 0
    for where, begin, last, name in sorted(ranges):
        if where != place or begin >= end or begin == last:
            buffer, end, place, base = buffer + 1, last, where, begin // ALIGNMENT * ALIGNMENT
        end = max(end, last)
        facts[name].update(buffer=buffer, offset=begin - base)
    return facts


def _plain(value: Stored, place: Any) -> Any:
    """A contiguous tensor."""
    numpy = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}
    # A copy: where a file has it, it need not be aligned.
    array = value.data.copy().view(numpy.get(value.dtype, value.dtype)).reshape(value.shape)
    tensor = paddle.to_tensor(array, place=place)
    fp8 = value.dtype.startswith("float8")
    return tensor.view(getattr(paddle, value.dtype)) if fp8 else tensor


def _fill(buffer: Array, facts: Mapping[str, Any], value: Stored) -> None:
    """Write a tensor's elements to their places in a buffer of bytes."""
    size = DTYPES[value.dtype][1]
    strides = [n * size for n in facts["strides"]]
    room = buffer[facts["offset"] :]
    # Each element is `size` adjacent bytes, whatever its alignment.
    view = np.lib.stride_tricks.as_strided(room, [*value.shape, size], [*strides, 1])
    view[...] = value.data.reshape([*value.shape, size])


def _buffer(names: Sequence[str], facts: Mapping[str, Any], values: Mapping[str, Stored]) -> Array:
    """Bytes of a buffer; where no tensor is they are 0xFF, which is NaN for every float."""
    end = 0
    for name in names:
        at = facts[name]
        size = DTYPES[at["dtype"]][1]
        if any(n < 0 for n in at["strides"]) or at["offset"] < 0:
            raise DumpError(f"{name}: negative strides or offset")
        end = max(end, at["offset"] + _span(at["shape"], at["strides"]) * size)
    if end > MOST_SPAN:
        raise DumpError(
            f"{', '.join(names)}: {end} bytes from the first to the last element, more than "
            f"{MOST_SPAN}; --contiguous leaves the gaps out"
        )
    buffer = np.full(-(-end // 8) * 8, 0xFF, np.uint8)
    for name in names:
        _fill(buffer, facts[name], values[name])
    return buffer


def _is_plain(at: Mapping[str, Any]) -> bool:
    """Whether a tensor is contiguous and begins as aligned as an allocation."""
    expected = 1
    strides: list[int] = []
    for n in reversed(at["shape"]):
        strides.insert(0, expected)
        expected *= max(n, 1)
    fits = all(n <= 1 or s == e for n, s, e in zip(at["shape"], at["strides"], strides))
    return fits and at["offset"] == 0


def rebuilt(
    facts: Mapping[str, Mapping[str, Any]],
    values: Mapping[str, Stored],
    place: str,
    *,
    contiguous: bool = False,
) -> dict[str, Any]:
    """Tensors of a call, with the strides and the shared memory that they had.

    Parameters
    ----------
    facts : mapping
        What :func:`layout` told.
    values : mapping of Stored
    place : {"cpu", "gpu"}
        Where tensors that were on a GPU go; others stay on the host.
    contiguous : bool
        Each tensor in memory of its own, without gaps.

    Raises
    ------
    DumpError
    """
    for name, at in facts.items():
        if (values[name].dtype, list(values[name].shape)) != (at["dtype"], at["shape"]):
            raise DumpError(f"{name}: its shape in the two files differs")
    tensors: dict[str, Any] = {}
    by_buffer = sorted(facts, key=lambda name: facts[name]["buffer"])
    for _, group in itertools.groupby(by_buffer, key=lambda name: facts[name]["buffer"]):
        names = list(group)
        gpu = place == "gpu" and facts[names[0]]["place"] != "cpu"
        where = paddle.CUDAPlace(0) if gpu else paddle.CPUPlace()
        if contiguous or (len(names) == 1 and _is_plain(facts[names[0]])):
            tensors.update({name: _plain(values[name], where) for name in names})
            continue
        data = _buffer(names, facts, values)
        kinds = {facts[name]["dtype"] for name in names}
        kind = kinds.pop() if len(kinds) == 1 else "uint8"
        pool = _plain(Stored(kind, (data.size // DTYPES[kind][1],), data), where)
        for name in names:
            at = facts[name]
            if 0 in at["shape"]:
                tensors[name] = _plain(values[name], where)
                continue
            size = DTYPES[at["dtype"]][1]
            if at["offset"] % size:
                raise DumpError(f"{name}: {at['dtype']} at byte {at['offset']} of its memory")
            if at["dtype"] != kind and paddle.__version__.startswith("2."):
                # Its view of another dtype ends the process.
                raise DumpError(
                    f"{', '.join(names)}: Paddle {paddle.__version__} makes no tensors of "
                    "different dtypes over the same memory; --contiguous gives each its own"
                )
            typed = pool if at["dtype"] == kind else pool.view(getattr(paddle, at["dtype"]))
            tensors[name] = _views.strided_view(
                typed, at["shape"], at["strides"], at["offset"] // size
            )
    return {name: tensors[name] for name in facts}
