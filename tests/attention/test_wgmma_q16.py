"""What the wgmma kernel of 16-bit queries has to keep besides test_wgmma.py.

On a Hopper GPU these take custom_ops/cuda/attention/wgmma_sm90/q16; anywhere else the other
kernels. Results are held to the error of 16-bit products (see tests.support.attention).
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.attention.test_wgmma import BF16, FEW_16, KINDS_16, MIXED, STATIC, TOKEN
from tests.support.attention import (
    CacheKind,
    assert_scores_in_14_bits,
    flash_problem,
    paged_problem,
)
from tests.support.compare import assert_same_bits

#: Whose codes of K are operands of the tensor cores as they lie.
CODES = [
    CacheKind("cache_int8", "head"),
    STATIC,
    CacheKind("block_wise_int8"),
    TOKEN,
]
INT4 = CacheKind("block_wise_int4")  # whose codes become fp16 values


@pytest.mark.parametrize("kind", [*(k for k in KINDS_16 if k.quant_type != "none"), INT4], ids=str)
def test_fp16_queries_of_codes(place, kind):
    seqs = [(70, 200), (0, 130)]
    paged_problem(seqs, kind=kind, dim=128, q_type="float16", seed=2).check(place)


@pytest.mark.parametrize("code", ["fp8", "int8", "int4"])
def test_nan_scales_stay_with_the_seqs_that_see_them(place, code):
    problem = paged_problem([(200, 300)], kind=CacheKind(f"block_wise_{code}"), dim=128)
    problem.v.scales[problem.slot(0, 333)[0], 0, 333 % 64] = np.nan
    problem.k.scales[problem.slot(0, 450)[0], 1, 450 % 64] = np.nan
    out, _ = problem.check(place)
    seen = np.isnan(out.astype(np.float32))
    assert seen[133:, :2].all() and not seen[:133].any()
    assert seen[250:, 2:].all() and not seen[:250, 2:].any()


@pytest.mark.parametrize("kind", [CacheKind("block_wise_int8"), TOKEN, INT4], ids=str)
def test_token_scales_far_apart(place, kind):
    # The scale that probabilities are stored with follows the largest scale of V, step by step.
    problem = paged_problem([(600, 200)], kind=kind, heads=(2, 1), dim=128)
    # The operands of 4-bit codes keep their bits down to 2^-10 of the largest scale only.
    most = 5 if kind is INT4 else 12
    size = 2.0 ** np.random.default_rng(3).integers(-most, most + 1, problem.v.scales.shape)
    problem.v.scales[:] = problem.v.scales * size.astype(np.float32)
    problem.check(place)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kind", [CacheKind("cache_int8", "head"), INT4], ids=str)
def test_queries_of_any_size(place, kind, dim):
    # fp16 operands have less range than bf16 queries.
    problem = paged_problem([(100, 200)], kind=kind, dim=dim)
    size = 2.0 ** np.random.default_rng(4).integers(-60, 61, (200, 4, 1))
    problem.q = (problem.q.astype(np.float32) * size).astype(problem.q.dtype)
    problem.check(place)


@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_the_size_of_other_queries_does_not_matter(place, softcap):
    # A query may have a power of two of its own, where most have none.
    problem = paged_problem([(100, 200)], kind=INT4, heads=(2, 1), dim=128, softcap=softcap)
    out, lse = problem.run(place, out_dtype="float32")
    size = np.ones((200, 1, 1), np.float32)
    size[3::5], size[1::5] = 2.0**30, 2.0**-30
    problem.q = (problem.q.astype(np.float32) * size).astype(problem.q.dtype)
    other, other_lse = problem.run(place, out_dtype="float32")
    same = size[:, 0, 0] == 1
    assert_same_bits(other[same], out[same], "out")
    assert_same_bits(other_lse[:, same], lse[:, same], "lse")


@pytest.mark.parametrize("kind", FEW_16, ids=str)
def test_fp32_results(place, kind):
    problem = paged_problem(MIXED, kind=kind, dim=128)
    rounded, lse = problem.check(place)
    out, same_lse = problem.run(place, out_dtype="float32")
    assert out.dtype == np.float32
    assert_same_bits(out.astype(rounded.dtype), rounded, "the same before it is rounded")
    assert_same_bits(same_lse, lse, "lse")


def test_keys_of_more_than_a_section(place):
    # 2 KiB of each token: heads are taken in sections whose keys fit into 32 MiB of the L2 cache.
    seqs = [(9000, 70), (0, 300), (7500, 130), (100, 1)]
    problem = paged_problem(seqs, kind=BF16, heads=(8, 4), dim=128, window_size=(300, 0), seed=5)
    keys = sum(cached + new for cached, new in seqs)
    assert keys * 4 * 2 * 128 * 2 > 32 << 20
    problem.check(place)


def test_more_seqs_than_are_listed_at_once(place):
    seqs = [((7 * i) % 150, 1 + (5 * i) % 24) for i in range(300)] + [(30, 100)]
    paged_problem(seqs, kind=BF16, heads=(4, 1), dim=64, seed=6).check(place)


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_that_are_all_far_from_zero(place, sign):
    problem = flash_problem([(100, 5), (70, 130)], heads=(2, 1), dim=128, q_type="float16")
    problem.q[:] = 3000 * sign  # scores of 1e8
    problem.k[:] = 3000
    problem.check(place)


@pytest.mark.parametrize("size", [30, 1e3, 1e6])
@pytest.mark.parametrize("kind", [*CODES, INT4], ids=str)
def test_scores_of_codes_that_are_far_from_zero(place, kind, size):
    # Few keys have weight then, and the integer products of int8 lose their bias.
    problem = paged_problem([(100, 200)], kind=kind, heads=(2, 1), dim=128, seed=7)
    problem.q[::2] = (problem.q[::2].astype(np.float32) * size).astype(problem.q.dtype)
    out, _ = problem.run(place)
    assert np.isfinite(out.astype(np.float32)).all()
    # The same key with a weight of one in every row: nothing is left to be rounded.
    problem.q[:] = np.abs(problem.q)
    codes = problem.k.elements
    codes[:] = 8 if kind.code == "int4" else 0
    block, at = problem.slot(0, 17)
    codes[block, :, at] = {"int8": 100, "e4m3": 0x70, "int4": 15}[kind.code]
    if kind.code == "int4":  # whose scales have signs
        problem.k.scales[:] = np.abs(problem.k.scales)
    problem.q[1::2] = (problem.q[1::2].astype(np.float32) * size).astype(problem.q.dtype)
    problem.check(place)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [*CODES, INT4], ids=str)
def test_queries_that_are_not_finite(place, kind, value):
    problem = paged_problem([(100, 200), (0, 70)], kind=kind, heads=(2, 1), dim=128)
    problem.q[5, 1, 77] = problem.q[150, 0, 3] = value
    out, _ = problem.check(place)
    seen = np.isnan(out.astype(np.float32))
    assert seen[5, 1].all() and seen[150, 0].all() and seen.sum() == 2 * 128


@pytest.mark.parametrize("growth", [4, 60])
@pytest.mark.parametrize("q_type", ["bfloat16", "float16"])
def test_scores_that_grow_towards_the_first_key(place, q_type, growth):
    # Keys are read from the last to the first: a row's maximum rises, and its shift follows.
    problem = flash_problem(
        [(130, 700), (300, 600)], heads=(2, 1), dim=128, q_type=q_type, causal=True
    )
    factors = np.geomspace(growth, 1, len(problem.k), dtype=np.float32)
    problem.k[:] = problem.k.astype(np.float32) * factors[:, None, None]
    problem.check(place)


@pytest.mark.parametrize("growth", [4, 60])
@pytest.mark.parametrize("code", ["int8", "fp8", "int4"])
def test_scores_of_scaled_codes_that_grow_towards_the_first_key(place, code, growth):
    seqs = [(130, 700), (300, 600)]
    problem = paged_problem(seqs, kind=CacheKind(f"block_wise_{code}"), heads=(2, 1), dim=128)
    for seq, (cached, new) in enumerate(seqs):
        for position in range(cached + new):
            block, at = problem.slot(seq, position)
            problem.k.scales[block, :, at] *= growth ** (1 - position / (cached + new))
    if code == "fp8" and growth > 4 and place != "cpu":
        assert_scores_in_14_bits(problem, place)
    else:
        problem.check(place)


@pytest.mark.parametrize("growth", [4, 20])
def test_integer_scores_that_grow_towards_the_first_key(place, growth):
    seqs = [(130, 700), (300, 600)]
    kind = CacheKind("cache_int8", "head")
    problem = paged_problem(seqs, kind=kind, heads=(2, 1), dim=128, seed=9)
    codes = problem.k.elements.view(np.int8)
    for seq, (cached, new) in enumerate(seqs):
        for position in range(cached + new):
            block, at = problem.slot(seq, position)
            codes[block, :, at] = codes[block, :, at] / growth ** (position / (cached + new))
    problem.k.scales *= growth
    problem.check(place)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [200, 300])
def test_as_many_equal_seqs_as_fill_a_gpu(place, tokens, causal):
    # Short sequences: the tiles of a sequence and head are neighbours, with a causal mask in pairs.
    seqs = [(tokens, tokens)] * 33
    flash_problem(seqs, heads=(4, 2), dim=128, seed=8, causal=causal).check(place)


@pytest.mark.parametrize("kind", [CacheKind("cache_int8", "head"), INT4], ids=str)
def test_queries_and_scales_of_zero(place, kind):
    problem = paged_problem([(100, 200)], kind=kind, dim=128)
    problem.q[5:90] = 0
    problem.k.scales[:] = 0
    problem.check(place)


@pytest.mark.parametrize("q_type", ["bfloat16", "e4m3:tensor"])
def test_a_nan_scale_of_keys_that_nobody_sees(place, q_type):
    problem = flash_problem(
        [(100, 70), (80, 0), (90, 200)],
        heads=(2, 1),
        dim=128,
        q_type=q_type,
        kv_type="e4m3",
        descale_shape="batch",
    )
    problem.options["k_descale"][1] = np.nan
    out, lse = problem.check(place)
    assert not out[100:180].any() and np.isneginf(lse[:, 100:180]).all()


@pytest.mark.parametrize("kv_type", ["bfloat16", "e4m3"])
def test_contiguous_seqs_do_not_see_each_other(place, kv_type):
    problem = flash_problem([(100, 200), (90, 100)], dim=128, kv_type=kv_type)
    nan = np.nan if kv_type == "bfloat16" else 0x7F
    problem.k[200, 0, 3] = problem.v[200, 0, 3] = nan
    out, _ = problem.check(place)
    assert not np.isnan(out[:100].astype(np.float32)).any()
