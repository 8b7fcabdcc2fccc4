"""fastattn/evaluate/sparse.py against the models of the operators, and against the operators."""

from __future__ import annotations

import numpy as np
import pytest

from fastattn import reference
from fastattn.evaluate.sparse import (
    Choice,
    OperatorAttention,
    SparseAttention,
    block_scores,
    chosen_blocks,
)
from fastattn.reference.block_selection import summary_shape
from tests.support.tensors import BF16

TOKENS, HEADS, KV, DIM, SCALE = 300, 6, 2, 64, 0.2

CHOICES = [
    Choice(64, 16, "mean", 0, 1),
    Choice(96, 16, "minmax", 1, 2),
    Choice(128, 64, "mean", 1, 1),
    Choice(192, 64, "minmax", 0, 1),
]


def draw(seed=0):
    rng = np.random.default_rng(seed)
    # Of values in 16 bits, so that a cache holds them as they are.
    return [
        rng.normal(size=(TOKENS, heads, DIM)).astype(BF16).astype(np.float32)
        for heads in (HEADS, KV, KV)
    ]


def by_the_models(choice, q, k, v):
    """Lists and outputs in fp64 of the models, over a cache of one sequence."""
    blocks = -(-TOKENS // 64)
    caches = [np.zeros((blocks, KV, 64, DIM), BF16) for _ in range(2)]
    for cache, x in zip(caches, (k, v)):
        padded = np.zeros((blocks * 64, KV, DIM), np.float32)
        padded[:TOKENS] = x
        cache[:] = padded.reshape(blocks, 64, KV, DIM).transpose(0, 2, 1, 3)
    step = [np.arange(blocks)[None], [0, TOKENS], [0], [TOKENS]]
    shape = summary_shape(blocks, KV, DIM, choice.granularity, choice.kind)
    options = {"granularity": choice.granularity, "kind": choice.kind}
    summaries = reference.update_block_summaries(
        np.zeros(shape, np.float32), caches[0], *step, **options
    )
    lists = reference.select_key_blocks(
        *(q, summaries, *step, choice.blocks),
        first_blocks=choice.first_blocks,
        last_blocks=choice.last_blocks,
        **options,
    )
    out, _ = reference.sparse_paged_attention(
        q, *caches, *step, lists, granularity=choice.granularity, softmax_scale=SCALE
    )
    return lists, out


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_the_simulation_is_the_models(choice):
    q, k, v = draw()
    lists, exact = by_the_models(choice, q, k, v)
    for head in range(KV):
        own = slice(head * 3, head * 3 + 3)
        scores = block_scores(q[:, own], k[:, head], choice.granularity, choice.kind)
        mask = chosen_blocks(scores, np.arange(TOKENS), choice)
        for token in range(TOKENS):
            wanted = lists[token, head]
            assert np.flatnonzero(mask[token]).tolist() == wanted[wanted >= 0].tolist()
    simulated = SparseAttention(choice, SCALE)
    np.testing.assert_allclose(simulated(0, q, k, v), exact, atol=2e-6)
    assert 0.2 < simulated.recalls[0] < 0.95


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_the_operators_are_the_simulation(choice):
    q, k, v = draw(1)
    _, exact = by_the_models(choice, q, k, v)
    operators = OperatorAttention(choice, "none", SCALE)
    out = operators(0, q, k, v)
    # Summaries in bfloat16 may order two blocks otherwise.
    assert operators.same[0] > 0.97
    error = np.abs(out - exact).max(axis=(1, 2))
    assert np.mean(error < 0.02) > 0.8


def test_all_keys():
    q, k, v = draw(2)
    dense = SparseAttention(None, SCALE)
    every = SparseAttention(Choice(512, 16, "mean"), SCALE)
    np.testing.assert_allclose(every(0, q, k, v), dense(0, q, k, v), atol=1e-6)
    assert not dense.recalls and not every.recalls  # no query sees more than the budget
