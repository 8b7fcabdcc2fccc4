"""Long sequences of e4m3 queries over FP8 keys and values.

On a Hopper GPU these take the kernel of custom_ops/cuda/attention/wgmma_sm90/fp8, which multiplies
e4m3 probabilities (see tests.support.attention.assert_fp8_products); anywhere else the other
kernels.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.attention import (
    CacheKind,
    assert_scores_in_14_bits,
    flash_problem,
    paged_problem,
)

STATIC = CacheKind("cache_fp8", "head")
TOKEN = CacheKind("block_wise_fp8")
E5M2 = CacheKind("cache_fp8", "head", "e5m2")
KINDS = [
    CacheKind("cache_fp8", "tensor"),
    STATIC,
    E5M2,
    CacheKind("cache_fp8", "head", scale_dtype="bfloat16"),
    TOKEN,
    CacheKind("block_wise_fp8", scale_dtype="bfloat16"),
]
FEW = [STATIC, TOKEN, E5M2]

#: (cached, new) tokens: a chunk at an odd offset, a prompt, decoding and resting sequences.
MIXED = [(333, 129), (0, 300), (100, 1), (0, 0), (51, 77), (64, 256)]


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_mixed_seqs(place, kind, dim):
    paged_problem(MIXED, kind=kind, dim=dim, q_type="e4m3:token_head", seed=1).check(place)


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (8, 1), (5, 5)], ids=str)
@pytest.mark.parametrize("kind", FEW, ids=str)
def test_query_head_groups(place, heads, kind):
    seqs = [(70, 200), (0, 130)]
    paged_problem(seqs, kind=kind, heads=heads, dim=128, q_type="e4m3:tensor").check(place)


@pytest.mark.parametrize("prefix", [0, 1, 63, 64, 127, 200])
@pytest.mark.parametrize("new", [64, 127, 129])
def test_prefix_lengths(place, prefix, new):
    seqs = [(prefix, new), (prefix + 5, new + 1)]
    paged_problem(seqs, kind=TOKEN, dim=128, q_type="e4m3:tensor", seed=prefix).check(place)


@pytest.mark.parametrize("kind", FEW, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"window_size": (100, 0)},
        {"causal": False, "window_size": (37, 150)},
        {"softcap": 5.0},
        {"sinks": np.array([0.3, -1.0, 4.0, -np.inf], np.float32)},
        {"out_scale": np.array([0.07], np.float32)},
    ],
    ids=lambda options: "-".join(options),
)
def test_options(place, kind, options):
    seqs = [(300, 200), (0, 333)]
    problem = paged_problem(seqs, kind=kind, dim=128, q_type="e4m3:token_head", **options)
    problem.check(place)


@pytest.mark.parametrize("kind", FEW, ids=str)
def test_mask_offsets(place, kind):
    rng = np.random.default_rng(0)
    start = rng.integers(0, 150, 333)
    offsets = np.stack([start, start + rng.integers(-3, 300, 333)], 1).astype(np.int32)
    problem = paged_problem(
        [(60, 200), (0, 133)],
        kind=kind,
        dim=128,
        q_type="e4m3:tensor",
        causal=False,
        mask_offsets=offsets,
    )
    problem.check(place)


@pytest.mark.parametrize("kind", FEW, ids=str)
def test_blocks_that_are_not_assigned(place, kind):
    problem = paged_problem([(500, 200), (0, 130)], kind=kind, dim=128, q_type="e4m3:tensor")
    problem.block_tables[0, [0, 3, 7]] = [-1, 2**31 - 1, 12345]
    problem.block_tables[1, :] = -1
    out, lse = problem.check(place)
    assert np.isneginf(lse[:, 200:]).all() and (out[200:] == 0).all()


@pytest.mark.parametrize("kind", FEW, ids=str)
def test_nan_stays_with_the_seqs_that_see_it(place, kind):
    problem = paged_problem([(200, 300)], kind=kind, dim=128, q_type="e4m3:tensor")
    problem.v.elements[problem.slot(0, 333)[0], 0, 333 % 64, 5] = 0x7F
    problem.k.elements[problem.slot(0, 450)[0], 1, 450 % 64, 7] = 0xFF
    out, _ = problem.check(place)
    seen = np.isnan(out)
    assert seen[133:, :2, 5].all() and not seen[:133].any() and not seen[:, :2, 6].any()
    assert seen[250:, 2:].all() and not seen[:250, 2:].any()


@pytest.mark.parametrize("kind", FEW, ids=str)
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


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_type", ["e4m3", "e5m2"])
def test_contiguous_keys(place, kv_type, dim, causal):
    seqs = [(300, 300), (77, 400), (0, 5), (129, 64), (200, 100)]
    problem = flash_problem(
        seqs,
        heads=(4, 2),
        dim=dim,
        q_type="e4m3:tensor",
        kv_type=kv_type,
        descale_shape="batch",
        causal=causal,
    )
    problem.check(place)
