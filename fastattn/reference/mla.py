"""NumPy model of latent caches: the bytes of a token, the writer and the reader."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fastattn.reference.indexer import power_of_two_scale, ue8m0_byte
from fastattn.reference.numerics import Array, amax, bfloat16, from_codes, to_codes

ROPE_DIM = 64


class Format(NamedTuple):
    """Sizes of a latent cache."""

    latent: int  #: number of channels that are not rotated
    row_bytes: int  #: per token, without a separate plane of scales
    scale_plane_bytes: int  #: per token, after the rows of the page
    tile: int  #: channels per dynamic scale, including rotated ones in "fp8_528"; 0: none

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
    """Dequantisation scale of a tile. An infinite amax counts as the largest fp32 value."""
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

    No operator writes "fp8_528"; here it has the scales of "pow2".

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


def exact_values(
    rows: Array, scales: Array, cache_format: str, scale: Array | None = None
) -> Array:
    """Latent and rotated channels of :func:`token_bytes`: exact codes times scales, float64.

    The rows of a "bf16" cache may have any number of channels.
    """
    fmt, tokens = FORMATS[cache_format], len(rows)
    if cache_format == "bf16":
        return np.ascontiguousarray(rows).view(bfloat16).astype(np.float64)
    if cache_format == "fp8":
        with np.errstate(invalid="ignore"):
            return from_codes(rows, "e4m3").astype(np.float64) * np.asarray(scale, np.float64)
    if cache_format == "fp8_656":
        factors = np.ascontiguousarray(rows[:, 512:528]).view("<f4").astype(np.float64)
    else:
        byte = scales[:, : 16 if cache_format == "fp8_528" else 7].astype(np.int32)
        factors = np.where(byte == 255, np.nan, np.ldexp(1.0, np.minimum(byte, 254) - 127))
    tiles = factors.shape[1]
    coded = tiles * fmt.tile
    codes = from_codes(rows[:, :coded], "e4m3").astype(np.float64)
    with np.errstate(invalid="ignore"):
        values = codes.reshape(tokens, tiles, fmt.tile) * factors[..., None]
    if cache_format == "fp8_528":  # the rotated channels are also codes
        return values.reshape(tokens, coded)
    rope = np.ascontiguousarray(rows[:, -2 * ROPE_DIM :]).view(bfloat16).astype(np.float64)
    return np.concatenate([values.reshape(tokens, coded), rope], 1)


def token_values(
    rows: Array, scales: Array, cache_format: str, scale: Array | None = None
) -> Array:
    """Latent and rotated channels of :func:`token_bytes`, bfloat16 [T, latent + 64].

    Each is the fp32 product of a code and its scale, rounded. Channels that the cache has in
    bfloat16 are copied. Every NaN from a product is 0x7FFF.
    """
    if cache_format == "bf16":
        return np.ascontiguousarray(rows).view(bfloat16)
    with np.errstate(all="ignore"):
        values = exact_values(rows, scales, cache_format, scale).astype(np.float32)
        bits = np.where(
            np.isnan(values), np.uint16(0x7FFF), values.astype(bfloat16).view(np.uint16)
        )
    if FORMATS[cache_format].tile and cache_format != "fp8_528":
        bits[:, -ROPE_DIM:] = np.ascontiguousarray(rows[:, -2 * ROPE_DIM :]).view(np.uint16)
    return bits.view(bfloat16)


def format_of(cache_format: str, channels: int = 576) -> Format:
    """Sizes of a format; a "bf16" cache may have 512 channels in place of 576."""
    fmt = FORMATS[cache_format]
    if cache_format != "bf16":
        return fmt
    return fmt._replace(latent=channels - ROPE_DIM, row_bytes=2 * channels)


def pages_of(cache: Array, fmt: Format, page_size: int | None) -> tuple[Array, int]:
    """View of a contiguous cache as bytes [num_pages, page_bytes], and the tokens of a page."""
    if cache.ndim > 2:
        assert cache.shape[-1] * cache.itemsize == fmt.token_bytes
        page_size = math.prod(cache.shape[1:-1])
    assert page_size is not None
    return cache.reshape(len(cache), math.prod(cache.shape[1:])).view(np.uint8), page_size


def places_of(slots: Array, page_size: int, fmt: Format) -> tuple[Array, Array, Array]:
    """Pages [n, 1] of the tokens at `slots`, and the offsets of their bytes [n, ...] in the page.

    Returns
    -------
    pages : array of int64, shape [n, 1]
    rows : array of int64, shape [n, row_bytes]
    scales : array of int64, shape [n, scale_plane_bytes]
        In the plane after the rows of the page.
    """
    slots = np.asarray(slots, np.int64)
    row = (slots % page_size)[:, None]
    plane = page_size * fmt.row_bytes + row * fmt.scale_plane_bytes
    return (
        (slots // page_size)[:, None],
        row * fmt.row_bytes + np.arange(fmt.row_bytes),
        plane + np.arange(fmt.scale_plane_bytes),
    )


def bytes_at(slots: Array, pages: Array, page_size: int, fmt: Format) -> tuple[Array, Array]:
    """Row bytes and scale plane bytes of the tokens at `slots`, as in :func:`token_bytes`."""
    page, rows, scales = places_of(slots, page_size, fmt)
    return pages[page, rows], pages[page, scales]


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
    fmt, n = FORMATS[cache_format], len(slot_mapping)
    pages, size = pages_of(result, fmt, page_size)
    slots = np.asarray(slot_mapping, np.int64)
    mine = (slots >= 0) & (slots < len(pages) * size)
    rows, scales = token_bytes(latent[:n], rope[:n], cache_format, scale_rule, scale)
    page, to_rows, to_scales = places_of(slots[mine], size, fmt)
    pages[page, to_rows], pages[page, to_scales] = rows[mine], scales[mine]
    return result


def assigned_slots(table: Array, count: int, num_pages: int, page_size: int) -> tuple[Array, Array]:
    """Slots of the first `count` tokens of a sequence, and the positions of these tokens.

    Tokens of an unassigned page are left out.
    """
    table = np.asarray(table, np.int64)
    positions = np.arange(min(max(count, 0), len(table) * page_size))
    page = table[positions // page_size]
    there = (page >= 0) & (page < num_pages)
    positions = positions[there]
    return page[there] * page_size + positions % page_size, positions


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
    fmt = FORMATS[cache_format]
    pages, size = pages_of(np.ascontiguousarray(cache), fmt, page_size)
    for b, table in enumerate(np.asarray(block_tables)):
        first, end = int(cu_seqlens_k[b]), min(int(cu_seqlens_k[b + 1]), len(result))
        if first < 0:
            continue
        count = min(int(seq_lens_decoder[b]), end - first)
        slots, positions = assigned_slots(table, count, len(pages), size)
        rows, scales = bytes_at(slots, pages, size, fmt)
        result[first + positions] = token_values(rows, scales, cache_format, scale)
    return result
