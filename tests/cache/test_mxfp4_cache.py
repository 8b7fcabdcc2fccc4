"""Caches of MXFP4 blocks: the operators of MXFP4 tensors, and attention."""

from __future__ import annotations

import numpy as np
import pytest

import fastattn.functional as F
from fastattn import reference
from fastattn.reference.layout import unpack
from tests.support.attention import BLOCK_WISE_MXFP4, paged_problem
from tests.support.cache import append, make_cache, make_step, make_values, write
from tests.support.compare import assert_same_bits
from tests.support.tensors import BF16, to_numpy, to_paddle, value_dim

KIND = "block_wise_mxfp4"
DIMS = [64, 96, 128, 192, 256]


def stored_of(cache, step, tokens):
    """Packed codes [T, KV, D / 2] and scales [T, KV, D / 32] of K, then of V."""
    blocks, slots = step.block_tables[0, np.arange(tokens) // 64], np.arange(tokens) % 64
    found = []
    for kind, bytes_, scales in (
        ("k", cache.key, cache.k_scales),
        ("v", cache.value, cache.v_scales),
    ):
        codes = unpack(bytes_, kind, "fastattn", int8=False)
        found.append((codes[blocks, :, slots], scales[blocks, :, slots]))
    return found


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("lengths", [[90], [1]])
def test_a_token_is_what_mxfp4_quantize_gives(place, dim, dtype, lengths):
    """Prompts and decode steps; blocks of unequal sizes, of zeros, with NaN and infinity."""
    shapes = [(lengths[0], 3, d) for d in (dim, value_dim(dim))]
    key, value = (make_values(shape, np.float32, seed) for seed, shape in enumerate(shapes, 1))
    for x in (key, value):
        sizes = np.random.default_rng(3).normal(0, 3, (*x.shape[:2], x.shape[2] // 32))
        x *= np.exp(sizes).repeat(32, -1)
        x[0, 0, :32] = 0
        x[0, 1, 33:35] = [np.nan, -np.inf]
    key, value = key.astype(dtype), value.astype(dtype)
    step, num_blocks = make_step([0], lengths)
    cache = write(make_cache(KIND, num_blocks, 3, dim), key, value, step, place)
    for (codes, scales), x in zip(stored_of(cache, step, lengths[0]), (key, value)):
        wanted = reference.mxfp4_quantize(x)
        assert_same_bits(codes, wanted[0], "codes")
        assert_same_bits(scales, wanted[1], "scales")
        given = [to_numpy(t) for t in F.mxfp4_quantize(to_paddle(x, place))]
        assert_same_bits(codes, given[0], "codes of the operator")
        assert_same_bits(scales, given[1], "scales of the operator")


@pytest.mark.parametrize("dim", DIMS)
def test_append_gives_what_mxfp4_dequantize_gives(place, dim):
    shapes = [(100, 2, d) for d in (dim, value_dim(dim))]
    key, value = (make_values(shape, np.float32, seed) for seed, shape in enumerate(shapes, 4))
    step, num_blocks = make_step([0], [100])
    cache = write(make_cache(KIND, num_blocks, 2, dim), key, value, step, place)
    out = [np.zeros(shape, BF16) for shape in shapes]
    got = append(cache, *out, step.block_tables, np.int32([100]), np.int32([0, 100]), place)
    for (codes, scales), x in zip(stored_of(cache, step, 100), got):
        assert_same_bits(x, reference.mxfp4_dequantize(codes, scales, BF16))


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("dim", DIMS)
def test_blocks_of_unlike_sizes(place, dim, invariant):
    """Scales of a token's blocks that differ by up to 2^20, and tokens that do."""
    seqs = [(300, 1), (130, 2), (5, 70), (0, 1)]
    problem = paged_problem(seqs, kind=BLOCK_WISE_MXFP4, dim=dim, heads=(6, 2))
    rng = np.random.default_rng(8)
    for stored, largest in ((problem.k, 125), (problem.v, 140)):
        written = stored.scales != 255
        scales = rng.integers(largest - 20, largest, stored.scales.shape).astype(np.uint8)
        stored.scales = np.where(written, scales, stored.scales)
    results = problem.run(place, batch_invariant=True) if invariant else None
    problem.check(place, results=results)


#: Most new tokens of a call, with two query heads a KV head: 8, 16 or 64 columns at a time.
COLUMNS = [1, 5, 30]


@pytest.mark.parametrize("most", COLUMNS)
@pytest.mark.parametrize("dim", DIMS)
def test_least_scales_of_keys_count(place, dim, most):
    """K's scales of 2^-127 to 2^-125, and queries that make scores of some units of them."""
    seqs = [(70, 3), (129, 1), (9, 30), (64, 7)]
    seqs = [(cached, min(new, most)) for cached, new in seqs]
    problem = paged_problem(seqs, kind=BLOCK_WISE_MXFP4, dim=dim, heads=(4, 2))
    written = problem.k.scales != 255
    scales = np.random.default_rng(9).integers(0, 3, problem.k.scales.shape).astype(np.uint8)
    problem.k.scales = np.where(written, scales, problem.k.scales)
    problem.q = (problem.q.astype(np.float32) * np.float32(2.0**123)).astype(problem.q.dtype)
    problem.check(place)


@pytest.mark.parametrize("most", COLUMNS)
@pytest.mark.parametrize("q_type", ["e4m3:tensor", "bfloat16"])
@pytest.mark.parametrize("dim", DIMS)
def test_largest_queries_keep_their_scores(place, dim, q_type, most):
    """Queries near the largest float, by their scale or of themselves, over keys near the least."""
    seqs = [(cached, min(new, most)) for cached, new in [(70, 3), (129, 1), (9, 30)]]
    problem = paged_problem(
        seqs, kind=BLOCK_WISE_MXFP4, dim=dim, heads=(4, 2), q_type=q_type, softmax_scale=1.6
    )
    written = problem.k.scales != 255
    scales = np.random.default_rng(9).integers(1, 4, problem.k.scales.shape).astype(np.uint8)
    problem.k.scales = np.where(written, scales, problem.k.scales)
    q = problem.q.astype(np.float32)
    if q_type == "bfloat16":
        grown = q * np.float32(2.0**127 / 2 ** np.floor(np.log2(np.abs(q).max())))
        problem.q = grown.astype(problem.q.dtype)
        assert np.isfinite(problem.q.astype(np.float32)).all()
    else:
        problem.q_descale = np.full_like(problem.q_descale, 2.0**118)
    problem.check(place)


@pytest.mark.parametrize(("cached", "new"), [(60, 9), (60, 20), (62, 5), (65, 1)])
@pytest.mark.parametrize("dim", DIMS)
def test_a_scale_that_is_no_number_reaches_who_sees_it(place, dim, cached, new):
    """NaN, byte 255, in one block of a key, which 0 codes do not hide; not before that key."""
    problem = paged_problem([(cached, new)], kind=BLOCK_WISE_MXFP4, dim=dim, heads=(2, 1))
    block, r = problem.slot(0, 65)
    problem.k.scales[block, 0, r, 1] = 255
    problem.k.elements[block, 0, r] = 0
    out, _ = problem.run(place)
    sees = np.arange(cached, cached + new) >= 65
    np.testing.assert_array_equal(np.isnan(out.astype(np.float32)).all(axis=(1, 2)), sees)
    np.testing.assert_array_equal(np.isnan(out.astype(np.float32)).any(axis=(1, 2)), sees)


@pytest.mark.parametrize("dim", DIMS)
def test_every_block_has_a_scale_of_its_own(place, dim):
    """V of one key: each 32 channels of the output are its codes times their scale."""
    problem = paged_problem([(0, 1)], kind=BLOCK_WISE_MXFP4, dim=dim, heads=(2, 1))
    block, r = problem.slot(0, 0)
    channels = np.arange(value_dim(dim))
    problem.v.scales[block, 0, r] = 127 + channels[::32] // 32 * 2
    codes = channels % 16
    problem.v.elements[block, 0, r] = codes
    out, _ = problem.run(place)
    sizes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values = np.array([-sizes[c - 8] if c >= 8 else sizes[c] for c in codes])
    wanted = values * 4.0 ** (channels // 32)
    np.testing.assert_allclose(out.astype(np.float64)[0], [wanted, wanted], rtol=1e-3)
