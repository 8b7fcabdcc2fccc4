"""The numerical promises of both attention operators, each with the case that breaks without it."""

from __future__ import annotations

import math

import numpy as np
import pytest

import fastattn.functional as F
from tests.support import bounds
from tests.support.attention import (
    BLOCK_WISE_FP8,
    BLOCK_WISE_INT8,
    CACHE_KINDS,
    FEW_KINDS,
    PLAIN,
    flash_problem,
    paged_problem,
)
from tests.support.compare import assert_same_bits
from tests.support.tensors import BF16, to_numpy, to_paddle

LENGTHS = [(0, 1), (1, 1), (62, 2), (63, 1), (64, 3), (255, 1), (256, 1), (320, 65), (1999, 1)]


def set_value(problem, value):
    """Make every V that a sequence may read `value` (as nearly as its codes allow)."""
    stored = problem.v
    if stored.scales is None:
        stored.elements[:] = value
        return
    code = {"int8": 100, "e4m3": 0x70, "e5m2": 0x54, "int4": 15, "e2m1": 6}[stored.code]
    size = {"int8": 100.0, "e4m3": 128.0, "e5m2": 64.0, "int4": 7.0, "e2m1": 4.0}[stored.code]
    stored.elements[:] = code
    stored.rescale(slice(None), np.float32(value / size))


# Probabilities sum to 1.


@pytest.mark.parametrize("q_type", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", CACHE_KINDS[:2] + CACHE_KINDS[2::2], ids=str)
def test_v_of_1_returns_1(place, kind, q_type):
    if kind.quant_type == "none" and kind.dtype != q_type:
        pytest.skip("a cache that is not quantised has Q's type")
    problem = paged_problem(LENGTHS, kind=kind, q_type=q_type)
    set_value(problem, 1.0)
    out, _ = problem.run(place)
    step = bounds.rounding_step(1.0, q_type)
    # GPU kernels round P to 16 bits (2^-9) but sum what they multiply.
    limit = step if place == "cpu" else max(step, 1e-3)
    assert np.abs(out.astype(np.float64) - 1).max() <= limit


@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
def test_small_probabilities_are_not_lost(place, kind):
    # One logit 0 and 31 at -8: those hold 1 % of the weight, each 3e-4.
    problem = paged_problem([(31, 1)], kind=kind, heads=(1, 1), softmax_scale=1.0, seed=3)
    problem.q[:] = 0
    problem.q[..., 0] = -8
    key = np.zeros((1, 1, 64, 64), np.float32)
    key[
        0,
        0,
        1:,
        :,
    ] = 0
    key[0, 0, 1:, 0] = 1
    value = np.zeros((1, 1, 64, 64), np.float32)
    value[0, 0, 1:] = 1
    block = problem.slot(0, 0)[0]
    for stored, x in ((problem.k, key), (problem.v, value)):
        write_exactly(stored, block, x[0])
    out, lse = problem.check(place)
    weight = 31 * math.exp(-8) / (1 + 31 * math.exp(-8))
    np.testing.assert_allclose(out.astype(np.float64), weight, rtol=0.01)
    np.testing.assert_allclose(lse, math.log(1 + 31 * math.exp(-8)), atol=2e-5)


def write_exactly(stored, block, x):
    """Store values 0 and 1 [KV, 64, D] so that they are read back as 0 and 1."""
    if stored.scales is None:
        stored.elements[block] = x
        return
    known = {"int8": (64, 0, 64), "int4": (12, 8, 4), "e2m1": (6, 0, 4)}
    one, zero, size = known.get(stored.code, (0x68, 0, 64))
    stored.elements[block] = np.where(x == 1, one, zero)
    if stored.kind.dynamic:
        stored.rescale(block, 1 / size)
    else:
        stored.scales[:] = 1 / 64


# The running maximum.


@pytest.mark.parametrize("late", [5, 700, 1399])
@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
def test_one_large_key_anywhere_in_a_long_seq(place, kind, late):
    problem = paged_problem([(1397, 3)], kind=kind, heads=(2, 1))
    block, r = problem.slot(0, late)
    towards = problem.q[2, 0].astype(np.float32) >= 0  # the query that sees all of them
    codes = {"int8": (100, 0x9C), "e4m3": (0x76, 0xF6), "int4": (15, 1), "e2m1": (7, 15)}
    plus, minus = codes[kind.code]
    if problem.k.scales is None:
        plus, minus = 4, -4
    problem.k.elements[block, :, r] = np.where(towards, plus, minus)
    if kind.dynamic:
        problem.k.scales[block, :, r] = np.abs(problem.k.scales[block, :, r])  # int4's have a sign
        problem.k.grow((block, slice(None), r), 3)
    _, lse = problem.check(place)
    assert lse[0, 2] > 15


@pytest.mark.parametrize("kind", [PLAIN, BLOCK_WISE_FP8], ids=str)
@pytest.mark.parametrize("scale", [-30.0, 30.0])
def test_large_logits_of_either_sign(place, kind, scale):
    problem = paged_problem([(300, 5)], kind=kind, softmax_scale=scale)
    out, lse = problem.check(place)
    assert np.isfinite(out.astype(np.float32)).all()
    assert np.abs(lse).max() > 500


@pytest.mark.parametrize("sinks", [None, np.array([-1e4, -3e4], np.float32)])
@pytest.mark.parametrize("kind", [PLAIN, BLOCK_WISE_INT8], ids=str)
def test_strongly_negative_logits_after_an_empty_tile(place, kind, sinks):
    # The first 700 keys are hidden; the rest have logits near -300, which exp of a maximum that
    # was taken for 0 loses.
    problem = paged_problem(
        [(800, 3)],
        kind=kind,
        heads=(2, 1),
        mask_offsets=np.array([[700, 900]] * 3, np.int32),
        sinks=sinks,
    )
    problem.q[:] = -8
    if problem.k.scales is None:
        problem.k.elements[:] = np.abs(problem.k.elements.astype(np.float32)) + 4
    else:
        problem.k.elements[problem.k.elements != 0x80] = 100
        problem.k.scales[:] = 0.05
    out, lse = problem.check(place)
    assert (lse < -200).all()
    assert np.abs(out.astype(np.float32)).max() > 0.1


@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
def test_a_query_without_a_visible_key_is_0_and_minus_infinity(place, kind):
    offsets = np.array([[0, 0], [50, 20], [300, 400], [0, 300], [128, 129]] * 2, np.int32)
    problem = paged_problem([(200, 5), (190, 5)], kind=kind, mask_offsets=offsets)
    out, lse = problem.check(place)
    empty = [0, 1, 2, 5, 6, 7]
    assert not out[empty].any()
    assert np.isneginf(lse[:, empty]).all()
    others = np.setdiff1d(np.arange(10), empty)
    assert np.isfinite(lse[:, others]).all()
    assert out[others].any(axis=(1, 2)).all()


def test_sinks_take_weight_and_give_no_value(place):
    sinks = np.array([0.0, 2.0, -np.inf, 60.0], np.float32)
    problem = paged_problem([(9, 1), (129, 2)], sinks=sinks)
    problem.q[:] = 0
    problem.v.elements[:] = 1
    out, lse = problem.check(place)
    keys = np.array([10, 130, 131])
    weight = keys[:, None] / (keys[:, None] + np.exp(sinks.astype(np.float64)))
    np.testing.assert_allclose(out[:, :, 0].astype(np.float64), weight, rtol=2**-8)
    np.testing.assert_allclose(lse.T, np.log(keys[:, None] / weight), atol=1e-4)


def test_the_largest_logit_may_be_a_sink(place):
    sinks = np.array([400.0, -400.0, 90.0, 0.0], np.float32)
    _, lse = paged_problem([(100, 3), (0, 2)], sinks=sinks).check(place)
    np.testing.assert_allclose(lse[0], 400.0)


# Softcap.


@pytest.mark.parametrize("cap", [0.5, 5.0, 50.0])
def test_softcap_of_logits_far_above_it(place, cap):
    # The form (e^2y - 1) / (e^2y + 1) of tanh is NaN from |S| > 88 * cap / 2 on.
    problem = paged_problem([(130, 4)], softcap=cap, softmax_scale=100.0)
    out, lse = problem.check(place)
    assert np.isfinite(out.astype(np.float32)).all()
    assert np.abs(lse - cap).max() < math.log(140) + 1.0


@pytest.mark.parametrize("cap", [1.0, 30.0, 1e4, 1e5, 1e8, 3e38])
@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
def test_softcap_keeps_the_precision_of_scores_far_below_it(place, kind, cap):
    """An error in proportion to the cap would make every softmax uniform in the end."""
    for seqs in ([(130, 4), (5, 1)], [(70, 200)]):
        problem = paged_problem(seqs, kind=kind, dim=128, softcap=cap, softmax_scale=0.31)
        _, lse = problem.check(place, f"cap {cap}")
        exact, exact_lse = problem.reference()
        if place == "cpu":
            np.testing.assert_allclose(lse, exact_lse, rtol=3e-6, atol=3e-6)
            fp32, _ = problem.run(place, out_dtype="float32")
            assert np.abs(fp32 - exact).max() < 2e-5 * np.abs(exact).max()
        else:
            np.testing.assert_allclose(lse, exact_lse, rtol=2e-3, atol=2e-2)


# Scales.


@pytest.mark.parametrize(
    "kind", [k for k in CACHE_KINDS if k.scale_dtype == "float32"][2:], ids=str
)
@pytest.mark.parametrize("letter", ["k", "v"])
def test_every_scale_counts_by_itself(place, kind, letter):
    """Changing one scale changes the result as it does in the model, and only there."""
    problem = paged_problem([(100, 2), (30, 1)], kind=kind)
    before, _ = problem.check(place)
    stored = problem.k if letter == "k" else problem.v
    if kind.dynamic:
        block, r = problem.slot(0, 70)
        stored.grow((block, 1, r), 6)
        changed = np.zeros((3, 4), bool)
        changed[:2, 2:] = True
    else:
        stored.scales[-1] *= 3
        changed = np.zeros((3, 4), bool)
        changed[:, 2:] = True
        if kind.granularity == "tensor":
            changed[:] = True
    after, _ = problem.check(place)
    np.testing.assert_array_equal((after != before).any(axis=-1), changed)


@pytest.mark.parametrize("q_type", ["e4m3:tensor", "e4m3:token_head"])
def test_query_scales_count(place, q_type):
    problem = paged_problem([(100, 2), (30, 1)], kind=BLOCK_WISE_FP8, q_type=q_type)
    before, _ = problem.check(place)
    problem.q_descale.reshape(-1)[-1] *= 3
    after, _ = problem.check(place)
    changed = np.zeros((3, 4), bool)
    changed[-1, -1] = True
    if q_type == "e4m3:tensor":
        changed[:] = True
    np.testing.assert_array_equal((after != before).any(axis=-1), changed)


@pytest.mark.parametrize("kind", FEW_KINDS[2:], ids=str)
def test_all_zero_tokens(place, kind):
    problem = paged_problem([(70, 3)], kind=kind)
    zeros = {"k": 8 if problem.k.code == "int4" else 0, "v": 8 if problem.v.code == "int4" else 0}
    for stored in (problem.k, problem.v):
        block, r = problem.slot(0, 5)
        stored.elements[block, :, r] = zeros[stored.letter]
        stored.rescale((block, slice(None), r), np.float32(1e-6) / np.float32(448))
    out, lse = problem.check(place)
    assert np.isfinite(out.astype(np.float32)).all()
    problem.k.elements[:] = zeros["k"]
    problem.v.elements[:] = zeros["v"]
    out, lse = problem.check(place)
    assert not out.any()
    np.testing.assert_allclose(lse[0], np.log([71, 72, 73]), atol=1e-5)


# Accumulation.


@pytest.mark.parametrize("kind", [PLAIN, BLOCK_WISE_FP8], ids=str)
def test_v_with_a_large_mean_over_a_long_seq(place, kind):
    # Equal-signed products: an accumulator of few bits drifts (18 % at 16k keys in FP8 kernels).
    problem = paged_problem([(8190, 2)], kind=kind, heads=(1, 1), v_mean=8.0)
    problem.q *= np.asarray(0.05, problem.q.dtype)
    problem.check(place)


# Long sequences, whose keys are split among threads and merged.

LONG = {
    "plain": {},
    "sinks": {"sinks": np.array([3.0, 11.0], np.float32)},
    "window": {"window_size": (2500, -1)},
    "one_part": {"mask_offsets": np.array([[4200, 4300]] * 2, np.int32)},
    "between_parts": {"mask_offsets": np.array([[2040, 2060], [0, 0]], np.int32)},
    "softcap": {"softcap": 1.5},
    "codes": {"out_scale": np.array([0.011], np.float32)},
}


@pytest.mark.parametrize("options", LONG.values(), ids=list(LONG))
@pytest.mark.parametrize("kind", [PLAIN, BLOCK_WISE_INT8], ids=str)
def test_splits_of_a_long_seq(place, kind, options):
    paged_problem([(6200, 2)], heads=(2, 1), kind=kind, **options).check(place)


@pytest.mark.parametrize("letter", ["k", "v"])
@pytest.mark.parametrize("position", [0, 3000, 6200])
def test_a_nan_in_one_split_of_a_long_seq(place, letter, position):
    problem = paged_problem([(6200, 2)], heads=(2, 1), kind=BLOCK_WISE_FP8)
    problem.poison(letter, 0, position)
    out, lse = problem.check(place)
    assert np.isnan(out.astype(np.float32)).all()
    assert np.isnan(lse).all() == (letter == "k")


def test_a_nan_stays_even_where_its_weight_is_0(place):
    # Logits of thousands: all but one probability underflow to 0, and 0 * NaN is still NaN.
    problem = paged_problem([(6200, 1)], heads=(2, 1), softmax_scale=500.0)
    _, lse = problem.run(place)
    assert lse.min() > 1000
    problem.poison("v", 0, 5)
    out, lse = problem.check(place)
    assert np.isnan(out.astype(np.float32)).all()
    assert np.isfinite(lse).all()


# LSE.


def test_lse_is_the_natural_logarithm_as_heads_by_tokens(place):
    problem = paged_problem([(0, 1), (9, 1), (99, 1)])
    problem.q[:] = 0
    _, lse = problem.run(place)
    assert lse.shape == (4, 3)
    assert lse.dtype == np.float32
    np.testing.assert_allclose(lse, [np.log([1, 10, 100])] * 4, atol=1e-5)


def test_merging_two_halves_by_lse_gives_the_whole(place):
    whole = flash_problem([(3, 200)])
    exact, exact_lse = whole.reference()
    parts = []
    for keys in (slice(0, 77), slice(77, 200)):
        part = flash_problem([(3, 200)])
        part.k, part.v = whole.k[keys], whole.v[keys]
        part.cu_seqlens_k = np.array([0, len(part.k)])
        parts.append(part.run(place))
    lse = np.logaddexp(parts[0][1], parts[1][1])
    np.testing.assert_allclose(lse, exact_lse, atol=1e-4)
    out = sum(o.astype(np.float64) * np.exp(part_lse - lse).T[:, :, None] for o, part_lse in parts)
    np.testing.assert_allclose(out, exact, atol=0.02)


# e4m3 output.


@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
@pytest.mark.parametrize("scale", [0.0123, 0.31])
def test_out_scale_gives_e4m3_codes(place, kind, scale):
    problem = paged_problem([(70, 5), (0, 66)], kind=kind, out_scale=np.array([scale], np.float32))
    codes, _ = problem.check(place)
    assert codes.dtype == np.uint8


def test_out_scale_saturates_and_keeps_nan(place):
    problem = paged_problem([(0, 4)], out_scale=np.array([1e-4], np.float32))
    block, r = problem.slot(0, 3)
    problem.v.elements[block, :, r] = np.nan
    codes, _ = problem.check(place)
    assert np.isin(codes[0] & 0x7F, [0x7E]).mean() > 0.9
    assert (codes[3] == 0x7F).all()


def test_out_scale_of_flash_attention_in_place(place):
    problem = flash_problem(
        [(5, 70)], q_type="e4m3:tensor", out_scale=np.array([0.0171], np.float32)
    )
    codes, _ = problem.check(place)
    given = to_paddle(np.zeros_like(codes), place)
    positional, keywords = problem.arguments(place)
    F.flash_attention(*positional, out=given, **keywords)
    assert_same_bits(to_numpy(given), codes, "given")


# The rule itself.


def rounded(x):
    return np.asarray(x, np.float32).astype(BF16)


def test_the_rule_accepts_rounding_and_refuses_more():
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(50, 4, 64)) * 10.0 ** rng.integers(-3, 2, (50, 4, 1))
    bounds.assert_error_ratio(rounded(exact), exact, exact, "bfloat16")
    step = bounds.rounding_step(np.abs(exact).max(axis=-1), "bfloat16")
    for change in (5.0, -5.0, np.nan, np.inf):
        wrong = exact.copy()
        wrong[17, 2, 5] += change * step[17, 2]
        with pytest.raises(AssertionError, match=r"1 of 12800 elements .* worst at \(17, 2, 5\)"):
            bounds.assert_error_ratio(rounded(wrong), exact, exact, "bfloat16")
    # 0.6 % is within one rounding step everywhere, but no rounding does it to every element.
    with pytest.raises(AssertionError, match="typical error"):
        bounds.assert_error_ratio(rounded(exact * 1.006), exact, exact, "bfloat16")
    # A naive version that is worse allows more.
    bounds.assert_error_ratio(rounded(exact * 1.006), exact, exact * 0.99, "bfloat16")
    with pytest.raises(AssertionError, match="shape"):
        bounds.assert_error_ratio(rounded(exact[1:]), exact, exact, "bfloat16")


def test_the_rule_wants_the_same_nan_and_infinity():
    exact = np.zeros((2, 64))
    exact[0, 3] = np.nan
    bounds.assert_error_ratio(rounded(exact), exact, exact, "bfloat16")
    with pytest.raises(AssertionError, match="1 of 128"):
        bounds.assert_error_ratio(rounded(np.zeros((2, 64))), exact, exact, "bfloat16")
    lse = np.array([[1.0, -np.inf]])
    bounds.assert_lse(lse.astype(np.float32), lse, lse)
    for wrong in ([1.0, -1e30], [1.0, np.nan], [1.0001, -np.inf], [1.0, np.inf]):
        with pytest.raises(AssertionError, match="lse"):
            bounds.assert_lse(np.array([wrong], np.float32), lse, lse)
    with pytest.raises(AssertionError, match="dtype float64"):
        bounds.assert_lse(lse, lse, lse)


def test_the_rule_for_codes():
    exact = np.array([[1.0, -3.3, 500.0, 0.0, np.nan]])
    codes = np.array([[0x38, 0xC5, 0x7E, 0x00, 0x7F]], np.uint8)
    bounds.assert_codes(codes, exact, exact, 1.0)
    for i, wrong in enumerate((0x39, 0xC6, 0x7D, 0x08, 0x7E)):
        changed = codes.copy()
        changed[0, i] = wrong
        with pytest.raises(AssertionError, match="1 of 5"):
            bounds.assert_codes(changed, exact, exact, 1.0)


@pytest.mark.parametrize(
    ("dtype", "at", "step"),
    [
        ("bfloat16", 1.0, 2**-7),
        ("bfloat16", 1.99, 2**-7),
        ("float16", -2.0, 2**-9),
        ("float16", 0.0, 2**-24),
        ("float32", 0.75, 2**-24),
        ("e4m3", 448.0, 32.0),
        ("e4m3", 0.001, 2**-9),
    ],
)
def test_rounding_step(dtype, at, step):
    assert bounds.rounding_step(at, dtype) == step
