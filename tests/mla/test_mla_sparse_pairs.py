"""mla_sparse_attention of many query tokens and heads: CTAs that have several work tiles each, and
share keys in clusters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.support.mla_sparse import check_lse, check_output, make_problem

LENGTHS = (200, 0, 37, 1, 130, 256, 64, 65)
#: Eight tokens, two groups of heads and four tiles of 64 keys: from 48 tiles for each of an H100's
#: 132 multiprocessors on, clusters are taken. A few tokens never have them.
TIMES = 104


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [64, 65, 128])
@pytest.mark.parametrize("kind", ["fp8_656", "fp8_656_amax", "fp8_584", "fp8", "bf16", "bf16_512"])
def test_many_tokens(kind, heads):
    few = make_problem(40, kind, heads, LENGTHS, 256)
    many = replace(
        few,
        q=np.tile(few.q, (TIMES, 1, 1)),
        indices=np.tile(few.indices, (TIMES, 1)),
        lengths=np.tile(few.lengths, TIMES),
    )
    out, lse = many.run("gpu")
    want, want_lse, _ = few.want()
    tokens = len(LENGTHS)
    check_output(out[:tokens], want)
    check_lse(lse[:, :tokens], want_lse, few.noise("gpu"))
    np.testing.assert_array_equal(out, np.tile(out[:tokens], (TIMES, 1, 1)))
    np.testing.assert_array_equal(lse, np.tile(lse[:, :tokens], TIMES))
