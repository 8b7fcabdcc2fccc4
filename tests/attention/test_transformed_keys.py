"""Attention over keys that are stored rotated and less a centre.

Kernels against the fp64 model over the stored bytes; and writer and reader together against fp64
attention over keys that were never quantised.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import reference
from fastattn.reference.attention import dense_attention
from fastattn.reference.hadamard import hadamard_matrix
from tests.support.attention import GROUPED_KINDS, MIXED_KINDS, CacheKind, paged_problem
from tests.support.cache import make_step
from tests.support.compare import assert_same_bits
from tests.support.tensors import BF16, int32, to_numpy, to_paddle

KINDS = [
    CacheKind("cache_int8", "channel"),
    CacheKind("block_wise_int8"),
    CacheKind("block_wise_int4"),
    *MIXED_KINDS,
    *GROUPED_KINDS,
]
FP8 = [CacheKind("cache_fp8", "head"), CacheKind("block_wise_fp8")]
#: (cached, new): chunks at odd offsets, a prompt, decode, speculative and resting sequences.
MIXED = [(333, 129), (0, 150), (100, 1), (0, 0), (51, 77), (64, 3)]
DECODE = [(300, 1), (63, 1), (0, 1), (129, 2), (700, 1)]


def centre(kv_heads: int, head_dim: int) -> np.ndarray:
    return np.random.default_rng(3).normal(0, 0.7, (kv_heads, head_dim)).astype(np.float32)


@pytest.mark.parametrize("q_type", ["bfloat16", "float16"])
@pytest.mark.parametrize("seqs", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("kind", [*KINDS, *FP8], ids=str)
def test_rotated(place, kind, dim, seqs, q_type):
    if kind.grouped and dim not in (64, 128):
        pytest.skip("MXFP4 caches have heads of 64 and 128 channels")
    options = {"k_rotation": "hadamard", "k_center": centre(2, dim)}
    paged_problem(seqs, kind=kind, dim=dim, q_type=q_type, heads=(6, 2), **options).check(place)


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
@pytest.mark.parametrize("extra", [{}, {"out_scale": np.array([0.013], np.float32)}], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_sinks_count_beside_scores_of_whole_keys(place, kind, extra, rotation):
    sinks = np.array([-1.0, 0.5, 2.0, -np.inf, 3.0, 0.0], np.float32)
    options = {"k_rotation": rotation, "k_center": 3 * centre(2, 64), "sinks": sinks, **extra}
    problem = paged_problem(MIXED, kind=kind, dim=64, heads=(6, 2), padding=4, **options)
    out, lse = problem.check(place)
    plain = dataclasses.replace(problem, options={**problem.options, "k_center": None})
    _, without = plain.run(place)
    some = np.isfinite(without)
    assert np.abs(lse[some] - without[some]).max() > 0.1  # it matters
    assert not out[~problem.owned()].any()
    arguments, keywords = problem.arguments(place)
    alone = F.paged_attention(*arguments, **keywords)  # without an LSE
    assert_same_bits(to_numpy(alone), out, "again")


def test_lonely_queries_have_no_lse(place):
    """Whatever their shift is; with and without a sink."""
    for sinks in (None, np.ones(4, np.float32)):
        offsets = np.zeros((3, 2), np.int32)
        offsets[1] = (0, 20)
        problem = paged_problem(
            [(40, 3)],
            kind=KINDS[0],
            dim=64,
            heads=(4, 2),
            causal=False,
            mask_offsets=offsets,
            k_center=centre(2, 64),
            sinks=sinks,
        )
        out, lse = problem.check(place)
        assert np.isneginf(lse[:, [0, 2]]).all() and not out[[0, 2]].any()
        assert np.isfinite(lse[:, 1]).all()


def test_queries_of_any_stride(place):
    problem = paged_problem(DECODE, kind=KINDS[1], dim=64, heads=(4, 2), k_rotation="hadamard")
    arguments, keywords = problem.arguments(place)
    expected = F.paged_attention(*arguments, **keywords)
    tokens = problem.q.shape[0]
    wide = np.zeros((tokens, 4, 80), problem.q.dtype)
    wide[..., 8:72] = problem.q
    view = to_paddle(wide, place)[:, :, 8:72]
    if view.is_contiguous():
        pytest.skip("this Paddle copies slices")
    got = F.paged_attention(view, *arguments[1:], **keywords)
    assert_same_bits(to_numpy(got), to_numpy(expected), "out")


def test_the_output_may_be_the_queries(place):
    problem = paged_problem(DECODE, kind=KINDS[1], dim=128, heads=(4, 2), k_rotation="hadamard")
    arguments, keywords = problem.arguments(place)
    expected = to_numpy(F.paged_attention(*arguments, **keywords))
    out = F.paged_attention(*arguments, out=arguments[0], **keywords)
    assert_same_bits(to_numpy(out), expected, "out")


def test_fp32_queries_are_not_rounded():
    problem = paged_problem(MIXED, kind=KINDS[1], dim=64, q_type="float32", k_rotation="hadamard")
    out, _ = problem.run()
    exact, _ = problem.reference()
    owned = problem.owned()
    np.testing.assert_allclose(out[owned], exact[owned], atol=2e-5)


def _cache(kind: str, num_blocks: int, kv_heads: int, dim: int):
    keys = np.zeros((num_blocks, kv_heads, 64, dim), np.uint8)
    values = np.zeros((num_blocks, kv_heads, dim, 64), np.uint8)
    shape = (num_blocks, kv_heads, 64) if kind == "block_wise_int8" else (kv_heads,)
    return keys, values, np.full(shape, 0.05, np.float32), np.full(shape, 0.03, np.float32)


def _write_and_attend(
    place, kind, k, v, q, step, num_blocks, *, center=None, rotation="none", **more
):
    kv_heads, dim = k.shape[1:]
    tensors = [to_paddle(x, place) for x in _cache(kind, num_blocks, kv_heads, dim)]
    seqs = [to_paddle(x, place) for x in step.arrays]
    options = {
        "cache_k_scales": tensors[2],
        "cache_v_scales": tensors[3],
        "cache_quant_type": kind,
        "k_rotation": rotation,
        "k_center": None if center is None else to_paddle(center, place),
    }
    F.write_cache_kv(to_paddle(k, place), to_paddle(v, place), *tensors[:2], *seqs, **options)
    longest = int(step.seq_lens_this_time.max())
    out, lse = F.paged_attention(
        to_paddle(q, place),
        *tensors[:2],
        *seqs,
        longest,
        longest,
        return_softmax_lse=True,
        **options,
        **more,
    )
    return to_numpy(out).astype(np.float64), to_numpy(lse)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("kind", ["cache_int8", "block_wise_int8"])
def test_against_keys_that_were_never_quantised(place, kind, sinks):
    """Outliers of K as models have them: a large channel, and channels far from 0."""
    rng = np.random.default_rng(1)
    step, num_blocks = make_step([0, 0], [130, 37])
    k = rng.normal(size=(167, 2, 64))
    k[:, :, 9] += 12
    k[:, 1, 30] -= 9
    k = k.astype(BF16)
    v = rng.normal(size=(167, 2, 64)).astype(BF16)
    q = rng.normal(size=(167, 4, 64)).astype(BF16)
    sink = np.array([3.0, -1.0, 0.5, 4.0], np.float32) if sinks else None
    more = {"sinks": to_paddle(sink, place)} if sinks else {}
    center = k.astype(np.float32).mean(0)
    results = {}
    for name, options in {
        "plain": {},
        "centred": {"center": center},
        "both": {"center": center, "rotation": "hadamard"},
    }.items():
        out, lse = _write_and_attend(place, kind, k, v, q, step, num_blocks, **options, **more)
        worst, worst_lse = [], []
        for first, last in ((0, 130), (130, 167)):
            at = slice(first, last)
            visible = np.tril(np.ones((last - first, last - first), bool))
            exact, exact_lse = dense_attention(
                *(x[at].astype(np.float64) for x in (q, k, v)),
                visible,
                softmax_scale=0.125,
                sinks=sink,
            )
            worst.append(np.sqrt(np.mean((out[at] - exact) ** 2) / np.mean(exact**2)))
            worst_lse.append(np.abs(lse[:, at] - exact_lse).max())
        results[name] = max(worst), max(worst_lse)
    bound = 0.012 if kind == "block_wise_int8" else 0.03
    assert results["both"][0] < bound and results["centred"][0] < bound, results
    assert results["both"][1] < 0.1 and results["centred"][1] < 0.15, results
    # Per-token scales see the outliers; a static scale of 0.05 clips them.
    assert results["plain"][0] > 2 * results["both"][0], results


@pytest.mark.parametrize("sinks", [False, True])
def test_a_writer_that_rotates_queries_saves_the_reader_that(place, sinks):
    """q_rotation, and a centre that is rotated, give what k_rotation of the attention gives."""
    problem = paged_problem(MIXED, kind=KINDS[1], dim=128, heads=(4, 2), k_rotation="hadamard")
    options = {"k_center": centre(2, 128)}
    if sinks:
        options["sinks"] = np.array([1.0, 2.0, 0.0, -1.0], np.float32)
    whole = dataclasses.replace(problem, options={**problem.options, **options})
    out, lse = whole.run(place)
    rotated = reference.hadamard(problem.q).astype(problem.q.dtype)
    center = (options["k_center"].astype(np.float64) @ hadamard_matrix(128)).astype(np.float32)
    ready = {**problem.options, **options, "k_rotation": "none", "k_center": center}
    got, got_lse = dataclasses.replace(problem, q=rotated, options=ready).run(place)
    owned = problem.owned()
    # Shifts are those of queries before and after one rounding to 16 bits.
    assert np.abs(got_lse - lse)[:, owned].max() < 0.05
    if sinks:
        error = got[owned].astype(np.float64) - out[owned].astype(np.float64)
        assert np.abs(error).max() < 0.02 * np.abs(out[owned].astype(np.float64)).max()
    else:
        assert_same_bits(got[owned], out[owned], "out")


@pytest.mark.parametrize("sinks", [False, True])
def test_cascade(place, sinks):
    """Partial results of the same centre are merged as those of whole keys."""
    rng = np.random.default_rng(2)
    dim, prefix, new = 64, 128, [1, 3]
    k = rng.normal(1.5, 1, (prefix + 4, 2, dim)).astype(BF16)
    v = rng.normal(size=k.shape).astype(BF16)
    q = to_paddle(rng.normal(size=(4, 4, dim)).astype(BF16), place)
    tensors = [to_paddle(x, place) for x in _cache("block_wise_int8", 6, 2, dim)]
    options = {
        "cache_k_scales": tensors[2],
        "cache_v_scales": tensors[3],
        "cache_quant_type": "block_wise_int8",
        "k_rotation": "hadamard",
        "k_center": to_paddle(centre(2, dim), place),
    }
    tables = [[4, 0, 2], [4, 0, 5]]
    shared = [int32(x, place) for x in ([[4, 0]], [0, prefix], [0], [prefix])]
    F.write_cache_kv(
        to_paddle(k[:prefix], place), to_paddle(v[:prefix], place), *tensors[:2], *shared, **options
    )
    seqs = [int32(x, place) for x in (tables, [0, 1, 4], [prefix, prefix], new)]
    F.write_cache_kv(
        to_paddle(k[prefix:], place), to_paddle(v[prefix:], place), *tensors[:2], *seqs, **options
    )
    if sinks:
        options["sinks"] = to_paddle(np.array([1.0, 4.0, 0.0, -2.0], np.float32), place)
    plan = F.plan_cascade(tables, [prefix, prefix], new, prefix, place=q.place)
    out, lse = F.cascade_attention(
        q, *tensors[:2], plan, seqs[1], seqs[3], 3, prefix + 3, return_softmax_lse=True, **options
    )
    whole, whole_lse = F.paged_attention(
        q, *tensors[:2], *seqs, 3, prefix + 3, return_softmax_lse=True, **options
    )
    np.testing.assert_allclose(to_numpy(lse), to_numpy(whole_lse), atol=2e-3)
    a, b = (to_numpy(x).astype(np.float64) for x in (out, whole))
    assert np.abs(a - b).max() < 0.01 * np.abs(b).max()


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"k_center": "c", "softcap": 3.0}, NotImplementedError, r"k_center.*softcap"),
        ({"k_rotation": "fwht"}, ValueError, r"k_rotation.*none or hadamard"),
        ({"k_center": "wrong"}, ValueError, r"k_center.*shape"),
        ({"k_center": "c", "sinks": "s", "out": "q"}, NotImplementedError, r"out.*k_center"),
    ],
)
def test_errors(place, changes, error, text):
    problem = paged_problem(DECODE, kind=KINDS[1], dim=64, heads=(4, 2))
    arguments, keywords = problem.arguments(place)
    tensors = {
        "c": to_paddle(centre(2, 64), place),
        "wrong": to_paddle(centre(4, 64), place),
        "s": to_paddle(np.zeros(4, np.float32), place),
        "q": paddle.empty_like(arguments[0]),
    }
    keywords.update({k: tensors.get(v, v) if isinstance(v, str) else v for k, v in changes.items()})
    with pytest.raises(error, match=text):
        F.paged_attention(*arguments, **keywords)


@pytest.mark.parametrize("kind", [CacheKind("cache_fp8", "head", "e5m2"), CacheKind()], ids=str)
def test_other_types_are_refused(place, kind):
    problem = paged_problem(DECODE, kind=kind, dim=64, k_rotation="hadamard")
    with pytest.raises(NotImplementedError, match=r"k_rotation.*supported: (cache_int8|e4m3)"):
        problem.run(place)


def test_e4m3_queries_are_refused(place):
    problem = paged_problem(
        DECODE, kind=KINDS[0], dim=64, q_type="e4m3:tensor", k_rotation="hadamard"
    )
    with pytest.raises(NotImplementedError, match=r"k_rotation.*q_rotation"):
        problem.run(place)


@pytest.mark.parametrize("seqs", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize("kind", FP8, ids=str)
def test_rotated_first_then_quantised(place, kind, seqs):
    """`quantize_q` of rotated queries, of long sequences on the FP8 tensor cores."""
    options = {"k_rotation": "hadamard", "quantize_q": True}
    problem = paged_problem(seqs, kind=kind, dim=128, heads=(4, 2), **options)
    out, _ = problem.check(place)
    rotated = reference.hadamard(problem.q).astype(problem.q.dtype)
    ready = {**problem.options, "k_rotation": "none"}
    same, _ = dataclasses.replace(problem, q=rotated, options=ready).run(place)
    owned = problem.owned()
    assert_same_bits(out[owned], same[owned], "out")


def test_e4m3_queries_over_centred_keys(place):
    """Allowed where nothing has to be put right."""
    problem = paged_problem(DECODE, kind=FP8[0], dim=64, q_type="e4m3:token_head")
    arguments, keywords = problem.arguments(place)
    expected = to_numpy(F.paged_attention(*arguments, **keywords))
    keywords["k_center"] = to_paddle(centre(arguments[1].shape[1], 64), place)
    assert_same_bits(to_numpy(F.paged_attention(*arguments, **keywords)), expected, "out")
    with pytest.raises(NotImplementedError, match=r"k_center.*LSE"):
        F.paged_attention(*arguments, return_softmax_lse=True, **keywords)
