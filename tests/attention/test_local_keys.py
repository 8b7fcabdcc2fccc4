"""paged_attention over compact tables: the keys of some blocks, against fp64 over the whole table.

This is what a rank of context parallelism attends to; here its part is the result.
"""

from __future__ import annotations

import copy

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from tests.support.attention import (
    BLOCK_WISE_FP8,
    CACHE_KINDS,
    FEW_KINDS,
    PLAIN,
    CacheKind,
    paged_problem,
)
from tests.support.compare import assert_same_bits
from tests.support.graph import capture
from tests.support.tensors import int32, to_numpy, to_paddle

#: Cached and new tokens: for the kernels of many queries, of a few, and of one.
LONG = [(0, 130), (333, 70), (70, 200), (0, 65), (129, 64)]
SHORT = [(70, 5), (1023, 4), (0, 3), (0, 0), (64, 1), (200, 6)]
MIXED = [(0, 150), (517, 1), (64, 4), (320, 80), (9, 0)]
DECODE = [(1023, 1), (64, 1), (0, 1), (5, 1), (517, 1), (63, 1), (130, 0), (2000, 1)]
SINKS = np.array([0.4, -3.0, 5.5, -np.inf], np.float32)
FP8 = CacheKind("cache_fp8", "head")


def interleaved(seq: int, block: int) -> bool:
    return block % 2 == 1


def first(seq: int, block: int) -> bool:
    return block % 2 == 0


def at_random(seq: int, block: int) -> bool:
    return bool(np.random.default_rng(100 * seq + block).random() < 0.4)


def whole_seqs(seq: int, block: int) -> bool:
    return seq % 2 == 0


DEALS = (interleaved, first, at_random, whole_seqs)


def masks_of(seqs):
    """Any intervals: short, long, empty, beyond the keys."""
    rng = np.random.default_rng(3)
    keys = np.concatenate([np.full(new, cached + new) for cached, new in seqs])
    begin = (rng.random(len(keys)) * keys * 0.6).astype(np.int64)
    end = begin + (rng.random(len(keys)) * (keys + 9)).astype(np.int64)
    begin[::5], end[::7] = 0, 10**6
    end[::11] = begin[::11]
    return np.stack([begin, end], 1).astype(np.int32)


def part_of(seqs, deal=interleaved, **options):
    """A problem of which only the dealt blocks are there."""
    problem = paged_problem(seqs, **options)
    tables = problem.block_tables
    owned = [[deal(seq, block) for block in range(tables.shape[1])] for seq in range(len(tables))]
    problem.block_tables = np.where(owned, tables, -1).astype(np.int32)
    return problem


def run_compact(problem, place, **extra):
    """Output and LSE over the compact tables."""
    positional, keywords = problem.arguments(place)
    q, key, value, tables, cu, cached, new, max_q, max_k = positional
    mask = {
        "causal": keywords.get("causal", True),
        "window_size": keywords.get("window_size", (-1, -1)),
        "mask_offsets": keywords.get("mask_offsets"),
    }
    wanted = max_q > 1 or mask["window_size"] != (-1, -1) or mask["mask_offsets"] is not None
    tables, cached, masks = F.compact_block_tables(
        *(tables, cu, cached, new),
        num_tokens=q.shape[0],
        num_blocks=key.shape[0],
        want_masks=wanted,
        **mask,
    )
    if wanted:
        keywords.update(causal=False, window_size=(-1, -1), mask_offsets=masks)
    keywords.update(extra)
    out, lse = F.paged_attention(
        *(q, key, value, tables, cu, cached, new, max_q, max_k),
        return_softmax_lse=True,
        **keywords,
    )
    return to_numpy(out), to_numpy(lse)


def check(problem, place, **extra):
    results = run_compact(problem, place, **extra)
    problem.check(place, results=results)
    # A query without a key has no part in the whole.
    _, exact = problem.reference(out_scale=None)
    nothing = np.isneginf(exact)
    assert_same_bits(np.isneginf(results[1])[:, problem.owned()], nothing[:, problem.owned()])
    assert not results[0][nothing.T].any()
    return results


@pytest.mark.parametrize("seqs", [LONG, SHORT, DECODE], ids=["long", "short", "decode"])
@pytest.mark.parametrize("kind", CACHE_KINDS, ids=str)
def test_cache_types(place, kind, seqs):
    check(part_of(seqs, kind=kind, seed=1), place)


@pytest.mark.parametrize("deal", DEALS)
@pytest.mark.parametrize("seqs", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
def test_deals(place, kind, seqs, deal):
    check(part_of(seqs, deal, kind=kind, dim=128, heads=(6, 2), seed=2), place)


OPTIONS = {
    "window": {"window_size": (100, -1)},
    "window_of_one": {"window_size": (0, 0)},
    "both_sides": {"window_size": (40, 7), "causal": False},
    "not_causal": {"causal": False},
    "sinks": {"sinks": SINKS},
    "softcap": {"softcap": 1.3},
    "window_sinks": {"window_size": (70, 0), "sinks": SINKS},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "seqs", [LONG, SHORT, MIXED, DECODE], ids=["long", "short", "mixed", "decode"]
)
@pytest.mark.parametrize("kind", [PLAIN, FP8, BLOCK_WISE_FP8], ids=str)
def test_masks(place, kind, seqs, options):
    check(part_of(seqs, kind=kind, seed=3, **OPTIONS[options]), place)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqs", [LONG, SHORT, DECODE], ids=["long", "short", "decode"])
@pytest.mark.parametrize("kind", [PLAIN, FP8, BLOCK_WISE_FP8], ids=str)
def test_mask_offsets(place, kind, seqs, causal):
    options = {"mask_offsets": masks_of(seqs), "causal": causal}
    check(part_of(seqs, kind=kind, seed=4, **options), place)


@pytest.mark.parametrize("q_type", ["e4m3:token_head", "e4m3:tensor"])
@pytest.mark.parametrize("seqs", [LONG, SHORT, DECODE], ids=["long", "short", "decode"])
@pytest.mark.parametrize("kind", [FP8, BLOCK_WISE_FP8], ids=str)
def test_fp8_queries(place, kind, seqs, q_type):
    check(part_of(seqs, kind=kind, q_type=q_type, dim=128, seed=5), place)


@pytest.mark.parametrize("options", ["window", "sinks", "not_causal"])
def test_fp8_queries_with_masks(place, options):
    problem = part_of(LONG, kind=FP8, q_type="e4m3:token_head", seed=6, **OPTIONS[options])
    check(problem, place)


@pytest.mark.parametrize("window", [(-1, -1), (200, 0)])
@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
def test_a_mask_given_as_intervals_keeps_the_bits(place, kind, window):
    """A kernel that knows what the intervals of a tile have in common does what it does without."""
    seqs = [(700, 130), (0, 200), (1023, 1), (333, 5)]
    problem = paged_problem(seqs, kind=kind, dim=128, heads=(8, 2), window_size=window, seed=10)
    out, lse = problem.run(place)
    positions = np.concatenate([np.arange(cached, cached + new) for cached, new in seqs])
    begin = 0 * positions if window[0] < 0 else np.maximum(positions - window[0], 0)
    problem.options["mask_offsets"] = np.stack([begin, positions + 1], 1).astype(np.int32)
    other, other_lse = problem.run(place)
    assert_same_bits(other, out, "with both")
    assert_same_bits(other_lse, lse, "with both")


@pytest.mark.parametrize("seqs", [LONG, SHORT, DECODE], ids=["long", "short", "decode"])
def test_padding_and_batch_invariant(place, seqs):
    """Beside other sequences and padding a sequence keeps its bits."""
    spans = [new + 3 for _, new in seqs]
    problem = part_of(seqs, kind=BLOCK_WISE_FP8, spans=spans, padding=4, seed=7)
    out, lse = check(problem, place, batch_invariant=True)
    for seq in (0, 1, 4):
        at, count = problem.cu_seqlens_q[seq], problem.seq_lens_this_time[seq]
        rows = slice(at, at + count)
        alone = copy.deepcopy(problem)
        alone.q = problem.q[rows]
        alone.block_tables = problem.block_tables[seq : seq + 1]
        alone.cu_seqlens_q = np.array([0, count], np.int32)
        alone.seq_lens_decoder = problem.seq_lens_decoder[seq : seq + 1]
        alone.seq_lens_this_time = problem.seq_lens_this_time[seq : seq + 1]
        lone_out, lone_lse = run_compact(alone, place, batch_invariant=True)
        assert_same_bits(lone_out, out[rows], f"out of {seq}")
        assert_same_bits(lone_lse, lse[:, rows], f"lse of {seq}")


@pytest.mark.parametrize("seqs", [LONG, SHORT, DECODE], ids=["long", "short", "decode"])
def test_nothing_but_own_keys_counts(place, seqs):
    """NaN in every block that the table does not name, and behind the sequences' ends."""
    problem = part_of(seqs, kind=BLOCK_WISE_FP8, seed=8)
    mine = np.unique(problem.block_tables[problem.block_tables >= 0])
    rest = np.setdiff1d(np.arange(problem.k.elements.shape[0]), mine)
    for stored in (problem.k, problem.v):
        stored.poison((rest, slice(None), slice(None)))
    out, _ = check(problem, place)
    assert np.isfinite(out.astype(np.float32)).all()


def test_drafts_see_a_nan_of_their_own(place):
    """A NaN in the newest key reaches the queries that see it, and no other one."""
    problem = part_of([(190, 4), (64, 3)], kind=PLAIN, seed=9)
    problem.poison("v", 0, 192)  # of token 2; block 3 is there
    out, _ = run_compact(problem, place)
    bad = np.isnan(out.astype(np.float32)).any((1, 2))
    assert bad.tolist() == [False, False, True, True, False, False, False]


@pytest.mark.gpu
def test_gpu_graph_follows_the_lengths():
    """Captured once; lengths, tables and masks of other steps are then copied in."""

    def made(seed):
        rng = np.random.default_rng(seed)
        # Never more than 300 keys and 20 new tokens in all.
        seqs = [(int(rng.integers(0, 280)), int(n)) for n in rng.permutation([1, 9, 0, 4])]
        seqs.append((200, 20 - sum(n for _, n in seqs)))
        return part_of(seqs, at_random, kind=BLOCK_WISE_FP8, seed=seed)

    names = ("q", "tables", "cu", "cached", "new")

    def arrays(problem):
        tables = np.full((5, 6), -1)
        tables[:, : problem.block_tables.shape[1]] = problem.block_tables[:, :6]
        rest = (problem.cu_seqlens_q, problem.seq_lens_decoder, problem.seq_lens_this_time)
        return dict(zip(names, (problem.q, tables.astype(np.int32), *rest)))

    def run(t, key, value, scales):
        seqs = [t[name] for name in names[1:]]
        tables, cached, masks = F.compact_block_tables(
            *seqs, num_tokens=20, num_blocks=key.shape[0]
        )
        options = {"cache_quant_type": "block_wise_fp8", "mask_offsets": masks, "causal": False}
        options.update(cache_k_scales=scales[0], cache_v_scales=scales[1])
        return F.paged_attention(
            *(t["q"], key, value, tables, seqs[1], cached, seqs[3], 20, 400), **options
        )

    problem = made(0)
    _, keywords = problem.arguments("gpu")
    key, value = (to_paddle(x.packed(), "gpu") for x in (problem.k, problem.v))
    scales = keywords["cache_k_scales"], keywords["cache_v_scales"]
    tensors = {k: to_paddle(v, "gpu") for k, v in arrays(problem).items()}
    paddle.set_device("gpu")
    try:
        for _ in range(2):
            run(tensors, key, value, scales)
        paddle.device.cuda.synchronize()
        with capture() as graph:
            out = run(tensors, key, value, scales)
        for seed in (1, 2, 3):
            other = arrays(made(seed))
            other["tables"] = np.where(other["tables"] < key.shape[0], other["tables"], -1)
            for name, value_ in other.items():
                tensors[name].copy_(to_paddle(value_, "gpu"), True)
            graph.replay()
            paddle.device.cuda.synchronize()
            again = run(tensors, key, value, scales)
            assert_same_bits(to_numpy(out), to_numpy(again))
        graph.reset()
    finally:
        paddle.set_device("cpu")


def test_int32_is_enough_for_a_table(place):
    """A million tokens in one sequence, of which a few are asked for."""
    blocks = 16384
    table = np.full((1, blocks), -1)
    table[0, ::2] = np.arange(blocks // 2) % 3
    seqs = [int32(x, place) for x in (table, [0, 3], [blocks * 64 - 70], [3])]
    tables, cached, masks = F.compact_block_tables(*seqs, num_tokens=3, num_blocks=3)
    assert (to_numpy(tables)[0, : blocks // 2] == np.arange(blocks // 2) % 3).all()
    assert (to_numpy(tables)[0, blocks // 2 :] == -1).all()
    # The newest keys are in the last block but one, which is the last of those that are there and
    # lacks three.
    assert to_numpy(cached).tolist() == [blocks // 2 * 64 - 3 - 3]
    assert to_numpy(masks).tolist() == [[0, blocks // 2 * 64 - 5 + i] for i in (0, 1, 2)]
