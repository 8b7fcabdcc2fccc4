"""Ranges and scores that break masked kernels, in the indexer's logits.

The idea of each is told in `tests/attention/test_adversarial_masks.py`. Here a mask is a range: the
cells outside are -inf, and what lies there is not read.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.indexer.test_mqa_logits import paged, ragged, ragged_model, ragged_size
from tests.support.mqa_logits import (
    Codes,
    Pages,
    check_logits,
    paged_reference,
    poison,
    weights_of,
)
from tests.support.tensors import to_numpy

QUANTS = ("fp8", "mxfp4")
BORDERS = (0, 1, 15, 16, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)


def border_ranges(total: int):
    """Every pair of borders, empty and reversed ones between others."""
    pairs = [(a, b) for a in BORDERS for b in (*BORDERS[::2], total)]
    return np.array(pairs).T


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("heads", [8, 24, 64])
def test_ranges_at_borders_of_tiles(place, heads, quant):
    rng = np.random.default_rng(0)
    starts, ends = border_ranges(300)
    q, keys = Codes(rng, (len(starts), heads), 128, quant), Codes(rng, (300,), 128, quant)
    weights = weights_of(rng, len(starts), heads)
    got = to_numpy(ragged(q, keys, weights, starts, ends, quant, place))
    want = ragged_model(q, keys, weights, starts, ends, quant)
    check_logits(got, want, ragged_size(q, keys, weights, quant))
    visible = (np.arange(300) >= starts[:, None]) & (np.arange(300) < ends[:, None])
    np.testing.assert_array_equal(np.isneginf(got), ~visible)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("heads", [8, 64])
def test_tiles_that_no_row_sees_hold_nan(place, heads, quant):
    """The first tiles and one in the middle."""
    rng = np.random.default_rng(1)
    starts = np.array([128, 320, 128, 500, 320, 0])
    ends = np.array([192, 420, 129, 500, 321, 0])
    q, keys = Codes(rng, (6, heads), 128, quant), Codes(rng, (500,), 128, quant)
    poison(keys, np.r_[0:128, 192:320, 420:500])
    weights = weights_of(rng, 6, heads)
    got = to_numpy(ragged(q, keys, weights, starts, ends, quant, place))
    assert not np.isnan(got).any() and np.isneginf(got[[3, 5]]).all()
    check_logits(got, ragged_model(q, keys, weights, starts, ends, quant))


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("next_n", [1, 2])
@pytest.mark.parametrize("heads", [8, 64])
def test_lengths_at_borders_of_pages(place, heads, next_n, quant):
    """Tables without a column to spare, whose other entries are out of range."""
    rng = np.random.default_rng(2)
    lengths = np.array(BORDERS)
    pages = Pages(rng, lengths, 128, quant)
    pages.tables = np.ascontiguousarray(pages.tables[:, : -(-int(lengths.max()) // 64)])
    for seq, length in enumerate(lengths):
        pages.tables[seq, -(-int(length) // 64) :] = (-1, 2**31 - 1, -(2**31))[seq % 3]
    q = Codes(rng, (len(lengths), next_n, heads), 128, quant)
    weights = weights_of(rng, len(lengths) * next_n, heads)
    columns = int(lengths.max())
    got = to_numpy(paged(q, pages, weights, lengths, columns, quant, place))
    check_logits(got, paged_reference(q, pages, weights, lengths, columns, quant))


@pytest.mark.parametrize("heads", [8, 64])
def test_logits_far_below_zero_are_no_mask(place, heads):
    """Weights that take every logit to -1e30 and beyond; the cells outside alone are -inf."""
    rng = np.random.default_rng(3)
    starts, ends = np.array([0, 64, 65, 3]), np.array([130, 65, 65, 129])
    q, keys = Codes(rng, (4, heads), 128, "fp8"), Codes(rng, (130,), 128, "fp8")
    weights = -np.abs(weights_of(rng, 4, heads)) * np.float32(1e30) - np.float32(1e28)
    got = to_numpy(ragged(q, keys, weights, starts, ends, "fp8", place))
    want = ragged_model(q, keys, weights, starts, ends, "fp8")
    check_logits(got / np.float32(1e30), want / 1e30)
    assert (want[np.isfinite(want)] <= 0).all() and want[np.isfinite(want)].min() < -1e30


def test_a_range_off_by_one_is_seen():
    rng = np.random.default_rng(4)
    starts, ends = np.array([0, 63, 64]), np.array([64, 65, 128])
    q, keys = Codes(rng, (3, 8), 128, "fp8"), Codes(rng, (130,), 128, "fp8")
    weights = weights_of(rng, 3, 8)
    got = to_numpy(ragged(q, keys, weights, starts, ends, "fp8", "cpu"))
    for a, b in ((0, 1), (0, -1), (1, 0)):
        with pytest.raises(AssertionError):
            check_logits(got, ragged_model(q, keys, weights, starts + a, ends + b, "fp8"))
