"""A tiny indexer of random weights: the same tokens wherever its prompt is cut, on CPU and GPU.

70 tokens of 64 hidden channels, 8 heads of 128. A chunk writes its keys into pages, scores its
queries against all keys up to now (gathered, or in their pages) and selects 16 of them.

A cut changes no logit's bits, so that selections are the same whatever they are. NumPy, a CPU and a
GPU sum in other orders: they agree on a selection where its last logit and the first one left out
are further apart than rounding. That holds for every row of this prompt, by a factor that
`test_the_prompt_has_a_margin` tells: the seeds are chosen for it.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

import fastattn.functional as F
from fastattn import reference
from fastattn.reference.indexer import rotate_last
from tests.support.mqa_logits import CALC_DIFF
from tests.support.tensors import BF16, int32, to_numpy, to_paddle

TOKENS, HIDDEN, HEADS, DIM, K = 70, 64, 8, 128, 16
PAGE, TABLE = 16, np.array([[5, 1, 4, 0, 3]], np.int32)
SCALES = DIM**-0.5, HEADS**-0.5
QUANTS = ("fp8", "mxfp4")
#: Chosen for the margin below.
SEEDS = {"fp8": 5812, "mxfp4": 28}
#: Least distance of a row's threshold from the next logit, of the row's largest logit. Two logits
#: that are each off by less than half of it cannot change places. Hopper's sums of FP8 products
#: keep 14 bits, which is a fifth of this margin; other sums are fp32.
MARGIN = {"fp8": 2.9e-3, "mxfp4": 1.3e-3}


@functools.lru_cache(maxsize=4)
def prompt(quant: str):
    """Projections of all tokens, in bf16 as a model has them, and the rotary table."""
    rng = np.random.default_rng(SEEDS[quant])
    x = rng.standard_normal((TOKENS, HIDDEN))
    to_q, to_k, to_w = (
        rng.standard_normal((HIDDEN, n)) / HIDDEN**0.5 for n in (HEADS * DIM, DIM, HEADS)
    )
    angles = np.arange(128)[:, None] / 10000 ** (np.arange(32) / 32)
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    q = (x @ to_q).reshape(TOKENS, HEADS, DIM).astype(np.float32).astype(BF16)
    k = rotate_last((x @ to_k).astype(np.float32).astype(BF16), table[:TOKENS]).astype(BF16)
    return q, k, (x @ to_w).astype(np.float32), table


class Model:
    """The indexer of one sequence: its cache, and a step for each chunk."""

    def __init__(self, quant: str, place: str, paged: bool = False, fused: bool = False) -> None:
        self.quant, self.place, self.paged, self.fused = quant, place, paged, fused
        width = 132 if quant == "fp8" else 68
        # No byte of it is a key yet.
        self.cache = to_paddle(np.full((6, PAGE, width), 0xFF, np.uint8), place)
        self.tables = to_paddle(TABLE, place)

    def chunk(self, first: int, last: int):
        """Selections of tokens [first, last), and (unless fused) their logits."""
        q, k, weights, table = prompt(self.quant)
        at = np.arange(first, last)
        slots = TABLE[0, at // PAGE].astype(np.int64) * PAGE + at % PAGE
        place, part = self.place, slice(first, last)
        F.indexer_k_write_cache(
            to_paddle(k[part], place), self.cache, to_paddle(slots, place), quant=self.quant
        )
        codes, scales, weights = F.indexer_q_rope_quant(
            int32(at, place), to_paddle(q[part], place), to_paddle(table, place),
            to_paddle(weights[part], place), *SCALES, quant=self.quant,
        )  # fmt: skip
        scales = None if self.quant == "fp8" else scales
        found = (self._paged if self.paged else self._ragged)(codes, scales, weights, at, last)
        return tuple(None if x is None else to_numpy(x) for x in found)

    def _ragged(self, codes, scales, weights, at, last):
        keys, k_scales = F.indexer_k_gather(
            self.cache, self.tables, int32([0, last], self.place), last, quant=self.quant
        )
        starts, ends = int32(np.zeros(len(at)), self.place), int32(at + 1, self.place)
        options = {"k_scales": k_scales, "q_scales": scales, "quant": self.quant}
        inputs = codes, keys, weights, starts, ends
        if self.fused:
            return F.indexer_topk(*inputs, K, **options, workspace_bytes=1), None
        logits = F.mqa_logits(*inputs, **options)
        return F.topk_indices(logits, ends, K), logits

    def _paged(self, codes, scales, weights, at, last):
        codes = to_paddle(to_numpy(codes)[None], self.place)
        scales = None if scales is None else to_paddle(to_numpy(scales)[None], self.place)
        inputs = codes, self.cache, weights, int32([last], self.place), self.tables, TOKENS
        options = {"q_scales": scales, "quant": self.quant}
        if self.fused:
            return F.paged_indexer_topk(*inputs, K, **options, workspace_bytes=1), None
        logits = F.paged_mqa_logits(*inputs, **options)
        return F.topk_indices(logits, int32(at + 1, self.place), K), logits

    def run(self, cuts):
        """Selections [TOKENS, K] and logits [TOKENS, TOKENS] of the prompt in chunks."""
        bounds = [0, *cuts, TOKENS]
        parts = [self.chunk(a, b) for a, b in zip(bounds, bounds[1:])]
        logits = np.full((TOKENS, TOKENS), -np.inf, np.float32)
        for first, (_, found) in zip(bounds, parts):
            if found is not None:
                logits[first : first + len(found), : found.shape[1]] = found
        return np.concatenate([chosen for chosen, _ in parts]), logits


@functools.lru_cache(maxsize=4)
def model(quant: str):
    """The same in NumPy: selections from logits in fp64."""
    q, k, weights, table = prompt(quant)
    at = np.arange(TOKENS)
    codes, scales, weights = reference.indexer_q_rope_quant(
        at, q, table, weights, *SCALES, quant=quant
    )
    slots = TABLE[0, at // PAGE].astype(np.int64) * PAGE + at % PAGE
    empty = np.full((6, PAGE, 132 if quant == "fp8" else 68), 0xFF, np.uint8)
    cache = reference.indexer_k_write_cache(k, empty, slots, quant=quant)
    keys, k_scales = reference.indexer_k_gather(cache, TABLE, [0, TOKENS], TOKENS, quant=quant)
    logits = reference.mqa_logits(
        codes, keys, weights, np.zeros(TOKENS), at + 1, k_scales=k_scales, quant=quant,
        q_scales=scales if quant == "mxfp4" else None,
    )  # fmt: skip
    return reference.topk_indices(logits, at + 1, K), logits


FORMS = pytest.mark.parametrize("paged", [False, True], ids=["gathered", "paged"])


@pytest.mark.parametrize("quant", QUANTS)
def test_the_prompt_has_a_margin(quant):
    _, logits = model(quant)
    for row in logits[K:]:
        ordered = np.sort(row[np.isfinite(row)].astype(np.float64))[::-1]
        assert ordered[K - 1] - ordered[K] > MARGIN[quant] * np.abs(ordered).max()
    # The selections are no mere windows or prefixes.
    chosen = model(quant)[0][-1]
    assert chosen.max() - chosen.min() > 2 * K and len({tuple(r) for r in model(quant)[0]}) > 60


@FORMS
@pytest.mark.parametrize("quant", QUANTS)
def test_every_cut_selects_the_same_tokens(place, quant, paged):
    want, logits = Model(quant, place, paged).run([])
    for cut in range(1, TOKENS):
        chosen, found = Model(quant, place, paged).run([cut])
        np.testing.assert_array_equal(chosen, want, err_msg=f"cut at {cut}")
        np.testing.assert_array_equal(found.view(np.uint32), logits.view(np.uint32))


@FORMS
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("size", [1, 2, 7, 16, 33])
def test_chunks_of_one_size(place, quant, paged, size):
    """A chunk of one token is a decode step."""
    want, _ = Model(quant, place, paged).run([])
    chosen, _ = Model(quant, place, paged).run(range(size, TOKENS, size))
    np.testing.assert_array_equal(chosen, want)


@FORMS
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("cuts", [(), (1,), (33,), (69,), (16, 17, 48)], ids=str)
def test_logits_and_top_k_in_one_call(place, quant, paged, cuts):
    want, _ = Model(quant, place, paged).run(cuts)
    chosen, _ = Model(quant, place, paged, fused=True).run(cuts)
    np.testing.assert_array_equal(chosen, want)


def check_against(quant, chosen, logits, want, expected):
    seen = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(logits), seen)
    x, y = logits[seen].astype(np.float64), expected[seen].astype(np.float64)
    assert 1 - 2 * (x * y).sum() / (x * x + y * y).sum() < CALC_DIFF
    largest = np.abs(np.where(seen, expected, 0)).max(axis=1, keepdims=True)
    worst = np.abs(np.where(seen, logits - np.where(seen, expected, 0), 0)) / largest
    assert worst.max() < MARGIN[quant] / 2, f"rounding {worst.max():.1e} of a row's largest logit"
    np.testing.assert_array_equal(chosen, want)


@FORMS
@pytest.mark.parametrize("quant", QUANTS)
def test_numpy_selects_the_same_tokens(place, quant, paged):
    check_against(quant, *Model(quant, place, paged).run([29]), *model(quant))


@pytest.mark.gpu
@FORMS
@pytest.mark.parametrize("quant", QUANTS)
def test_a_gpu_selects_the_tokens_of_a_cpu(quant, paged):
    want, expected = Model(quant, "cpu", paged).run([])
    for cuts in ([], [29], range(1, TOKENS)):
        check_against(quant, *Model(quant, "gpu", paged).run(cuts), want, expected)
