"""paged_attention against the fp64 model, over every way of storing a cache."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fastattn.functional as F
from tests.support.attention import (
    BLOCK_WISE_FP8,
    BLOCK_WISE_INT8,
    CACHE_KINDS,
    FEW_KINDS,
    PLAIN,
    CacheKind,
    paged_problem,
)
from tests.support.bounds import assert_error_ratio
from tests.support.compare import assert_same_bits
from tests.support.tensors import EMPTY_OUTPUTS, int32, skip_slices_on, to_numpy, to_paddle

RNG = np.random.default_rng

#: (cached, new) tokens: prefill, chunked prefill, decode and resting sequences in one step.
MIXED = [(0, 65), (1023, 1), (320, 63), (0, 0), (64, 1), (1, 64), (0, 1), (70, 5)]
SHORT = [(70, 5), (0, 66), (129, 1), (0, 0)]
QUANTISED = [kind for kind in FEW_KINDS if kind.quant_type != "none"]


@pytest.mark.parametrize("kind", CACHE_KINDS, ids=str)
def test_every_cache_type(place, kind):
    paged_problem(MIXED, dim=64, kind=kind, seed=1).check(place)


@pytest.mark.parametrize(
    "kind", [kind for kind in CACHE_KINDS if kind.scale_dtype == "float32"], ids=str
)
def test_every_cache_type_with_head_dim_128(place, kind):
    paged_problem(MIXED, dim=128, kind=kind, heads=(2, 2), seed=2).check(place)


@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (5, 5), (6, 2), (8, 2), (16, 2), (71, 1)], ids=str)
def test_query_head_groups(place, heads, kind):
    paged_problem(SHORT, heads=heads, kind=kind, seed=heads[0]).check(place)


@pytest.mark.parametrize("prefix", [0, 1, 64, 320, 1023])
@pytest.mark.parametrize("kind", [PLAIN, BLOCK_WISE_FP8], ids=str)
def test_prefix_lengths(place, prefix, kind):
    seqs = [(prefix, n) for n in (1, 2, 63, 64, 65, 130, 0)]
    paged_problem(seqs, kind=kind, heads=(2, 1), seed=prefix).check(place)


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("kind", [PLAIN, BLOCK_WISE_FP8], ids=str)
def test_seqs_of_every_length_in_one_batch(place, kind, dim):
    seqs = [(0, n) for n in (65, 1000, 0, 63, 1, 64)]
    paged_problem(seqs, kind=kind, heads=(2, 1), dim=dim).check(place)


@pytest.mark.parametrize("kind", [PLAIN, BLOCK_WISE_INT8], ids=str)
def test_a_long_prompt(place, kind):
    paged_problem([(0, 1000), (24, 1000)], heads=(2, 1), dim=128, kind=kind).check(place)


@pytest.mark.parametrize("kind", [PLAIN, BLOCK_WISE_FP8], ids=str)
def test_more_seqs_than_one_launch_takes(place, kind):
    """Sequences of none, one, a few and many new tokens, most of them short and some long."""
    seqs = [
        ((17 * i) % 131 + (3000 if i % 239 == 5 else 0), (1, 0, 1, 3)[i % 4]) for i in range(700)
    ]
    paged_problem(seqs, kind=kind).check(place)


def test_host_threads_may_call_at_once(place):
    """Steps of very different batch sizes, each from a thread of its own."""
    problems = [
        paged_problem([(70, 1)] * count, kind=BLOCK_WISE_FP8, seed=count) for count in (1, 40, 300)
    ]
    expected = [problem.run(place) for problem in problems]

    def repeat(i: int) -> None:
        for _ in range(5):
            out, lse = problems[i].run(place)
            assert_same_bits(out, expected[i][0], f"{i}: out")
            assert_same_bits(lse, expected[i][1], f"{i}: lse")

    with ThreadPoolExecutor(len(problems)) as pool:
        list(pool.map(repeat, range(len(problems))))


def test_mask_offsets_of_any_value(place):
    """Ends before the first key, and starts behind the last one, hide every key."""
    offsets = np.array([[0, -(2**31)], [2**31 - 1, 2**31 - 1], [-(2**31), 2**31 - 1]], np.int32)
    for new in (3, 30):
        mask = np.tile(offsets, (new // 3, 1))
        problem = paged_problem([(300, new)], kind=BLOCK_WISE_FP8, mask_offsets=mask)
        _, lse = problem.check(place)
        assert np.isneginf(lse[:, 0::3]).all() and np.isneginf(lse[:, 1::3]).all()
        assert np.isfinite(lse[:, 2::3]).all()


def test_short_and_long_seqs_in_one_call(place):
    """On a GPU, sequences that decode and sequences of many tokens are different launches."""
    seqs = [(500, 1), (64, 100), (0, 1), (0, 0), (63, 17), (1000, 2), (0, 300), (129, 9)]
    for heads in ((8, 1), (6, 2), (2, 2)):
        paged_problem(seqs, heads=heads, kind=BLOCK_WISE_INT8, padding=3).check(place)


@pytest.mark.parametrize("new", [1, 3, 65])
def test_causal_end_at_every_offset(place, new):
    # Equal scores, V of key j is j: the output is the mean of the visible positions.
    problem = paged_problem([(p, new) for p in range(128)], heads=(1, 1))
    problem.q[:] = 0
    _positions_as_values(problem)
    out, _ = problem.run(place)
    position = np.concatenate([p + np.arange(new) for p in range(128)])
    error = out.astype(np.float64) - (position / 2)[:, None, None]
    # One key more or less moves a mean by 0.5; bf16 keeps the means below 96.5 exactly.
    assert np.abs(error).max() < 0.26


def _positions_as_values(problem):
    for seq, keys in enumerate(problem.seq_lens_decoder + problem.seq_lens_this_time):
        position = np.arange(keys)
        at = problem.block_tables[seq, position // 64], slice(None), position % 64
        problem.k.elements[at] = 0
        problem.v.elements[at] = position[:, None, None]


@pytest.mark.parametrize("causal", [True, False])
def test_int8_positions_at_every_offset(place, causal):
    problem = paged_problem(
        [(p, 3) for p in range(125)], heads=(2, 1), kind=BLOCK_WISE_INT8, causal=causal
    )
    problem.q[:] = 0
    _positions_as_values(problem)
    problem.v.scales[:] = np.float32(0.25)
    out, _ = problem.run(place)
    prefix = np.repeat(np.arange(125), 3)
    last = prefix + (np.tile(np.arange(3), 125) if causal else 2)
    np.testing.assert_allclose(out.astype(np.float64)[:, 1, 7], 0.25 * last / 2, rtol=2**-8)


def _offsets(seqs, make):
    """mask_offsets [T, 2] from a function of (prefix, index in the sequence)."""
    return np.array([make(p, i) for p, n in seqs for i in range(n)], np.int32).reshape(-1, 2)


WILD = [(-5, 3), (9, 2), (2**31 - 1, 2**31 - 1), (-(2**31), 2**31 - 1)]

OPTIONS = {
    "not_causal": {"causal": False},
    "window_left": {"window_size": (17, -1)},
    "window_of_one": {"window_size": (0, 0)},
    "window_right": {"causal": False, "window_size": (-1, 9)},
    "window_both": {"causal": False, "window_size": (70, 3)},
    "causal_beats_right": {"window_size": (100, 20)},
    "softcap": {"softcap": 1.3},
    "softcap_with_window": {"softcap": 30.0, "window_size": (90, -1)},
    "scale": {"softmax_scale": 0.31},
    "negative_scale": {"softmax_scale": -0.2},
    "sinks": {"sinks": np.array([0.4, -3.0, 5.5, 0.0], np.float32)},
    "everything": {
        "sinks": np.array([0.4, -3.0, 2.5, 0.0], np.float32),
        "softcap": 2.0,
        "window_size": (65, -1),
        "softmax_scale": 0.2,
    },
    "ends": {"mask_offsets": _offsets(SHORT, lambda p, i: (0, (37 * i) % (p + 2)))},
    "starts": {"mask_offsets": _offsets(SHORT, lambda p, i: (i % 7 * 9, 10**6))},
    "ranges": {
        "causal": False,
        "mask_offsets": _offsets(SHORT, lambda p, i: (i * 3 % 50, 40 + i * 31 % 90)),
    },
    "ranges_and_window": {
        "window_size": (40, -1),
        "mask_offsets": _offsets(SHORT, lambda p, i: (p // 2, p + 3 - i % 5)),
    },
    "wild_ranges": {"mask_offsets": _offsets(SHORT, lambda p, i: WILD[i % 4])},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("kind", [PLAIN, BLOCK_WISE_FP8], ids=str)
def test_masks_and_logit_options(place, kind, options):
    paged_problem(SHORT, kind=kind, **options).check(place)


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("q_type", ["float16", "float32", "e4m3:tensor", "e4m3:token_head"])
@pytest.mark.parametrize("kind", QUANTISED, ids=str)
def test_query_types(place, kind, q_type, dim):
    paged_problem(SHORT, kind=kind, q_type=q_type, dim=dim).check(place)


@pytest.mark.parametrize("q_type", ["bfloat16", "float16"])
def test_fp32_results_of_16_bit_queries(place, q_type):
    problem = paged_problem(SHORT, kind=BLOCK_WISE_FP8, q_type=q_type)
    exact, _ = problem.reference()
    naive, _ = problem.reference("float32" if place == "cpu" else "bfloat16")
    out, _ = problem.run(place, out_dtype="float32")
    assert_error_ratio(out, exact, naive, "float32")
    rounded, _ = problem.run(place)
    assert_same_bits(out.astype(rounded.dtype), rounded, "the same before it is rounded")


@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
def test_seqs_may_share_blocks(place, kind):
    seqs = [(200, 5), (133, 1), (64, 70), (1, 2)]
    problem = paged_problem(seqs, kind=kind, share=True)
    assert (problem.block_tables[0, :2] == problem.block_tables[1, :2]).all()
    problem.check(place)


@pytest.mark.parametrize("kind", [PLAIN, BLOCK_WISE_FP8], ids=str)
def test_seqs_do_not_depend_on_their_order(place, kind):
    problem = paged_problem(MIXED, kind=kind)
    out, lse = problem.run(place)
    cu = problem.cu_seqlens_q
    order = RNG(1).permutation(len(MIXED))
    tokens = np.concatenate([np.arange(cu[b], cu[b + 1]) for b in order])
    problem.q = problem.q[tokens]
    problem.block_tables = problem.block_tables[order]
    problem.seq_lens_decoder = problem.seq_lens_decoder[order]
    problem.seq_lens_this_time = problem.seq_lens_this_time[order]
    problem.cu_seqlens_q = np.concatenate([[0], np.cumsum(problem.seq_lens_this_time)])
    again, lse_again = problem.run(place)
    # Another order may split sequences elsewhere: the same within the rule, not bit by bit.
    problem.check(place)
    np.testing.assert_allclose(
        again.astype(np.float32), out[tokens].astype(np.float32), rtol=2**-6, atol=2**-9
    )
    np.testing.assert_allclose(lse_again, lse[:, tokens], atol=1e-4)


@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
@pytest.mark.parametrize("chunks", [(64, 64, 64), (1, 63, 100, 28), (191, 1)])
def test_chunked_prefill_is_one_shot(place, kind, chunks):
    whole = paged_problem([(0, 192)], kind=kind)
    expected, expected_lse = whole.check(place)
    begin = 0
    for n in chunks:
        chunk = paged_problem([(0, 192)], kind=kind)
        chunk.q = whole.q[begin : begin + n]
        chunk.seq_lens_decoder = np.array([begin])
        chunk.seq_lens_this_time = np.array([n])
        chunk.cu_seqlens_q = np.array([0, n])
        out, lse = chunk.check(place)
        # A GPU may take different kernels for the whole and for a chunk, with probabilities of
        # their own rounding and, over codes, queries of 15 bits or scores summed in 14.
        np.testing.assert_allclose(
            out.astype(np.float32),
            expected[begin : begin + n].astype(np.float32),
            rtol=2**-6,
            atol=2**-9 if place == "cpu" else 2**-7,
        )
        expected_chunk = expected_lse[:, begin : begin + n]
        # Those are errors of scores, which grow with them.
        bound = {"atol": 1e-4, "rtol": 0} if place == "cpu" else {"atol": 4e-3, "rtol": 2**-12}
        np.testing.assert_allclose(lse, expected_chunk, **bound)
        begin += n


@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
def test_same_bits_twice(place, kind):
    problem = paged_problem(MIXED, kind=kind)
    first, second = problem.run(place), problem.run(place)
    assert_same_bits(first[0], second[0], "out")
    assert_same_bits(first[1], second[1], "lse")


# Tokens without a sequence, sequences without tokens, keys without a block.


def test_resting_seqs_and_padding_tokens(place):
    # Sequence 1 rests with 5 tokens set aside, sequence 2 uses 2 of its 4, and 3 tokens follow the
    # last sequence.
    problem = paged_problem([(3, 2), (70, 0), (9, 2)], spans=[2, 5, 4], padding=3)
    out, lse = problem.check(place)
    assert out.shape == (14, 4, 64)
    assert lse.shape == (4, 14)
    marker = np.full(out.shape, 7.0, out.dtype)
    given = to_paddle(marker, place)
    positional, keywords = problem.arguments(place)
    F.paged_attention(*positional, out=given, **keywords)
    owned = problem.owned()
    assert_same_bits(to_numpy(given)[owned], out[owned], "owned tokens")
    assert_same_bits(to_numpy(given)[~owned], marker[~owned], "tokens of no sequence")


@pytest.mark.parametrize("kind", [PLAIN, BLOCK_WISE_FP8], ids=str)
def test_out_is_written_in_place(place, kind):
    problem = paged_problem(SHORT, kind=kind)
    expected, _ = problem.run(place)
    given = to_paddle(np.zeros_like(expected), place)
    positional, keywords = problem.arguments(place)
    result = F.paged_attention(*positional, out=given, **keywords)
    assert_same_bits(to_numpy(given), expected, "given")
    assert_same_bits(to_numpy(result), expected, "returned")


@pytest.mark.parametrize("bad_id", [-1, -(2**31), 2**31 - 1, 2**25])
@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
def test_keys_of_an_unassigned_block_are_invisible(place, kind, bad_id):
    problem = paged_problem([(200, 3), (0, 70), (64, 1)], kind=kind)
    problem.block_tables[0, 1] = bad_id
    problem.block_tables[1, 0] = bad_id
    problem.block_tables[2, :2] = bad_id
    out, lse = problem.check(place)
    assert not out[73].any()
    assert np.isneginf(lse[:, 73]).all()
    assert np.isneginf(lse[:, 3:67]).all()


def test_the_first_id_past_the_cache_is_unassigned(place):
    problem = paged_problem([(200, 3)])
    problem.block_tables[0, 2] = problem.k.elements.shape[0]
    problem.check(place)


@pytest.mark.parametrize("kind", [PLAIN, BLOCK_WISE_FP8], ids=str)
def test_a_block_table_shorter_than_the_seq(place, kind):
    problem = paged_problem([(200, 3), (10, 4)], kind=kind)
    problem.block_tables = np.ascontiguousarray(problem.block_tables[:, :2])
    problem.check(place)


def test_wild_lengths_stay_in_bounds(place):
    problem = paged_problem([(10, 2), (20, 3), (5, 1)])
    for decoder, this_time, cu in (
        ([10, -7, 2**31 - 1], [2, 3, 1], [0, 2, 5, 6]),
        ([10, 20, 5], [2**31 - 1, -4, 2**30], [0, 2, 5, 6]),
        ([10, 20, 5], [2, 3, 1], [0, 2, 2**31 - 1, 2**31 - 1]),
        ([10, 20, 5], [2, 3, 1], [0, 5, 2, -(2**31)]),
        ([10, 20, 5], [2, 3, 1], [-9, -4, -1, 0]),
    ):
        positional, keywords = problem.arguments(place)
        positional[4:7] = (int32(x, place) for x in (cu, decoder, this_time))
        out = to_numpy(F.paged_attention(*positional, **keywords))
        if cu[0] == 0:  # a sequence before the wild one is right
            expected = problem.reference()[0][:2]
            np.testing.assert_allclose(out[:2].astype(np.float64), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", [PLAIN, BLOCK_WISE_INT8], ids=str)
@pytest.mark.parametrize("seqs", [[], [(0, 0)], [(5, 0), (64, 0)]], ids=str)
def test_no_tokens(place, seqs, kind):
    if not EMPTY_OUTPUTS:
        pytest.skip("this Paddle has no empty outputs")
    out, lse = paged_problem(seqs, kind=kind).run(place)
    assert out.shape == (0, 4, 64)
    assert lse.shape == (4, 0)


def test_no_seqs_but_tokens(place):
    problem = paged_problem([], padding=3)
    out, lse = problem.run(place)
    assert out.shape == (3, 4, 64)
    assert lse.shape == (4, 3)


def test_a_cache_without_blocks(place):
    problem = paged_problem([(0, 3)])
    problem.k.elements = problem.k.elements[:0]
    problem.v.elements = problem.v.elements[:0]
    out, lse = problem.run(place)
    assert not out.any()
    assert np.isneginf(lse).all()


# NaN: hidden ones never reach a result, visible ones always do.


def _nan_kinds():
    """Cache types that can hold a NaN."""
    return [
        PLAIN,
        CacheKind("cache_fp8", "head"),
        CacheKind("cache_fp8", "tensor", "e5m2"),
        BLOCK_WISE_FP8,
        BLOCK_WISE_INT8,
    ]


@pytest.mark.parametrize("letter", ["k", "v"])
@pytest.mark.parametrize("kind", _nan_kinds(), ids=str)
def test_a_visible_nan_reaches_exactly_the_queries_that_see_it(place, kind, letter):
    seqs = [(70, 4), (3, 70), (72, 1)]
    problem = paged_problem(seqs, kind=kind)
    clean, clean_lse = problem.run(place)
    problem.poison(letter, 0, 72, head=1)
    problem.poison(letter, 1, 40, head=0)
    out, lse = problem.check(place)
    poisoned = np.zeros(out.shape[:2], bool)
    poisoned[2:4, 2:] = True  # positions 72 and 73 of sequence 0, the query heads of KV head 1
    poisoned[4 + 37 : 74, :2] = True  # positions 40 to 72 of sequence 1
    np.testing.assert_array_equal(np.isnan(out.astype(np.float32)).all(axis=-1), poisoned)
    assert_same_bits(out[~poisoned], clean[~poisoned], "other tokens and heads")
    assert_same_bits(lse.T[~poisoned], clean_lse.T[~poisoned], "their LSE")
    assert np.isnan(lse.T[poisoned]).all() == (letter == "k")


def test_a_nan_in_q(place):
    problem = paged_problem(SHORT)
    clean, clean_lse = problem.run(place)
    problem.q[3, 1, 5] = np.nan
    out, lse = problem.check(place)
    others = np.ones(out.shape[:2], bool)
    others[3, 1] = False
    assert np.isnan(out[3, 1].astype(np.float32)).all()
    assert np.isnan(lse[1, 3])
    assert_same_bits(out[others], clean[others], "others")
    assert_same_bits(lse.T[others], clean_lse.T[others], "their LSE")


def test_a_nan_in_one_channel_of_v(place):
    problem = paged_problem(SHORT)
    block, r = problem.slot(0, 10)
    problem.v.elements[block, 0, r, 3] = np.nan
    out, lse = problem.check(place)
    assert np.isnan(out[:5, :2, 3].astype(np.float32)).all()
    assert np.isfinite(lse).all()


@pytest.mark.parametrize("kind", _nan_kinds(), ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"window_size": (20, -1)},
        {"causal": False, "window_size": (20, -1)},
        {"mask_offsets": np.array([[60, 200]] * 5, np.int32)},
    ],
    ids=str,
)
def test_a_nan_hidden_from_all_queries(place, kind, options):
    problem = paged_problem([(90, 5)], kind=kind, **options)
    clean, clean_lse = problem.run(place)
    for position in (*range(0, 50), 59):
        problem.poison("k", 0, position)
        problem.poison("v", 0, position)
    out, lse = problem.run(place)
    assert np.isfinite(clean.astype(np.float32)).all()
    assert_same_bits(out, clean, "out")
    assert_same_bits(lse, clean_lse, "lse")


# Layout of the arguments.


@pytest.mark.parametrize("kind", [PLAIN, BLOCK_WISE_FP8], ids=str)
def test_q_may_be_a_slice_of_qkv(place, kind):
    skip_slices_on(place)
    problem = paged_problem(SHORT, kind=kind)
    expected, expected_lse = problem.run(place)
    tokens, heads, dim = problem.q.shape
    qkv = np.full((tokens, heads + 4, dim), np.nan, problem.q.dtype)
    qkv[:, :heads] = problem.q
    strided = to_paddle(qkv, place)[:, :heads]
    positional, keywords = problem.arguments(place)
    out, lse = F.paged_attention(strided, *positional[1:], return_softmax_lse=True, **keywords)
    assert_same_bits(to_numpy(out), expected, "out")
    assert_same_bits(to_numpy(lse), expected_lse, "lse")


def test_lengths_may_be_columns(place):
    problem = paged_problem(SHORT)
    expected, _ = problem.run(place)
    positional, keywords = problem.arguments(place)
    for i in (5, 6):
        positional[i] = int32(to_numpy(positional[i])[:, None], place)
    assert_same_bits(to_numpy(F.paged_attention(*positional, **keywords)), expected, "out")


def test_without_lse_only_the_output_comes_back(place):
    problem = paged_problem(SHORT)
    expected, _ = problem.run(place)
    positional, keywords = problem.arguments(place)
    assert_same_bits(to_numpy(F.paged_attention(*positional, **keywords)), expected, "out")


def test_max_seqlens_are_upper_bounds_only(place):
    problem = paged_problem(MIXED)
    expected, _ = problem.check(place)
    positional, keywords = problem.arguments(place)
    positional[7:] = [10**6, 10**7]
    out = to_numpy(F.paged_attention(*positional, **keywords)).astype(np.float32)
    np.testing.assert_allclose(out, expected.astype(np.float32), rtol=2**-6, atol=2**-9)


def test_max_seqlens_that_are_too_small_hide_nothing(place):
    """More tiles of queries share fewer CTAs than the host expects."""
    problem = paged_problem([(1500, 20)], kind=CacheKind("cache_int8"), seed=31)
    expected, _ = problem.check(place)
    positional, keywords = problem.arguments(place)
    for bounds in ([1, 1], [1, 5000], [3, 700]):
        positional[7:] = bounds
        out = to_numpy(F.paged_attention(*positional, **keywords)).astype(np.float32)
        np.testing.assert_allclose(out, expected.astype(np.float32), rtol=2**-6, atol=2**-9)
