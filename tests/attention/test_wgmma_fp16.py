"""Long sequences of bf16 and fp16 queries over every cache and over ragged keys.

On a Hopper GPU these take the kernel of custom_ops/cuda/attention/wgmma_sm90/fp16; anywhere else
the other kernels. Results are held to the error of 16-bit products (see tests.support.attention).
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
from tests.support.compare import assert_same_bits

BF16 = CacheKind()
FP16 = CacheKind(dtype="float16")
KINDS = [
    BF16,
    FP16,
    CacheKind("cache_int8", "tensor"),
    CacheKind("cache_int8", "head", scale_dtype="bfloat16"),
    CacheKind("cache_int8", "channel"),
    CacheKind("cache_fp8", "head"),
    CacheKind("cache_fp8", "tensor", "e5m2"),
    CacheKind("block_wise_fp8"),
    CacheKind("block_wise_fp8", scale_dtype="bfloat16"),
    CacheKind("block_wise_int8"),
]
#: One for each way of the values into the product.
FEW = [BF16, CacheKind("cache_int8", "channel"), CacheKind("block_wise_fp8")]
#: Whose codes of K are operands of the tensor cores as they lie.
CODES = [
    CacheKind("cache_int8", "head"),
    CacheKind("cache_fp8", "head"),
    CacheKind("block_wise_int8"),
    CacheKind("block_wise_fp8"),
]
#: With codes that are NaN.
NAN = [BF16, FP16, CacheKind("cache_fp8", "head"), CacheKind("block_wise_fp8")]

#: (cached, new) tokens: a chunk at an odd offset, a prompt, decoding and resting sequences.
MIXED = [(333, 129), (0, 300), (100, 1), (0, 0), (51, 77), (64, 256)]


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_mixed_seqs(place, kind, dim):
    paged_problem(MIXED, kind=kind, dim=dim, seed=1, padding=3).check(place)


@pytest.mark.parametrize("kind", [k for k in KINDS if k.quant_type != "none"], ids=str)
def test_fp16_queries_of_codes(place, kind):
    seqs = [(70, 200), (0, 130)]
    paged_problem(seqs, kind=kind, dim=128, q_type="float16", seed=2).check(place)


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (8, 1), (5, 5)], ids=str)
@pytest.mark.parametrize("kind", FEW, ids=str)
def test_query_head_groups(place, heads, kind):
    paged_problem([(70, 200), (0, 130)], kind=kind, heads=heads, dim=128).check(place)


@pytest.mark.parametrize("prefix", [0, 1, 63, 64, 127, 200])
@pytest.mark.parametrize("new", [64, 127, 129])
def test_prefix_lengths(place, prefix, new):
    for seed, kind in enumerate((BF16, CacheKind("block_wise_int8"))):
        seqs = [(prefix, new), (prefix + 5, new + 1)]
        paged_problem(seqs, kind=kind, heads=(2, 1), dim=128, seed=seed).check(place, str(kind))


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
    paged_problem([(300, 200), (0, 333)], kind=kind, dim=128, **options).check(place)


@pytest.mark.parametrize("kind", FEW, ids=str)
def test_mask_offsets(place, kind):
    rng = np.random.default_rng(0)
    start = rng.integers(0, 150, 333)
    offsets = np.stack([start, start + rng.integers(-3, 300, 333)], 1).astype(np.int32)
    problem = paged_problem(
        [(60, 200), (0, 133)], kind=kind, dim=128, causal=False, mask_offsets=offsets
    )
    problem.check(place)


@pytest.mark.parametrize("kind", FEW, ids=str)
def test_blocks_that_are_not_assigned(place, kind):
    problem = paged_problem([(500, 200), (0, 130)], kind=kind, dim=128)
    problem.block_tables[0, [0, 3, 7]] = [-1, 2**31 - 1, 12345]
    problem.block_tables[1, :] = -1
    out, lse = problem.check(place)
    assert np.isneginf(lse[:, 200:]).all() and (out[200:] == 0).all()


@pytest.mark.parametrize("kind", NAN, ids=str)
def test_nan_stays_with_the_seqs_that_see_it(place, kind):
    problem = paged_problem([(200, 300)], kind=kind, dim=128)
    nan = np.nan if kind.quant_type == "none" else 0x7F
    problem.v.elements[problem.slot(0, 333)[0], 0, 333 % 64, 5] = nan
    problem.k.elements[problem.slot(0, 450)[0], 1, 450 % 64, 7] = nan
    out, _ = problem.check(place)
    seen = np.isnan(out.astype(np.float32))
    assert seen[133:, :2, 5].all() and not seen[:133].any() and not seen[:, :2, 6].any()
    assert seen[250:, 2:].all() and not seen[:250, 2:].any()


@pytest.mark.parametrize("code", ["fp8", "int8"])
def test_nan_scales_stay_with_the_seqs_that_see_them(place, code):
    problem = paged_problem([(200, 300)], kind=CacheKind(f"block_wise_{code}"), dim=128)
    problem.v.scales[problem.slot(0, 333)[0], 0, 333 % 64] = np.nan
    problem.k.scales[problem.slot(0, 450)[0], 1, 450 % 64] = np.nan
    out, _ = problem.check(place)
    seen = np.isnan(out.astype(np.float32))
    assert seen[133:, :2].all() and not seen[:133].any()
    assert seen[250:, 2:].all() and not seen[:250, 2:].any()


@pytest.mark.parametrize(
    "kind", [CacheKind("block_wise_int8"), CacheKind("block_wise_fp8")], ids=str
)
def test_token_scales_far_apart(place, kind):
    # The scale that probabilities are stored with follows the largest scale of V, step by step.
    problem = paged_problem([(600, 200)], kind=kind, heads=(2, 1), dim=128)
    size = 2.0 ** np.random.default_rng(3).integers(-12, 13, problem.v.scales.shape)
    problem.v.scales[:] = problem.v.scales * size.astype(np.float32)
    problem.check(place)


def test_queries_of_any_size(place):
    # fp16 operands have less range than bf16 queries.
    problem = paged_problem([(100, 200)], kind=CacheKind("cache_int8", "head"), dim=128)
    size = 2.0 ** np.random.default_rng(4).integers(-60, 61, (200, 4, 1))
    problem.q = (problem.q.astype(np.float32) * size).astype(problem.q.dtype)
    problem.check(place)


@pytest.mark.parametrize("kind", FEW, ids=str)
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
@pytest.mark.parametrize("kind", CODES, ids=str)
def test_scores_of_codes_that_are_far_from_zero(place, kind, size):
    # Few keys have weight then, and the integer products of int8 lose their bias.
    problem = paged_problem([(100, 200)], kind=kind, heads=(2, 1), dim=128, seed=7)
    problem.q[::2] = (problem.q[::2].astype(np.float32) * size).astype(problem.q.dtype)
    out, _ = problem.run(place)
    assert np.isfinite(out.astype(np.float32)).all()
    # The same key with a weight of one in every row: nothing is left to be rounded.
    problem.q[:] = np.abs(problem.q)
    codes = problem.k.elements
    codes[:] = 0
    block, at = problem.slot(0, 17)
    codes[block, :, at] = 100 if "int8" in kind.quant_type else 0x70
    problem.q[1::2] = (problem.q[1::2].astype(np.float32) * size).astype(problem.q.dtype)
    problem.check(place)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", CODES, ids=str)
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
@pytest.mark.parametrize("code", ["int8", "fp8"])
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


def test_queries_and_scales_of_zero(place):
    problem = paged_problem([(100, 200)], kind=CacheKind("cache_int8", "head"), dim=128)
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


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "types",
    [
        ("bfloat16", None),
        ("float16", None),
        ("bfloat16", "int8"),
        ("float16", "int8"),
        ("bfloat16", "e4m3"),
        ("float16", "e4m3"),
        ("bfloat16", "e5m2"),
    ],
    ids=lambda types: "-".join(filter(None, types)),
)
def test_contiguous_keys(place, types, dim, causal):
    seqs = [(300, 300), (77, 400), (0, 5), (129, 64), (200, 100)]
    q_type, kv_type = types
    problem = flash_problem(
        seqs, heads=(4, 2), dim=dim, q_type=q_type, kv_type=kv_type, descale_shape="batch",
        causal=causal,
    )  # fmt: skip
    problem.check(place)


@pytest.mark.parametrize("kv_type", ["bfloat16", "e4m3"])
def test_contiguous_seqs_do_not_see_each_other(place, kv_type):
    problem = flash_problem([(100, 200), (90, 100)], dim=128, kv_type=kv_type)
    nan = np.nan if kv_type == "bfloat16" else 0x7F
    problem.k[200, 0, 3] = problem.v[200, 0, 3] = nan
    out, _ = problem.check(place)
    assert not np.isnan(out[:100].astype(np.float32)).any()
