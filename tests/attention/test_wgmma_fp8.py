"""What the wgmma kernel of e4m3 queries has to keep besides test_wgmma.py.

On a Hopper GPU these take custom_ops/cuda/attention/wgmma_sm90/fp8, which multiplies e4m3
probabilities (see tests.support.attention.assert_fp8_products); anywhere else the other kernels.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.attention.test_wgmma import FEW_8, STATIC
from tests.support.attention import assert_scores_in_14_bits, paged_problem


@pytest.mark.parametrize("kind", FEW_8, ids=str)
def test_scores_of_any_size(place, kind):
    # A score of 2^40 less a shift of 2^40 must not be the rounding error of either.
    problem = paged_problem([(100, 200)], kind=kind, dim=128, q_type="e4m3:token_head")
    size = 2.0 ** np.random.default_rng(4).integers(-40, 61, problem.q_descale.shape)
    problem.q_descale = (problem.q_descale * size).astype(np.float32)
    assert_scores_in_14_bits(problem, place)


def test_two_levels_of_accumulation(place):
    # One sum over all keys in the tensor core loses several per cent of a V that has a mean.
    problem = paged_problem(
        [(3968, 128)],
        kind=STATIC,
        heads=(1, 1),
        dim=128,
        q_type="e4m3:tensor",
        causal=False,
        v_mean=4.0,
    )
    out, _ = problem.check(place)
    exact, _ = problem.reference()
    assert abs(np.mean(out.astype(np.float64)) / np.mean(exact) - 1) < 5e-3
