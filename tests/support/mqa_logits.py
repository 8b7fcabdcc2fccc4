"""Inputs of the indexer's logits, and how far a result may be from fp64."""

from __future__ import annotations

import numpy as np

from fastattn import reference
from fastattn.reference.mqa_logits import index_values
from fastattn.reference.mxfp4 import pack_e2m1
from tests.support.tensors import E4M3

#: Bound on 1 - 2 x.y / (x.x + y.y), the figure that implementations of these logits are held to.
CALC_DIFF = 5e-6


def exponents(rng, shape, blocks: int, spread: int):
    """UE8M0 bytes of heads or keys as int32: their blocks are up to 2^spread apart."""
    scales = np.zeros((*shape, 4), np.uint8)
    middle = rng.integers(118, 130, (*shape, 1))
    scales[..., :blocks] = middle - rng.integers(0, spread + 1, (*shape, blocks))
    return scales.view("<i4")[..., 0]


class Codes:
    """Random queries or keys [..., D] and their scales."""

    def __init__(self, rng, shape, dim: int, quant: str, spread: int = 3) -> None:
        if quant == "fp8":
            values = rng.standard_normal((*shape, dim), np.float32)
            self.codes = np.clip(values * 16, -448, 448).astype(E4M3).view(np.uint8)
            self.scales = rng.uniform(0.01, 3, shape).astype(np.float32)
        else:
            self.codes = pack_e2m1(rng.integers(0, 16, (*shape, dim)).astype(np.uint8))
            self.scales = exponents(rng, shape, dim // 32, spread)


def poison(codes: Codes, at) -> None:
    """Make NaNs of what may not reach a result."""
    codes.codes[at] = 0x7F
    codes.scales[at] = np.float32(np.nan) if codes.scales.dtype == np.float32 else -1


def weights_of(rng, rows: int, heads: int):
    """Of either sign and unequal, a zero among them."""
    weights = rng.standard_normal((rows, heads), np.float32) * np.float32(0.1)
    weights[:, 0] = 0
    return weights


def magnitude(q, q_scales, values, k_scales, weights, quant: str):
    """What a logit would be if nothing cancelled [rows, keys]: errors are relative to it."""
    queries = np.abs(index_values(q, q_scales, quant))
    sums = np.einsum("mh,mhd->md", np.abs(weights).astype(np.float64), queries)
    return (sums @ np.abs(values).T) * (k_scales if quant == "fp8" else 1.0)


def check_logits(got, want, size=None) -> None:
    """The same cells are -inf (and NaN); the others agree, together and one by one."""
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    seen = np.isfinite(want)
    x, y = got[seen].astype(np.float64), want[seen].astype(np.float64)
    if x.size and (total := (x * x + y * y).sum()) > 0:
        difference = 1 - 2 * (x * y).sum() / total
        assert difference < CALC_DIFF, f"calc_diff {difference:.2e}"
    if size is not None and x.size:
        # A product may lose what is below 2^-13 of its largest partial sum.
        error = np.abs(x - y) / np.maximum(np.broadcast_to(size, want.shape)[seen], 1e-300)
        assert error.max() < 2e-4, f"worst error {error.max():.2e} of the magnitude"


class Pages:
    """A paged cache whose pages lie in any order, padded, with NaN wherever no key is."""

    def __init__(self, rng, lengths, dim: int, quant: str, page_size: int = 64, padding: int = 48):
        blocks = [-(-int(n) // page_size) for n in lengths]
        self.page_size, total = page_size, sum(blocks) + 3
        self.keys = Codes(rng, (total, page_size), dim, quant)
        order = rng.permutation(total)
        width = max([*blocks, 1]) + 2
        # What lies behind a sequence's pages is not to be followed.
        self.tables = np.full((len(lengths), width), 2147480000, np.int32)
        written = np.zeros((total, page_size), bool)
        for b, (length, count) in enumerate(zip(lengths, blocks)):
            self.tables[b, :count], order = order[:count], order[count:]
            for i, page in enumerate(self.tables[b, :count]):
                written[page, : max(0, min(page_size, length - i * page_size))] = True
        poison(self.keys, ~written)
        code_bytes = self.keys.codes.shape[-1]
        token = code_bytes + 4
        self.cache = np.full((total, page_size * token + padding), 0xFF, np.uint8)
        self.cache[:, : page_size * code_bytes] = self.keys.codes.reshape(total, -1)
        scales = np.ascontiguousarray(self.keys.scales).view(np.uint8).reshape(total, -1)
        self.cache[:, page_size * code_bytes : page_size * token] = scales


def paged_reference(q, pages: Pages, weights, lengths, columns: int, quant: str):
    return reference.paged_mqa_logits(
        q.codes,
        pages.cache,
        weights,
        lengths,
        pages.tables,
        columns,
        q_scales=q.scales if quant == "mxfp4" else None,
        quant=quant,
        page_size=pages.page_size,
    )
