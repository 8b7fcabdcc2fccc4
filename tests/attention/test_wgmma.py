"""Long sequences of 16-bit and of e4m3 queries over every cache and over ragged keys.

On a Hopper GPU these take the kernels of custom_ops/cuda/attention/wgmma_sm90; anywhere else the
other kernels. 16-bit queries are held to the error of 16-bit products, e4m3 ones over FP8 keys to
that of e4m3 probabilities (see tests.support.attention). What only one of the two has to keep is in
test_wgmma_q16.py and test_wgmma_fp8.py.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.attention import CacheKind, flash_problem, paged_problem

BF16 = CacheKind()
FP16 = CacheKind(dtype="float16")
STATIC = CacheKind("cache_fp8", "head")
TOKEN = CacheKind("block_wise_fp8")
E5M2 = CacheKind("cache_fp8", "head", "e5m2")

#: Caches of 16-bit queries.
KINDS_16 = [
    BF16,
    FP16,
    CacheKind("cache_int8", "tensor"),
    CacheKind("cache_int8", "head", scale_dtype="bfloat16"),
    CacheKind("cache_int8", "channel"),
    STATIC,
    CacheKind("cache_fp8", "tensor", "e5m2"),
    TOKEN,
    CacheKind("block_wise_fp8", scale_dtype="bfloat16"),
    CacheKind("block_wise_int8"),
    CacheKind("block_wise_int4"),
]
#: Of them one for each way of the values into the product, and those with codes that are NaN.
FEW_16 = [BF16, CacheKind("cache_int8", "channel"), TOKEN]
NAN_16 = [BF16, FP16, STATIC, TOKEN]
#: Caches of e4m3 queries.
KINDS_8 = [
    CacheKind("cache_fp8", "tensor"),
    STATIC,
    E5M2,
    CacheKind("cache_fp8", "head", scale_dtype="bfloat16"),
    TOKEN,
    CacheKind("block_wise_fp8", scale_dtype="bfloat16"),
]
FEW_8 = [STATIC, TOKEN, E5M2]

#: (cached, new) tokens: a chunk at an odd offset, a prompt, decoding and resting sequences.
MIXED = [(333, 129), (0, 300), (100, 1), (0, 0), (51, 77), (64, 256)]


def each(kinds_16, kinds_8, q_type):
    """Caches with 16-bit queries, and caches with e4m3 ones of a type of scales."""
    cases = [*((kind, None) for kind in kinds_16), *((kind, q_type) for kind in kinds_8)]
    return pytest.mark.parametrize("kind, q_type", cases, ids=lambda x: str(x or "16 bits"))


@pytest.mark.few_on_cpu
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@each(KINDS_16, KINDS_8, "e4m3:token_head")
def test_mixed_seqs(place, kind, q_type, dim):
    padding = 3 if q_type is None else 0
    problem = paged_problem(MIXED, kind=kind, dim=dim, q_type=q_type, seed=1, padding=padding)
    problem.check(place)


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (8, 1), (5, 5)], ids=str)
@each(FEW_16, FEW_8, "e4m3:tensor")
def test_query_head_groups(place, heads, kind, q_type):
    seqs = [(70, 200), (0, 130)]
    paged_problem(seqs, kind=kind, heads=heads, dim=128, q_type=q_type).check(place)


@pytest.mark.parametrize("prefix", [0, 1, 63, 64, 127, 200])
@pytest.mark.parametrize("new", [64, 127, 129])
@each([BF16, CacheKind("block_wise_int8")], [TOKEN], "e4m3:tensor")
def test_prefix_lengths(place, prefix, new, kind, q_type):
    seqs, heads = [(prefix, new), (prefix + 5, new + 1)], (2, 1) if q_type is None else (4, 2)
    problem = paged_problem(seqs, kind=kind, heads=heads, dim=128, q_type=q_type, seed=prefix)
    problem.check(place)


@pytest.mark.few_on_cpu
@each(FEW_16, FEW_8, "e4m3:token_head")
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
def test_options(place, kind, q_type, options):
    seqs = [(300, 200), (0, 333)]
    paged_problem(seqs, kind=kind, dim=128, q_type=q_type, **options).check(place)


@each(FEW_16, FEW_8, "e4m3:tensor")
def test_mask_offsets(place, kind, q_type):
    rng = np.random.default_rng(0)
    start = rng.integers(0, 150, 333)
    offsets = np.stack([start, start + rng.integers(-3, 300, 333)], 1).astype(np.int32)
    seqs, mask = [(60, 200), (0, 133)], {"causal": False, "mask_offsets": offsets}
    paged_problem(seqs, kind=kind, dim=128, q_type=q_type, **mask).check(place)


@each(FEW_16, FEW_8, "e4m3:tensor")
def test_blocks_that_are_not_assigned(place, kind, q_type):
    problem = paged_problem([(500, 200), (0, 130)], kind=kind, dim=128, q_type=q_type)
    problem.block_tables[0, [0, 3, 7]] = [-1, 2**31 - 1, 12345]
    problem.block_tables[1, :] = -1
    out, lse = problem.check(place)
    assert np.isneginf(lse[:, 200:]).all() and (out[200:] == 0).all()


@each(NAN_16, FEW_8, "e4m3:tensor")
def test_nan_stays_with_the_seqs_that_see_it(place, kind, q_type):
    problem = paged_problem([(200, 300)], kind=kind, dim=128, q_type=q_type)
    v_nan = np.nan if kind.quant_type == "none" else 0x7F
    k_nan = v_nan if q_type is None else 0xFF
    problem.v.elements[problem.slot(0, 333)[0], 0, 333 % 64, 5] = v_nan
    problem.k.elements[problem.slot(0, 450)[0], 1, 450 % 64, 7] = k_nan
    out, _ = problem.check(place)
    seen = np.isnan(out.astype(np.float32))
    assert seen[133:, :2, 5].all() and not seen[:133].any() and not seen[:, :2, 6].any()
    assert seen[250:, 2:].all() and not seen[:250, 2:].any()


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
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
        ("e4m3:tensor", "e4m3"),
        ("e4m3:tensor", "e5m2"),
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
