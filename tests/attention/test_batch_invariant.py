"""paged_attention(batch_invariant=True): a sequence's bits follow from the sequence alone."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

import fastattn.functional as F
from tests.attention.test_gpu_graph import capture
from tests.support.attention import (
    BLOCK_WISE_FP8,
    CACHE_KINDS,
    PLAIN,
    CacheKind,
    PagedProblem,
    flash_problem,
    paged_problem,
)
from tests.support.compare import assert_same_bits
from tests.support.tensors import to_numpy

FP8 = CacheKind("cache_fp8", "head")
#: Cache and queries: one pair for each kernel of long sequences and way of its values.
KINDS = [
    (PLAIN, "bfloat16"),
    (FP8, "bfloat16"),
    (FP8, "e4m3:token_head"),
    (BLOCK_WISE_FP8, "bfloat16"),
    (BLOCK_WISE_FP8, "e4m3:tensor"),
    (CacheKind("block_wise_int8"), "bfloat16"),
    (CacheKind("block_wise_int4"), "bfloat16"),
    (CacheKind("block_wise_mxfp4"), "bfloat16"),
    (CacheKind("block_wise_k8v4"), "bfloat16"),
    (CacheKind("block_wise_kfp8v4"), "bfloat16"),
    (CacheKind("cache_int8", "channel"), "bfloat16"),
]
#: (cached, new) tokens: decoding, speculative and long sequences, on both sides of every limit
#: between kernels and splits, at odd offsets.
SEQS = [
    *((1500, 1), (701, 4), (0, 63), (333, 129), (0, 0), (64, 2), (2047, 1), (1200, 17)),
    *((129, 64), (0, 1), (1023, 3), (5, 150), (600, 33), (4100, 1), (700, 32)),
]


class Invariant(PagedProblem):
    """A problem whose operator gets the option; the reference has no such thing."""

    def run(self, place: str = "cpu", **extra):
        return super().run(place, **{"batch_invariant": True, **extra})


def invariant(problem: PagedProblem) -> Invariant:
    return Invariant(**{f.name: getattr(problem, f.name) for f in dataclasses.fields(problem)})


def batch_of(problem: PagedProblem, seqs, *, padding: int = 0) -> PagedProblem:
    """The step of some of the sequences, in another order; tokens of no sequence lie behind."""
    seqs = list(seqs)
    new = problem.seq_lens_this_time[seqs]
    tokens = [
        np.arange(problem.cu_seqlens_q[s], problem.cu_seqlens_q[s] + n) for s, n in zip(seqs, new)
    ]
    rows = np.concatenate([*tokens, np.zeros(padding, int)]).astype(int)
    options = dict(problem.options)
    if options.get("mask_offsets") is not None:
        options["mask_offsets"] = options["mask_offsets"][rows]
    descale = problem.q_descale
    if descale is not None and descale.ndim == 2:
        descale = descale[rows]
    return dataclasses.replace(
        problem,
        q=problem.q[rows],
        q_descale=descale,
        block_tables=problem.block_tables[seqs],
        cu_seqlens_q=np.concatenate([[0], np.cumsum(new)]).astype(np.int32),
        seq_lens_decoder=problem.seq_lens_decoder[seqs],
        seq_lens_this_time=new,
        options=options,
    )


def moved(problem: PagedProblem, seed: int) -> PagedProblem:
    """The same sequences in other blocks, behind tables of another width."""
    blocks = len(problem.k.elements)
    to = np.random.default_rng(seed).permutation(blocks + 5)[:blocks]

    def move(stored):
        def spread(x):
            wider = np.zeros((blocks + 5, *x.shape[1:]), x.dtype)
            wider[to] = x
            return wider

        scales = spread(stored.scales) if stored.kind.dynamic else stored.scales
        return dataclasses.replace(stored, elements=spread(stored.elements), scales=scales)

    tables = problem.block_tables
    known = (tables >= 0) & (tables < blocks)
    tables = np.where(known, to[np.where(known, tables, 0)], -1)
    tables = np.concatenate([tables, np.full((len(tables), 9), -1)], axis=1).astype(np.int32)
    return dataclasses.replace(problem, k=move(problem.k), v=move(problem.v), block_tables=tables)


def bits_of(problem: PagedProblem, results) -> list[tuple[np.ndarray, np.ndarray]]:
    """(out, LSE) of each sequence."""
    out, lse = results
    spans = zip(problem.cu_seqlens_q, problem.seq_lens_this_time)
    return [(out[first : first + n], lse[:, first : first + n]) for first, n in spans]


def assert_seqs(problem: PagedProblem, results, wanted, seqs, what: str) -> None:
    for s, (out, lse) in zip(seqs, bits_of(problem, results)):
        assert_same_bits(out, wanted[s][0], f"{what}: sequence {s}: out")
        assert_same_bits(lse, wanted[s][1], f"{what}: sequence {s}: lse")


def check_batches(problem: PagedProblem, place: str, batches=(1, 2, 7)) -> None:
    """Compare the whole step with smaller ones, in another order, elsewhere, and again."""
    problem = invariant(problem)
    rng = np.random.default_rng(0)
    count = len(problem.seq_lens_this_time)
    every = range(count)
    wanted = bits_of(problem, problem.run(place))
    for size in batches:
        order = rng.permutation(count)
        for first in range(0, count, size):
            seqs = order[first : first + size]
            part = batch_of(problem, seqs, padding=int(rng.integers(0, 3)))
            assert_seqs(part, part.run(place), wanted, seqs, f"of {len(seqs)}")
    order = rng.permutation(count)
    assert_seqs(batch_of(problem, order), batch_of(problem, order).run(place), wanted, order, "all")
    assert_seqs(problem, moved(problem, 0).run(place), wanted, every, "other blocks")
    assert_seqs(problem, problem.run(place), wanted, every, "again")
    loose = dataclasses.replace(problem, max_seqlen_q=4096)
    positional, keywords = loose.arguments(place)
    positional[-1] = 1 << 17
    assert_seqs(problem, run(positional, keywords), wanted, every, "other bounds")


def run(positional, keywords):
    results = F.paged_attention(
        *positional, return_softmax_lse=True, batch_invariant=True, **keywords
    )
    return tuple(to_numpy(x) for x in results)


# --- the same bits in every batch ----------------------------------------------------------------


@pytest.mark.few_on_cpu
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("kind, q_type", KINDS, ids=str)
def test_mixed_steps(place, kind, q_type, dim):
    """Prefill, speculation and decode in one step, and in steps of their own."""
    problem = paged_problem(SEQS, kind=kind, q_type=q_type, dim=dim, heads=(2, 1), seed=dim)
    check_batches(problem, place, batches=(1, 4))


@pytest.mark.parametrize("kind", CACHE_KINDS, ids=str)
def test_every_cache_type(place, kind):
    seqs = [(3000, 1), (513, 1), (64, 1), (1200, 3), (400, 40), (100, 70)]
    check_batches(paged_problem(seqs, kind=kind, seed=3), place, batches=(1, 3))


@pytest.mark.parametrize("heads", [(2, 2), (8, 1), (16, 2), (16, 1), (17, 1), (9, 9)], ids=str)
@pytest.mark.parametrize("kind, q_type", KINDS[1:4:2], ids=str)
def test_query_head_groups(place, heads, kind, q_type):
    seqs = [(3000, 1), (1029, 2), (700, 9), (100, 70), (4100, 1)]
    problem = paged_problem(seqs, kind=kind, q_type=q_type, heads=heads, seed=heads[0])
    check_batches(problem, place, batches=(1, 2))


def _offsets(seqs) -> np.ndarray:
    """An interval of keys for each query, empty ones among them."""
    rng = np.random.default_rng(5)
    spans = []
    for cached, new in seqs:
        start = rng.integers(0, cached + new, new)
        spans.append(np.stack([start, start + rng.integers(0, cached + new, new)], 1))
    return np.concatenate(spans).astype(np.int32)


_OPTION_SEQS = [s for s in SEQS if s[1] > 0]
OPTIONS = {
    "window": {"window_size": (900, 0)},
    "short window": {"window_size": (70, -1)},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": np.array([0.5, -2.0, 3.0, -np.inf], np.float32)},
    "not causal": {"causal": False},
    "mask_offsets": {"mask_offsets": _offsets(_OPTION_SEQS), "causal": False},
    "out_scale": {"out_scale": np.array([0.013], np.float32)},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", [PLAIN, BLOCK_WISE_FP8], ids=str)
def test_masks_and_logit_options(place, kind, name):
    problem = paged_problem(_OPTION_SEQS, kind=kind, seed=8, **OPTIONS[name])
    check_batches(problem, place, batches=(3,))
    invariant(problem).check(place, name)


@pytest.mark.parametrize("batch", [2, 7, 64, 256])
@pytest.mark.parametrize("kind", [PLAIN, FP8, BLOCK_WISE_FP8], ids=str)
def test_decode_beside_many_others(place, kind, batch):
    """Sequences of every length, each alone and as one of a batch that is ragged."""
    rng = np.random.default_rng(batch)
    keys = [1, 64, 500, 1023, 1025, 3000, 6000][: min(batch, 7)]
    others = rng.integers(0, 150, batch - len(keys))
    seqs = [(n, 1) for n in (*keys, *others)]
    problem = invariant(paged_problem(seqs, kind=kind, heads=(8, 2), seed=batch))
    order = rng.permutation(batch)
    step = batch_of(problem, order)
    found = bits_of(step, step.run(place))
    for place_in_batch in np.flatnonzero(order < len(keys)):
        seq = order[place_in_batch]
        alone = batch_of(problem, [seq])
        assert_seqs(alone, alone.run(place), {seq: found[place_in_batch]}, [seq], f"of {batch}")


@pytest.mark.parametrize("new", [1, 2, 4, 8, 31, 33, 63, 64, 130])
def test_one_length_in_batches_of_all_sizes(place, new):
    """Where all sequences are alike, the number of them decides about nothing either."""
    seqs = [(2500 + 64 * i, new) for i in range(9)]
    problem = paged_problem(seqs, kind=FP8, dim=128, heads=(4, 1), seed=new)
    check_batches(problem, place, batches=(1, 4))


def test_inactive_seqs_and_padding_do_not_count(place):
    seqs = [(3000, 1), (0, 0), (77, 0), (900, 5), (100, 80), (0, 0)]
    problem = invariant(paged_problem(seqs, kind=FP8, seed=4, padding=7))
    wanted = bits_of(problem, problem.run(place))
    active = [0, 3, 4]
    step = batch_of(problem, active)
    assert_seqs(step, step.run(place), wanted, active, "without the others")


@pytest.mark.parametrize("q_type", ["bfloat16", "e4m3:tensor"])
def test_long_seqs_over_contiguous_keys(place, q_type):
    """flash_attention has no such option; sequences of more than 64 tokens do not need it."""
    seqs = [(65, 700), (200, 200), (130, 1500), (1, 900), (70, 75)]
    problem = flash_problem(seqs, q_type=q_type, dim=128, seed=3, causal=True)
    out, lse = problem.run(place)
    for s, (new, keys) in enumerate(seqs):
        if new <= 64:
            continue
        q0, k0 = problem.cu_seqlens_q[s], problem.cu_seqlens_k[s]
        alone = dataclasses.replace(
            problem,
            q=problem.q[q0 : q0 + new],
            k=problem.k[k0 : k0 + keys],
            v=problem.v[k0 : k0 + keys],
            cu_seqlens_q=np.array([0, new], np.int32),
            cu_seqlens_k=np.array([0, keys], np.int32),
        )
        alone_out, alone_lse = alone.run(place)
        assert_same_bits(alone_out, out[q0 : q0 + new], f"sequence {s}: out")
        assert_same_bits(alone_lse, lse[:, q0 : q0 + new], f"sequence {s}: lse")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [PLAIN, FP8, BLOCK_WISE_FP8], ids=str)
def test_a_graph_gives_the_bits_of_eager_calls(kind):
    """One graph, captured with bounds that no step reaches; sequences change places and lengths."""
    seqs = [(3000, 1), (500, 6), (90, 80), (40, 1), (1500, 1), (0, 0)]
    problem = invariant(paged_problem(seqs, kind=kind, dim=128, seed=9, padding=1))
    wanted = bits_of(problem, problem.run("gpu"))
    tokens = len(problem.q)

    def step(order):
        new = batch_of(problem, order)
        return dataclasses.replace(
            batch_of(problem, order, padding=tokens - len(new.q)), max_seqlen_q=200
        )

    positional, keywords = step(range(6)).arguments("gpu")
    held = positional[:7]
    bounds, options = (200, 1 << 15), {**keywords, "batch_invariant": True}
    call = functools.partial(F.paged_attention, *held, *bounds, return_softmax_lse=True, **options)
    call()
    with capture() as graph:
        results = call()
    for order in ([0, 1, 2, 3, 4, 5], [5, 4, 0, 1, 3, 2], [3, 2, 1, 0, 5, 4]):
        for mine, its in zip(held, step(order).arguments("gpu")[0]):
            mine.copy_(its, True)
        graph.replay()
        found = tuple(to_numpy(x) for x in results)
        assert_seqs(batch_of(problem, order), found, wanted, order, f"replay of {order}")
    del results
    graph.reset()


# --- right, too ----------------------------------------------------------------------------------


@pytest.mark.few_on_cpu
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("kind, q_type", KINDS, ids=str)
def test_error(place, kind, q_type, dim):
    problem = paged_problem(SEQS, kind=kind, q_type=q_type, dim=dim, seed=1, padding=5)
    invariant(problem).check(place)


@pytest.mark.parametrize("kind", [PLAIN, FP8, BLOCK_WISE_FP8], ids=str)
@pytest.mark.parametrize("batch, keys", [(1, 6000), (3, 3000), (40, 700)])
def test_error_of_split_keys(place, kind, batch, keys):
    """Work tiles that lie in one CTA, in some, and in many."""
    seqs = [(keys - 7 * i, 1) for i in range(batch)]
    problem = paged_problem(seqs, kind=kind, dim=128, heads=(4, 2), seed=batch, v_mean=3.0)
    invariant(problem).check(place)


def test_more_keys_than_the_host_was_told(place):
    """A bound that is too small costs the promise, never the result."""
    problem = paged_problem([(5000, 1), (10, 1), (3000, 40)], kind=FP8, dim=128, seed=2)
    positional, keywords = problem.arguments(place)
    positional[-2:] = [1, 600]
    problem.check(place, results=run(positional, keywords))


#: Intervals without a key, ahead of the keys, among them and after them.
EMPTY = [(4096, 4096), (0, -100), (20000, 20000), (1024, 1024), (0, 0), (5120, 5119), (-9, -8)]


@pytest.mark.parametrize("option", ["batch_invariant", "split_invariant"])
@pytest.mark.parametrize("new", [1, 7, 40])
def test_queries_that_see_no_key(place, new, option):
    """No CTA waits for a result that no other leaves. Each sequence has queries of one interval."""
    seqs = [(6000 - new, new)] * len(EMPTY) + [(6000, new)]
    offsets = np.repeat(np.array([*EMPTY, (17, 5990)], np.int32), new, axis=0)
    problem = paged_problem(seqs, kind=FP8, causal=False, mask_offsets=offsets, heads=(4, 2))
    _, lse = problem.check(place, results=problem.run(place, **{option: True}))
    assert np.isneginf(lse[:, :-new]).all() and np.isfinite(lse[:, -new:]).all()
    for seq in range(len(seqs)):
        alone = batch_of(problem, [seq])
        alone.check(place, f"alone {seq}", results=alone.run(place, **{option: True}))


@pytest.mark.parametrize("option", ["batch_invariant", "split_invariant"])
def test_more_work_than_can_be_shared(place, option):
    """Each work tile is one CTA's then, and has the same bits."""
    seqs = [(3000 + 64 * i, new) for i, new in enumerate((1, 3, 40, 130))]
    problem = paged_problem(seqs, kind=FP8, heads=(8, 4), seed=9)
    wanted = bits_of(problem, problem.run(place, **{option: True}))
    positional, keywords = problem.arguments(place)
    positional[-1] = 1 << 30
    results = F.paged_attention(*positional, return_softmax_lse=True, **{option: True}, **keywords)
    found = tuple(to_numpy(x) for x in results)
    assert_seqs(problem, found, wanted, range(len(seqs)), "other bounds")


def test_a_nan_stays_in_its_sequence(place):
    problem = paged_problem([(3000, 1), (3000, 1), (900, 20)], kind=BLOCK_WISE_FP8, seed=6)
    wanted = bits_of(problem, invariant(problem).run(place))
    problem.poison("v", 0, 1700)
    found = bits_of(problem, invariant(problem).run(place))
    assert np.isnan(found[0][0].astype(np.float32)).any()
    for s in (1, 2):
        assert_same_bits(found[s][0], wanted[s][0], f"sequence {s}")


# --- what the test is worth ----------------------------------------------------------------------


def test_the_comparison_can_fail():
    problem = paged_problem([(100, 1), (200, 3)], seed=1)
    wanted = bits_of(problem, problem.run())
    out, lse = problem.run()
    out.view(np.uint16)[2, 1, 5] ^= 1
    with pytest.raises(AssertionError, match="sequence 1: out"):
        assert_seqs(problem, (out, lse), wanted, [0, 1], "changed")


@pytest.mark.gpu
def test_without_the_option_bits_follow_the_batch():
    """What the option is for: shares of the keys end elsewhere when others are beside."""
    problem = paged_problem([(6000, 1)] * 40, kind=FP8, dim=128, heads=(8, 2), seed=0)
    together = bits_of(problem, problem.run("gpu"))[0][0]
    alone = batch_of(problem, [0]).run("gpu")[0]
    assert (alone != together).any()
