"""mla_sparse_attention where scores grow along the keys: an earlier maximum is the sums' unit."""

from __future__ import annotations

import numpy as np
import pytest

import fastattn.functional as F
from tests.support.mla_sparse import (
    BF16,
    KINDS,
    Problem,
    check_lse,
    check_output,
    make_cache,
    queries,
)
from tests.support.tensors import to_numpy

RNG = np.random.default_rng


@pytest.mark.parametrize("step", [0.6, 3.0, 40.0])
@pytest.mark.parametrize("heads", [8, 64])
@pytest.mark.parametrize("kind", ["bf16", "bf16_512", "fp8_656", "fp8_584"])
def test_scores_that_rise_and_fall_from_tile_to_tile(place, kind, heads, step):
    """By less than a row's probabilities may exceed 1 before its sums are rescaled, and by more."""
    rng, dim, keys = RNG(53), KINDS[kind][2], 640
    latents = 0.25 * rng.normal(size=(keys, dim))
    # 64 channels of q = 1: scores of 64 * dim^-0.5 / ln(2) times the key's channel, in base 2.
    latents[:, -64:] = (np.arange(keys) // 64 * step * np.log(2) * dim**0.5 / 64)[:, None]
    cache = make_cache(rng, KINDS[kind], keys, latents=latents.astype(BF16))
    q = queries(rng, 4, heads, dim, 0.5)
    q[:, 0::2, -64:] = 1
    q[:, 1::2, -64:] = -1  # the first tile has the largest scores
    problem = Problem(q, cache, np.tile(cache.written, (4, 1)).astype(np.int32))
    problem.lengths = np.array([640, 65, 577, 64], np.int32)
    problem.options = {"sinks": RNG(54).normal(size=heads).astype(np.float32)}
    positional, named = problem.tensors(place)
    options = {"return_softmax_lse": True, "return_max_logits": True}
    out, lse, largest = map(to_numpy, F.mla_sparse_attention(*positional, **named, **options))
    want, want_lse, want_largest = problem.want()
    check_output(out, want)
    check_lse(lse, want_lse)
    check_lse(largest, want_largest)
