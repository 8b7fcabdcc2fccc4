"""A prompt in chunks and decode steps: the caches of one step bit for bit, its outputs to rounding.

Pages lie in another order in every run; states and tokens that have left the window are given back
and their pages reused, so that whatever reads one of them too late reads another token or NaN.
"""

from __future__ import annotations

import functools
import zlib

import numpy as np
import pytest

from tests.support.deepseek.cuts import (
    BATCHES,
    CONFIGS,
    V4_CONFIGS,
    Problem,
    assert_same,
    check_cut,
    decode,
    run,
    snapshot,
)

#: Around the ends of groups of 4 and 128, pages of states, tokens and entries, and the window.
EDGES = (*range(1, 10), *range(63, 66), *range(123, 132), 255, 256)
ALL = pytest.mark.parametrize("name", CONFIGS, scope="module")
BATCH = pytest.mark.parametrize("batch", BATCHES, scope="module")
#: Those that select fewer entries than there are.
SELECTING = ["v32_top48", "glm_top21", "flash_c4_top19"]


@functools.lru_cache(maxsize=3)
def problem_of(name, batch):
    return Problem(name, BATCHES[batch])


@functools.lru_cache(maxsize=3)
def whole(name, batch, place):
    """Results of one step for all of a batch, and its caches."""
    results, layer = problem_of(name, batch).whole(place, seed=99)
    return results, snapshot(layer)


def sampled(name, batch):
    """Cuts for a run of all tests: an edge, and one or two of all others."""
    last = max(BATCHES[batch]) - 1
    rng = np.random.default_rng(zlib.crc32(f"{name} {batch}".encode()))
    if last < 10:
        return rng.permutation(np.arange(1, last + 1))[:4]
    return [rng.choice([cut for cut in EDGES if cut <= last]), rng.integers(1, last + 1)]


@BATCH
@ALL
def test_some_cuts(place, name, batch):
    for cut in sampled(name, batch):
        check_cut(problem_of(name, batch), place, int(cut), whole(name, batch, place))


@pytest.mark.slow
@BATCH
@ALL
def test_every_cut(place, name, batch):
    started = None
    for cut in range(1, max(BATCHES[batch])):
        want = whole(name, batch, place)
        started = check_cut(problem_of(name, batch), place, cut, want, started)


@pytest.mark.parametrize("batch", ["1-9", "300"])
@ALL
def test_token_by_token(place, name, batch):
    problem = problem_of(name, batch)
    layer = problem.layer(place, seed=3)
    got = run(layer, decode(np.zeros_like(problem.lengths), problem.lengths))
    assert_same(problem, place, layer, got, whole(name, batch, place))


@ALL
def test_two_tokens_a_decode_step(place, name):
    """As drafts of speculative decoding are; some end in the middle of a group."""
    problem = problem_of(name, "124-132")
    layer = problem.layer(place, seed=4)
    start = problem.lengths - np.arange(5, 14)
    got = run(layer, [start, *decode(start, problem.lengths, 2)])
    assert_same(problem, place, layer, got, whole(name, "124-132", place))


@ALL
def test_sequences_at_their_own_pace(place, name):
    """Steps with chunks of some sequences, one token of others and none of the rest."""
    problem = problem_of(name, "124-132")
    layer, rng = problem.layer(place, seed=5), np.random.default_rng(5)
    got, counts = {}, np.zeros_like(problem.lengths)
    while (left := problem.lengths - counts).any():
        sizes = rng.choice([0, 1, 2, 3, 4, 61, 70], len(counts))
        new = np.minimum(left, sizes)
        run(layer, [new], got)
        counts += new
    assert_same(problem, place, layer, got, whole(name, "124-132", place))


@pytest.mark.parametrize("name", V4_CONFIGS)
def test_prefill_from_gathered_rows(place, name):
    """Chunks gather what they see as bf16 rows; decode steps read both caches."""
    problem = problem_of(name, "124-132")
    layer = problem.layer(place, seed=7, workspace=True)
    lengths = problem.lengths
    sizes = np.array([3, 40, 100, 124, 5, 64, 127, 128, 129])
    steps = [np.minimum(sizes, lengths), np.ones_like(lengths) * (lengths > sizes)]
    steps.append(lengths - sum(steps))
    got = run(layer, steps)
    assert_same(problem, place, layer, got, whole(name, "124-132", place))


@pytest.mark.parametrize(
    "options",
    [
        {"form": "gathered"},
        {"form": "paged"},
        {"form": "gathered", "fused": True},
        {"form": "paged", "fused": True},
        {"short": False},
    ],
    ids=lambda options: "-".join(str(v) for v in options.values()),
)
@pytest.mark.parametrize("name", [*SELECTING, "flash_c4"])
def test_other_ways_to_select(place, name, options):
    """Keys gathered or in their pages, logits kept or not, and logits that nothing depends on."""
    problem = problem_of(name, "300")
    layer = problem.layer(place, seed=6, **options)
    got = run(layer, [[130], [1], [2], [1], [0], [166]])
    assert_same(problem, place, layer, got, whole(name, "300", place))
