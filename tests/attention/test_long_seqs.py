"""Long sequences: what depends on how many KV iterations and work tiles they have, and softcaps.

On a Hopper GPU a KV iteration takes 128 keys and a work tile 128 queries of a head. Block ids are
found for 16 iterations at a time, sequences of up to 32 work tiles are scheduled otherwise than
longer ones, and a softcap is a kernel of its own.
"""

from __future__ import annotations

import pytest

from tests.support.attention import CacheKind, paged_problem

#: Caches of 16 bits and of each way of codes into the products; of e4m3 queries, too.
KINDS = [
    (CacheKind(), None),
    (CacheKind("cache_int8", "channel"), None),
    (CacheKind("cache_int8", "head"), "float16"),
    (CacheKind("cache_fp8", "head"), None),
    (CacheKind("cache_fp8", "head"), "float16"),
    (CacheKind("cache_fp8", "tensor", "e5m2"), None),
    (CacheKind("block_wise_int8"), None),
    (CacheKind("block_wise_int4"), None),
    (CacheKind("block_wise_mxfp4"), None),
    (CacheKind("block_wise_k8v4"), None),
    (CacheKind("block_wise_kfp8v4"), None),
    (CacheKind("block_wise_fp8"), None),
    (CacheKind("cache_fp8", "head"), "e4m3:token_head"),
    (CacheKind("block_wise_fp8"), "e4m3:tensor"),
]
IDS = [f"{kind}-{q_type or 'bfloat16'}" for kind, q_type in KINDS]
each_kind = pytest.mark.parametrize(("kind", "q_type"), KINDS, ids=IDS)


@each_kind
def test_more_kv_iterations_than_two_windows_of_blocks(place, kind, q_type):
    seqs = [(4300, 200), (2100, 130), (0, 70)]
    paged_problem(seqs, kind=kind, heads=(2, 1), dim=128, q_type=q_type, seed=11).check(place)


@pytest.mark.parametrize(("kind", "q_type"), KINDS[1:2] + KINDS[-2:], ids=IDS[1:2] + IDS[-2:])
def test_seqs_of_more_work_tiles_than_ctas_take(place, kind, q_type):
    seqs = [(0, 4200), (300, 200)]
    problem = paged_problem(seqs, kind=kind, heads=(1, 1), q_type=q_type, seed=12)
    problem.check(place)


@each_kind
def test_work_tiles_of_one_to_three_kv_iterations(place, kind, q_type):
    seqs = [(0, n) for n in (64, 127, 128, 129, 256, 257, 384, 385)]
    paged_problem(seqs, kind=kind, heads=(2, 2), dim=128, q_type=q_type, seed=13).check(place)


@pytest.mark.parametrize(("kind", "q_type"), KINDS[3:4] + KINDS[-3:], ids=IDS[3:4] + IDS[-3:])
def test_more_seqs_than_are_listed_at_once(place, kind, q_type):
    # 256 are listed at a time; those of few tokens are for another kernel.
    seqs = [((7 * i) % 150, 64 + (5 * i) % 9) for i in range(300)] + [(30, 200)]
    paged_problem(seqs, kind=kind, heads=(1, 1), q_type=q_type, seed=14).check(place)


@pytest.mark.few_on_cpu
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@each_kind
def test_softcap(place, kind, q_type, dim):
    seqs = [(300, 200), (0, 333)]
    options = {"softcap": 5.0, "causal": True} if dim == 64 else {"softcap": 50.0, "causal": False}
    paged_problem(seqs, kind=kind, dim=dim, q_type=q_type, seed=15, **options).check(place)
