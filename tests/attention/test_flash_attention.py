"""flash_attention against the fp64 model: ragged sequences on contiguous tensors."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from tests.support.attention import assert_fp8_products, flash_problem
from tests.support.bounds import assert_error_ratio
from tests.support.compare import assert_same_bits
from tests.support.tensors import EMPTY_OUTPUTS, skip_slices_on, to_numpy, to_paddle

#: (queries, keys) of each sequence; if causal, more queries than keys leave some without any.
RAGGED = [(65, 65), (1, 1000), (0, 0), (63, 383), (64, 64), (1, 1), (0, 7), (5, 0), (66, 64)]
SHORT = [(5, 75), (66, 66), (1, 130), (0, 3), (9, 4)]

#: (Q type, K/V type)
TYPES = [
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("e4m3:tensor", "e4m3"),
    ("e4m3:token_head", "e4m3"),
    ("bfloat16", "e4m3"),
    ("bfloat16", "e5m2"),
    ("bfloat16", "int8"),
    ("float16", "e4m3"),
    ("float32", "float32"),
    ("float32", "int8"),
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("types", TYPES, ids="-".join)
def test_ragged_seqs(place, types, dim, causal):
    flash_problem(RAGGED, q_type=types[0], kv_type=types[1], dim=dim, causal=causal).check(place)


@pytest.mark.parametrize("prefix", [0, 1, 64, 320, 1023])
def test_prefix_lengths(place, prefix):
    seqs = [(n, prefix + n) for n in (65, 0, 63, 1, 64)]
    flash_problem(seqs, heads=(2, 1), causal=True, seed=prefix).check(place)


@pytest.mark.parametrize("types", [TYPES[0], TYPES[3]], ids="-".join)
def test_seqs_of_every_length_in_one_batch(place, types):
    seqs = [(n, n) for n in (65, 1000, 0, 63, 1, 64)]
    flash_problem(seqs, q_type=types[0], kv_type=types[1], heads=(2, 1), causal=True).check(place)


FP8_TENSORS = pytest.mark.skipif(
    not hasattr(paddle, "float8_e5m2"), reason="this Paddle has no FP8 tensors"
)


@FP8_TENSORS
@pytest.mark.parametrize("kv_type", ["e4m3", "e5m2"])
def test_fp8_tensors_name_their_codes(place, kv_type):
    problem = flash_problem(SHORT, kv_type=kv_type, causal=True)
    expected, _ = problem.check(place)
    positional, keywords = problem.arguments(place)
    for i in (1, 2):
        positional[i] = positional[i].view({"e4m3": "float8_e4m3fn"}.get(kv_type, "float8_e5m2"))
    keywords.pop("kv_dtype", None)
    assert_same_bits(to_numpy(F.flash_attention(*positional, **keywords)), expected, "out")


def test_int8_codes_in_uint8_tensors(place):
    problem = flash_problem(SHORT, kv_type="int8")
    expected, _ = problem.run(place)
    positional, keywords = problem.arguments(place)
    for i, codes in ((1, problem.k), (2, problem.v)):
        positional[i] = to_paddle(codes.view(np.uint8), place)
    out = F.flash_attention(*positional, kv_dtype="int8", **keywords)
    assert_same_bits(to_numpy(out), expected, "out")


@pytest.mark.parametrize("out_dtype", ["float16", "float32"])
def test_output_type_of_fp8_queries(place, out_dtype):
    problem = flash_problem(SHORT, q_type="e4m3:tensor")
    exact, _ = problem.reference()
    naive, _ = problem.reference("float32")
    out, lse = problem.run(place, out_dtype=out_dtype)
    if place == "cpu":
        assert_error_ratio(out, exact, naive, out_dtype)
    else:
        assert_fp8_products(problem, out, lse)


@pytest.mark.parametrize("descale_shape", ["tensor", "head", "batch"])
@pytest.mark.parametrize("types", TYPES[2:7], ids="-".join)
def test_descales_are_indexed(place, types, descale_shape):
    flash_problem(
        SHORT, heads=(6, 3), q_type=types[0], kv_type=types[1], descale_shape=descale_shape
    ).check(place)


def test_descales_of_k_and_v_may_differ_in_shape(place):
    problem = flash_problem(SHORT, kv_type="e4m3", descale_shape="batch")
    problem.options["k_descale"] = np.array([0.0071], np.float32)
    problem.check(place)


def test_q_descale_of_a_seq_and_kv_head(place):
    problem = flash_problem(SHORT, heads=(6, 2), q_type="e4m3:tensor")
    rng = np.random.default_rng(4)
    problem.q_descale = rng.uniform(0.005, 0.03, (len(SHORT), 2)).astype(np.float32)
    problem.check(place)


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (8, 2), (8, 1)], ids=str)
def test_query_head_groups(place, heads):
    flash_problem(SHORT, heads=heads, causal=True).check(place)


def _offsets(make):
    rows = [make(k, i) for n, k in SHORT for i in range(n)]
    return np.array(rows, np.int32).reshape(-1, 2)


OPTIONS = {
    "window_left": {"window_size": (17, -1)},
    "window_right": {"window_size": (-1, 9)},
    "window_both": {"window_size": (20, 3), "causal": True},
    "window_of_one": {"window_size": (0, 0)},
    "softcap": {"softcap": 1.3, "causal": True},
    "scale": {"softmax_scale": 0.31},
    "sinks": {"sinks": np.array([0.4, -3.0, 5.5, 0.0], np.float32), "causal": True},
    "ends": {"mask_offsets": _offsets(lambda k, i: (0, 37 * i % (k + 2)))},
    "ranges": {"mask_offsets": _offsets(lambda k, i: (i * 3 % 50, 40 + i * 31 % 90))},
    "ranges_and_causal": {"mask_offsets": _offsets(lambda k, i: (i, i + 20)), "causal": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("types", [TYPES[0], TYPES[3]], ids="-".join)
def test_masks_and_logit_options(place, types, options):
    flash_problem(SHORT, q_type=types[0], kv_type=types[1], **options).check(place)


@pytest.mark.parametrize("offset", range(0, 128, 3))
def test_causal_end_at_many_offsets(place, offset):
    problem = flash_problem([(3, 3 + offset), (65, 65 + offset)], heads=(1, 1), causal=True)
    problem.q[:] = 0
    for begin, end in zip(problem.cu_seqlens_k, problem.cu_seqlens_k[1:]):
        problem.v[begin:end] = np.arange(end - begin)[:, None, None]
    out, _ = problem.run(place)
    position = offset + np.concatenate([np.arange(3), np.arange(65)])
    # A key more or less moves a mean by 0.5; bf16 keeps means below 96.5 exactly.
    assert np.abs(out.astype(np.float64) - (position / 2)[:, None, None]).max() < 0.26


def test_strided_inputs(place):
    skip_slices_on(place)
    # Q, K and V as slices of one fused tensor [T, (H + 2 KV), D].
    problem = flash_problem([(70, 70), (3, 3)], causal=True)
    expected, expected_lse = problem.run(place)
    fused = to_paddle(np.concatenate([problem.q, problem.k, problem.v], axis=1), place)
    slices = [fused[:, :4], fused[:, 4:6], fused[:, 6:]]
    positional, keywords = problem.arguments(place)
    out, lse = F.flash_attention(*slices, *positional[3:], return_softmax_lse=True, **keywords)
    assert_same_bits(to_numpy(out), expected, "out")
    assert_same_bits(to_numpy(lse), expected_lse, "lse")


def test_out_is_written_in_place(place):
    problem = flash_problem(SHORT, causal=True)
    expected, _ = problem.run(place)
    given = to_paddle(np.full_like(expected, 7.0), place)
    positional, keywords = problem.arguments(place)
    result = F.flash_attention(*positional, out=given, **keywords)
    assert_same_bits(to_numpy(given), expected, "given")
    assert_same_bits(to_numpy(result), expected, "returned")


@pytest.mark.parametrize("types", TYPES, ids="-".join)
def test_same_bits_twice(place, types):
    problem = flash_problem(RAGGED, q_type=types[0], kv_type=types[1])
    first, second = problem.run(place), problem.run(place)
    assert_same_bits(first[0], second[0], "out")
    assert_same_bits(first[1], second[1], "lse")


@pytest.mark.parametrize("seqs", [[], [(0, 0)], [(0, 5)]], ids=str)
def test_no_tokens(place, seqs):
    if not EMPTY_OUTPUTS:
        pytest.skip("this Paddle has no empty outputs")
    out, lse = flash_problem(seqs).run(place)
    assert out.shape == (0, 4, 64)
    assert lse.shape == (4, 0)


def test_no_keys_at_all(place):
    out, lse = flash_problem([(3, 0), (2, 0)]).check(place)
    assert not out.any()
    assert np.isneginf(lse).all()


def test_wild_lengths_stay_in_bounds(place):
    problem = flash_problem([(2, 9), (3, 4)])
    exact = problem.reference()[0]
    for cu_q, cu_k in (
        ([0, 2, 2**31 - 1], [0, 9, 2**31 - 1]),
        ([0, 2, -5], [0, 9, -(2**31)]),
        ([0, 2, 1], [0, 9, 3]),
        ([-(2**31), 2, 5], [-7, 9, 13]),
        ([2**31 - 1, 2, 5], [2**31 - 1, 9, 13]),
    ):
        positional, keywords = problem.arguments(place)
        positional[3] = to_paddle(np.array(cu_q, np.int32), place)
        positional[4] = to_paddle(np.array(cu_k, np.int32), place)
        out = to_numpy(F.flash_attention(*positional, **keywords)).astype(np.float64)
        right = slice(0, 2) if cu_q[0] == 0 else slice(2, 5)
        if cu_q[2] in (5, 2**31 - 1) or cu_q[0] == 0:
            np.testing.assert_allclose(out[right], exact[right], rtol=0.02, atol=0.02)


# NaN


@pytest.mark.parametrize("types", [TYPES[0], TYPES[2], TYPES[4]], ids="-".join)
@pytest.mark.parametrize("letter", ["k", "v"])
def test_a_visible_nan_reaches_exactly_the_queries_that_see_it(place, letter, types):
    problem = flash_problem(
        [(70, 80), (5, 64), (3, 3)], q_type=types[0], kv_type=types[1], causal=True
    )
    clean, clean_lse = problem.run(place)
    tensor = problem.k if letter == "k" else problem.v
    nan = 0x7F if tensor.dtype == np.uint8 else np.nan
    tensor[40, 1] = nan  # sequence 0, key 40: queries from 30 on
    tensor[80 + 63, 0] = nan  # sequence 1, its last key: its last query
    out, lse = problem.check(place)
    poisoned = np.zeros(out.shape[:2], bool)
    poisoned[30:70, 2:] = True
    poisoned[74, :2] = True
    np.testing.assert_array_equal(np.isnan(out.astype(np.float32)).all(axis=-1), poisoned)
    assert_same_bits(out[~poisoned], clean[~poisoned], "other tokens and heads")
    assert_same_bits(lse.T[~poisoned], clean_lse.T[~poisoned], "their LSE")


def test_a_nan_in_q(place):
    problem = flash_problem(SHORT, causal=True)
    clean, _ = problem.run(place)
    problem.q[70, 2, 0] = np.nan
    out, lse = problem.check(place)
    assert np.isnan(out[70, 2].astype(np.float32)).all()
    assert np.isnan(lse[2, 70])
    others = np.ones(out.shape[:2], bool)
    others[70, 2] = False
    assert_same_bits(out[others], clean[others], "others")
