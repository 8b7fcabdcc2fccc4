"""Faults of other attention kernels, by the numbers of docs/faults.md: the smallest inputs."""

from __future__ import annotations

import numpy as np
import pytest

import fastattn.functional as F
from tests.support.attention import CACHE_KINDS, FEW_KINDS, PLAIN, flash_problem, paged_problem
from tests.support.bounds import rounding_step
from tests.support.compare import assert_same_bits
from tests.support.tensors import int32, to_numpy, to_paddle


def positions_problem(queries: int, keys: int, **options):
    """Equal scores, V of key j is j: the output is the mean of the visible positions.

    fp16 holds these integers and half-integers up to 1024 exactly.
    """
    problem = flash_problem([(queries, keys)], heads=(1, 1), q_type="float16", **options)
    problem.q[:] = 0
    problem.k[:] = 0
    problem.v[:] = np.arange(keys)[:, None, None]
    return problem


@pytest.mark.parametrize(
    ("queries", "keys"),
    [(65, 129), (64, 128), (256, 320), (200, 264), (100, 164), (130, 193), (1000, 1064), (2, 128)],
)
def test_bug02_a_causal_mask_at_an_unaligned_offset_hides_the_future(place, queries, keys):
    # A kernel that masks only its right-most key tile lets early queries see up to 126 more keys.
    out, _ = positions_problem(queries, keys, causal=True).run(place)
    means = (np.arange(queries) + keys - queries) / 2
    if (queries, keys) == (65, 129):
        assert float(out[0, 0, 0]) == 32.0
    error = np.abs(out.astype(np.float64) - means[:, None, None])
    assert error.max() <= (0 if place == "cpu" else 0.25)


@pytest.mark.parametrize(("queries", "keys"), [(128, 64), (300, 64), (129, 1), (5, 0)])
def test_bug03_a_query_without_keys_gives_0_and_minus_infinity(place, queries, keys):
    # 0 * (1 / 0) is NaN in an epilogue without a guard.
    out, lse = flash_problem([(queries, keys)], causal=True).check(place)
    empty = queries - keys
    assert not out[:empty].any()
    assert np.isneginf(lse[:, :empty]).all()
    assert np.isfinite(lse[:, empty:]).all()


def test_bug04_a_masked_query_is_not_an_average_of_v(place):
    # A large finite number in place of -inf makes equal weights of keys that are all masked.
    problem = flash_problem([(2, 128)], mask_offsets=np.array([[0, 0], [0, 128]], np.int32))
    problem.v[:] = 7
    out, lse = problem.check(place)
    assert not out[0].any()
    assert np.isneginf(lse[:, 0]).all()
    np.testing.assert_allclose(out[1].astype(np.float32), 7.0)


@pytest.mark.parametrize("lengths", [(65, 64), (1, 64), (63, 1), (64, 130)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_bug05_nan_in_the_next_sequence_does_not_leak(place, lengths, causal):
    # A tile reaches past the end of its sequence; a probability of 0 times NaN is NaN.
    problem = flash_problem([(n, n) for n in lengths], causal=causal)
    clean, clean_lse = problem.run(place)
    problem.k[lengths[0] :] = np.nan
    problem.v[lengths[0] :] = np.nan
    out, lse = problem.run(place)
    assert_same_bits(out[: lengths[0]], clean[: lengths[0]], "first sequence")
    assert_same_bits(lse[:, : lengths[0]], clean_lse[:, : lengths[0]], "its LSE")
    assert np.isnan(out[lengths[0] :].astype(np.float32)).all()


def test_bug14_the_start_of_a_mask_range_is_used(place):
    out, _ = positions_problem(1, 128, mask_offsets=np.array([[32, 64]], np.int32)).run(place)
    assert (out.astype(np.float64) == 47.5).all()


@pytest.mark.parametrize("ends", [(200, 100), (100, 200), (300, 0), (1, 300)], ids=str)
def test_bug14_mask_ends_need_not_grow(place, ends):
    # The number of key tiles may not come from the last query of a tile alone.
    offsets = np.array([[0, end] for end in ends], np.int32)
    out, _ = positions_problem(2, 300, mask_offsets=offsets).run(place)
    means = [max(end - 1, 0) / 2 for end in ends]
    np.testing.assert_array_equal(out[:, 0, 0].astype(np.float64), means)


@pytest.mark.parametrize("queries", [1, 127, 129])
def test_bug14_a_mask_is_not_read_past_its_end(place, queries):
    # The mask lies at the end of a larger tensor whose later entries would change the result.
    problem = flash_problem([(queries, 200)])
    offsets = np.stack([np.arange(queries) % 7, np.arange(queries) % 150 + 20], axis=1)
    problem.options["mask_offsets"] = offsets.astype(np.int32)
    expected, _ = problem.check(place)
    guarded = np.full((queries + 128, 2), 2**30, np.int32)
    guarded[:queries] = offsets
    positional, keywords = problem.arguments(place)
    keywords["mask_offsets"] = to_paddle(guarded, place)[:queries]
    assert_same_bits(to_numpy(F.flash_attention(*positional, **keywords)), expected, "out")


@pytest.mark.parametrize("kind", [PLAIN, CACHE_KINDS[1]], ids=str)
@pytest.mark.parametrize("keys", [257, 514, 1285, 4097, 8191])
def test_bug16_partial_results_of_splits_keep_their_precision(place, kind, keys):
    # Sums such as 257 do not exist in bf16: partial sums stored so would make 1 something else.
    problem = paged_problem([(keys - 1, 1)], kind=kind, heads=(2, 1))
    problem.q[:] = 0
    problem.v.elements[:] = 1
    out, lse = problem.run(place)
    step = rounding_step(1.0, kind.dtype)
    assert np.abs(out.astype(np.float64) - 1).max() <= step
    np.testing.assert_allclose(lse, np.log(keys), atol=1e-4)


@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
def test_bug18_three_query_heads_a_kv_head(place, kind):
    paged_problem([(70, 3), (0, 65), (5, 1)], heads=(24, 8), kind=kind).check(place)


def test_bug18_three_query_heads_a_kv_head_on_contiguous_tensors(place):
    flash_problem([(3, 70), (65, 65)], heads=(24, 8), causal=True).check(place)


@pytest.mark.parametrize("kind", CACHE_KINDS, ids=str)
def test_bug22_results_are_the_same_bits_every_time(place, kind):
    # Long sequences, which are split and merged, next to short ones.
    problem = paged_problem([(4500, 1), (3, 1), (700, 2), (64, 66)], heads=(2, 1), kind=kind)
    positional, keywords = problem.arguments(place)
    runs = [F.paged_attention(*positional, return_softmax_lse=True, **keywords) for _ in range(4)]
    for out, lse in runs[1:]:
        assert_same_bits(to_numpy(out), to_numpy(runs[0][0]), "out")
        assert_same_bits(to_numpy(lse), to_numpy(runs[0][1]), "lse")


@pytest.mark.parametrize("kind", [CACHE_KINDS[2], CACHE_KINDS[-1]], ids=str)
def test_bug22_a_seq_gives_the_same_bits_whatever_physical_blocks_hold_it(place, kind):
    problem = paged_problem([(500, 3), (64, 2)], kind=kind)
    expected, expected_lse = problem.run(place)
    order = np.random.default_rng(5).permutation(problem.k.elements.shape[0])
    used = (problem.block_tables >= 0) & (problem.block_tables < len(order))
    where = np.argsort(order)
    for stored in (problem.k, problem.v):
        stored.elements = stored.elements[order]
        if kind.dynamic:
            stored.scales = stored.scales[order]
    problem.block_tables = problem.block_tables.copy()
    problem.block_tables[used] = where[problem.block_tables[used]]
    out, lse = problem.run(place)
    assert_same_bits(out, expected, "out")
    assert_same_bits(lse, expected_lse, "lse")


def test_dead_seqs_of_a_captured_batch_are_harmless(place):
    # A fixed batch with resting sequences whose table entries are stale.
    problem = paged_problem([(70, 1), (0, 0), (130, 1), (0, 0)])
    problem.block_tables[[1, 3]] = 2**31 - 1
    problem.seq_lens_decoder[[1, 3]] = [900, -3]
    out, _ = problem.check(place)
    positional, keywords = problem.arguments(place)
    positional[3] = int32(problem.block_tables, place)
    assert_same_bits(to_numpy(F.paged_attention(*positional, **keywords)), out, "out")


@pytest.mark.parametrize("new", [3, 100])
@pytest.mark.parametrize("window", [(2**29, -1), (2**31 - 1, 2**31 - 1), (2**31 + 5, 0)], ids=str)
def test_a_window_longer_than_any_seq_is_no_window(place, window, new):
    # Lengths that are too large to be true are cut: the window must not move with the cut.
    results = []
    for size in (window, (-1, -1 if window[1] else 0)):
        problem = paged_problem([(70, new), (200, new)], heads=(2, 1), window_size=size)
        problem.seq_lens_decoder[1] = 2**31 - 1
        results.append(problem.run(place))
    for actual, expected in zip(*results):
        assert_same_bits(actual, expected, str(window))
