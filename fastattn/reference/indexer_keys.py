"""NumPy model of the indexer's keys in paged caches: quantised into pages, and gathered."""

from __future__ import annotations

import math

import numpy as np

from fastattn.reference.indexer import FP8_AMAX_FLOOR, PAGE_FORMATS, power_of_two_scale
from fastattn.reference.mxfp4 import mxfp4_quantize
from fastattn.reference.numerics import Array, amax, dynamic_scale, quantize, to_codes

HEAD_DIM = 128


def key_bytes(x: Array, quant: str, scale_rule: str) -> tuple[Array, Array]:
    """Code bytes and scale bytes of one key of 128 channels, fp32."""
    if quant == "mxfp4":
        return mxfp4_quantize(x)
    largest = amax(x, axis=-1)
    if scale_rule == "pow2":
        scale = power_of_two_scale(largest)
    else:
        scale = dynamic_scale(largest, "e4m3", floor=FP8_AMAX_FLOOR)
    scale = np.where(np.isnan(scale), np.float32(np.nan), scale)
    if scale_rule == "amax_div":
        with np.errstate(all="ignore"):
            codes = to_codes(np.asarray(x, np.float32) / scale, "e4m3")
    else:
        codes = quantize(x, scale, "e4m3")
    return codes, np.asarray([scale], "<f4").view(np.uint8)


def _pages(cache: Array, page_size: int | None) -> tuple[Array, int]:
    """View of the cache as [num_pages, bytes], and the number of tokens of a page."""
    size = int(cache.shape[1]) if page_size is None else page_size
    return cache.reshape(len(cache), math.prod(cache.shape[1:])), size


def indexer_k_write_cache(
    key: Array,
    cache: Array,
    slot_mapping: Array,
    *,
    quant: str = "fp8",
    scale_rule: str = "pow2",
    page_size: int | None = None,
) -> Array:
    """See :func:`fastattn.functional.indexer_k_write_cache`; returns a new cache."""
    layout = PAGE_FORMATS[quant]
    result = np.array(cache)
    pages, size = _pages(result, page_size)
    for x, slot in zip(np.asarray(key, np.float32), np.asarray(slot_mapping).tolist()):
        page, row = divmod(slot, size)
        if slot < 0 or page >= len(pages):
            continue
        codes, scales = key_bytes(x, quant, scale_rule)
        at = row * layout.code_bytes
        pages[page, at : at + layout.code_bytes] = codes
        at = size * layout.code_bytes + row * layout.scale_bytes
        pages[page, at : at + layout.scale_bytes] = scales
    return result


def indexer_k_gather(
    cache: Array,
    block_tables: Array,
    cu_seqlens_k: Array,
    num_tokens: int,
    *,
    quant: str = "fp8",
    page_size: int | None = None,
    out: Array | None = None,
    out_scales: Array | None = None,
) -> tuple[Array, Array]:
    """See :func:`fastattn.functional.indexer_k_gather`; other rows come from `out`."""
    layout = PAGE_FORMATS[quant]
    pages, size = _pages(np.asarray(cache), page_size)
    codes = np.zeros((num_tokens, layout.code_bytes), np.uint8) if out is None else np.array(out)
    scale_dtype = np.float32 if quant == "fp8" else np.int32
    scales = np.zeros(num_tokens, scale_dtype) if out_scales is None else np.array(out_scales)
    words = scales.reshape(-1).view(np.uint8).reshape(-1, 4)  # the four bytes of a row
    starts = np.asarray(cu_seqlens_k).tolist()
    for seq, (begin, end) in enumerate(zip(starts, starts[1:])):
        for row in range(max(begin, 0), min(end, num_tokens)):
            index, at = divmod(row - begin, size)
            if index >= block_tables.shape[1] or not 0 <= block_tables[seq, index] < len(pages):
                continue
            page = pages[block_tables[seq, index]]
            codes[row] = page[at * layout.code_bytes : (at + 1) * layout.code_bytes]
            first = size * layout.code_bytes + at * layout.scale_bytes
            words[row] = page[first : first + layout.scale_bytes]
    return codes, scales
