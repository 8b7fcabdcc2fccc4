"""NumPy model of latent caches: bytes of a token, the writer and the reader."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fastattn.reference.indexer import power_of_two_scale, ue8m0_byte
from fastattn.reference.numerics import Array, amax, bfloat16, from_codes, to_codes

ROPE_DIM = 64


class Format(NamedTuple):
    """Sizes of a latent cache."""

    latent: int  #: channels that are not rotated
    row_bytes: int  #: of a token, scales in a plane of their own left out
    scale_plane_bytes: int  #: of a token, behind the rows of the page
    tile: int  #: channels that share a dynamic scale, rotated ones too in "fp8_528"; 0: none

    @property
    def token_bytes(self) -> int:
        """Bytes of a token."""
        return self.row_bytes + self.scale_plane_bytes


FORMATS = {
    "bf16": Format(512, 1152, 0, 0),
    "fp8": Format(512, 576, 0, 0),
    "fp8_656": Format(512, 656, 0, 128),
    "fp8_584": Format(448, 576, 8, 64),
    "fp8_528": Format(448, 512, 16, 32),
}

_TINY = np.finfo(np.float32).tiny


def tile_scale(tile_amax: Array, scale_rule: str) -> Array:
    """Dequantisation scale of a tile; an infinite amax counts as the largest fp32 value."""
    if scale_rule == "pow2":
        return power_of_two_scale(tile_amax)
    with np.errstate(under="ignore"):
        scale = np.minimum(tile_amax, np.finfo(np.float32).max) / np.float32(448)
    return np.asarray(np.maximum(scale, _TINY), np.float32)


def _e4m3(x: Array, scale: Array) -> Array:
    with np.errstate(all="ignore"):
        return to_codes(np.asarray(x, np.float32) / np.asarray(scale, np.float32), "e4m3")


def token_bytes(
    latent: Array,
    rope: Array,
    cache_format: str,
    scale_rule: str = "pow2",
    scale: Array | None = None,
) -> tuple[Array, Array]:
    """Row bytes and scale plane bytes of tokens.

    "fp8_528", which no operator writes, has the scales of "pow2" here.

    Parameters
    ----------
    latent, rope : array of bfloat16, shapes [T, latent] and [T, 64]
    cache_format, scale_rule, scale
        As for :func:`fastattn.functional.mla_write_cache`.

    Returns
    -------
    rows : array of uint8, shape [T, row_bytes]
    scales : array of uint8, shape [T, scale_plane_bytes]
    """
    fmt, tokens = FORMATS[cache_format], len(latent)
    none = np.zeros((tokens, 0), np.uint8)
    rope_bytes = np.ascontiguousarray(rope).view(np.uint8)
    if cache_format == "bf16":
        return np.concatenate([np.ascontiguousarray(latent).view(np.uint8), rope_bytes], 1), none
    if cache_format == "fp8":
        assert scale is not None
        return _e4m3(np.concatenate([latent, rope], 1), scale), none
    coded = np.concatenate([latent, rope], 1) if cache_format == "fp8_528" else latent
    tiles = np.asarray(coded, np.float32).reshape(tokens, coded.shape[1] // fmt.tile, fmt.tile)
    scales = tile_scale(amax(tiles, axis=-1), scale_rule)
    codes = _e4m3(tiles, scales[..., None]).reshape(tokens, coded.shape[1])
    if cache_format == "fp8_528":
        return codes, ue8m0_byte(scales)
    if cache_format == "fp8_656":
        scale_bytes = np.ascontiguousarray(scales, "<f4").view(np.uint8)
        return np.concatenate([codes, scale_bytes, rope_bytes], 1), none
    zero = np.zeros((tokens, 1), np.uint8)
    return np.concatenate([codes, rope_bytes], 1), np.concatenate([ue8m0_byte(scales), zero], 1)


def token_values(
    rows: Array, scales: Array, cache_format: str, scale: Array | None = None
) -> Array:
    """Latent and rotated channels, bfloat16 [T, latent + 64], of :func:`token_bytes`.

    Every NaN that comes of a product is 0x7FFF.
    """
    fmt, tokens = FORMATS[cache_format], len(rows)
    if cache_format == "bf16":
        return np.ascontiguousarray(rows).view(bfloat16)
    if cache_format == "fp8":
        return _products(from_codes(rows, "e4m3"), np.asarray(scale, np.float32))
    if cache_format == "fp8_656":
        factors = np.ascontiguousarray(rows[:, 512:528]).view("<f4")
    else:
        count = 16 if cache_format == "fp8_528" else 7
        byte = scales[:, :count].astype(np.int32)
        powers = np.ldexp(np.float32(1), np.minimum(byte, 254) - 127)
        factors = np.where(byte == 255, np.float32(np.nan), powers)
    coded = factors.shape[1] * fmt.tile
    tiles = from_codes(rows[:, :coded], "e4m3").reshape(tokens, factors.shape[1], fmt.tile)
    latent = _products(tiles, factors[..., None]).reshape(tokens, coded)
    if cache_format == "fp8_528":
        return latent
    rope = np.ascontiguousarray(rows[:, -2 * ROPE_DIM :]).view(bfloat16)
    return np.concatenate([latent, rope], 1)


def _products(codes: Array, scale: Array) -> Array:
    with np.errstate(all="ignore"):
        values = (codes * scale).astype(np.float32)
        bits = values.astype(bfloat16).view(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), bits).view(bfloat16)


def _pages(cache: Array, cache_format: str, page_size: int | None) -> tuple[Array, int]:
    """A view of a contiguous cache as bytes [num_pages, page_bytes], and a page's tokens."""
    width = FORMATS[cache_format].token_bytes // cache.itemsize
    if cache.ndim > 2:
        assert cache.shape[-1] == width
        page_size = int(np.prod(cache.shape[1:-1]))
    assert page_size is not None
    return cache.reshape(len(cache), math.prod(cache.shape[1:])).view(np.uint8), page_size


def _at(pages: Array, page: int, row: int, page_size: int, fmt: Format) -> tuple[Array, Array]:
    """Views of a token's row and of its bytes in the plane of scales."""
    begin = page_size * fmt.row_bytes + row * fmt.scale_plane_bytes
    return (
        pages[page, row * fmt.row_bytes : (row + 1) * fmt.row_bytes],
        pages[page, begin : begin + fmt.scale_plane_bytes],
    )


def mla_write_cache(
    latent: Array,
    rope: Array,
    cache: Array,
    slot_mapping: Array,
    *,
    cache_format: str,
    scale_rule: str = "pow2",
    scale: Array | None = None,
    page_size: int | None = None,
) -> Array:
    """See :func:`fastattn.functional.mla_write_cache`; returns a new `cache`."""
    result = np.array(cache)
    pages, size = _pages(result, cache_format, page_size)
    fmt, n = FORMATS[cache_format], len(slot_mapping)
    rows, scales = token_bytes(latent[:n], rope[:n], cache_format, scale_rule, scale)
    for i, slot in enumerate(np.asarray(slot_mapping).tolist()):
        if not 0 <= slot < len(pages) * size:
            continue
        to_row, to_scales = _at(pages, slot // size, slot % size, size, fmt)
        to_row[:], to_scales[:] = rows[i], scales[i]
    return result


def mla_gather_cache(
    cache: Array,
    out: Array,
    block_tables: Array,
    seq_lens_decoder: Array,
    cu_seqlens_k: Array,
    *,
    cache_format: str,
    scale: Array | None = None,
    page_size: int | None = None,
) -> Array:
    """See :func:`fastattn.functional.mla_gather_cache`; returns a new `out`."""
    result = np.array(out)
    pages, size = _pages(np.ascontiguousarray(cache), cache_format, page_size)
    fmt = FORMATS[cache_format]
    for b, table in enumerate(np.asarray(block_tables).tolist()):
        first, end = int(cu_seqlens_k[b]), min(int(cu_seqlens_k[b + 1]), len(result))
        if first < 0:
            continue
        for i in range(min(int(seq_lens_decoder[b]), end - first, len(table) * size)):
            page = table[i // size]
            if 0 <= page < len(pages):
                row, scales = _at(pages, page, i % size, size, fmt)
                values = token_values(row[None], scales[None], cache_format, scale)
                result[first + i] = values[0]
    return result
