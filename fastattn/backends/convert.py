"""Conversion of a server's caches from one byte layout to another, in place."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

from fastattn._foreign import not_a_tensor
from fastattn.backends.config import BLOCK_SIZE
from fastattn.functional._cache_types import (
    DYNAMIC_TYPES,
    HEAD_DIMS,
    check_cache_type,
    codes_per_byte,
    value_dim,
)

_OP = "convert_caches"
_LAYOUTS = ("fastattn", "fastdeploy", "logical")


def convert_caches(
    caches: Sequence[Any],
    *,
    cache_quant_type: str,
    src: str = "fastdeploy",
    dst: str = "fastattn",
    block_ranges: Iterable[tuple[int, int]] | None = None,
) -> Sequence[Any]:
    """Convert the caches of all layers in place, by default from FastDeploy's layout to fastattn's.

    The conversion needs no second cache and no scratch memory. Scales are the same in all layouts
    and are not changed. All arguments are checked before the first byte is written.

    Parameters
    ----------
    caches : sequence of Tensor
        As in ``forward_meta.caches``: ``2 * layer + {0: k, 1: v}``, or
        ``4 * layer + {k, v, k_scales, v_scales}`` for the dynamic types.
    cache_quant_type : str
        ``cache_int8``, ``cache_fp8``, ``block_wise_int8`` or ``block_wise_fp8``.
        ``block_wise_int4``, ``block_wise_mxfp4``, ``block_wise_k8v4`` and ``block_wise_kfp8v4`` are
        supported between layouts other than FastDeploy's. For ``none`` all layouts are the same and
        nothing is done.
    src, dst : {"fastattn", "fastdeploy", "logical"}
        See :func:`fastattn.functional.convert_cache_layout`.
    block_ranges : iterable of (int, int), optional
        Physical blocks ``[begin, end)`` to convert. Default: all. Other blocks keep their bytes, so
        a server can convert only the blocks in use, or some in each step. Do not convert a block
        twice: its contents would be lost.

    Returns
    -------
    sequence of Tensor
        `caches`, the same tensors. Each V tensor now has the shape of layout `dst`, even if only
        some of its blocks were converted.

    Raises
    ------
    TypeError
        If an entry is not a tensor or does not have the dtype of a quantised cache.
    ValueError
        If the length of the list, a shape or a range is wrong, a layout is unknown, two entries
        share memory, or ranges overlap.
    NotImplementedError
        If `cache_quant_type` or the head dimension is not supported.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.backends import convert_caches
    >>> key, value = (paddle.full([4, 2, 64, 128], 128, "uint8") for _ in range(2))
    >>> caches = convert_caches([key, value], cache_quant_type="cache_int8")
    >>> int(key[3, 1, 2, 5]), list(value.shape)
    (0, [4, 2, 128, 64])
    """
    from fastattn import functional

    cache_quant_type = check_cache_type(_OP, cache_quant_type)
    for name, layout in (("src", src), ("dst", dst)):
        if layout not in _LAYOUTS:
            raise ValueError(f"{_OP}: {name}: expected {', '.join(_LAYOUTS)}, got {layout!r}")
    if 2 in codes_per_byte(cache_quant_type) and "fastdeploy" in (src, dst):
        raise NotImplementedError(
            f"{_OP}: cache_quant_type: FastDeploy has no {cache_quant_type!r}, which is converted "
            "between fastattn and logical"
        )
    per_layer = 4 if cache_quant_type in DYNAMIC_TYPES else 2
    if len(caches) % per_layer:
        raise ValueError(
            f"{_OP}: caches: type {cache_quant_type!r} has {per_layer} tensors a layer, got "
            f"{len(caches)}"
        )
    ranges = None if block_ranges is None else sorted(_pair(entry) for entry in block_ranges)
    chosen = [
        (index, "kv"[index % per_layer])
        for index in range(len(caches))
        if index % per_layer in (0, 1)
    ]
    if cache_quant_type == "none":
        return caches
    shapes = _checked(caches, chosen, cache_quant_type, ranges)
    for index, kind in chosen:
        cache = caches[index]
        for begin, end in [(0, shapes[index][0])] if ranges is None else _joined(ranges):
            if cache.size == 0:
                continue
            functional.convert_cache_blocks(
                cache,
                kind=kind,
                cache_quant_type=cache_quant_type,
                src=src,
                dst=dst,
                begin=begin,
                end=end,
            )
        num_blocks, kv_heads, row = shapes[index]
        inner = [row, BLOCK_SIZE] if kind == "v" and dst == "fastattn" else [BLOCK_SIZE, row]
        if list(cache.shape[2:]) != inner:
            cache.reshape_([num_blocks, kv_heads, *inner])
    return caches


def _pair(entry: Any) -> tuple[int, int]:
    try:
        begin, end = entry
        return operator.index(begin), operator.index(end)
    except (TypeError, ValueError):
        raise TypeError(
            f"{_OP}: block_ranges: expected (begin, end) of ints, got {entry!r}"
        ) from None


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sort ranges, drop empty ones and join adjacent ones, because each range costs a launch."""
    joined: list[tuple[int, int]] = []
    for begin, end in ranges:
        if begin == end:
            continue
        if joined and joined[-1][1] == begin:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return joined


def _checked(
    caches: Sequence[Any],
    chosen: list[tuple[int, str]],
    cache_quant_type: str,
    ranges: list[tuple[int, int]] | None,
) -> dict[int, tuple[int, int, int]]:
    """Check all arguments; return (num_blocks, KV, elements of a token) of each tensor."""
    from fastattn import _ops

    shapes: dict[int, tuple[int, int, int]] = {}
    spans: list[tuple[int, int, int]] = []  # address of the first byte, end address, index
    codes = ("uint8", "int8") if "int8" in cache_quant_type else ("uint8", "float8")
    for index, kind in chosen:
        cache = caches[index]
        name = f"caches[{index}]"
        if not _ops.is_tensor(cache):
            raise not_a_tensor(_OP, name, cache)
        dtype = str(cache.dtype).rpartition(".")[2]
        if not dtype.startswith(codes):
            raise TypeError(
                f"{_OP}: {name}: expected dtype uint8 or the dtype of the codes for "
                f"{cache_quant_type!r}, got {dtype}"
            )
        shape = [int(size) for size in cache.shape]
        transposed = kind == "v" and len(shape) == 4 and shape[2] != BLOCK_SIZE
        if len(shape) != 4 or shape[3 if transposed else 2] != BLOCK_SIZE:
            raise ValueError(
                f"{_OP}: {name}: expected shape [num_blocks, KV, 64, D]"
                f"{' or [num_blocks, KV, D, 64]' if kind == 'v' else ''}, got {shape}"
            )
        row = shape[2 if transposed else 3]
        head_dim = row * codes_per_byte(cache_quant_type)[kind == "v"]
        supported = [dim for dim in HEAD_DIMS if kind == "k" or value_dim(dim) == dim]
        if head_dim not in supported:
            raise NotImplementedError(
                f"{_OP}: {name}: head_dim {head_dim} is not supported; supported: "
                + ", ".join(map(str, supported))
            )
        if not cache.is_contiguous():
            raise ValueError(f"{_OP}: {name}: it is written in place and must be contiguous")
        if not cache.stop_gradient:
            raise ValueError(
                f"{_OP}: {name}: it is written in place and must have stop_gradient = True"
            )
        shapes[index] = (shape[0], shape[1], row)
        first = int(cache.data_ptr()) if shape[0] and shape[1] else 0
        spans.append((first, first + shape[0] * shape[1] * BLOCK_SIZE * row, index))
        for begin, end in ranges or ():
            if not 0 <= begin <= end <= shape[0]:
                raise ValueError(
                    f"{_OP}: block_ranges: expected 0 <= begin <= end <= {shape[0]} (blocks of "
                    f"{name}), got ({begin}, {end})"
                )
    filled = [entry for entry in ranges or () if entry[0] < entry[1]]
    for previous, following in zip(filled, filled[1:]):
        if following[0] < previous[1]:
            raise ValueError(f"{_OP}: block_ranges: {previous} and {following} overlap")
    spans.sort()
    for (_, end, index), (first, _, other) in zip(spans, spans[1:]):
        if first < end:
            raise ValueError(f"{_OP}: caches[{index}] and caches[{other}] share memory")
    return shapes
