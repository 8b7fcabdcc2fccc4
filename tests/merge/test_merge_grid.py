"""merge_attn_states over a grid of shapes: bit by bit, and a sample of the tokens against fp64.

A default run takes every (tokens, heads, dim) once, with dtypes and output kinds in turn; the rest
of the product is marked slow.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest

import fastattn.functional as F
from fastattn import reference
from fastattn.reference.numerics import to_codes
from tests.support.compare import assert_same_bits, assert_within
from tests.support.tensors import DTYPES, to_numpy, to_paddle

SCALE = np.array([0.05], np.float32)
#: Tokens of a shape that are also computed in fp64.
SAMPLE = 48
#: Half a step of each dtype, relative, and its smallest step.
HALF_STEP = {
    "float32": (2.0**-24, 2.0**-149),
    "float16": (2.0**-11, 2.0**-24),
    "bfloat16": (2.0**-8, 2.0**-133),
}


def cases():
    shapes = itertools.product(
        [1, 256, 513, 1536], [4, 5, 16, 48], [32, 48, 64, 80, 96, 128, 192, 256]
    )
    kinds = list(itertools.product(DTYPES, [False, True]))
    for i, shape in enumerate(shapes):
        for j, kind in enumerate(kinds):
            marks = [] if j == (i + i // 8) % len(kinds) else [pytest.mark.slow]
            name = "-".join([*map(str, shape), kind[0], "fp8" if kind[1] else "plain"])
            yield pytest.param(*shape, *kind, marks=marks, id=name)


@functools.lru_cache(maxsize=len(DTYPES))
def pool(dtype: str) -> np.ndarray:
    """Normal values, as many as no period of any shape here divides."""
    values = np.random.default_rng(0).normal(size=(1 << 20) + 7).astype(np.float32)
    return values.astype(DTYPES[dtype])


def side(rng, tokens, heads, dim, dtype):
    """Output and LSE; a tenth of the rows is empty: -inf or +inf there, NaN in the output."""
    output = np.resize(np.roll(pool(dtype), int(rng.integers(1 << 20))), (tokens, heads, dim))
    lse = (2 * rng.normal(size=(heads, tokens))).astype(np.float32)
    gone = rng.random((heads, tokens)) < 0.1
    lse[gone] = np.where(rng.random(gone.sum()) < 0.5, -np.inf, np.inf)
    output[gone.T] = np.nan
    return output, lse


def exact_merge(prefix, p, suffix, s):
    """(merged, LSE, size of the terms) in fp64 by the textbook formula."""
    p, s = (np.where(np.isposinf(x), -np.inf, x.astype(np.float64)) for x in (p, s))
    lse = np.logaddexp(p, s)
    top = np.where(np.isneginf(lse), 0, lse)
    terms = []
    for output, side_lse in ((prefix, p), (suffix, s)):
        weight = np.exp(side_lse - top).T[:, :, None]
        terms.append(np.where(weight == 0, 0, output.astype(np.float64)) * weight)
    return terms[0] + terms[1], lse, np.abs(terms[0]) + np.abs(terms[1])


def order(codes):
    """Place of an e4m3 code among its like; +0 and -0 share one."""
    return np.where(codes & 0x80, -(codes & 0x7F).astype(int), codes.astype(int))


@pytest.mark.parametrize(("tokens", "heads", "dim", "dtype", "fp8"), list(cases()))
def test_grid(place, tokens, heads, dim, dtype, fp8):
    rng = np.random.default_rng([tokens, heads, dim])
    arrays = [*side(rng, tokens, heads, dim, dtype), *side(rng, tokens, heads, dim, dtype)]
    kwargs = {"output_scale": SCALE} if fp8 else {}
    output, lse = F.merge_attn_states(
        *(to_paddle(a, place) for a in arrays),
        **{k: to_paddle(v, place) for k, v in kwargs.items()},
    )
    output, lse = to_numpy(output), to_numpy(lse)
    expected, expected_lse = reference.merge_attn_states(*arrays, **kwargs)
    assert_same_bits(output, expected, "output")
    assert_within(lse, expected_lse, 2.0**-23 * np.abs(expected_lse) + 2.0**-23, "lse")

    some = np.unique(np.linspace(0, tokens - 1, SAMPLE).astype(int))
    sampled = [a[some] if a.ndim == 3 else a[:, some] for a in arrays]
    exact, exact_lse, size = exact_merge(*sampled)
    assert_within(lse[:, some], exact_lse, 2.0**-24 * (10 + np.abs(exact_lse)), "lse in fp64")
    # fp32 roundings: p - m (|p - m| <= 20 here), exp (2 ulp), sum, ratio, product, sum.
    error = 2.0**-24 * (2 * 20 + 2 * 4 + 5) * size
    if not fp8:
        relative, smallest = HALF_STEP[dtype]
        assert_within(output[some], exact, error + relative * np.abs(exact) * 1.01 + smallest)
        return
    # A value within the fp32 error of the edge between two codes may get the other one; few are.
    low, high, nearest = (
        order(to_codes(((exact + d) / np.float64(SCALE[0])).astype(np.float32), "e4m3"))
        for d in (-error, error, 0)
    )
    got = order(output[some])
    assert ((low <= got) & (got <= high)).all()
    assert np.abs(got - nearest).max() <= 1
    assert np.count_nonzero(got != nearest) <= 3 + 2e-5 * got.size
