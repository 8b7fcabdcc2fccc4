"""What the wgmma kernel of e4m3 queries has to keep besides test_wgmma.py.

On a Hopper GPU these take custom_ops/cuda/attention/wgmma_sm90/fp8, which multiplies e4m3
probabilities (see tests.support.attention.assert_fp8_products); anywhere else the other kernels.
"""

from __future__ import annotations

import numpy as np
import pytest

from fastattn.reference import numerics
from tests.attention.test_wgmma import FEW_8, STATIC
from tests.support.attention import PagedProblem, assert_scores_in_14_bits, paged_problem
from tests.support.compare import assert_same_bits


@pytest.mark.parametrize("kind", FEW_8, ids=str)
def test_scores_of_any_size(place, kind):
    # A score of 2^40 less a shift of 2^40 must not be the rounding error of either.
    problem = paged_problem([(100, 200)], kind=kind, dim=128, q_type="e4m3:token_head")
    size = 2.0 ** np.random.default_rng(4).integers(-40, 61, problem.q_descale.shape)
    problem.q_descale = (problem.q_descale * size).astype(np.float32)
    assert_scores_in_14_bits(problem, place)


def test_two_levels_of_accumulation(place):
    # One sum over all keys in the tensor core loses several per cent of a V that has a mean.
    problem = paged_problem(
        [(3968, 128)],
        kind=STATIC,
        heads=(1, 1),
        dim=128,
        q_type="e4m3:tensor",
        causal=False,
        v_mean=4.0,
    )
    out, _ = problem.check(place)
    exact, _ = problem.reference()
    assert abs(np.mean(out.astype(np.float64)) / np.mean(exact) - 1) < 5e-3


# --- scores that jump between KV tiles -----------------------------------------------------------

#: (cached, new) tokens: several KV tiles, odd offsets, and more Q tiles than a CTA takes at a time.
SEQS = [(300, 300), (771, 129), (0, 77)]
#: Keys of these blocks of a sequence have a channel whose product with a query's may be large.
FAR_BLOCKS = [0, 3, 4, 6, 9]


def halves(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return (np.rint(2 * rng.normal(size=shape)) / 2).astype(np.float32)


def jump_problem(jump: float, *, queries: str = "some", **options) -> PagedProblem:
    """Scores of about N(0, 1), plus `jump` in log2 units where a query and a block of keys ask.

    Elements are multiples of 1/2: the 14 bits in which the tensor core sums hold these scores.
    """
    problem = paged_problem(SEQS, kind=STATIC, dim=128, q_type="e4m3:tensor", **options)
    rng = np.random.default_rng(7)
    problem.q = numerics.to_codes(halves(rng, problem.q.shape), "e4m3")
    problem.q_descale = np.array([1.0], np.float32)
    problem.k.elements = numerics.to_codes(halves(rng, problem.k.elements.shape), "e4m3")
    problem.k.scales = np.array([1.0, 1.25], np.float32)
    key = np.float32(jump / 8 / np.log2(np.e) * np.sqrt(128))
    problem.k.elements[..., 0] = 0
    for (prefix, new), table in zip(SEQS, problem.block_tables):
        far = [table[block] for block in FAR_BLOCKS if 64 * block < prefix + new]
        problem.k.elements[far, :, :, 0] = numerics.to_codes(key, "e4m3")
    asks = np.zeros(problem.q.shape[:2], bool)
    if queries == "all":
        asks[:] = True
    else:
        asks[1::3] = asks[6::16] = asks[14::16] = True  # a thread's rows, both and one of them
        asks[:, 1] = False  # a head without any
    problem.q[..., 0] = np.where(asks, numerics.to_codes(np.float32(8.0), "e4m3"), 0)
    return problem


@pytest.mark.parametrize("queries", ["some", "all"])
@pytest.mark.parametrize("jump", [20.0, 100.0, 130.0, 160.0])
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": False}, {"window_size": (200, -1)}, {"sinks": np.float32([0.3, -1, 4, 150])}],
    ids=["causal", "full", "window", "sinks"],
)
def test_scores_that_jump(place, options, jump, queries):
    # 2^128 is infinite: what cannot be brought back is found again.
    jump_problem(jump, queries=queries, **options).check(place)


def test_scores_that_jump_far(place):
    # Beyond all differences that fp32 could keep.
    problem = jump_problem(160.0)
    problem.q_descale = np.array([200.0], np.float32)
    assert_scores_in_14_bits(problem, place)


@pytest.mark.parametrize("causal", [True, False])
def test_scores_of_deviation_40(place, causal):
    problem = jump_problem(0.0, causal=causal)
    problem.q_descale = np.array([40.0], np.float32)
    assert_scores_in_14_bits(problem, place)


def test_rows_of_a_jump_move_no_bit_of_others(place):
    problem, calm = jump_problem(160.0, causal=False), jump_problem(160.0, causal=False)
    asks = problem.q[..., 0] != 0
    calm.q[..., 0] = 0
    out, lse = problem.run(place, out_dtype="float32")
    wanted, wanted_lse = calm.run(place, out_dtype="float32")
    assert_same_bits(out[~asks], wanted[~asks], "out")
    assert_same_bits(lse.T[~asks], wanted_lse.T[~asks], "lse")
    again, again_lse = problem.run(place, out_dtype="float32")
    assert_same_bits(again, out, "again: out")
    assert_same_bits(again_lse, lse, "again: lse")


@pytest.mark.parametrize("jump", [0.0, 160.0])
def test_nan_queries_and_keys(place, jump):
    problem = jump_problem(jump)
    problem.q[[3, 11, 250], [0, 1, 3], 17] = 0x7F
    problem.poison("k", 0, 333, head=1)
    problem.poison("v", 1, 5, head=0)
    out, lse = problem.check(place)
    assert np.isnan(lse).any() and np.isfinite(lse).any()
    assert np.isnan(out).any() and np.isfinite(out).any()


@pytest.mark.parametrize("jump", [0.0, 160.0])
def test_rows_that_first_see_keys_late(place, jump):
    # The last blocks are missing, and each query's range of keys is its own; some are empty.
    rng = np.random.default_rng(3)
    tokens = sum(new for _, new in SEQS)
    begin = rng.integers(0, 500, tokens)
    ranges = np.stack([begin, begin + rng.integers(0, 400, tokens)], axis=1).astype(np.int32)
    jump_problem(jump, mask_offsets=ranges).check(place, "ranges")
    problem = jump_problem(jump, causal=False)
    problem.block_tables[0, 6:10] = problem.block_tables[1, 8:15] = -1
    problem.check(place, "blocks")
    window = jump_problem(jump, window_size=(90, -1))
    window.block_tables[0, 8] = window.block_tables[1, 13] = -1
    window.check(place, "window")


# --- a key that leads many of little weight ------------------------------------------------------


@pytest.mark.parametrize("back", [1, 600, 8192], ids=["last", "600 back", "first"])
def test_many_keys_of_little_weight(place, back):
    # The leading key has 2^15.3 times the weight of any other, which have a sixth of it together.
    keys, queries = 8192, 70
    problem = paged_problem(
        [(keys - queries, queries)],
        kind=STATIC,
        heads=(1, 1),
        dim=128,
        q_type="e4m3:tensor",
        causal=False,
    )
    score = np.float32(15.3 / np.log2(np.e) * np.sqrt(128) / 8)
    one = numerics.to_codes(np.float32(1.0), "e4m3")
    problem.q[:] = 0
    problem.q[..., 0] = numerics.to_codes(np.float32(8.0), "e4m3")
    problem.q_descale = np.array([score / 8], np.float32)
    problem.k.elements[:], problem.v.elements[:] = 0, one
    problem.k.scales = problem.v.scales = np.ones(1, np.float32)
    block, token = problem.slot(0, keys - back)
    problem.k.elements[block, :, token, 0] = numerics.to_codes(np.float32(8.0), "e4m3")
    out, _ = problem.check(place)
    np.testing.assert_allclose(out.astype(np.float64), 1.0, atol=0.03)
