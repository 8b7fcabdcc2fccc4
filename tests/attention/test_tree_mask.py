"""``tree_mask`` of paged_attention: trees of drafts and other masks among a step's new tokens.

Results are compared with dense attention in fp64 over the reference's boolean mask, which one test
holds to what a tree means: a token sees its own path and nothing else.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import reference
from tests.attention.test_masked_keys import GARBAGE, fill, query_types
from tests.support.attention import CACHE_KINDS, FEW_KINDS, PLAIN, CacheKind, paged_problem
from tests.support.compare import assert_same_bits
from tests.support.holes import hide, random_tree, slots_of, tree_masks, visible_of
from tests.support.tensors import to_paddle

#: (cached, new) tokens: trees of several sizes at several offsets, one token, and an idle sequence.
TREES = [(130, 7), (0, 5), (61, 1), (63, 12), (200, 0), (64, 9), (5, 12)]
#: Beside prompts that are too long to have a tree.
MIXED = [(130, 7), (3, 70), (217, 12), (64, 1)]
KINDS = [kind for kind in CACHE_KINDS if kind.scale_dtype == "float32"]


def tree_problem(seqs, size: int = 12, seed: int = 0, **options):
    rng = np.random.default_rng(seed + 1000)
    masks = tree_masks(rng, [new for _, new in seqs], size)
    return paged_problem(seqs, seed=seed, tree_mask=masks, **options)


def test_a_token_sees_its_path():
    """The model with a tree gives what each path gives as a sequence without branches."""
    rng = np.random.default_rng(3)
    cached, new = 70, 9
    tree = random_tree(rng, new)
    assert (tree.sum(axis=1) < np.arange(new) + 1).any(), "a tree with branches"
    problem = paged_problem([(cached, new)], heads=(4, 2), tree_mask=tree[None])
    out, lse = problem.reference()
    k, v, _ = reference.attention.gather_seq(
        problem.k.packed(), problem.v.packed(), problem.block_tables[0], cached + new
    )
    for token in range(new):
        path = np.concatenate([np.arange(cached), cached + np.flatnonzero(tree[token])])
        alone, alone_lse = reference.flash_attention(
            problem.q[token : token + 1], k[path], v[path], [0, 1], [0, len(path)]
        )
        np.testing.assert_allclose(out[token], alone[0], rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(lse[:, token], alone_lse[:, 0], rtol=1e-6)


@pytest.mark.parametrize("seqs", [TREES, MIXED], ids=["trees", "mixed"])
@pytest.mark.parametrize("kind", CACHE_KINDS, ids=str)
def test_every_type_of_cache(place, kind, seqs):
    problem = tree_problem(seqs, kind=kind, padding=2)
    hide(problem)
    problem.check(place)


@pytest.mark.few_on_cpu
@pytest.mark.parametrize("heads", [(4, 2), (6, 1), (16, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
def test_heads_of_every_size(place, kind, dim, heads):
    for seed, q_type in enumerate(query_types(kind)):
        problem = tree_problem(TREES, seed=seed, heads=heads, dim=dim, kind=kind, q_type=q_type)
        hide(problem)
        problem.check(place)


@pytest.mark.parametrize("kind", [PLAIN, FEW_KINDS[1], FEW_KINDS[2], FEW_KINDS[-1]], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"softcap": 5.0},
        {"window_size": (40, -1)},
        {"causal": False, "window_size": (30, 3)},
        {"sinks": np.array([0.3, -1.0, 4.0, 9.0], np.float32)},
        {"out_scale": np.array([0.017], np.float32)},
    ],
    ids=lambda options: "-".join(options),
)
def test_beside_other_options(place, kind, options):
    problem = tree_problem(MIXED, kind=kind, seed=2, **options)
    hide(problem)
    problem.check(place)


@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
def test_any_mask_of_a_long_extend(place, kind):
    """Masks without order, in which tokens see later ones, and some see no new token at all."""
    rng = np.random.default_rng(7)
    seqs = [(70, 140), (0, 71), (64, 64), (129, 3)]
    masks = rng.random((4, 140, 140)) < 0.3
    masks[:, ::9] = False
    problem = paged_problem(seqs, kind=kind, causal=False, tree_mask=masks)
    hide(problem)
    _, lse = problem.check(place)
    empty = 140 + np.arange(0, 71, 9)
    assert np.isneginf(lse[:, empty]).all()


@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
def test_a_token_that_sees_nothing(place, kind):
    """No cached key, or cached ones that offsets hide: output 0 and LSE -inf, as without a tree."""
    seqs = [(0, 4), (70, 4)]
    masks = np.ones((2, 4, 4), bool)
    masks[0, 2] = masks[1, 3] = False
    offsets = np.full((8, 2), [0, 1000], np.int32)
    offsets[7] = 70, 1000
    problem = paged_problem(seqs, kind=kind, tree_mask=masks, mask_offsets=offsets)
    out, lse = problem.check(place)
    assert not out[[2, 7]].any() and np.isneginf(lse[:, [2, 7]]).all()
    assert np.isfinite(lse[:, [0, 1, 3, 4, 5, 6]]).all()


@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
def test_many_keys_and_splits(place, kind):
    problem = tree_problem([(4200, 8), (2041, 7)], kind=kind, heads=(4, 1))
    hide(problem)
    problem.check(place)


@pytest.mark.few_on_cpu
@pytest.mark.parametrize("q_index", [0, 1])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_key_off_the_path_moves_no_bit(place, kind, q_index):
    types = query_types(kind)
    if q_index >= len(types):
        pytest.skip("has no FP8 products")
    problem = tree_problem([(58, 11), (3, 5)], kind=kind, q_type=types[q_index], seed=5)
    visible = visible_of(problem, 0)[0]
    for key in (60, 63, 64, 66, 68):
        queries = np.flatnonzero(~visible[:, key])
        if not (visible[key - 58 :, key].all() or queries.size):
            continue
        results = {}
        for garbage in ("zero", *GARBAGE):
            other = dataclasses.replace(
                problem,
                k=dataclasses.replace(
                    problem.k,
                    elements=problem.k.elements.copy(),
                    scales=None if problem.k.scales is None else problem.k.scales.copy(),
                ),
                v=dataclasses.replace(
                    problem.v,
                    elements=problem.v.elements.copy(),
                    scales=None if problem.v.scales is None else problem.v.scales.copy(),
                ),
            )
            for stored in (other.k, other.v):
                code = None if kind.quant_type == "none" else stored.code
                scales = stored.scales if kind.dynamic else None
                for head in range(2):
                    where = slots_of(problem, 0, head, [key])
                    fill(stored.elements, scales, where, code, garbage)
            results[garbage] = other.run(place, out_dtype="float32")
        for garbage in GARBAGE:
            for got, want in zip(results[garbage], results["zero"]):
                axis = 0 if got.ndim == 3 else 1
                assert_same_bits(got.take(queries, axis), want.take(queries, axis), garbage)


@pytest.mark.parametrize("kind", [PLAIN, CacheKind("block_wise_fp8")], ids=str)
def test_a_nan_on_the_path_stays(place, kind):
    problem = tree_problem([(58, 11)], kind=kind, seed=5)
    visible = visible_of(problem, 0)[0]
    problem.poison("v", 0, 61)
    out, _ = problem.run(place)
    np.testing.assert_array_equal(np.isnan(out).any(axis=(1, 2)), visible[:, 61])
    problem.check(place)


def test_dtypes_of_the_mask(place):
    problem = tree_problem(MIXED)
    masks = problem.options["tree_mask"]
    want = problem.run(place)
    types = [np.uint8, np.int8]
    if place == "cpu":  # others are converted by Paddle, which 2.6 cannot do on a GPU
        types += [np.int32, np.int64]
    for dtype in types:
        given = to_paddle(masks.astype(dtype) * np.array(3, dtype), place)
        for got, expected in zip(problem.run(place, tree_mask=given), want):
            assert_same_bits(got, expected, str(dtype))


def test_a_mask_of_more_sequences(place):
    problem = tree_problem(TREES)
    masks = problem.options["tree_mask"]
    more = np.concatenate([masks, ~masks[:2]])
    want = problem.run(place)
    for got, expected in zip(problem.run(place, tree_mask=to_paddle(more, place)), want):
        assert_same_bits(got, expected)


def test_a_sequence_alone_gives_what_it_gives_in_a_batch():
    problem = tree_problem(TREES)
    out, lse = problem.run()
    for seq, (_, new) in enumerate(TREES):
        first = problem.cu_seqlens_q[seq]
        alone = dataclasses.replace(
            problem,
            q=problem.q[first : first + new],
            block_tables=problem.block_tables[seq : seq + 1],
            cu_seqlens_q=np.array([0, new], np.int32),
            seq_lens_decoder=problem.seq_lens_decoder[seq : seq + 1],
            seq_lens_this_time=problem.seq_lens_this_time[seq : seq + 1],
            options={"tree_mask": problem.options["tree_mask"][seq : seq + 1]},
        )
        if new:
            one, one_lse = alone.run()
            assert_same_bits(one, out[first : first + new])
            assert_same_bits(one_lse, lse[:, first : first + new])


@pytest.mark.parametrize(
    ("mask", "error", "text"),
    [
        (np.ones((6, 12, 12), bool), ValueError, r"tree_mask: expected shape \[7, N, N\]"),
        (np.ones((7, 12, 11), bool), ValueError, r"tree_mask: expected shape \[7, N, N\]"),
        (np.ones((7, 0, 0), bool), ValueError, "tree_mask: expected a tensor with elements"),
        (np.ones((7, 12), bool), ValueError, "tree_mask: expected 3 dim"),
        (np.ones((7, 12, 12), np.float32), TypeError, "tree_mask: expected dtype"),
        ([1], TypeError, "tree_mask: expected a tensor"),
    ],
)
def test_wrong_masks(mask, error, text):
    problem = tree_problem(TREES)
    with pytest.raises(error, match=text):
        problem.run(tree_mask=mask if isinstance(mask, list) else to_paddle(mask))


def test_refused_together():
    problem = tree_problem(TREES)
    with pytest.raises(NotImplementedError, match="batch_invariant: not supported with tree_mask"):
        problem.run(batch_invariant=True)
    masks = to_paddle(problem.options["tree_mask"])
    positional, keywords = problem.arguments()
    flat = paddle.zeros([masks.size]).astype("uint8")
    with pytest.raises(ValueError, match="out"):
        F.paged_attention(*positional, **{**keywords, "out": flat})
