"""Checks of scales that would lose their values: NaN, infinite, 0, or negative for unsigned scales.

Static scales are checked completely. Of a cache's dynamic scales (one per token and head), only
scales of tokens that the call reads are checked.
"""

from __future__ import annotations

import contextlib

import numpy as np
import paddle

from fastattn._check_args import Arguments, Array, Malformed, Positions

#: Inputs with a scale per call, head, channel, or sequence and head.
_STATIC = ("scale", "extra_scale", "q_scale", "out_scale", "output_scale", "k_descale", "v_descale")
_OF_CACHE = ("cache_k_scales", "cache_v_scales")

_E8M0_NAN = 255


def check_static(args: Arguments) -> None:
    """Refuse static scales that are not finite numbers above 0."""
    for name in (*_STATIC, *_OF_CACHE, "q_descale"):
        if not args.has(name):
            continue
        shape = args.shape(name, 0)
        if name == "q_descale" and shape != [1]:  # per token, and tokens may be padding
            continue
        if name in _OF_CACHE and len(shape) > 2:
            continue
        scales = args.floats(name)
        if scales is None:
            continue
        right = np.isfinite(scales) & (scales > 0)
        if not right.all():
            at = int(np.argmin(right))
            got = f"{scales.reshape(-1)[at]} at entry {at}"
            args.refuse(name, "finite scales above 0", got)


def _of_blocks(args: Arguments, name: str, blocks: Array) -> Array:
    """Scales of some blocks, [blocks, KV, 64, ...], as fp32 or uint8."""
    tensor = args.tensor(name)
    bits = tensor.dtype == paddle.bfloat16
    # Paddle 2 has no kernels for recent GPUs and fails silently, so the whole tensor is copied
    # there.
    if not tensor.place.is_cpu_place() and not paddle.__version__.startswith("2."):
        chosen = paddle.to_tensor(blocks, place=tensor.place)
        # Copy only these blocks to the host; but not every Paddle version gathers every dtype.
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            tensor, blocks = paddle.gather(tensor, chosen), np.arange(len(blocks))
    values: Array = tensor.numpy()[blocks]
    return (values.astype(np.uint32) << 16).view(np.float32) if bits else values


def check_dynamic(
    args: Arguments,
    tables: Array,
    begin: Positions,
    end: Positions,
    block_size: int,
    kv_head: int | None = None,
) -> None:
    """Refuse dynamic scales of positions [begin, end) that are 0 or not finite, of one KV head or
    of all.

    Scales of 4-bit codes may be negative. A scale of 0 means that the slot was never written.
    """
    for name in _OF_CACHE:
        if not args.has(name) or len(args.shape(name, 0)) < 3:
            continue
        if args.shape(name)[2] != block_size:
            raise Malformed
        count = np.minimum(-(-end // block_size), tables.shape[1])
        first = begin // block_size
        count = np.where(end > begin, np.maximum(count - first, 0), 0)
        rows = np.repeat(np.arange(len(tables)), count)
        entries = np.arange(len(rows)) + np.repeat(first - (np.cumsum(count) - count), count)
        blocks = tables[rows, entries].astype(np.int64)
        there = (blocks >= 0) & (blocks < args.shape(name)[0])
        rows, entries, blocks = rows[there], entries[there], blocks[there]
        scales = _of_blocks(args, name, blocks)
        if kv_head is not None:
            scales = scales[:, kv_head : kv_head + 1]
        if scales.dtype == np.uint8:
            wrong = scales == _E8M0_NAN
        else:
            wrong = ~np.isfinite(scales) | (scales == 0)
        positions = entries[:, None] * block_size + np.arange(block_size)
        needed = (positions >= begin[rows][:, None]) & (positions < end[rows][:, None])
        wrong &= needed.reshape(len(rows), 1, block_size, *[1] * (scales.ndim - 3))
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            args.refuse(
                name,
                f"a finite scale other than 0 of token {positions[at[0], at[2]]} of sequence "
                f"{rows[at[0]]}, KV head {at[1] if kv_head is None else kv_head}",
                f"{scales[at]} in block {blocks[at[0]]}",
            )
