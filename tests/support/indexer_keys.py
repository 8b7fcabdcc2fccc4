"""Index keys, slots and pages, and what a key's bytes have to be, in plain loops."""

from __future__ import annotations

import numpy as np

from tests.support.tensors import E4M3

#: Bytes of a token: codes, scales.
TOKEN = {"fp8": (128, 4), "mxfp4": (64, 4)}
CANARY = 0xA5


def keys(rng, tokens, dtype=np.float32):
    """Keys whose sizes differ by orders of magnitude, from token to token and block to block."""
    x = rng.normal(size=(tokens, 128)) * np.exp(2 * rng.normal(size=(tokens, 1)))
    x *= np.repeat(np.exp(rng.normal(size=(tokens, 4))), 32, axis=1)
    return x.astype(dtype)


def empty_pages(pages, page_size, quant, padding=0):
    """A cache of canaries: [pages, bytes]."""
    return np.full((pages, page_size * sum(TOKEN[quant]) + padding), CANARY, np.uint8)


def row_of(cache, page, row, page_size, quant):
    """Code bytes and scale bytes of a row of a cache [pages, bytes]."""
    codes, scales = TOKEN[quant]
    at, first = row * codes, page_size * codes + row * scales
    return cache[page, at : at + codes], cache[page, first : first + scales]


def touched_rows(cache, page_size, quant):
    """Rows of which a byte is no canary; bytes behind the scales must all be canaries."""
    used = page_size * sum(TOKEN[quant])
    assert (cache[:, used:] == CANARY).all()
    rows = []
    for page in range(len(cache)):
        for row in range(page_size):
            parts = row_of(cache, page, row, page_size, quant)
            if any((part != CANARY).any() for part in parts):
                rows.append(page * page_size + row)
    return rows


def dequantized(codes, scales, quant):
    """fp64 values of a row's bytes and the scale of each channel."""
    if quant == "fp8":
        scale = np.repeat(scales.view("<f4").astype(np.float64), 128)
        return codes.view(E4M3).astype(np.float64) * scale, scale
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nibbles = np.stack([codes & 15, codes >> 4], axis=1).reshape(-1)
    values = np.where(nibbles & 8, -1, 1) * magnitudes[nibbles & 7]
    scale = np.repeat(2.0 ** (scales.astype(np.float64) - 127), 32)
    return values * scale, scale
