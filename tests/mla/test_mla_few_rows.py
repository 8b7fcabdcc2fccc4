"""mla_attention of few heads over caches of codes, which Hopper has a kernel for.

Scales are of every size and sign, lengths odd, and bytes that no query may see are NaN.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.mla_dense import UNASSIGNED, Problem, assert_close, assert_outputs_close

#: Heads and most new tokens: at most 16 rows a sequence.
ROWS = [(16, 1), (8, 2), (5, 3), (8, 1), (1, 7)]
CODES = ["fp8", "fp8_656"]


def step(heads, most, cache_format, **options):
    """Sequences of odd lengths, empty ones and such as do not run among them."""
    cached, new = [0, 129, 63, 0, 64, 517, 5, 320], [1, 1, 1, 0, 1, 1, 1, 1]
    return Problem(
        cached,
        [min(n * (1 + i % most), most) for i, n in enumerate(new)],
        heads=heads,
        cache_format=cache_format,
        rule="amax",
        **options,
    )


def set_scales(problem, scale_of):
    """Scales [n, 4] of the n keys of every sequence, in an fp8_656 cache."""
    for b, count in enumerate(problem.cached + problem.new):
        i = np.arange(count)
        pages = problem.tables[b, i // problem.page_size]
        scales = np.asarray(scale_of(i[:, None], np.arange(4)), np.float32)
        scales = np.ascontiguousarray(np.broadcast_to(scales, (count, 4)))
        problem.cache[pages, i % problem.page_size, 512:528] = scales.view(np.uint8)


@pytest.mark.parametrize("page_size", [64, 16, 7, 1, 256])
@pytest.mark.parametrize(("heads", "most"), ROWS)
@pytest.mark.parametrize("cache_format", CODES)
def test_shapes(place, cache_format, heads, most, page_size):
    problem = step(heads, most, cache_format, page_size=page_size, gap=heads % 2)
    problem.check(place, causal=page_size != 16)


@pytest.mark.parametrize("cache_format", CODES)
def test_sinks_and_pages_that_are_not_assigned(place, cache_format):
    problem = step(8, 2, cache_format)
    problem.tables[1, 1:] = UNASSIGNED[0]
    problem.tables[5, [0, 2, 5]] = -1, len(problem.cache), UNASSIGNED[2]
    problem.tables[6] = -1  # nothing at all
    sinks = np.array([0, 2.5, -4, np.inf, -np.inf, 9, 1, -1], np.float32)
    problem.check(place)
    problem.check(place, sinks=sinks)
    got = problem.run(place, sinks=sinks, out_dtype="float32")
    problem.accept(place, got, sinks=sinks)


@pytest.mark.parametrize(("heads", "new"), [(16, 1), (4, 4)])
def test_scales_of_any_size_and_sign(place, heads, new):
    problem = Problem([700, 33], [new, 1], heads=heads, cache_format="fp8_656", q_std=0.2)
    rng = np.random.default_rng(1)

    def wild(i, g):
        shape = np.broadcast_shapes(i.shape, g.shape)
        return rng.normal(size=shape) * np.exp2(rng.integers(-8, 1, shape)) / 40

    set_scales(problem, wild)
    problem.check(place)


@pytest.mark.parametrize("direction", [1, -1])
def test_scales_that_rise_or_fall_along_the_keys(place, direction):
    """Weights are in units of the largest scale so far, which the first or the last key has."""
    problem = Problem([640], [1], heads=8, cache_format="fp8_656", q_std=0.01)
    set_scales(problem, lambda i, g: np.exp2(direction * (i // 32 - 10) * (1 + g) / 4 - 6) * 1.37)
    problem.check(place)


def test_scales_near_the_ends_of_fp32(place):
    """Zeros, subnormals, and groups whose scales are 2^100 apart."""
    problem = Problem([200], [1], heads=8, cache_format="fp8_656", q_std=0.0)

    def scales(i, g):
        return np.where(i % 3 == 0, 0.0, np.ldexp(1.5, [-145, -60, 0, 40])[g] * (1 + i % 2))

    set_scales(problem, scales)
    out, lse = problem.run(place, out_dtype="float32")
    want, want_lse = problem.want(rounded=False)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)
    for g in (1, 2, 3):  # the first group's outputs are subnormal themselves
        part, exact = out[..., 128 * g : 128 * g + 128], want[..., 128 * g : 128 * g + 128]
        assert np.linalg.norm(part / 2.0**-60 - exact / 2.0**-60) <= (
            5e-3 * np.linalg.norm(exact / 2.0**-60)
        )


@pytest.mark.parametrize("factor", [1e5, 1e6, 1e7, 3e7, 1e8, 1e12])
@pytest.mark.parametrize("cache_format", CODES)
def test_large_scores(place, cache_format, factor):
    """Keys that are alike have like weights, also where 13 is next to nothing beside a score."""

    def alike(rng, count, latent):
        return np.broadcast_to(rng.normal(size=latent), (count, latent))

    problem = Problem([300, 5], [1, 2], heads=4, cache_format=cache_format, latents=alike)
    problem.q = (problem.q.astype(np.float32) * np.float32(factor)).astype(problem.q.dtype)
    problem.q[..., 512:] = 0
    out, lse = problem.run(place)
    assert_outputs_close(out, problem.want()[0])
    assert np.isfinite(lse[:, problem.starts[0] :]).all()


def test_a_key_of_no_weight_has_any_scale(place):
    """Its scale is infinite in units of the others', and all queries see it."""
    problem = Problem([200], [1], heads=8, cache_format="fp8_656")
    pages, rows = problem.tables[0, np.arange(201) // 64], np.arange(201) % 64
    problem.cache[pages, rows, 128:256] = 0x38
    problem.cache[pages[5], rows[5], 128:256] = 0xB8
    problem.q[...] = 0
    problem.q[..., 128:256] = 20

    def scales(i, g):
        return np.where(g > 0, 1.0, np.where(i == 5, 4.0, np.finfo(np.float32).tiny))

    set_scales(problem, scales)
    out, lse = problem.run(place)
    assert np.isfinite(out.astype(np.float32)).all() and np.isfinite(lse).all()
    problem.check(place)


@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_queries_without_keys_whatever_the_scale(place, scale):
    problem = Problem([70, 9], [1, 2], heads=8, cache_format="fp8")
    problem.tables[0] = -1
    problem.scale = np.full_like(problem.scale, scale)
    out, lse = problem.run(place)
    assert not out[:1].astype(np.float32).any() and np.isneginf(lse[:, :1]).all()


@pytest.mark.parametrize("cache_format", CODES)
def test_masked_keys_change_no_bit(place, cache_format):
    """Codes, scales and rotated channels of later tokens, NaN and huge ones too."""
    problem = Problem([70], [4], heads=4, cache_format=cache_format)
    before = problem.run(place)
    page = problem.tables[0, 1]
    for value in (0xFF, 0x7F, 0x7E, 0x00, 0x70):
        problem.cache[page, 72 - 64 : 74 - 64] = value
        out, lse = problem.run(place)
        assert np.array_equal(out[:2].view(np.uint16), before[0][:2].view(np.uint16))
        assert np.array_equal(lse[:, :2].view(np.uint32), before[1][:, :2].view(np.uint32))


@pytest.mark.parametrize("cache_format", CODES)
def test_nan_codes_stay_with_those_that_see_them(place, cache_format):
    problem = Problem([70], [4], heads=4, cache_format=cache_format)
    problem.cache[problem.tables[0, 1], 72 - 64, 40] = 0xFF
    got = problem.run(place)
    problem.accept(place, got)
    assert np.isnan(got[1][:, 2:]).all() and not np.isnan(got[1][:, :2]).any()


@pytest.mark.gpu
@pytest.mark.parametrize("cache_format", CODES)
@pytest.mark.parametrize("heads", [8, 16])
def test_same_bits_again(cache_format, heads):
    problem = Problem([3000, 17, 900], [1, 1, 1], heads=heads, cache_format=cache_format)
    first = problem.run("gpu")
    assert_close(first, problem.want(rounded=False))
    for _ in range(3):
        for a, b in zip(first, problem.run("gpu")):
            assert np.array_equal(a.view(np.uint8), b.view(np.uint8))
