"""paged_attention with a block table, a window and first tokens for each KV head."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest

from fastattn import reference
from tests.attention.test_masked_keys import GARBAGE, fill, query_types
from tests.support.attention import CACHE_KINDS, FEW_KINDS, PLAIN, CacheKind, paged_problem
from tests.support.compare import assert_same_bits
from tests.support.holes import (
    hide,
    slots_of,
    tree_masks,
    visible_of,
    with_pool_of_heads,
    with_tables_of_heads,
)
from tests.support.tensors import int32, to_paddle

#: (cached, new) tokens: decode, drafts, chunks and prompts, and an idle sequence.
MIXED = [(300, 1), (0, 1), (261, 5), (70, 70), (64, 0), (63, 1)]
#: (left, first) of two KV heads: one sees all, the other a window, or a window and first tokens.
WINDOWS = [
    [(-1, 0), (100, 0)],
    [(-1, 0), (100, 4)],
    [(63, 64), (129, 70)],
    [(0, 1), (64, 0)],
    [(5, 0), (-1, 17)],
    [(700, 3), (200, 1000)],
]


def as_windows(pairs) -> np.ndarray:
    return np.array(pairs, np.int32)


def test_the_model_of_windows():
    """What each query sees, key by key."""
    for left, first in [(-1, 0), (-1, 5), (0, 0), (3, 0), (3, 2), (3, 20), (100, 2)]:
        mask = reference.attention_mask(4, 13, causal=True, head_window=(left, first))
        for i in range(4):
            position = 9 + i
            seen = [
                key
                for key in range(13)
                if key <= position and (left < 0 or key >= position - left or key < first)
            ]
            np.testing.assert_array_equal(np.flatnonzero(mask[i]), seen)


def test_the_model_of_tables():
    """A table for each head gives what one table gives, where each head has the same bytes."""
    problem = paged_problem(MIXED, kind=CacheKind("block_wise_fp8"))
    out, lse = problem.reference()
    other, other_lse = with_tables_of_heads(problem).reference()
    assert_same_bits(other, out)
    assert_same_bits(other_lse, lse)
    # And a head's window is what `window_size` is for all of them.
    windows = {"head_windows": as_windows([(-1, 0), (33, 0)])}
    mixed, _ = dataclasses.replace(problem, options=windows).reference()
    narrow, _ = dataclasses.replace(problem, options={"window_size": (33, -1)}).reference()
    np.testing.assert_allclose(mixed[:, :2], out[:, :2], rtol=1e-12)
    np.testing.assert_allclose(mixed[:, 2:], narrow[:, 2:], rtol=1e-12)


@pytest.mark.parametrize("kind", CACHE_KINDS, ids=str)
def test_tables_of_every_type(place, kind):
    problem = with_tables_of_heads(paged_problem(MIXED, kind=kind, padding=2))
    problem.check(place)


@pytest.mark.few_on_cpu("windows", "kind")
@pytest.mark.parametrize("kind", CACHE_KINDS, ids=str)
def test_pools_of_every_type(place, kind):
    """A cache of one head, whose blocks all heads share."""
    options = {"head_windows": as_windows([(100, 4), (-1, 0)])}
    problem = paged_problem(MIXED, kind=kind, **options)
    hide(problem)
    pool = with_pool_of_heads(problem)
    assert pool.k.elements.shape[1] == 1
    got, got_lse = pool.check(place)
    want, want_lse = problem.run(place)
    assert_same_bits(got, want)
    assert_same_bits(got_lse, want_lse)
    if kind.granularity == "tensor":
        exact, _ = pool.reference()
        np.testing.assert_array_equal(exact, problem.reference()[0])


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
def test_windows(place, kind, windows):
    for seed, q_type in enumerate(query_types(kind)):
        problem = paged_problem(
            MIXED, kind=kind, seed=seed, q_type=q_type, head_windows=as_windows(windows)
        )
        hide(problem)
        problem.check(place)


@pytest.mark.few_on_cpu
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (16, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
def test_heads_of_every_size(place, kind, dim, heads):
    windows = as_windows([(90, 3), (-1, 0), (40, 0)][: heads[1]])
    problem = paged_problem(MIXED, kind=kind, dim=dim, heads=heads, head_windows=windows)
    problem = with_tables_of_heads(problem)
    hide(problem)
    problem.check(place)


@pytest.mark.parametrize("kind", CACHE_KINDS, ids=str)
def test_freed_blocks(place, kind):
    """Blocks that no query of a head sees need no entry. Some other sequence may have them."""
    windows = as_windows([(-1, 0), (100, 70)])
    problem = paged_problem([(500, 1), (317, 5), (400, 70)], kind=kind, head_windows=windows)
    whole = with_tables_of_heads(problem)
    freed = copy.deepcopy(whole)
    count = 0
    for seq in range(3):
        for head, visible in enumerate(visible_of(whole, seq)):
            seen = visible.any(axis=0)
            for block in range(len(seen) // 64):
                if not seen[64 * block : 64 * block + 64].any():
                    freed.block_tables[seq, head, block] = [-1, 2**30, -5][count % 3]
                    count += 1
    assert count >= 5
    hide(whole)
    want, want_lse = whole.check(place)
    got, got_lse = freed.check(place)
    assert_same_bits(got, want)
    assert_same_bits(got_lse, want_lse)


@pytest.mark.few_on_cpu
@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"softcap": 5.0},
        {"window_size": (200, -1)},
        {"sinks": np.array([0.3, -1.0, 4.0, 9.0], np.float32)},
        {"out_scale": np.array([0.017], np.float32)},
        {"quantize_q": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_beside_other_options(place, kind, options):
    if "quantize_q" in options and (kind.quant_type == "none" or kind.code != "e4m3"):
        pytest.skip("its queries stay as they are")
    windows = as_windows([(63, 64), (129, 7)])
    problem = paged_problem(MIXED, kind=kind, seed=2, head_windows=windows, **options)
    hide(problem)
    with_tables_of_heads(problem).check(place)


@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
def test_beside_trees_and_offsets(place, kind):
    rng = np.random.default_rng(4)
    seqs = [(300, 9), (0, 5), (217, 12), (70, 70)]
    tokens = sum(new for _, new in seqs)
    start = rng.integers(0, 90, tokens)
    offsets = np.stack([start, start + rng.integers(1, 300, tokens)], axis=1).astype(np.int32)
    problem = paged_problem(
        seqs,
        kind=kind,
        tree_mask=tree_masks(rng, [new for _, new in seqs], 12),
        mask_offsets=offsets,
        head_windows=as_windows([(100, 80), (-1, 0)]),
    )
    problem = with_tables_of_heads(problem)
    hide(problem)
    problem.check(place)


@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
def test_many_keys_and_splits(place, kind):
    windows = as_windows([(64, 5), (-1, 0)])
    problem = paged_problem([(4200, 1), (2041, 2)], kind=kind, heads=(4, 2), head_windows=windows)
    problem = with_tables_of_heads(problem)
    hide(problem)
    problem.check(place)


@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
def test_a_key_in_the_gap_moves_no_bit(place, kind):
    problem = paged_problem([(300, 6)], kind=kind, head_windows=as_windows([(70, 3), (40, 64)]))
    for head, keys in ((0, [3, 60, 229]), (1, [64, 130, 259])):
        results = {}
        for garbage in ("zero", *GARBAGE):
            other = copy.deepcopy(problem)
            for stored in (other.k, other.v):
                code = None if kind.quant_type == "none" else stored.code
                scales = stored.scales if kind.dynamic else None
                fill(stored.elements, scales, slots_of(problem, 0, head, keys), code, garbage)
            results[garbage] = other.run(place, out_dtype="float32")
        blind = ~visible_of(problem, 0)[head][:, keys].any(axis=1)
        assert blind.any()
        of_head = slice(2 * head, 2 * head + 2)
        for garbage in GARBAGE:
            (got, got_lse), (want, want_lse) = results[garbage], results["zero"]
            assert_same_bits(got[blind, of_head], want[blind, of_head], garbage)
            assert_same_bits(got_lse[of_head, blind], want_lse[of_head, blind], garbage)


def test_a_window_of_nothing(place):
    """A query of offsets that end before its head's window sees nothing."""
    offsets = np.tile(np.array([[5, 100]], np.int32), (3, 1))
    windows = as_windows([(10, 0), (10, 6)])
    problem = paged_problem([(300, 3)], head_windows=windows, mask_offsets=offsets)
    out, lse = problem.check(place)
    assert np.isneginf(lse[:2]).all() and not out[:, :2].any()
    assert np.isfinite(lse[2:]).all()


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("head_windows", np.zeros((3, 2), np.int32), ValueError, r"head_windows: expected shape"),
        ("head_windows", np.zeros((2, 2), np.int64), TypeError, "head_windows: expected dtype"),
        (
            "block_tables",
            np.zeros((6, 3, 20), np.int32),
            ValueError,
            r"\[sequences, 2 \(KV heads\)",
        ),
        ("block_tables", np.zeros((6, 1, 2, 3), np.int32), ValueError, "block_tables: expected 2"),
    ],
)
def test_wrong_shapes(name, value, error, text):
    problem = paged_problem(MIXED)
    with pytest.raises(error, match=text):
        if name == "block_tables":
            dataclasses.replace(problem, block_tables=value).run()
        else:
            problem.run(**{name: to_paddle(value)})


def test_refused_together():
    problem = paged_problem(MIXED, kind=PLAIN)
    with pytest.raises(NotImplementedError, match="not supported with head_windows"):
        problem.run(batch_invariant=True, head_windows=int32(np.zeros((2, 2))))
    with pytest.raises(NotImplementedError, match="not supported with a block table for each KV"):
        with_tables_of_heads(problem).run(batch_invariant=True)
