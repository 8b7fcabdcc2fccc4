"""Masks and scores that have broken other attention kernels, over every type of keys.

Each test has the idea of a fault that other libraries had: a finite number in the place of -inf,
-inf less -inf in a tile or a split without a key, one key in a tile, padded heads that read behind
the sinks, a last tile that reads behind the block table, and FP8 keys whose probabilities depend on
the width of a tile. Keys that no query of a sequence sees hold NaN in all of them.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.attention.test_cascade import cascade_problem
from tests.attention.test_masked_keys import FEW, FLASH_TYPES, intervals, query_types
from tests.support.attention import (
    BLOCK_WISE_FP8,
    PLAIN,
    CacheKind,
    PagedProblem,
    flash_problem,
    paged_problem,
)
from tests.support.bounds import assert_within, rounding_step
from tests.support.compare import assert_same_bits
from tests.support.tensors import E5M2

#: (cached, new) tokens of a sequence, of each kind of step.
STEPS = {
    "decode": (300, 1),
    "drafts": (317, 5),
    "chunk": (131, 70),
    "prefill": (0, 130),
}
#: Ends of tiles of 16 to 192 keys.
BORDERS = (16, 32, 64, 96, 128, 192)

#: Keys [begin, end) of a query from its index, its position, and the number of keys.
PATTERNS = {
    "first tiles masked": lambda i, p, n: (max(p - 1, 0) // 64 * 64, n),
    "last tiles masked": lambda i, p, n: (0, 1 + p // 3),
    "no key in every other row": lambda i, p, n: (0, n) if i % 2 else (5, 5),
    "reversed in some rows": lambda i, p, n: (max(p - 70, 0), p + 1) if i % 3 else (p + 1, 0),
    "one key": lambda i, p, n: (p // 2, p // 2 + 1),
    "first rows empty": lambda i, p, n: (0, 0) if i < 66 else (p // 4, n),
    "middle rows empty": lambda i, p, n: (n, n + 9) if i // 32 == 1 else (p - 40, p),
    "before and behind the keys": lambda i, p, n: (-7, 1) if i % 2 else (n - 1, n + 70),
    "borders": lambda i, p, n: (BORDERS[i % 6] + i // 6 % 3 - 1, BORDERS[-1 - i % 5] + i % 3 - 1),
    "one tile": lambda i, p, n: (64 * (i % 3), 64 * (i % 3) + 64),
    "a tile and a key": lambda i, p, n: (64 * (i % 3), 64 * (i % 3) + 65),
}


def offsets_of(seqs) -> np.ndarray:
    """Mask offsets [T, 2] of sequences of (first position, keys, queries), a pattern each."""
    rows = [
        pattern(i, keys - new + i, keys)
        for pattern, (new, keys) in zip(PATTERNS.values(), seqs)
        for i in range(new)
    ]
    return np.array(rows, np.int32)


def hide(problem) -> None:
    """NaN in every key that no query of its sequence sees."""
    paged = isinstance(problem, PagedProblem)
    offsets = problem.options.get("mask_offsets")
    for seq, first in enumerate(problem.cu_seqlens_q[:-1]):
        if paged:
            new = int(problem.seq_lens_this_time[seq])
            keys = int(problem.seq_lens_decoder[seq]) + new
        else:
            new = int(problem.cu_seqlens_q[seq + 1] - first)
            keys = int(np.diff(problem.cu_seqlens_k)[seq])
        rows = None if offsets is None else offsets[first : first + new]
        options = problem.options if paged else {"causal": False, **problem.options}
        seen = np.zeros(keys, bool)
        for begin, end in intervals(new, keys, options, rows):
            seen[max(begin, 0) : max(end, 0)] = True
        at = np.flatnonzero(~seen)
        if paged:
            where = problem.block_tables[seq, at // 64], slice(None), at % 64
            problem.k.poison(where)
            problem.v.poison(where)
        else:
            at += problem.cu_seqlens_k[seq]
            for x in (problem.k, problem.v):
                if x.dtype in (np.uint8, np.int8, E5M2):
                    x.view(np.uint8)[at] = 0x80 if x.dtype == np.int8 else 0x7F
                else:
                    x[at] = np.nan


def paged_cases(step: str) -> list[tuple[int, int]]:
    cached, new = STEPS[step]
    return [(cached + 3 * i, new) for i in range(len(PATTERNS))]


@pytest.mark.parametrize(
    ("step", "causal"), [*((step, False) for step in STEPS), ("drafts", True), ("chunk", True)]
)
@pytest.mark.parametrize("kind", FEW, ids=str)
def test_offsets_over_pages(place, kind, step, causal):
    """A pattern a sequence, in steps of one kind."""
    seqs = paged_cases(step)
    offsets = offsets_of([(new, cached + new) for cached, new in seqs])
    sinks = np.array([0.3, 4.0], np.float32) if causal else None
    # e4m3 queries have kernels of their own.
    for seed, q_type in enumerate(query_types(kind)[: 1 if causal else 2]):
        problem = paged_problem(
            seqs,
            heads=(2, 1),
            kind=kind,
            q_type=q_type,
            seed=seed,
            causal=causal,
            mask_offsets=offsets,
            sinks=sinks,
        )
        hide(problem)
        _, lse = problem.check(place, step)
        assert np.isneginf(lse).any() and np.isfinite(lse).any()


@pytest.mark.parametrize("kind", FEW, ids=str)
def test_offsets_in_a_mixed_step(place, kind):
    seqs = [list(STEPS.values())[i % 4] for i in range(len(PATTERNS))]
    offsets = offsets_of([(new, cached + new) for cached, new in seqs])
    problem = paged_problem(seqs, kind=kind, causal=False, mask_offsets=offsets, padding=2)
    hide(problem)
    problem.options["mask_offsets"] = np.concatenate([offsets, np.zeros((2, 2), np.int32)])
    problem.check(place)


@pytest.mark.parametrize("q_type, kv_type", FLASH_TYPES)
def test_offsets_over_contiguous_keys(place, q_type, kv_type):
    for new, causal in ((1, False), (5, True), (70, False), (70, True)):
        seqs = [(new + i, 200 + 3 * i) for i in range(len(PATTERNS))]
        problem = flash_problem(
            seqs,
            heads=(2, 1),
            q_type=q_type,
            kv_type=kv_type,
            causal=causal,
            mask_offsets=offsets_of(seqs),
        )
        hide(problem)
        problem.check(place)


#: Windows that end at tiles' borders and beside them; of an even number of keys and of an odd one.
LEFTS = (0, 1, 15, 62, 63, 64, 65, 127, 128, 129)


@pytest.mark.parametrize("kind", FEW, ids=str)
def test_windows_over_pages(place, kind):
    """Whole tiles are masked ahead of a window, and between a window and the end."""
    seqs = [(300, 1), (0, 1), (140, 17), (255, 4)]
    for seed, left in enumerate(LEFTS):
        options = (
            {"window_size": (left, -1)}
            if seed % 3
            else {"window_size": (left, seed), "causal": False}
        )
        sinks = np.array([0.3, 4.0], np.float32) if seed % 2 else None
        problem = paged_problem(seqs, heads=(2, 1), kind=kind, seed=seed, sinks=sinks, **options)
        hide(problem)
        problem.check(place, f"left {left}")


@pytest.mark.parametrize("kind", FEW, ids=str)
def test_windows_of_a_prompt(place, kind):
    for left in (0, 63, 64, 65):
        problem = paged_problem([(70, 140)], heads=(2, 1), kind=kind, window_size=(left, -1))
        hide(problem)
        problem.check(place, f"left {left}")


@pytest.mark.parametrize("q_type, kv_type", FLASH_TYPES)
def test_queries_ahead_of_the_first_key(place, q_type, kv_type):
    """More queries than keys: the first ones see nothing, and the next one sees a single key."""
    seqs = [(77, 1), (1, 1), (130, 1), (5, 0), (200, 64), (66, 65), (3, 2), (129, 127), (64, 1)]
    for seed, options in enumerate(({}, {"window_size": (0, -1)}, {"window_size": (63, 1)})):
        sinks = np.array([0.5, -np.inf, -3.0, 6.0], np.float32) if seed == 1 else None
        problem = flash_problem(
            seqs, q_type=q_type, kv_type=kv_type, causal=seed < 2, sinks=sinks, **options
        )
        hide(problem)
        out, lse = problem.check(place)
        if seed < 2:
            assert np.isneginf(lse[:, :76]).all() and not out[:76].any()
            assert np.isfinite(lse[:, 76]).all()


@pytest.mark.parametrize("kind", FEW, ids=str)
def test_splits_without_a_key(place, kind):
    """Many keys, of which each row sees a few: most splits, and some rows, have none."""
    cached = 4200
    rows = [(4095, 4096), (2047, 2050), (9, 9), (2048, 2049), (4196, 4205)]
    many = paged_problem([(cached, 5)], heads=(2, 1), kind=kind, causal=False)
    many.options["mask_offsets"] = np.array(rows, np.int32)
    hide(many)
    many.check(place)
    one = dataclasses.replace(
        many,
        q=many.q[:1],
        cu_seqlens_q=np.array([0, 1], np.int32),
        seq_lens_decoder=np.array([cached + 4], np.int32),
        seq_lens_this_time=np.array([1], np.int32),
    )
    for first in (0, 2, 3):
        one.options = {**many.options, "mask_offsets": np.array(rows[first : first + 1], np.int32)}
        one.check(place)


# --- scores far below zero, and -inf ------------------------------------------------------------

#: Codes of about 4 with the scales of `store`, and of the largest magnitude where tokens have one.
HIGH = {"int8": 0x7F, "e4m3": 0x7E, "e5m2": 0x5C, "int4": 0xF, "e2m1": 0x7}


def steepen(problem: PagedProblem, size: float) -> PagedProblem:
    """Have every score near -4 size times the softmax scale, by the first channel."""
    elements = problem.k.elements
    plain = problem.kind.quant_type == "none"
    if problem.kind.code == "int4":
        problem.k.scales = np.abs(problem.k.scales)  # theirs have signs
    elements.view(elements.dtype if plain else np.uint8)[..., 0] = (
        4.0 if plain else HIGH[problem.kind.code]
    )
    problem.q[..., 0] = -size
    return problem


def magnitudes_of(problem) -> np.ndarray:
    """The exact result with the absolute values of V."""
    twin = problem.with_magnitudes()
    if isinstance(problem, PagedProblem) and problem.v.code == "int4":
        codes = np.minimum(np.abs(problem.v.elements.astype(int) - 8) + 8, 15)  # -8 has no opposite
        scales = np.abs(problem.v.scales) * np.float32(8 / 7)
        twin.v = dataclasses.replace(problem.v, elements=codes.astype(np.uint8), scales=scales)
    return twin.reference()[0]


def check_steep(problem, place: str) -> None:
    """As the error ratio, with the fp32 roundings of a score of this size."""
    out, lse = problem.run(place)
    exact, exact_lse = problem.reference()
    naive, naive_lse = problem.reference("float32" if place == "cpu" else "bfloat16")
    magnitudes = magnitudes_of(problem)
    seen = np.isfinite(exact_lse)
    np.testing.assert_array_equal(np.isneginf(lse), ~seen)
    apart = np.where(seen, np.abs(naive_lse - np.where(seen, exact_lse, 0)), 0)
    score = 2.0**-20 * np.where(seen, np.abs(exact_lse), 0)
    assert_within(lse, exact_lse, 2 * apart + score + 1e-5, "lse")
    out = out.astype(np.float64)
    step = 2 * rounding_step(np.abs(exact).max(-1, keepdims=True), "bfloat16")
    moved = np.expm1(np.minimum(2 * score, 20)).T[..., None] * magnitudes
    rounded = 2 * np.abs(naive - exact).max(-1, keepdims=True)
    assert_within(out, exact, step + moved + rounded, "out")
    assert (np.abs(exact).max(axis=-1)[seen.T] > 0.02).all(), "a row that cannot tell"


def check_in_hull(problem) -> None:
    """What holds where a kernel rounds queries with their scales, or keys, to 16 bits.

    At scores of this size such a rounding decides which key weighs most. The LSE stays within it,
    and an output stays within the values that the query sees.
    """
    out, lse = problem.run("gpu")
    exact, exact_lse = problem.reference()
    seen = np.isfinite(exact_lse)
    np.testing.assert_array_equal(np.isneginf(lse), ~seen)
    assert_within(lse[seen], exact_lse[seen], 2.0**-9 * np.abs(exact_lse[seen]), "lse")
    out = out.astype(np.float64)
    assert np.isfinite(out).all() and not out[~seen.T].any()
    most = np.abs(exact).max()
    assert np.abs(out).max() <= 4 * most
    assert (np.abs(out).max(axis=-1)[seen.T] > 0.02).all(), "a row that cannot tell"


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", FEW, ids=str)
def test_all_scores_far_below_a_finite_stand_in(place, kind, step):
    """Products of about -1e5 and -2.4e5: below what stood for -inf, before the softmax scale."""
    for seed, size in enumerate((3e4, 6e4)):
        seqs = [STEPS[step], (64, 1), (0, 1)]
        options = {"window_size": (70, -1)} if seed else {}
        problem = paged_problem(seqs, kind=kind, seed=seed, v_mean=1.5, **options)
        steep = steepen(problem, size)
        if place == "gpu" and kind.quant_type != "none":
            check_in_hull(steep)
        else:
            check_steep(steep, place)


@pytest.mark.parametrize("q_type, kv_type", [("bfloat16", "bfloat16"), ("float16", "float16")])
def test_all_scores_far_below_zero_over_contiguous_keys(place, q_type, kv_type):
    seqs = [(77, 130), (1, 1), (5, 200), (66, 3), (1, 300)]
    for size in (3e4, 6e4):
        problem = flash_problem(seqs, q_type=q_type, kv_type=kv_type, causal=True, v_mean=1.5)
        problem.k[..., 0], problem.q[..., 0] = 4.0, -size
        check_steep_flash(problem, place)


def check_steep_flash(problem, place: str) -> None:
    seeing = np.isfinite(problem.reference()[1]).T
    out, lse = problem.run(place)
    assert not out[~seeing].any() and np.isneginf(lse.T[~seeing]).all()
    exact, exact_lse = problem.reference()
    naive, naive_lse = problem.reference("float32" if place == "cpu" else "bfloat16")
    score = 2.0**-20 * np.abs(exact_lse.T[seeing])
    apart = np.abs(naive_lse.T[seeing] - exact_lse.T[seeing])
    assert_within(lse.T[seeing], exact_lse.T[seeing], 2 * apart + score + 1e-5, "lse")
    magnitudes, _ = problem.with_magnitudes().reference()
    step = 2 * rounding_step(np.abs(exact[seeing]).max(-1, keepdims=True), "bfloat16")
    bound = step + np.expm1(2 * score)[:, None] * magnitudes[seeing]
    bound += 2 * np.abs(naive[seeing] - exact[seeing]).max(-1, keepdims=True)
    assert_within(out[seeing].astype(np.float64), exact[seeing], bound, "out")


#: Kinds that store infinities.
INFINITE = [PLAIN, CacheKind(dtype="float16"), CacheKind("cache_fp8", "tensor", "e5m2")]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", INFINITE, ids=str)
def test_scores_of_minus_infinity_ahead_of_finite_ones(place, kind, step):
    """Whole tiles of -inf first, in the middle and at the end; rows without anything else."""
    cached, new = STEPS[step]
    for infinite in (range(128), range(64, 192), range(100, cached + new), range(cached + new)):
        problem = paged_problem([(cached, new), (40, new)], kind=kind, causal=True)
        at = np.array([i for i in infinite if i < cached + new])
        where = problem.block_tables[0, at // 64], slice(None), at % 64, 0
        problem.k.elements[where] = 0xFC if kind.code == "e5m2" else -np.inf
        problem.q[..., 0] = 1.25
        out, _ = problem.check(place)
        assert np.isfinite(out.astype(np.float32)).all()


@pytest.mark.parametrize("q_type, kv_type", [("bfloat16", "bfloat16"), ("float16", "float16")])
def test_scores_of_minus_infinity_over_contiguous_keys(place, q_type, kv_type):
    problem = flash_problem([(70, 200), (1, 130), (5, 64)], q_type=q_type, kv_type=kv_type)
    problem.q[..., 0] = 1.25
    problem.k[:128, :, 0] = -np.inf
    problem.k[200:330, 0, 0] = -np.inf  # every key of a sequence and a head
    problem.k[390:, :, 0] = -np.inf
    problem.options["causal"] = True
    out, lse = problem.check(place)
    assert np.isneginf(lse[:2, 70]).all() and np.isfinite(lse[2:, 70]).all()
    assert not out[70, :2].any()


# --- sinks, tables, tiles of FP8 ----------------------------------------------------------------


@pytest.mark.parametrize("heads", [(3, 1), (10, 2), (14, 2), (12, 1)])
@pytest.mark.parametrize("kind", [PLAIN, BLOCK_WISE_FP8, FEW[2]], ids=str)
def test_sinks_of_groups_that_no_tile_divides(place, kind, heads):
    """A sink of each head, none alike; padded heads take nothing of the next group's."""
    sinks = np.linspace(-4, 9, heads[0]).astype(np.float32)
    for seqs in ([(300, 1), (63, 1)], [(0, 70), (130, 5)]):
        paged_problem(seqs, heads=heads, kind=kind, sinks=sinks).check(place)


@pytest.mark.parametrize("kind", FEW, ids=str)
def test_tables_that_end_with_the_last_key(place, kind):
    """Entries behind a sequence's blocks are out of range, and the longest one's table has none."""
    for last in (257, 256, 320):
        seqs = [(last - 1, 1), (0, 1), (63, 1), (64, 1), (190, 3)]
        problem = paged_problem(seqs, kind=kind)
        tables = np.ascontiguousarray(problem.block_tables[:, : -(-last // 64)])
        for seq, (cached, new) in enumerate(seqs):
            blocks = -(-(cached + new) // 64)
            tables[seq, blocks:] = np.resize([-1, 2**31 - 1, -(2**31), 2**30], 9)[
                : tables.shape[1] - blocks
            ]
        problem.block_tables = tables
        problem.check(place)


@pytest.mark.parametrize("kind", [FEW[2], FEW[3], BLOCK_WISE_FP8, PLAIN], ids=str)
@pytest.mark.parametrize("length", [96, 97, 129, 193])
def test_a_decoded_token_beside_the_same_one_of_a_prompt(place, kind, length):
    """The last token by decode, by a chunk and by prefill: tiles may have other widths there."""
    for q_type in query_types(kind):
        whole = paged_problem([(0, length)], kind=kind, q_type=q_type, dim=128)
        out, lse = whole.check(place)
        for new in (1, 67):
            part = dataclasses.replace(
                whole,
                q=whole.q[-new:],
                q_descale=None if whole.q_descale is None else whole.q_descale[-new:],
                cu_seqlens_q=np.array([0, new], np.int32),
                seq_lens_decoder=np.array([length - new], np.int32),
                seq_lens_this_time=np.array([new], np.int32),
            )
            other, other_lse = part.run(place, batch_invariant=True)
            if place == "cpu":  # a GPU has kernels of their own for many queries
                assert_same_bits(other, out[-new:], f"{new} new: out")
                assert_same_bits(other_lse, lse[:, -new:], f"{new} new: lse")
            part.check(place, f"{new} new", (other, other_lse))


# --- a prefix that sequences share --------------------------------------------------------------


@pytest.mark.parametrize("kind", INFINITE, ids=str)
@pytest.mark.parametrize("hidden", ["prefix", "suffix", "both"])
def test_a_side_of_a_cascade_whose_scores_are_minus_infinity(place, kind, hidden):
    seqs = [(192, 3), (192, 1), (255, 1), (256, 66)]
    problem = cascade_problem(seqs, kind=kind)
    problem.q[..., 0] = 1.25
    value = 0xFC if kind.code == "e5m2" else -np.inf
    if hidden != "suffix":
        problem.k.elements[problem.block_tables[0, :3], :, :, 0] = value
    if hidden != "prefix":
        for seq, (cached, new) in enumerate(seqs):
            at = np.arange(192, cached + new)
            problem.k.elements[problem.block_tables[seq, at // 64], :, at % 64, 0] = value
    out, lse = problem.check(place)
    assert np.isneginf(lse).all() == (hidden == "both")
    assert out.any() == (hidden != "both")


@pytest.mark.parametrize("kind", FEW, ids=str)
def test_scores_of_a_cascade_far_below_zero(place, kind):
    problem = cascade_problem([(192, 3), (192, 1), (255, 1)], kind=kind, v_mean=1.5)
    check_steep(steepen(problem, 6e4), place)


# --- the comparison itself ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "kind"), zip(STEPS, (PLAIN, BLOCK_WISE_FP8, FEW[1], FEW[7])), ids=str
)
def test_a_mask_off_by_one_is_seen(step, kind):
    """One key more or less in a single row is out of bound."""
    seqs = paged_cases(step)
    offsets = offsets_of([(new, cached + new) for cached, new in seqs])
    problem = paged_problem(seqs, kind=kind, causal=False, mask_offsets=offsets)
    results = problem.run()
    problem.check(results=results)
    row = 4 * seqs[0][1]  # of the sequence whose rows see one key each
    for change in ((0, 1), (-1, 0)):
        shifted = offsets.copy()
        shifted[row] += np.array(change, np.int32)
        other = paged_problem(seqs, kind=kind, causal=False, mask_offsets=shifted)
        with pytest.raises(AssertionError):
            other.check(results=results)
    window = paged_problem([(300, 1)], kind=kind, window_size=(70, -1))
    results = window.run()
    window.check(results=results)
    for left in (69, 71):
        window.options["window_size"] = (left, -1)
        with pytest.raises(AssertionError):
            window.check(results=results)


def test_the_bounds_of_steep_scores_see_a_row_of_zeros():
    problem = steepen(paged_problem([(300, 1), (0, 66)], v_mean=1.5), 6e4)
    out, lse = problem.run()
    for wrong in ((np.zeros_like(out), lse), (out, np.full_like(lse, -5e4)), (out * 0.5, lse)):
        with pytest.raises(AssertionError):
            check_steep(Given(problem, wrong), "cpu")


class Given:
    """A problem whose results are given."""

    def __init__(self, problem, results) -> None:
        self.problem, self.results = problem, results

    def __getattr__(self, name):
        return getattr(self.problem, name)

    def run(self, place):
        return self.results
