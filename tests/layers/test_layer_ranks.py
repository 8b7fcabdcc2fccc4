"""Layers spread over 2 and 4 processes: every rank selects the same, and the sum is one process's.

Ranks have their pages in orders of their own. In the cases of ties the top-k ends among logits that
are exactly equal, where an order of arrival would tell ranks apart.
"""

from __future__ import annotations

import functools
import pickle

import numpy as np
import pytest

from benchmarks.core.processes import run_group
from tests.support.compare import assert_same_bits
from tests.support.deepseek import ranks as program
from tests.support.deepseek.cuts import Problem
from tests.support.deepseek.weights import RANK_CONFIGS

NAMES = pytest.mark.parametrize("name", RANK_CONFIGS)
TIES = [name for name in RANK_CONFIGS if name.endswith("_ties")]


#: What two ranks do, four do as well, and have ranks that are neither the first nor the last.
@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 4])
def ranks(request, tmp_path_factory):
    """Results of every rank, by configuration."""
    folder = tmp_path_factory.mktemp("layer_ranks")
    run_group("tests.support.deepseek.ranks", str(folder), world_size=request.param, logs=folder)
    files = [folder / f"rank{rank}.pickle" for rank in range(request.param)]
    return [pickle.loads(file.read_bytes()) for file in files]


@functools.lru_cache
def one_process(name):
    return program.solve(name, 0, 1)


@NAMES
def test_every_rank_selects_the_same(ranks, name):
    first = ranks[0][name]["indices"]
    for other in ranks[1:]:
        assert_same_bits(other[name]["indices"], first, "indices")
    assert_same_bits(first, one_process(name)["indices"], "indices of one process")


@pytest.mark.parametrize("name", TIES)
def test_selections_end_among_equal_logits(name):
    """The premise of the test above."""
    problem, indices = Problem(name, program.LENGTHS), one_process(name)["indices"]
    tied = 0
    for seq in range(len(program.LENGTHS)):
        dense, rows = problem.dense(seq), problem.of_seq(seq)
        for logits, seen, chosen in zip(dense.logits, dense.visible, indices[rows]):
            if seen.sum() > problem.config.topk and (chosen >= 0).all():
                left = np.setdiff1d(np.flatnonzero(seen), chosen)
                tied += logits[left].max() == logits[chosen].min() == 0
    assert tied > 50


@NAMES
def test_heads_are_those_of_one_process(ranks, name):
    want = one_process(name)
    got = np.concatenate([rank[name]["attention"] for rank in ranks], axis=1)
    assert got.shape == want["attention"].shape
    step = np.abs(got.astype(np.float64) - want["attention"].astype(np.float64))
    assert (step <= 2.0**-7 * np.abs(want["attention"].astype(np.float64)) + 1e-4).all()


@NAMES
def test_the_sum_over_ranks_is_the_output(ranks, name):
    want = one_process(name)["output"]
    assert np.linalg.norm(want) > 1
    for rank in ranks:
        error = np.linalg.norm(rank[name]["output"] - want) / np.linalg.norm(want)
        assert error <= 1e-5, f"{error:.1e}"
