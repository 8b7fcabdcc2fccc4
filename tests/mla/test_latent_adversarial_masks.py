"""Masks and scores that have broken other attention kernels, over latent caches.

The idea of each is told in `tests/attention/test_adversarial_masks.py`. What no query may see is
NaN in every byte of these problems.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.support import mla_sparse
from tests.support.mla_dense import UNASSIGNED, Problem, assert_close
from tests.support.mla_sparse import check_lse, check_output, make_problem
from tests.support.tensors import BF16

FORMATS = ["bf16", "fp8", "fp8_656", "fp8_584", "fp8_528"]
#: Decode, drafts, a chunk and a prompt: a block less than a tile, a tile, and a key more.
SEQS = ([63, 64, 127, 128, 130, 0, 191], [1, 1, 1, 3, 18, 9, 1])


def steep(rng, tokens: int, channels: int) -> np.ndarray:
    """Latents whose sixth channel is 4, of every format's largest codes or near them."""
    x = rng.normal(size=(tokens, channels)) * 0.25
    x[:, 5] = 4
    return x


def negative(rng, tokens: int, channels: int) -> np.ndarray:
    x = rng.normal(size=(tokens, channels))
    x[:, 5] = -np.abs(x[:, 5]) - 0.5
    return x


@pytest.mark.parametrize("heads", [3, 20])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_tiles_without_a_key_anywhere(place, cache_format, heads):
    """Pages that are not assigned: the first tile, one in the middle, the last, all but one."""
    for missing in ([0], [1], [0, 1], [2], [0, 2]):
        problem = Problem(*SEQS, heads=heads, cache_format=cache_format)
        for seq in range(7):
            for page in missing:
                problem.tables[seq, page] = UNASSIGNED[(seq + page) % 3]
        out, lse = problem.run(place)
        problem.accept(place, (out, lse))
        if missing == [0]:
            assert np.isneginf(lse[:, 0]).all() and np.isneginf(lse[:, 1]).sum() == 0


@pytest.mark.parametrize("cache_format", FORMATS)
def test_tables_that_end_with_the_last_page(place, cache_format):
    for cached in ([255, 3, 64], [256, 190, 0]):
        problem = Problem(cached, [1, 1, 1], heads=5, cache_format=cache_format)
        problem.tables = np.ascontiguousarray(problem.tables[:, :-1])
        for seq, keys in enumerate(cached):
            problem.tables[seq, keys // 64 + 1 :] = UNASSIGNED[seq]
        problem.check(place)


def assert_far_below(got, want, least: float) -> None:
    """Scores below `least`: an LSE within 2^-18 of them, and outputs as far as that moves them."""
    (out, lse), (exact, exact_lse) = got, want
    seen = np.isfinite(exact_lse)
    np.testing.assert_array_equal(np.isneginf(lse), ~seen)
    assert (exact_lse[seen] < least).all()
    step = 2.0**-18 * np.abs(exact_lse[seen]).max()
    assert np.abs(lse[seen] - exact_lse[seen]).max() <= step
    out = out.astype(np.float64)
    assert not out[~seen.T].any()
    size = np.abs(exact[seen.T]).max(axis=-1, keepdims=True)
    assert (np.abs(out - exact)[seen.T] <= (0.02 + np.expm1(2 * step)) * size).all()


@pytest.mark.parametrize("heads", [3, 20])
@pytest.mark.parametrize("cache_format", ["bf16", "fp8_656", "fp8_584"])
def test_scores_far_below_a_finite_stand_in(place, cache_format, heads):
    """Products of about -1.2e5 in every row, before the softmax scale."""
    if place == "gpu" and heads == 3:
        pytest.skip("Hopper's kernel of few rows multiplies keys that are not rounded")
    problem = Problem(
        *SEQS, heads=heads, cache_format=cache_format, latents=steep, q_std=0.2, spare=1
    )
    problem.q[..., 5] = np.where(np.isnan(problem.q[..., 5].astype(np.float32)), np.nan, -3e4)
    got = problem.run(place)
    assert_far_below(got, problem.want(rounded=problem.rounds_keys(place)), -5e3)


@pytest.mark.parametrize("heads", [2, 40])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_minus_infinity_in_one_row_beside_finite_ones(place, cache_format, heads):
    """Of a tile's rows every other one has -inf alone."""
    problem = Problem(*SEQS, heads=heads, cache_format=cache_format, latents=negative)
    problem.q[::2, ::2, 5] = np.inf
    out, lse = problem.run(place)
    problem.accept(place, (out, lse))
    assert np.isneginf(lse[::2, ::2]).all() and np.isfinite(lse[1::2]).all()


def test_the_bounds_see_a_key_more():
    """A page that one side has and the other lacks, and the row of zeros of a finite stand-in."""
    problem = Problem([130, 64], [1, 1], heads=4)
    got = problem.run()
    assert_close(got, problem.want())
    problem.cached[1] -= 1  # the last key masked, and the query a position earlier
    with pytest.raises(AssertionError):
        assert_close(got, problem.want())
    problem = Problem([130], [1], heads=4, latents=steep, q_std=0.2)
    problem.q[..., 5] = -3e4
    out, lse = problem.run()
    for wrong in ((np.zeros_like(out), lse), (out, np.full_like(lse, -5e3))):
        with pytest.raises(AssertionError):
            assert_far_below(wrong, problem.want(), -5e3)


# --- chosen slots -------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [3, 64])
@pytest.mark.parametrize("kind", mla_sparse.KINDS)
def test_tiles_of_skipped_indices(place, kind, heads):
    """The first tile of indices is skipped, one in the middle, all but one, all."""
    problem = make_problem(0, kind, heads, (256,) * 6, 256)
    skipped = np.zeros((6, 256), bool)
    skipped[0, :64] = skipped[1, 64:192] = skipped[2, :255] = skipped[3, :] = True
    skipped[4, 1:] = skipped[5, 63:129] = True
    problem.indices[skipped] = np.resize([-1, 2**31 - 1, -(2**31), problem.cache.slots], 6 * 256)[
        : skipped.sum()
    ]
    problem.indices[2, 255] = problem.indices[4, 0] = problem.cache.written[0]
    for sinks in (None, np.linspace(-3, 5, heads).astype(np.float32)):
        problem.options = {} if sinks is None else {"sinks": sinks}
        out, lse = problem.check(place)
        assert np.isneginf(lse[:, 3]).all() and not out[3].any()
        assert np.isfinite(np.delete(lse, 3, axis=1)).all()


@pytest.mark.parametrize("heads", [3, 64])
@pytest.mark.parametrize("kind", mla_sparse.KINDS)
def test_lengths_at_borders_of_tiles(place, kind, heads):
    lengths = (0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 130)
    make_problem(1, kind, heads, lengths, 130).check(place)


@pytest.mark.parametrize("heads", [3, 64])
@pytest.mark.parametrize("kind", ["bf16", "bf16_512"])
def test_chosen_scores_far_below_zero_and_of_minus_infinity(place, kind, heads):
    rng = np.random.default_rng(2)
    dim = mla_sparse.KINDS[kind][2]
    latents = (rng.normal(size=(300, dim)) * 0.25).astype(BF16)
    latents[:, 5] = 4
    problem = make_problem(3, kind, heads, (200, 64, 1, 65), 200, std=0.2, latents=latents)
    problem.q[..., 5] = -3e4
    out, lse, (want, want_lse, _) = *problem.run(place), problem.want()
    assert_far_below((out, lse), (want, want_lse), -4e3)
    problem.q[1::2, :, 5] = -np.inf
    out, lse, (want, want_lse, _) = *problem.run(place), problem.want()
    assert np.isneginf(want_lse[:, 1::2]).all()
    assert_far_below((out, lse), (want, want_lse), -4e3)


def test_the_bounds_see_an_index_more():
    problem = make_problem(4, "fp8_656", 4, (65, 130), 130)
    problem.indices[0, 64] = problem.cache.written[3]
    out, lse = problem.run("cpu")
    problem.lengths = np.array([64, 130], np.int32)
    want, want_lse, _ = problem.want()
    with pytest.raises(AssertionError):
        check_output(out, want)
    with pytest.raises(AssertionError):
        check_lse(lse, want_lse)
