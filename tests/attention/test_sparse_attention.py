"""sparse_paged_attention against its fp64 model, and this against the model of all keys."""

from __future__ import annotations

import dataclasses

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import reference
from fastattn.reference.sparse_attention import GRANULARITIES, selected_mask
from tests.support.attention import (
    BLOCK_WISE_FP8,
    BLOCK_WISE_INT4,
    BLOCK_WISE_MXFP4,
    CACHE_KINDS,
    FEW_KINDS,
    PLAIN,
    CacheKind,
    paged_problem,
)
from tests.support.bounds import assert_error_ratio
from tests.support.compare import assert_same_bits
from tests.support.sparse import sparse_problem
from tests.support.tensors import EMPTY_OUTPUTS, int32, skip_slices_on, to_numpy, to_paddle

#: (cached, new) tokens: prefill, chunks, decoding, drafts and a resting sequence in one step.
MIXED = [(0, 5), (1023, 1), (320, 3), (0, 0), (64, 1), (1, 9), (0, 1), (70, 4)]
SHORT = [(70, 3), (0, 4), (129, 1), (0, 0)]


# --- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_model_of_a_full_list_is_that_of_all_keys(kind, granularity):
    paged = paged_problem(SHORT, kind=kind, sinks=np.array([0.4, -3.0, 1.5, 0.0], np.float32))
    entries = -(-140 // granularity)
    problem = sparse_problem(
        SHORT, kind=kind, granularity=granularity, width=entries, sinks=paged.options["sinks"]
    )
    problem.selected_lens = None
    problem.selected[:] = np.random.default_rng(3).permutation(entries)
    for actual, exact in zip(problem.reference(), paged.reference()):
        np.testing.assert_allclose(actual, exact, rtol=1e-12, atol=1e-12)


def test_the_model_of_a_window_is_that_of_a_window():
    paged = paged_problem(SHORT, window_size=(16, -1))
    problem = sparse_problem(SHORT, window=17)
    problem.selected_lens = np.zeros_like(problem.selected_lens)
    for actual, exact in zip(problem.reference(), paged.reference()):
        np.testing.assert_allclose(actual, exact, rtol=1e-12, atol=1e-12)


def test_the_mask_of_a_query():
    seen = selected_mask(np.array([1, -1, 3, 9]), 13, 4, window=3, sink_tokens=2)
    assert np.flatnonzero(seen).tolist() == [0, 1, 4, 5, 6, 7, 11, 12, 13]
    assert len(seen) == 14


# --- the operator ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CACHE_KINDS, ids=str)
@pytest.mark.parametrize("granularity", [1, 16, 64])
def test_every_cache_type(place, kind, granularity):
    sparse_problem(MIXED, kind=kind, granularity=granularity, width=12, seed=1).check(place)


@pytest.mark.parametrize("kind", CACHE_KINDS, ids=str)
@pytest.mark.parametrize("granularity", [64, 128])
@pytest.mark.parametrize("dim", [64, 128, 192, 256])
def test_lists_of_whole_blocks(place, kind, granularity, dim):
    """On a GPU they are block tables of each KV head for the kernel of paged_attention."""
    sinks = np.array([0.4, -3.0, 1.5, 0.0], np.float32)
    for groups, options in ((1, {}), (2, {"sinks": sinks, "softcap": 1.3})):
        sparse_problem(
            MIXED, kind=kind, granularity=granularity, groups=groups, width=9, dim=dim, **options
        ).check(place)


@pytest.mark.parametrize("q_type", ["float16", "e4m3:tensor", "e4m3:token_head"])
@pytest.mark.parametrize("heads", [(6, 2), (32, 2), (71, 1)], ids=str)
def test_whole_blocks_of_many_heads(place, q_type, heads):
    for kind in (BLOCK_WISE_FP8, BLOCK_WISE_INT4):
        sparse_problem(
            SHORT, kind=kind, q_type=q_type, heads=heads, granularity=64, groups=heads[1]
        ).check(place)


def test_whole_blocks_of_more_tokens_than_a_launch_has(place):
    sparse_problem([(300, 900), (70, 1)], granularity=64, width=5).check(place)


@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_head_dimensions(place, kind, dim):
    for granularity in (4, 32):
        sparse_problem(SHORT, kind=kind, dim=dim, granularity=granularity, seed=dim).check(place)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("window, sink_tokens", [(0, 0), (1, 0), (0, 1), (37, 5), (100, 70)])
@pytest.mark.parametrize("kind", [PLAIN, BLOCK_WISE_FP8, BLOCK_WISE_INT4], ids=str)
def test_granularities_windows_and_groups(place, kind, granularity, groups, window, sink_tokens):
    sparse_problem(
        SHORT,
        kind=kind,
        granularity=granularity,
        groups=groups,
        window=window,
        sink_tokens=sink_tokens,
        seed=granularity,
    ).check(place)


@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
@pytest.mark.parametrize(
    "heads", [(1, 1), (3, 3), (5, 5), (6, 2), (10, 5), (8, 2), (32, 2), (33, 3), (71, 1)], ids=str
)
def test_query_head_groups(place, heads, kind):
    for groups, granularity in ((1, 16), (heads[1], 1)):
        problem = sparse_problem(
            SHORT, heads=heads, kind=kind, groups=groups, granularity=granularity, seed=heads[0]
        )
        problem.check(place)


@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_what_nobody_sees_may_be_nan(place, kind, granularity):
    seqs = [(400, 1), (129, 2), (0, 3)]
    problem = sparse_problem(
        seqs, kind=kind, granularity=granularity, groups=2, width=4, window=3, sink_tokens=2
    )
    assert problem.poison_unseen() > 0
    out, _ = problem.check(place)
    assert np.isfinite(out.astype(np.float64)).all()


@pytest.mark.parametrize("kind", [PLAIN, BLOCK_WISE_FP8, BLOCK_WISE_MXFP4], ids=str)
@pytest.mark.parametrize("letter", ["k", "v"])
def test_a_nan_that_a_query_sees(place, kind, letter):
    problem = sparse_problem([(200, 2)], kind=kind, granularity=16, width=2, window=1, lens=False)
    problem.selected[:] = [[[2, 5]], [[2, 6]]]
    problem.poison(letter, 0, 5 * 16 + 3)
    out, _ = problem.check(place)
    assert np.isnan(out[0].astype(np.float64)).any(-1).all()
    assert np.isfinite(out[1].astype(np.float64)).all()


OPTIONS = {
    "softcap": {"softcap": 1.3},
    "scale": {"softmax_scale": 0.31},
    "negative_scale": {"softmax_scale": -0.2},
    "sinks": {"sinks": np.array([0.4, -3.0, 5.5, 0.0], np.float32)},
    "codes": {"out_scale": np.array([0.021], np.float32)},
    "everything": {
        "sinks": np.array([0.4, -3.0, 2.5, 0.0], np.float32),
        "softcap": 2.0,
        "softmax_scale": 0.2,
        "out_scale": np.array([0.03], np.float32),
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("kind", [PLAIN, BLOCK_WISE_FP8], ids=str)
def test_logit_and_output_options(place, kind, options):
    sparse_problem(SHORT, kind=kind, granularity=4, sink_tokens=3, **options).check(place)


@pytest.mark.parametrize("q_type", ["float16", "float32", "e4m3:tensor", "e4m3:token_head"])
@pytest.mark.parametrize("kind", [kind for kind in FEW_KINDS if kind != PLAIN], ids=str)
def test_query_types(place, kind, q_type):
    sparse_problem(SHORT, kind=kind, q_type=q_type, granularity=16).check(place)


@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16"])
def test_types_of_the_output(place, out_dtype):
    problem = sparse_problem(SHORT, kind=BLOCK_WISE_FP8, q_type="e4m3:tensor", granularity=16)
    out, _ = problem.run(place, out_dtype=out_dtype)
    exact, naive = problem.reference()[0], problem.reference("bfloat16")[0]
    assert_error_ratio(out, exact, naive, out_dtype)


@pytest.mark.parametrize("kind", [BLOCK_WISE_INT4, CacheKind("cache_int8")], ids=str)
@pytest.mark.parametrize("sinks", [None, np.array([0.4, -3.0, 1.5, 0.0], np.float32)])
def test_transformed_keys(place, kind, sinks):
    rng = np.random.default_rng(4)
    center = rng.normal(0, 0.5, (2, 64)).astype(np.float32)
    problem = sparse_problem(
        SHORT, kind=kind, granularity=4, k_rotation="hadamard", k_center=center, sinks=sinks
    )
    problem.check(place)


def test_the_arguments_of_a_cache(place):
    """A cache as make_cache sets it up: written and attended with the same arguments."""
    rng = np.random.default_rng(5)
    key, value = (rng.normal(size=(150, 2, 64)).astype(np.float32) for _ in range(2))
    center = to_paddle(key.mean(0).astype(np.float32), place)
    target = paddle.CPUPlace() if place == "cpu" else paddle.CUDAPlace(0)
    cache = F.make_cache(4, 2, 64, "block_wise_int8", k_center=center, place=target)
    tables = int32([[2, 0, 3]], place)
    seqs = [int32(x, place) for x in ([0, 150], [0], [150])]
    k, v = (to_paddle(x.astype(np.float16), place) for x in (key, value))
    both = cache.key_cache, cache.value_cache
    F.write_cache_kv(k, v, *both, tables, *seqs, **cache.arguments)
    q = to_paddle(rng.normal(size=(1, 4, 64)).astype(np.float16), place)
    decode = [tables, *(int32(x, place) for x in ([0, 1], [149], [1])), 1, 150]
    sparse = F.sparse_paged_attention(
        q, *both, *decode, int32([[[0, 2, 1]]], place), granularity=64, **cache.arguments
    )
    dense = F.paged_attention(q, *both, *decode, **cache.arguments)
    np.testing.assert_allclose(to_numpy(sparse), to_numpy(dense), rtol=0.02, atol=0.005)


# --- lists ----------------------------------------------------------------------------------------


def test_a_key_counts_once(place):
    """Equal scores, V of key j is j: the output is the mean of the positions that are seen."""
    problem = sparse_problem([(99, 1)], heads=(1, 1), granularity=16, width=3, lens=False)
    problem.q[:] = 0
    keys = np.arange(100)
    at = problem.block_tables[0, keys // 64], slice(None), keys % 64
    problem.v.elements[at] = keys[:, None, None]
    for window, sink_tokens, entries in (
        (20, 20, [0, 5, 6]),
        (7, 0, [6, 5, -1]),
        (0, 3, [0, 1, 2]),
        (100, 100, [0, 3, 6]),
        (2**31 - 1, 2**31 - 1, [1, 2, 3]),
        (60, 90, [2, 3, 4]),
    ):
        problem.window, problem.sink_tokens = window, sink_tokens
        problem.selected[0, 0] = entries
        seen = selected_mask(np.array(entries), 99, 16, window=window, sink_tokens=sink_tokens)
        out, lse = problem.run(place)
        assert abs(float(out[0, 0, 9]) - keys[seen].mean()) < 0.26
        np.testing.assert_allclose(lse[0, 0], np.log(seen.sum()), rtol=1e-5)


def test_queries_that_see_nothing(place):
    problem = sparse_problem(SHORT, kind=BLOCK_WISE_FP8, granularity=64, width=3, lens=False)
    problem.options["sinks"] = np.array([0.4, -3.0, 5.5, 0.0], np.float32)
    problem.selected[:] = [-1, 2**31 - 1, 3]
    out, lse = problem.run(place)
    assert not out.astype(np.float32).any() and np.isneginf(lse).all()


def test_blocks_without_an_assignment(place):
    problem = sparse_problem([(300, 2)], kind=BLOCK_WISE_FP8, granularity=16, window=70)
    problem.block_tables[0, 4] = 2**30
    problem.block_tables[0, 2] = -1
    problem.check(place)


def test_tables_that_end_early(place):
    problem = sparse_problem([(300, 2)], kind=BLOCK_WISE_FP8, granularity=32, window=70)
    problem.block_tables = np.ascontiguousarray(problem.block_tables[:, :3])
    problem.check(place)


@pytest.mark.parametrize("granularity", [1, 64])
def test_lists_without_entries(place, granularity):
    problem = sparse_problem(SHORT, granularity=granularity, window=5, sink_tokens=2)
    problem.selected = problem.selected[:, :, :0]
    problem.check(place)


def test_padding_and_given_outputs(place):
    problem = sparse_problem(SHORT, kind=BLOCK_WISE_FP8, spans=[5, 6, 2, 1], padding=3)
    out, lse = problem.check(place)
    owned = problem.owned()
    assert not out[~owned].astype(np.float32).any() and np.isneginf(lse[:, ~owned]).all()
    given = to_paddle(np.full(out.shape, 7, out.dtype), place)
    kept, _ = problem.run(place, out=given)
    assert (kept[~owned].astype(np.float32) == 7).all()
    assert_same_bits(kept[owned], out[owned])


@pytest.mark.skipif(not EMPTY_OUTPUTS, reason="Paddle 2.6 refuses empty outputs")
@pytest.mark.parametrize("seqs", [[], [(0, 0), (70, 0)]])
def test_empty_steps(place, seqs):
    out, lse = sparse_problem(seqs, kind=BLOCK_WISE_FP8).run(place)
    assert out.shape == (0, 4, 64) and lse.shape == (4, 0)


def test_any_lengths_are_cut(place):
    problem = sparse_problem(SHORT, kind=BLOCK_WISE_FP8, window=9)
    out, lse = problem.run(place)
    problem.seq_lens_this_time = problem.seq_lens_this_time + 100
    keys = problem.seq_lens_decoder + np.diff(problem.cu_seqlens_q)
    other, other_lse = problem.run(place)
    assert keys.max() < 200 and np.isfinite(lse).any()
    assert_same_bits(other[:8], out[:8])
    assert_same_bits(other_lse[:, :8], lse[:, :8])


# --- bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", [1, 16])
@pytest.mark.parametrize("kind", [PLAIN, BLOCK_WISE_FP8], ids=str)
def test_bits_do_not_depend_on_the_batch(place, kind, granularity):
    problem = sparse_problem(
        [(400, 2), (129, 1), (70, 3)], kind=kind, granularity=granularity, window=3
    )
    out, lse = problem.run(place)
    for token, seq, position in problem.queries():
        alone = dataclasses.replace(
            problem,
            q=problem.q[[token]],
            block_tables=problem.block_tables[[seq]],
            cu_seqlens_q=np.array([0, 1], np.int32),
            seq_lens_decoder=np.array([position], np.int32),
            seq_lens_this_time=np.array([1], np.int32),
            selected=problem.selected[[token]],
            selected_lens=problem.selected_lens[[token]],
        )
        own, own_lse = alone.run(place)
        assert_same_bits(own[0], out[token], f"token {token}")
        assert_same_bits(own_lse[:, 0], lse[:, token], f"lse of token {token}")


def test_strided_lists(place):
    problem = sparse_problem(SHORT, kind=BLOCK_WISE_FP8, groups=2, granularity=4)
    out, lse = problem.run(place)
    positional, keywords = problem.arguments(place)
    swapped = int32(np.ascontiguousarray(problem.selected.transpose(1, 0, 2)), place)
    lists = swapped.transpose([1, 0, 2])
    got = F.sparse_paged_attention(
        *positional,
        lists,
        selected_lens=int32(problem.selected_lens, place),
        return_softmax_lse=True,
        **problem.lists(),
        **keywords,
    )
    assert_same_bits(to_numpy(got[0]), out)
    assert_same_bits(to_numpy(got[1]), lse)


@pytest.mark.parametrize("kind", [PLAIN, BLOCK_WISE_FP8, BLOCK_WISE_INT4], ids=str)
@pytest.mark.parametrize("granularity", [1, 64])
def test_views_of_a_pool_and_of_projections(place, kind, granularity):
    """K and V are halves of one pool, with their heads in another order; Q is part of a tensor."""
    skip_slices_on(place)
    problem = sparse_problem(SHORT, kind=kind, granularity=granularity, window=5)
    out, lse = problem.run(place)
    positional, keywords = problem.arguments(place)
    wide = np.zeros((len(problem.q), 7, 64), problem.q.dtype)
    wide[:, 2:6] = problem.q
    positional[0] = to_paddle(wide, place)[:, 2:6]
    for i, stored in ((1, problem.k.packed()), (2, problem.v.packed())):
        pool = np.zeros((stored.shape[1], len(stored), 2, *stored.shape[2:]), stored.dtype)
        pool[:, :, i - 1] = stored.swapaxes(0, 1)
        positional[i] = to_paddle(pool, place)[:, :, i - 1].transpose([1, 0, 2, 3])
        assert not positional[i].is_contiguous()
    got = F.sparse_paged_attention(
        *positional,
        int32(problem.selected, place),
        selected_lens=int32(problem.selected_lens, place),
        return_softmax_lse=True,
        **problem.lists(),
        **keywords,
    )
    assert_same_bits(to_numpy(got[0]), out)
    assert_same_bits(to_numpy(got[1]), lse)


# --- the comparison -------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", [1, 16])
@pytest.mark.parametrize(
    "change", ["another entry", "a longer list", "one key more", "unread scales"]
)
def test_the_comparison_sees_a_wrong_list(change, granularity):
    problem = sparse_problem(
        [(400, 1), (300, 1)], kind=BLOCK_WISE_FP8, granularity=granularity, window=2, lens=False
    )
    problem.selected_lens = np.full((2, 1), 20, np.int32)
    other = dataclasses.replace(problem, selected=problem.selected.copy())
    if change == "another entry":
        unused = np.setdiff1d(np.arange(300 // granularity), other.selected[0, 0, :20])
        at = np.argmax((other.selected[0, 0, :20] >= 0) & (other.selected[0, 0, :20] < 18))
        other.selected[0, 0, at] = unused[0] if len(unused) else -1
    elif change == "a longer list":
        other.selected_lens = problem.selected_lens + 15
    elif change == "one key more":
        other.window = 3
    else:
        scales = problem.v.scales * np.float32(1.01)
        other.v = dataclasses.replace(problem.v, scales=scales)
    problem.check("cpu")
    with pytest.raises(AssertionError, match=r"out|lse"):
        problem.check("cpu", results=other.run("cpu"))


def test_the_model_is_exported():
    assert "sparse_paged_attention" in reference.__all__ and "sparse_paged_attention" in F.__all__
