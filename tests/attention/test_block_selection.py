"""update_block_summaries and select_key_blocks against their model, and the model against fp64."""

from __future__ import annotations

import dataclasses

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import reference
from fastattn.reference.attention import gather_seq
from fastattn.reference.block_selection import GRANULARITIES, KINDS, block_score, summarise
from tests.support.attention import BLOCK_WISE_FP8, CACHE_KINDS, FEW_KINDS, CacheKind
from tests.support.compare import assert_same_bits
from tests.support.selection import selection_problem
from tests.support.sparse import sparse_problem
from tests.support.tensors import int32, to_numpy, to_paddle

#: (cached, new) tokens: prefill, chunks, decoding, drafts and a resting sequence in one step.
MIXED = [(0, 5), (1023, 1), (320, 3), (0, 0), (64, 1), (1, 9), (0, 1), (70, 40), (127, 2)]
LONG = [(700, 3), (0, 4), (129, 1), (0, 0), (410, 2)]


# --- the model ------------------------------------------------------------------------------------


def test_the_model_of_a_summary():
    rng = np.random.default_rng(0)
    keys = rng.normal(0.4, 1.0, (13, 64)).astype(np.float32)
    weights = rng.normal(0.3, 1.0, (13, 64)).astype(np.float32)
    exact = keys.astype(np.float64)
    np.testing.assert_allclose(summarise(keys, "mean")[0], exact.mean(0), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(summarise(keys, "minmax"), [keys.min(0), keys.max(0)])
    pooled = summarise(keys, "pooled", weights)[0]
    np.testing.assert_allclose(pooled, (exact * weights).sum(0), rtol=0, atol=2e-6)
    # A weight of 1 / n is the mean, as far as it is rounded.
    same = summarise(keys, "pooled", np.full((13, 64), 1 / 13, np.float32))
    np.testing.assert_allclose(same, summarise(keys, "mean"), rtol=0, atol=1e-6)


def test_the_model_of_a_score():
    rng = np.random.default_rng(1)
    q = rng.normal(size=(3, 96)).astype(np.float32)
    keys = rng.normal(size=(16, 96)).astype(np.float32)
    mean = summarise(keys, "mean")
    np.testing.assert_allclose(block_score(q, mean), q.astype(np.float64) @ mean[0], atol=1e-5)
    bound = block_score(q, summarise(keys, "minmax"))
    assert (bound > (q.astype(np.float64) @ keys.T).max(-1)).all()
    # Of one key, the bound is the inner product itself.
    one = block_score(q, summarise(keys[:1], "minmax"))
    np.testing.assert_allclose(one, q.astype(np.float64) @ keys[0], atol=1e-5)


@pytest.mark.parametrize("reduction", ["max", "sum"])
def test_the_model_of_a_list(reduction):
    """By hand: the scores of whole blocks of 16 keys, in fp64, and a sort."""
    problem = selection_problem([(333, 1)], granularity=16, heads=(6, 2))
    k, _, _ = gather_seq(problem.k.packed(), problem.v.packed(), problem.block_tables[0], 334)
    found = problem.model_of_select(
        problem.model_of_update(problem.start(), problem.all_tokens()),
        7,
        reduction=reduction,
        first_blocks=2,
        last_blocks=3,
    )
    for head in range(2):
        means = k[: 20 * 16, head].reshape(20, 16, 64).mean(1)
        scores = problem.q[0, 3 * head : 3 * head + 3].astype(np.float64) @ means.T
        scores = scores.max(0) if reduction == "max" else scores.sum(0)
        best = 2 + np.argsort(-scores[2:18])[:2]
        assert found[0, head].tolist() == sorted({0, 1, *best.tolist(), 18, 19, 20})


# --- summaries ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CACHE_KINDS, ids=str)
@pytest.mark.parametrize("summary", KINDS)
def test_summaries_of_every_cache_type(place, kind, summary):
    for granularity in (16, 128):
        problem = selection_problem(MIXED, kind=kind, granularity=granularity, summary=summary)
        start = problem.whole(place)
        assert_same_bits(problem.update(start, place), problem.model_of_update(start), "summaries")


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("summary", KINDS)
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_only_summaries_with_new_tokens_are_written(place, granularity, summary, stored):
    problem = selection_problem(MIXED, granularity=granularity, summary=summary, stored=stored)
    start = problem.start()
    found = problem.update(start, place)
    assert_same_bits(found, problem.model_of_update(start), "summaries")
    size = min(granularity, 64)
    written = np.zeros(found.shape[:3], bool)
    for table, cached, new in zip(
        problem.block_tables, problem.seq_lens_decoder, problem.seq_lens_this_time
    ):
        for position in range(cached, cached + new):
            written[table[position // 64], :, position % 64 // size] = True
    assert np.isfinite(found[written].astype(np.float32)).all()
    assert np.isnan(found[~written].astype(np.float32)).all()


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
def test_summaries_of_head_dimensions(place, dim, kind):
    problem = selection_problem(LONG, dim=dim, kind=kind, granularity=32, summary="minmax")
    start = problem.start()
    assert_same_bits(problem.update(start, place), problem.model_of_update(start), "summaries")


@pytest.mark.parametrize("summary", KINDS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_bits_do_not_depend_on_the_cut(place, summary, granularity):
    """The same keys in one step, and in steps of random sizes."""
    seqs = [(0, 300), (0, 131), (0, 64)]
    problem = selection_problem(
        seqs, kind=BLOCK_WISE_FP8, granularity=granularity, summary=summary, stored="bfloat16"
    )
    whole, cut = problem.whole(place), problem.start()
    rng = np.random.default_rng(5)
    done, ends = np.zeros(3, np.int32), np.array([300, 131, 64])
    while (done < ends).any():
        new = np.minimum(rng.integers(0, 41, 3), ends - done).astype(np.int32)
        starts = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
        cut = problem.update(cut, place, seqs=[problem.block_tables, starts, done, new])
        done = done + new
    assert_same_bits(cut, whole, "summaries")


def test_rejected_drafts_leave_nothing(place):
    problem = selection_problem([(60, 10)], granularity=16, summary="minmax")
    drafts = problem.update(problem.whole(place), place)
    # Three of the ten were right; the next step writes others over the rest.
    block, row = problem.slot(0, 64)
    problem.k.elements[block, :, row:] *= np.float32(0.25).astype(problem.k.elements.dtype)
    problem.seq_lens_decoder[:] = 63
    problem.seq_lens_this_time[:] = 2
    problem.cu_seqlens_q[1] = 2
    fresh = problem.update(problem.start(), place, seqs=problem.all_tokens())
    found = problem.update(drafts, place)
    for position in (48, 64):
        block, row = problem.slot(0, position)
        np.testing.assert_array_equal(found[block, :, row // 16], fresh[block, :, row // 16])
    assert not np.array_equal(found[block, :, 0], drafts[block, :, 0])


def test_summaries_are_of_keys_before_rotation(place):
    rng = np.random.default_rng(4)
    center = rng.normal(0, 2.0, (2, 64)).astype(np.float32)
    for kind in (CacheKind("block_wise_int8"), CacheKind("block_wise_int4")):
        problem = selection_problem(
            LONG, kind=kind, granularity=16, k_rotation="hadamard", k_center=center
        )
        start = problem.start()
        found = problem.update(start, place)
        assert_same_bits(found, problem.model_of_update(start), "summaries")
        plain = dataclasses.replace(problem, options={})
        assert not np.array_equal(plain.update(start, place), found, equal_nan=True)


def test_the_arguments_of_a_cache(place):
    """The writer and this call take the same arguments of make_cache; the mean is that of K."""
    rng = np.random.default_rng(6)
    key = rng.normal(0.5, 1.0, (100, 2, 64)).astype(np.float32)
    center = to_paddle(key.mean(0), place)
    target = paddle.CPUPlace() if place == "cpu" else paddle.CUDAPlace(0)
    cache = F.make_cache(3, 2, 64, "block_wise_int8", k_center=center, place=target)
    step = [int32(x, place) for x in ([[2, 0]], [0, 100], [0], [100])]
    tensors = cache.key_cache, cache.value_cache
    k = to_paddle(key, place)
    F.write_cache_kv(k, k, *tensors, *step, **cache.arguments)
    summaries = to_paddle(np.zeros((3, 2, 1, 1, 64), np.float32), place)
    F.update_block_summaries(summaries, *tensors, *step, granularity=64, **cache.arguments)
    found = to_numpy(summaries)
    for block, keys in ((2, key[:64]), (0, key[64:])):
        np.testing.assert_allclose(found[block, :, 0, 0], keys.mean(0), atol=4e-3)


@pytest.mark.parametrize("summary", KINDS)
def test_a_nan_stays_in_its_channel(place, summary):
    problem = selection_problem([(100, 3)], granularity=16, summary=summary)
    block, row = problem.slot(0, 97)
    problem.k.elements[block, 1, row, 5] = np.nan
    start = problem.start()
    found = problem.update(start, place)
    assert_same_bits(found, problem.model_of_update(start), "summaries")
    mine = found[block, :, row // 16]
    nan = np.isnan(mine)
    assert nan[1, :, 5].all() and nan.sum() == mine.shape[1]


def test_unassigned_blocks_and_lengths_out_of_range(place):
    problem = selection_problem([(100, 30), (64, 2), (5, 5)], granularity=16)
    problem.block_tables[0, 1] = -1
    problem.block_tables[1, 1] = 10**6
    problem.seq_lens_decoder[2] = 2**31 - 5
    start = problem.start()
    found = problem.update(start, place)
    assert_same_bits(found, problem.model_of_update(start), "summaries")
    assert np.isfinite(found.astype(np.float32)).any()
    problem.cu_seqlens_q[:] = [-3, 2**31 - 1, 1, -7]
    assert_same_bits(problem.update(start, place), problem.model_of_update(start), "summaries")


# --- lists ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("summary", KINDS)
@pytest.mark.parametrize("reduction", ["max", "sum"])
@pytest.mark.parametrize("first, last", [(0, 1), (1, 2), (3, 1)])
def test_lists(place, granularity, summary, reduction, first, last):
    problem = selection_problem(LONG, granularity=granularity, summary=summary, heads=(6, 2))
    summaries = problem.whole(place)
    options = {"reduction": reduction, "first_blocks": first, "last_blocks": last}
    for k in (first + last, 4, 9, 60):
        found = problem.select(summaries, k, **options, place=place)
        np.testing.assert_array_equal(found, problem.model_of_select(summaries, k, **options))


@pytest.mark.parametrize("q_type", ["float32", "float16", "e4m3:tensor", "e4m3:token_head"])
@pytest.mark.parametrize("heads", [(1, 1), (5, 5), (10, 5), (33, 3)], ids=str)
def test_queries_and_heads(place, q_type, heads):
    problem = selection_problem(
        LONG, granularity=16, kind=BLOCK_WISE_FP8, q_type=q_type, heads=heads, stored="bfloat16"
    )
    summaries = problem.whole(place)
    for reduction in ("max", "sum"):
        found = problem.select(summaries, 5, reduction=reduction, place=place)
        np.testing.assert_array_equal(
            found, problem.model_of_select(summaries, 5, reduction=reduction)
        )


def test_descales_of_sequences(place):
    problem = selection_problem(LONG, granularity=16, kind=BLOCK_WISE_FP8, q_type="e4m3:tensor")
    summaries = problem.whole(place)
    rng = np.random.default_rng(9)
    problem.q_descale = rng.uniform(0.01, 1.0, (len(LONG), 2)).astype(np.float32)
    found = problem.select(summaries, 5, place=place)
    np.testing.assert_array_equal(found, problem.model_of_select(summaries, 5))


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_head_dimensions(place, dim):
    problem = selection_problem(LONG, granularity=16, dim=dim, summary="minmax")
    summaries = problem.whole(place)
    found = problem.select(summaries, 6, first_blocks=1, place=place)
    np.testing.assert_array_equal(found, problem.model_of_select(summaries, 6, first_blocks=1))


def test_a_list_is_what_attention_takes(place):
    """All keys in the list: attention of chosen keys is attention of all."""
    problem = selection_problem([(300, 4), (0, 9)], granularity=16)
    lists = problem.select(problem.whole(place), 20, place=place)
    positional, keywords = problem.arguments(place)
    sparse = F.sparse_paged_attention(*positional, int32(lists, place), granularity=16, **keywords)
    dense = F.paged_attention(*positional, **keywords)
    np.testing.assert_allclose(
        to_numpy(sparse).astype(np.float32), to_numpy(dense).astype(np.float32), atol=0.02
    )


def test_a_list_has_what_attention_needs(place):
    """Chosen by the bound, a key that dominates is always seen; the model of the mask says so."""
    problem = selection_problem([(500, 1)], granularity=16, summary="minmax", heads=(2, 2))
    block, row = problem.slot(0, 237)
    problem.k.elements[block, :, row] = 8 * problem.q[0]
    lists = problem.select(problem.whole(place), 2, place=place)
    assert (lists == [[[237 // 16, 500 // 16]] * 2]).all()
    mask = sparse_problem([(500, 1)], granularity=16, groups=2)
    mask.selected, mask.selected_lens = lists, None
    assert mask.seen(0, 1, 500)[237]


def test_ties_take_the_smaller_index(place):
    problem = selection_problem([(200, 1)], granularity=16)
    summaries = np.zeros_like(problem.whole(place))
    assert problem.select(summaries, 5, first_blocks=1, place=place)[0, 0].tolist() == [
        0,
        1,
        2,
        3,
        12,
    ]
    summaries[:] = -0.0
    assert problem.select(summaries, 5, place=place)[0, 0].tolist() == [0, 1, 2, 3, 12]


def test_nan_and_unassigned_blocks_come_last(place):
    problem = selection_problem([(200, 1)], granularity=16, heads=(1, 1))
    summaries = problem.whole(place)
    block, row = problem.slot(0, 32)
    summaries[block, 0, row // 16] = np.nan
    problem.block_tables[0, 1] = -1  # key blocks 4 to 7
    found = problem.select(summaries, 12, place=place)
    np.testing.assert_array_equal(found, problem.model_of_select(summaries, 12))
    assert found[0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12]
    found = problem.select(summaries, 8, place=place)[0, 0].tolist()
    assert found == [0, 1, 3, 8, 9, 10, 11, 12]


def test_half_of_a_block_of_128_tokens(place):
    problem = selection_problem([(1000, 1)], granularity=128, summary="minmax")
    summaries = problem.whole(place)
    problem.block_tables[0, [2, 5, 6, 7]] = -1
    found = problem.select(summaries, 4, place=place)
    np.testing.assert_array_equal(found, problem.model_of_select(summaries, 4))
    assert 3 not in found


@pytest.mark.parametrize("granularity", [16, 128])
def test_a_list_does_not_depend_on_later_tokens(place, granularity):
    """Prefill in one step gives the lists of a token at a time."""
    problem = selection_problem([(0, 300)], granularity=granularity, summary="minmax")
    at_once = problem.select(problem.whole(place), 3, place=place)
    summaries, q = problem.start(), problem.q
    for position in range(300):
        one = dataclasses.replace(
            problem,
            q=q[position : position + 1],
            cu_seqlens_q=np.array([0, 1], np.int32),
            seq_lens_decoder=np.array([position], np.int32),
            seq_lens_this_time=np.array([1], np.int32),
        )
        summaries = one.update(summaries, place)
        if position % 7 == 0:
            np.testing.assert_array_equal(
                one.select(summaries, 3, place=place)[0], at_once[position]
            )


def test_padding_and_resting_sequences(place):
    problem = selection_problem(
        [(100, 2), (0, 0), (30, 1)], granularity=16, spans=[4, 0, 2], padding=3
    )
    summaries = problem.whole(place)
    found = problem.select(summaries, 4, place=place)
    np.testing.assert_array_equal(found, problem.model_of_select(summaries, 4))
    assert (found[[2, 3, 5, 6, 7, 8]] == -1).all()
    assert (found[4] == [0, 1, -1, -1]).all()


def test_lengths_out_of_range(place):
    problem = selection_problem([(100, 2), (64, 2)], granularity=16)
    summaries = problem.whole(place)
    problem.seq_lens_decoder[:] = [2**31 - 1, -5]
    found = problem.select(summaries, 4, place=place)
    assert ((found >= -1) & (found < 2**27)).all()
    assert (found[2] == [0, -1, -1, -1]).all()


def test_no_tokens_and_no_blocks(place):
    problem = selection_problem([(0, 0)], granularity=16)
    assert problem.select(problem.start(), 4, place=place).shape == (0, 2, 4)
    assert np.isnan(problem.update(problem.start(), place)).all()


def test_a_wrong_summary_is_found(place):
    """The comparison can fail."""
    problem = selection_problem(LONG, granularity=16)
    summaries = problem.whole(place)
    wrong = summaries[:, ::-1].copy()
    assert not np.array_equal(
        problem.select(wrong, 5, place=place), problem.model_of_select(summaries, 5)
    )


def test_operators_are_in_the_reference():
    assert {"select_key_blocks", "update_block_summaries"} <= set(reference.__all__)
