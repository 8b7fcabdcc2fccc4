"""Head dimensions besides 64 and 128, whose kernels hold a head in several stages, or in a part.

256 channels over every way of reading a cache, 96 where they differ from it, and 192 with values
of 128 channels. The cases that run over head dimensions elsewhere have these, too; here are
options, special values and sizes that those leave out.
"""

from __future__ import annotations

import copy

import ml_dtypes
import numpy as np
import pytest

import fastattn.functional as F
from tests.support.attention import (
    MIXED_KINDS,
    CacheKind,
    assert_scores_in_14_bits,
    flash_problem,
    paged_problem,
)
from tests.support.tensors import to_numpy, to_paddle, value_dim

BF16 = CacheKind()
STATIC = CacheKind("cache_fp8", "head")
CHANNEL = CacheKind("cache_int8", "channel")
TOKEN = CacheKind("block_wise_fp8")
INT4 = CacheKind("block_wise_int4")
MXFP4 = CacheKind("block_wise_mxfp4")
K8V4, KFP8V4 = MIXED_KINDS
KINDS = [
    *(BF16, STATIC, CHANNEL, TOKEN, CacheKind("block_wise_int8", scale_dtype="bfloat16")),
    *(INT4, MXFP4, K8V4, KFP8V4),
]

OPTIONS = [
    {"window_size": (100, 0)},
    {"causal": False, "window_size": (37, 150)},
    {"softcap": 5.0},
    {"sinks": np.array([0.3, -1.0, 4.0, -np.inf], np.float32)},
    {"out_scale": np.array([0.07], np.float32)},
]


def each_option(test):
    return pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))(test)


@each_option
@pytest.mark.parametrize("q_type", [None, "e4m3:token_head"])
@pytest.mark.parametrize("dim", [96, 192, 256])
def test_options_of_a_cache(place, dim, q_type, options):
    kind = BF16 if q_type is None else TOKEN
    seqs = [(200, 100), (0, 150), (90, 1), (33, 4)]
    paged_problem(seqs, kind=kind, dim=dim, q_type=q_type, **options).check(place)


@pytest.mark.few_on_cpu("kind", "options")
@each_option
@pytest.mark.parametrize("q_type", ["bfloat16", "float16"])
@pytest.mark.parametrize("dim", [96, 256])
@pytest.mark.parametrize("kind", [*KINDS[1:], CacheKind("cache_fp8", "tensor", "e5m2")], ids=str)
def test_options_of_codes(place, kind, dim, q_type, options):
    """16-bit queries: of large heads they become operands where they lie."""
    seqs = [(200, 100), (0, 150), (90, 1), (33, 4), (77, 257)]
    paged_problem(seqs, kind=kind, dim=dim, q_type=q_type, **options).check(place)


@pytest.mark.few_on_cpu("kind", "q_type")
@pytest.mark.parametrize("dim", [96, 256])
@pytest.mark.parametrize(
    "kind", [*KINDS[1:], CacheKind("block_wise_fp8", scale_dtype="bfloat16")], ids=str
)
@pytest.mark.parametrize("q_type", ["bfloat16", "float16"])
def test_queries_of_any_size(place, kind, q_type, dim):
    """A power of two for each query brings it into the range of the operands."""
    problem = paged_problem([(0, 300), (130, 200)], kind=kind, dim=dim, q_type=q_type)
    size = 2.0 ** np.random.default_rng(4).integers(-6, 7, (*problem.q.shape[:2], 1))
    problem.q = (problem.q.astype(np.float32) * size).astype(problem.q.dtype)
    problem.check(place)


@pytest.mark.few_on_cpu
@pytest.mark.parametrize("dim", [96, 256])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_more_tiles_than_processors(place, kind, dim):
    """Several tiles a CTA, of few and of many keys: each stage and each query's place is reused."""
    seqs = [(53 * i % 400, 70 + 13 * i % 90) for i in range(19)]
    paged_problem(seqs, kind=kind, dim=dim, heads=(16, 2), seed=5).check(place)


@each_option
@pytest.mark.parametrize("q_type", ["bfloat16", "e4m3:token_head"])
@pytest.mark.parametrize("kind", [INT4, MXFP4, K8V4], ids=str)
def test_options_of_4_bits_and_192_channels(place, kind, q_type, options):
    seqs = [(200, 100), (0, 150), (90, 1), (33, 4), (77, 57)]
    paged_problem(seqs, kind=kind, dim=192, q_type=q_type, **options).check(place)


@each_option
@pytest.mark.parametrize("q_type", ["bfloat16", "e4m3:tensor"])
@pytest.mark.parametrize("dim", [192, 256])
def test_options_of_contiguous_keys(place, dim, q_type, options):
    seqs = [(100, 300), (150, 150), (1, 90), (4, 37)]
    flash_problem(seqs, dim=dim, q_type=q_type, **{"causal": True, **options}).check(place)


@pytest.mark.few_on_cpu("kind", "heads")
@pytest.mark.parametrize("heads", [(1, 1), (10, 1), (32, 2), (40, 2), (5, 5)], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dim", [192, 256])
def test_groups_of_decoding_seqs(place, dim, kind, heads):
    """8, 16 and 64 columns; several new tokens."""
    for new in (1, 3):
        seqs = [(new * 100, new), (0, new), (63, new), (1, 0)]
        paged_problem(seqs, kind=kind, heads=heads, dim=dim, seed=new).check(place)


@pytest.mark.few_on_cpu("kind", "dim")
@pytest.mark.parametrize("dim", [96, 192, 256])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_many_keys(place, kind, dim, batch_invariant):
    """Splits whose partial results are merged."""
    problem = paged_problem([(3000, 1), (700, 2)], kind=kind, heads=(2, 1), dim=dim)
    problem.check(place, results=problem.run(place, batch_invariant=batch_invariant))


@pytest.mark.parametrize("dim", [96, 192, 256])
@pytest.mark.parametrize("new", [1, 100])
@pytest.mark.parametrize("kind", [BF16, STATIC, TOKEN], ids=str)
def test_nan_stays_with_the_seqs_that_see_it(place, kind, new, dim):
    """In the first and in the last channels, which lie in stages of their own."""
    for channel in (5, value_dim(dim) - 3):
        problem = paged_problem([(200, new), (130, new)], kind=kind, dim=dim)
        value = np.nan if kind.quant_type == "none" else 0x7F
        problem.v.elements[problem.slot(0, 200)[0], 0, 200 % 64, channel] = value
        out, _ = problem.check(place)
        seen = np.isnan(out.astype(np.float32))
        assert seen[:new, :2, channel].all() and not seen[new:].any()
        assert not seen[:, 2:].any() and not np.delete(seen, channel, axis=2).any()


@pytest.mark.parametrize("dim", [96, 192, 256])
@pytest.mark.parametrize("kind", [BF16, TOKEN, INT4, MXFP4, K8V4], ids=str)
def test_blocks_that_are_not_assigned(place, kind, dim):
    problem = paged_problem([(300, 100), (0, 130), (200, 1)], kind=kind, dim=dim)
    problem.block_tables[0, [0, 3]] = [-1, 2**31 - 1]
    problem.block_tables[1, :] = -1
    out, lse = problem.check(place)
    assert np.isneginf(lse[:, 100:230]).all() and (out[100:230] == 0).all()


@pytest.mark.parametrize("dim", [192, 256])
@pytest.mark.parametrize("kind", [STATIC, TOKEN], ids=str)
def test_scores_of_any_size(place, kind, dim):
    problem = paged_problem([(100, 200)], kind=kind, dim=dim, q_type="e4m3:token_head")
    size = 2.0 ** np.random.default_rng(4).integers(-40, 61, problem.q_descale.shape)
    problem.q_descale = (problem.q_descale * size).astype(np.float32)
    assert_scores_in_14_bits(problem, place)


@pytest.mark.parametrize("dim", [192, 256])
def test_two_levels_of_accumulation(place, dim):
    """One sum over all keys in the tensor core loses several per cent of a V that has a mean."""
    problem = flash_problem(
        [(128, 4096)], heads=(1, 1), dim=dim, q_type="e4m3:tensor", v_mean=4.0, causal=False
    )
    out, _ = problem.check(place)
    exact, _ = problem.reference()
    assert abs(np.mean(out.astype(np.float64)) / np.mean(exact) - 1) < 5e-3


@pytest.mark.parametrize("q_type", ["e4m3:tensor", "e4m3:token_head"])
@pytest.mark.parametrize("kind", [CacheKind("cache_fp8", "head", "e5m2"), STATIC, TOKEN], ids=str)
def test_fp8_prefill_of_192_channels(place, kind, q_type):
    """Chunks behind prefixes at odd offsets, prompts, and a few tokens beside them."""
    seqs = [(333, 129), (0, 300), (100, 1), (0, 0), (51, 77), (64, 256), (1, 130)]
    paged_problem(seqs, heads=(6, 3), kind=kind, dim=192, q_type=q_type, padding=3).check(place)


@pytest.mark.parametrize(
    "kind", [BF16, CacheKind(dtype="float16"), CHANNEL, TOKEN, INT4, MXFP4, KFP8V4], ids=str
)
def test_shared_prefix_of_192_channels(place, kind):
    """A cascade's partial results have the channels of V."""
    problem = paged_problem(
        [(128, 1), (192, 2), (130, 40)], heads=(4, 2), dim=192, kind=kind, share=True
    )
    plan = F.plan_cascade(
        problem.block_tables, problem.seq_lens_decoder, problem.seq_lens_this_time, 128, place=place
    )
    (q, key_cache, value_cache, _, cu, _, new, *longest), keywords = problem.arguments(place)
    out, lse = F.cascade_attention(
        q, key_cache, value_cache, plan, cu, new, *longest, return_softmax_lse=True, **keywords
    )
    problem.check(place, results=(to_numpy(out), to_numpy(lse)))


@pytest.mark.parametrize("kind", [BF16, CHANNEL, TOKEN], ids=str)
def test_key_and_value_caches_must_fit_each_other(place, kind):
    problem = paged_problem([(70, 3)], kind=kind, dim=192)
    wide = np.concatenate([problem.v.elements, problem.v.elements[..., :64]], -1)
    for key, value in ((problem.k.elements, wide), (wide[..., :128], wide)):
        other = copy.deepcopy(problem)
        other.k.elements, other.v.elements = key, value
        other.q = other.q[..., : key.shape[-1]]
        if kind == CHANNEL:
            other.k.scales = other.k.scales[: 2 * key.shape[-1]]
        plain = kind.quant_type == "none"
        shape = r"64, 128\]" if plain else r"128, 64\]"
        with pytest.raises(ValueError, match=rf"value_cache: expected shape \[\d+, 2, {shape}"):
            other.run(place)


def test_outputs_have_the_channels_of_values(place):
    problem = paged_problem([(70, 3)], kind=TOKEN, dim=192)
    given = to_paddle(np.zeros((3, 4, 192), ml_dtypes.bfloat16), place)
    with pytest.raises(ValueError, match=r"out: expected shape \[3, 4, 128\]"):
        problem.run(place, out=given)
    own = to_paddle(np.zeros((3, 4, 128), ml_dtypes.bfloat16), place)
    problem.check(place, results=problem.run(place, out=own))


def test_values_of_128_channels_have_no_other_number(place):
    problem = flash_problem([(5, 9)], dim=192)
    problem.v = np.concatenate([problem.v, problem.v[..., :64]], -1)
    with pytest.raises(ValueError, match=r"flash_attention: v: expected shape \[9, 2, 128\]"):
        problem.run(place)
