"""Merges of partial results that have no key, or scores far below zero, against fp64.

The idea of each is told in `tests/attention/test_adversarial_masks.py`.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import fastattn.functional as F
from tests.support.bounds import assert_within
from tests.support.tensors import to_numpy, to_paddle

#: LSEs of sides without a key, with one far below any finite stand-in for -inf, and usual ones.
LSES = (-np.inf, -3e38, -1e30, -2.45e5, -5e4, -88.5, 0.0, 88.5, 5e4)


def exact_merge(outputs, lses):
    """Outputs [N, T, H, D] and LSEs [N, H, T] in fp64; a side of -inf is not read."""
    outputs, lses = np.asarray(outputs, np.float64), np.asarray(lses, np.float64)
    largest = lses.max(axis=0)
    with np.errstate(invalid="ignore"):
        weights = np.where(np.isneginf(lses), 0, np.exp(lses - largest))
    total = weights.sum(axis=0)
    parts = np.where(
        weights.swapaxes(1, 2)[..., None] > 0, outputs * weights.swapaxes(1, 2)[..., None], 0
    )
    merged = parts.sum(axis=0) / np.where(total == 0, 1, total).T[..., None]
    with np.errstate(divide="ignore"):
        return merged, np.where(total == 0, -np.inf, largest + np.log(total))


def cases(sides: int):
    """Every combination of the LSEs, a token each; empty sides hold NaN."""
    lses = np.array(list(itertools.product(LSES, repeat=sides)), np.float32).T[:, None, :]
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(sides, lses.shape[2], 1, 64)).astype(np.float32) + 1
    outputs[np.isneginf(lses).swapaxes(1, 2)] = np.nan
    return outputs, lses


def check(got, outputs, lses) -> None:
    want, want_lse = exact_merge(outputs, lses)
    assert_within(got[0], want, np.full(want.shape, 2e-6) + 1e-6 * np.abs(want), "out")
    size = np.where(np.isfinite(want_lse), np.abs(want_lse), 0)
    assert_within(got[1], want_lse, 1e-6 + 2.0**-22 * size, "lse")


def two(place, outputs, lses):
    pairs = zip(outputs, lses)
    states = [to_paddle(x, place) for pair in pairs for x in pair]
    return [to_numpy(x) for x in F.merge_attn_states(*states)]


def test_two_sides(place):
    outputs, lses = cases(2)
    check(two(place, outputs, lses), outputs, lses)


@pytest.mark.parametrize("sides", [2, 3])
def test_many_sides(place, sides):
    outputs, lses = cases(sides)
    got = F.merge_many_attn_states(to_paddle(outputs, place), to_paddle(lses, place))
    check([to_numpy(x) for x in got], outputs, lses)


def test_the_bounds_see_a_side_that_should_be_empty():
    outputs, lses = cases(2)
    out, lse = two("cpu", outputs, lses)
    finite = np.where(np.isneginf(lses), np.float32(-5e4), lses)
    with pytest.raises(AssertionError):
        check((out, lse), np.nan_to_num(outputs), finite)
