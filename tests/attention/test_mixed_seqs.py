"""Calls whose sequences decode, speculate and prefill: on a GPU each kind is a launch of its own.

The launches run at the same time and share a workspace; every sequence belongs to one of them.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.support.attention import CacheKind, flash_problem, paged_problem
from tests.support.compare import assert_same_bits

#: (cached, new) tokens: on both sides of every launch's limits, in no order, at odd offsets.
SEQS = [
    *((1500, 1), (701, 4), (0, 63), (333, 129), (0, 0), (64, 2), (2000, 17)),
    *((129, 64), (0, 1), (63, 65), (1000, 3), (5, 200), (900, 9), (0, 2)),
]

BF16 = CacheKind()
FP8 = CacheKind("cache_fp8", "head")
TOKEN_FP8 = CacheKind("block_wise_fp8")
#: Cache and queries: one pair for each kernel of long sequences and way of its values.
KINDS = [
    (BF16, "bfloat16"),
    (CacheKind(dtype="float16"), "float16"),
    (CacheKind("cache_int8", "channel"), "bfloat16"),
    (CacheKind("block_wise_int8"), "bfloat16"),
    (CacheKind("block_wise_int4"), "bfloat16"),
    (CacheKind("block_wise_mxfp4"), "bfloat16"),
    (CacheKind("block_wise_k8v4"), "bfloat16"),
    (CacheKind("block_wise_kfp8v4"), "bfloat16"),
    (TOKEN_FP8, "float16"),
    (FP8, "e4m3:token_head"),
    (TOKEN_FP8, "e4m3:tensor"),
]
FEW = [KINDS[0], KINDS[3], KINDS[5], KINDS[6]]


@pytest.mark.few_on_cpu
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("kind, q_type", KINDS, ids=str)
def test_every_kernel(place, kind, q_type, dim):
    paged_problem(SEQS, kind=kind, q_type=q_type, dim=dim, seed=1, padding=5).check(place)


@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (16, 2), (17, 1)], ids=str)
@pytest.mark.parametrize("kind, q_type", FEW, ids=str)
def test_query_head_groups(place, heads, kind, q_type):
    seqs = SEQS[1:8] + SEQS[10:11]
    paged_problem(seqs, kind=kind, q_type=q_type, heads=heads, seed=heads[0]).check(place)


@pytest.mark.parametrize("new", [2, 8, 16, 31, 32, 33, 63])
@pytest.mark.parametrize("kind, q_type", FEW[:3:2], ids=str)
def test_a_few_speculative_seqs_with_many_keys(place, kind, q_type, new):
    """Their keys are shared out over all multiprocessors, beside a chunk's tiles."""
    seqs = [(4001, new), (77, 180), (2900, new - 1)]
    paged_problem(seqs, kind=kind, q_type=q_type, dim=128, seed=new).check(place)


@pytest.mark.parametrize("q_type", ["bfloat16", "e4m3:tensor"])
def test_contiguous_keys(place, q_type):
    """FP8 values are transposed into the workspace that holds the partial results, too."""
    seqs = [(new, cached + new) for cached, new in SEQS]
    flash_problem(seqs, q_type=q_type, dim=128, seed=3, causal=True).check(place)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"window_size": (300, 0)},
        {"softcap": 5.0, "sinks": np.array([0.3, -1.0, 4.0, -np.inf], np.float32)},
        {"out_scale": np.array([0.07], np.float32)},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("kind, q_type", FEW[:3:2], ids=str)
def test_options(place, kind, q_type, options):
    paged_problem(SEQS[:8], kind=kind, q_type=q_type, dim=128, **options).check(place)


@pytest.mark.parametrize("kind, q_type", FEW[:3:2], ids=str)
def test_more_seqs_than_one_launch_takes(place, kind, q_type):
    seqs = [((17 * i) % 131, {7: 5, 300: 70, 301: 130}.get(i % 520, i % 3)) for i in range(1100)]
    paged_problem(seqs, kind=kind, q_type=q_type, seed=5).check(place)


@pytest.mark.parametrize("bound", [1, 16, 63, 64, 2**31 - 1])
@pytest.mark.parametrize("kind, q_type", FEW, ids=str)
def test_the_largest_length_masks_nothing(place, kind, q_type, bound):
    """No sequence is left out or done twice where the host's bound is too small or too large."""
    problem = paged_problem(SEQS[::-2], kind=kind, q_type=q_type, dim=128, seed=6)
    dataclasses.replace(problem, max_seqlen_q=bound).check(place)


@pytest.mark.parametrize("kind, q_type", FEW, ids=str)
def test_repeated_calls_give_the_same_bits(place, kind, q_type):
    """Launches that run at the same time do not disturb each other."""
    problem = paged_problem(SEQS, kind=kind, q_type=q_type, dim=128, seed=7, padding=1)
    out, lse = problem.check(place)
    for i in range(5):
        again = problem.run(place)
        assert_same_bits(again[0], out, f"{i}: out")
        assert_same_bits(again[1], lse, f"{i}: lse")
