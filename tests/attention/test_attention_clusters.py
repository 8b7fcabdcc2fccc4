"""Few query tokens over few keys: on a GPU, clusters take what equal splits take in larger calls.

Which of the two does not show in a result, so both are held to the same model. Where the bound on
the keys that the host gives leaves it open, the lengths on the device decide.
"""

from __future__ import annotations

import numpy as np
import pytest

import fastattn.functional as F
from tests.support.attention import (
    BLOCK_WISE_FP8,
    BLOCK_WISE_INT4,
    BLOCK_WISE_INT8,
    CACHE_KINDS,
    PLAIN,
    CacheKind,
    flash_problem,
    paged_problem,
)
from tests.support.compare import assert_same_bits
from tests.support.tensors import to_numpy

#: (cached, new) tokens of decoding sequences: long, short, resting and new ones.
DECODE = [(1023, 1), (64, 1), (0, 0), (0, 1), (200, 1)]
LARGE = 1 << 24  # keys of a sequence, as a bound
LIMIT = 35 * 64  # keys of a sequence, up to which clusters take a call of 60 with 2 KV heads


def _with_bound(problem, place, max_seqlen_k):
    positional, keywords = problem.arguments(place)
    positional[8] = max_seqlen_k
    return [
        to_numpy(x) for x in F.paged_attention(*positional, return_softmax_lse=True, **keywords)
    ]


def test_the_calls_below_are_clusters_by_the_plan():
    host = pytest.importorskip("fastattn._host")

    def cluster(batch, heads, kv_heads, max_k, element_bytes=1, dim=64):
        plan = host.plan_attention(
            batch, batch, heads, kv_heads, dim, element_bytes, 1, max_k, 132, 8
        )
        return [launch["cluster"] for launch in plan]

    for dim in (64, 128):
        for element_bytes in (1, 2):
            assert cluster(5, 4, 2, 1024, element_bytes, dim) == [8]
    assert [cluster(seqs, 16, 1, 400) for seqs in (1, 17, 40)] == [[8], [4], [2]]
    (launch,) = host.plan_attention(5, 5, 8, 2, 64, 1, 1, LARGE, 132, 8)
    assert launch["finds_seqs"] and 64 * launch["cluster_kv_tiles"] > 1024
    (launch,) = host.plan_attention(60, 60, 4, 2, 64, 1, 1, LARGE, 132, 8)
    assert launch["finds_seqs"] and 64 * launch["cluster_kv_tiles"] == LIMIT


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("kind", CACHE_KINDS, ids=str)
def test_every_cache_type(place, kind, dim):
    paged_problem(DECODE, dim=dim, kind=kind, seed=3).check(place)


@pytest.mark.few_on_cpu
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (8, 1), (16, 1), (32, 8), (64, 8)], ids=str)
@pytest.mark.parametrize("seqs", [1, 2, 5, 17, 40])
def test_clusters_of_every_size(place, heads, seqs):
    """8, 4 or 2 CTAs, or none: it depends on how many sequences and heads there are."""
    lengths = [((37 * i) % 400, 1) for i in range(1, seqs + 1)]
    paged_problem(lengths, heads=heads, kind=BLOCK_WISE_FP8, seed=seqs).check(place)


@pytest.mark.parametrize("window", [-1, 900])
@pytest.mark.parametrize(
    "seqs",
    [[(2047, 1)], [(2048, 1)], [(8191, 1)], [(3000, 2)], [(2500, 1), (0, 0), (70, 1)]],
    ids=str,
)
def test_twice_the_warps_of_4_bit_codes(place, seqs, window):
    # From 2049 keys on the CTAs of clusters of 8 have twice the warps.
    problem = paged_problem(
        seqs, heads=(8, 2), kind=BLOCK_WISE_INT4, dim=128, window_size=(window, -1), seed=4
    )
    problem.check(place)


@pytest.mark.parametrize("kind", [PLAIN, CacheKind("cache_fp8"), BLOCK_WISE_INT8], ids=str)
@pytest.mark.parametrize("new", [1, 2, 3, 8])
def test_speculative_seqs(place, kind, new):
    seqs = [(700, new), (70, 1), (0, new), (129, new - 1)]
    paged_problem(seqs, kind=kind, seed=new).check(place)


@pytest.mark.parametrize(
    "options",
    [
        {"window_size": (100, -1)},
        {"window_size": (0, 0)},
        {"causal": False, "window_size": (300, 5)},
        {"softcap": 1.3, "sinks": np.array([0.4, -3.0, 5.5, 0.0], np.float32)},
        {"mask_offsets": np.array([(3, 900), (9, 2), (0, 1), (150, 10**6)], np.int32)},
    ],
    ids=["window", "window_of_one", "window_both", "softcap_sinks", "mask_offsets"],
)
def test_masks_and_logit_options(place, options):
    paged_problem(DECODE, kind=BLOCK_WISE_FP8, **options).check(place)


@pytest.mark.parametrize("q_type", ["bfloat16", "e4m3:token_head"])
def test_e4m3_queries_and_output(place, q_type):
    scale = np.array([0.07], np.float32)
    paged_problem(DECODE, kind=BLOCK_WISE_FP8, q_type=q_type, out_scale=scale).check(place)


@pytest.mark.parametrize("kv_type", [None, "e4m3", "int8"])
def test_contiguous_keys(place, kv_type):
    seqs = [(1, 1000), (2, 64), (0, 7), (1, 0), (3, 333)]
    flash_problem(seqs, heads=(8, 2), dim=128, kv_type=kv_type, causal=True).check(place)


@pytest.mark.parametrize("kind", [PLAIN, BLOCK_WISE_FP8], ids=str)
def test_padding_and_resting_seqs(place, kind):
    seqs, spans = [(3, 1), (70, 0), (900, 1)], [2, 5, 1]
    paged_problem(seqs, kind=kind, spans=spans, padding=3).check(place)


@pytest.mark.parametrize("kind", [PLAIN, BLOCK_WISE_FP8], ids=str)
@pytest.mark.parametrize("bound", [1, 1024, LARGE])
def test_a_bound_of_the_lengths_is_no_limit(place, kind, bound):
    """The same bits at every run, and nearly the same with any bound."""
    problem = paged_problem(DECODE, kind=kind, heads=(8, 2), seed=5)
    expected, expected_lse = problem.check(place)
    first, again = (_with_bound(problem, place, bound) for _ in range(2))
    assert_same_bits(first[0], again[0], "out")
    assert_same_bits(first[1], again[1], "lse")
    values = first[0].astype(np.float32)
    np.testing.assert_allclose(values, expected.astype(np.float32), rtol=2**-6, atol=2**-9)
    np.testing.assert_allclose(first[1], expected_lse, atol=1e-4)


@pytest.mark.parametrize("bound", [1024, LARGE])
def test_a_nan_among_the_keys_reaches_its_seq_only(place, bound):
    problem = paged_problem(DECODE, kind=CacheKind("cache_fp8"), heads=(8, 2), seed=7)
    problem.poison("k", 0, 600, head=1)
    out, lse = _with_bound(problem, place, bound)
    assert np.isnan(lse[4:, 0]).all() and np.isnan(out.astype(np.float32)[0, 4:]).all()
    assert np.isfinite(lse[:4, 0]).all() and np.isfinite(out.astype(np.float32)[1:]).all()


# --- lengths that the host does not know ---------------------------------------------------------


def _sixty(longest: int) -> list[tuple[int, int]]:
    """60 sequences, one of them with `longest` keys."""
    seqs = [((37 * i) % 300, 1) for i in range(60)]
    seqs[41] = (longest - 1, 1)
    return seqs


@pytest.mark.few_on_cpu
@pytest.mark.parametrize("kind", CACHE_KINDS, ids=str)
@pytest.mark.parametrize("longest", [LIMIT - 1, LIMIT, LIMIT + 1, 3000])
def test_lengths_around_the_limit(place, kind, longest):
    problem = paged_problem(_sixty(longest), kind=kind, seed=longest)
    exact = problem.check(place)
    told = _with_bound(problem, place, LARGE)
    for got, want in zip(told, exact):
        np.testing.assert_allclose(
            got.astype(np.float32), want.astype(np.float32), rtol=2**-6, atol=2**-9
        )
    for got, again in zip(told, _with_bound(problem, place, LARGE)):
        assert_same_bits(got, again)


@pytest.mark.few_on_cpu
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("seqs", [1, 2, 5, 17, 40, 200, 300])
@pytest.mark.parametrize("longest", [200, 4500])
def test_sequences_without_tokens_among_others(place, dim, seqs, longest):
    """As in a captured step: fewer tokens than sequences, anywhere among them."""
    lengths = [(0, 0)] * seqs
    for i in range(seqs // 7, seqs, 7 + seqs // 8):
        lengths[i] = ((61 * i) % 190, 1)
    lengths[seqs // 7] = (longest - 1, 1)
    problem = paged_problem(lengths, dim=dim, heads=(8, 2), kind=BLOCK_WISE_FP8, seed=seqs)
    problem.check(place)
    for bound in (1, LARGE):
        out, lse = _with_bound(problem, place, bound)
        want, want_lse = problem.reference()
        np.testing.assert_allclose(out.astype(np.float32), want, rtol=2**-6, atol=2**-8)
        np.testing.assert_allclose(lse, want_lse, atol=1e-3)


@pytest.mark.few_on_cpu
@pytest.mark.parametrize("new", [2, 9, 40, 300])
@pytest.mark.parametrize("seqs, padding", [(2, 0), (5, 3), (60, 0), (600, 0)])
@pytest.mark.parametrize("kind, q_type", [(PLAIN, None), (BLOCK_WISE_FP8, "e4m3:token_head")])
def test_a_prefill_that_the_host_does_not_know_of(place, new, seqs, padding, kind, q_type):
    """The host was told of one new token a sequence: the longer ones take longer, no more."""
    lengths = [((29 * i) % 130, 1) for i in range(seqs)]
    lengths[seqs // 2] = (70, new)
    lengths[seqs - 1] = (0, 0)
    problem = paged_problem(lengths, kind=kind, q_type=q_type, seed=new, padding=padding)
    problem.max_seqlen_q = 1
    problem.check(place)
    positional, keywords = problem.arguments(place)
    positional[8] = LARGE
    out = to_numpy(F.paged_attention(*positional, **keywords)).astype(np.float32)
    np.testing.assert_allclose(out, problem.reference()[0], rtol=2**-6, atol=2**-8)


@pytest.mark.parametrize("bound", [1, LARGE])
def test_windows_make_keys_few(place, bound):
    """A window leaves few of many keys, whose number alone would ask for equal shares."""
    problem = paged_problem(_sixty(3000), kind=BLOCK_WISE_FP8, window_size=(90, -1), seed=9)
    problem.check(place)
    out, _ = _with_bound(problem, place, bound)
    np.testing.assert_allclose(
        out.astype(np.float32), problem.reference()[0], rtol=2**-6, atol=2**-8
    )
