"""Byte layouts of an 8-bit cache: the offset of element (token, channel) in a block.

``logical`` is [64, D] in token order for K and V, the form that people and tests read. ``fastattn``
has K in that order, and V as [D, 64], with the tokens of each group of 16 in the order of
:func:`token_slot`. ``fastdeploy`` has the same codes in MMA fragment order, and int8 codes with 128
added.
"""

from __future__ import annotations

import functools

import numpy as np

from fastattn.reference.numerics import Array

#: Number of tokens of a cache block.
BLOCK_SIZE = 64

LAYOUTS = ("fastattn", "fastdeploy", "logical")


def token_slot(token: Array) -> Array:
    """Slot of a token (0..63) within the 64 tokens of a channel of V in layout ``fastattn``.

    Groups of 16 are stored 0,1,8,9, 2,3,10,11, 4,5,12,13, 6,7,14,15. A 32-bit word then holds the
    accumulator columns of one thread of an m16n8 MMA instruction in two neighbouring tiles.
    """
    r = np.asarray(token)
    return 16 * (r // 16) + 4 * ((r % 8) // 2) + 2 * ((r % 16) // 8) + r % 2


def key_offsets(layout: str, head_dim: int) -> Array:
    """Byte offset [64, D] of K element (token, channel) in the block of one KV head."""
    r, d = np.meshgrid(np.arange(BLOCK_SIZE), np.arange(head_dim), indexing="ij")
    if layout == "fastdeploy":
        g, w = d // 16, d % 16
        row = (r // 16) * 16 + r % 8 + (g % 2) * 8
        col = (g // 2) * 32 + ((r % 16) // 8) * 16 + ((w % 8) // 2) * 4 + (w // 8) * 2 + w % 2
        return row * head_dim + col
    _check(layout)
    return r * head_dim + d


def value_offsets(layout: str, head_dim: int) -> Array:
    """Byte offset [64, D] of V element (token, channel) in the block of one KV head."""
    r, d = np.meshgrid(np.arange(BLOCK_SIZE), np.arange(head_dim), indexing="ij")
    if layout == "fastdeploy":
        g, w = d // 16, d % 16
        row = g * 16 + w % 8 + ((r // 16) % 2) * 8
        col = (r // 32) * 32 + (w // 8) * 16 + ((r % 8) // 2) * 4 + ((r % 16) // 8) * 2 + r % 2
        return row * BLOCK_SIZE + col
    if layout == "fastattn":
        return d * BLOCK_SIZE + token_slot(r)
    _check(layout)
    return r * head_dim + d


def _check(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")


def offsets(kind: str, layout: str, head_dim: int) -> Array:
    """:func:`key_offsets` for kind ``"k"``, :func:`value_offsets` for ``"v"``."""
    return key_offsets(layout, head_dim) if kind == "k" else value_offsets(layout, head_dim)


@functools.lru_cache(maxsize=64)
def _order(kind: str, layout: str, head_dim: int) -> tuple[Array, Array]:
    """The offsets of a block's elements in logical order, and the inverse permutation."""
    to_bytes = offsets(kind, layout, head_dim).ravel()
    return to_bytes, np.argsort(to_bytes)


def cache_shape(
    kind: str, layout: str, num_blocks: int, kv_heads: int, head_dim: int
) -> tuple[int, ...]:
    """Shape of an 8-bit cache tensor, or of a 4-bit one for half of the head dimension."""
    if kind == "v" and layout == "fastattn":
        return (num_blocks, kv_heads, head_dim, BLOCK_SIZE)
    return (num_blocks, kv_heads, BLOCK_SIZE, head_dim)


def pack_nibbles(codes: Array) -> Array:
    """Pack 4-bit codes [..., D] to bytes [..., D / 2], with the even channel in the low nibble."""
    return np.asarray(codes[..., 0::2] | codes[..., 1::2] << 4, np.uint8)


def unpack_nibbles(codes: Array) -> Array:
    """Unpack bytes [..., D / 2] to 4-bit codes [..., D]; the inverse of :func:`pack_nibbles`."""
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)


def pack(logical: Array, kind: str, layout: str, *, int8: bool, nibbles: bool = False) -> Array:
    """Bytes of a cache tensor from its logical codes.

    Parameters
    ----------
    logical : array of uint8, shape [num_blocks, KV, 64, D]
    kind : {"k", "v"}
    layout : {"fastattn", "fastdeploy", "logical"}
    int8 : bool
        Whether the codes are int8, to which FastDeploy adds 128.
    nibbles : bool
        Whether the codes have 4 bits: then a byte holds two channels.
    """
    if nibbles:
        logical = pack_nibbles(logical)
    num_blocks, kv_heads, _, head_dim = logical.shape
    codes = logical.view(np.uint8).reshape(num_blocks, kv_heads, BLOCK_SIZE * head_dim)
    if layout == "fastdeploy" and int8:
        codes = codes ^ np.uint8(0x80)  # adding 128 to an int8 flips its top bit
    flat = np.take(codes, _order(kind, layout, head_dim)[1], axis=-1)
    return flat.reshape(cache_shape(kind, layout, num_blocks, kv_heads, head_dim))


def unpack(cache: Array, kind: str, layout: str, *, int8: bool, nibbles: bool = False) -> Array:
    """Logical codes [num_blocks, KV, 64, D] of a cache tensor; the inverse of :func:`pack`."""
    num_blocks, kv_heads = cache.shape[:2]
    size = cache.shape[2] * cache.shape[3]
    head_dim = size // BLOCK_SIZE
    flat = np.ascontiguousarray(cache).view(np.uint8).reshape(num_blocks, kv_heads, size)
    codes = np.take(flat, _order(kind, layout, head_dim)[0], axis=-1)
    codes = codes.reshape(num_blocks, kv_heads, BLOCK_SIZE, head_dim)
    if layout == "fastdeploy" and int8:
        codes = codes ^ np.uint8(0x80)
    return unpack_nibbles(codes) if nibbles else codes
