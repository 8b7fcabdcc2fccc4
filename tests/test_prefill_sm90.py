"""Long rows of e4m3 queries over FP8 keys and values.

On a Hopper GPU these take the kernel of custom_ops/cuda/prefill_sm90, which multiplies e4m3
probabilities; anywhere else they take the other kernels, which must keep the same bounds.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest

from fastattn.reference import numerics
from tests.support.attention import CacheKind, flash_problem, paged_problem

STATIC = CacheKind("cache_fp8", "head")
TOKEN = CacheKind("block_wise_fp8")
KINDS = [
    CacheKind("cache_fp8", "tensor"),
    STATIC,
    CacheKind("cache_fp8", "head", scale_dtype="bfloat16"),
    TOKEN,
    CacheKind("block_wise_fp8", scale_dtype="bfloat16"),
]
FEW = [STATIC, TOKEN]

#: (cached, new) tokens: a chunk at an odd offset, a prompt, decoding and resting rows.
MIXED = [(333, 129), (0, 300), (100, 1), (0, 0), (51, 77), (64, 256)]

#: Rounding of a probability to e4m3, and what the scores' own error makes of it.
_PROBABILITY = 2.0**-4 + 0.03


def check(problem, place: str) -> tuple[np.ndarray, np.ndarray]:
    """Hold the result to the error that e4m3 probabilities can make; returns (out, lse).

    A relative error of every probability moves an output by at most that times the output for the
    values' magnitudes.
    """
    out, lse = problem.run(place)
    exact, exact_lse = problem.reference(out_scale=None)
    magnitude = _with_magnitudes(problem).reference(out_scale=None)[0]
    owned = problem.owned()
    scale = problem.options.get("out_scale")
    step = 2.0**-7
    if scale is not None:
        out = numerics.from_codes(out, "e4m3") * scale[0]
        step = 2.0**-3
    out, exact, magnitude = (x[owned].astype(np.float64) for x in (out, exact, magnitude))
    lse, exact_lse = lse[:, owned], exact_lse[:, owned]
    np.testing.assert_array_equal(np.isnan(out), np.isnan(exact))
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(exact_lse))
    smallest = 0.0 if scale is None else 2.0**-9 * scale[0]
    bound = (_PROBABILITY + step) * magnitude + smallest + 1e-6
    with np.errstate(invalid="ignore"):
        assert not (np.abs(out - exact) > bound).any()
        finite = np.isfinite(exact_lse) & np.isfinite(lse)
        assert np.abs(lse - exact_lse)[finite].max(initial=0.0) < 0.03
    # Rounding errors cancel over many keys; a wrong scale does not.
    ok = np.isfinite(exact) & np.isfinite(out)
    error = np.sqrt(np.mean((out - exact)[ok] ** 2)) / np.sqrt(np.mean(exact[ok] ** 2))
    assert error < (0.035 if scale is None else 0.05), error
    return out, lse


def _with_magnitudes(problem):
    twin = copy.deepcopy(problem)
    if hasattr(twin, "cu_seqlens_k"):
        twin.v = (twin.v.view(np.uint8) & 0x7F).view(problem.v.dtype)
    else:
        twin.v.elements &= 0x7F
    return twin


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_mixed_rows(place, kind, dim):
    check(paged_problem(MIXED, kind=kind, dim=dim, q_type="e4m3:token_head", seed=1), place)


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (8, 1), (5, 5)], ids=str)
@pytest.mark.parametrize("kind", FEW, ids=str)
def test_query_head_groups(place, heads, kind):
    rows = [(70, 200), (0, 130)]
    check(paged_problem(rows, kind=kind, heads=heads, dim=128, q_type="e4m3:tensor"), place)


@pytest.mark.parametrize("prefix", [0, 1, 63, 64, 127, 200])
@pytest.mark.parametrize("new", [64, 127, 129])
def test_prefix_lengths(place, prefix, new):
    rows = [(prefix, new), (prefix + 5, new + 1)]
    check(paged_problem(rows, kind=TOKEN, dim=128, q_type="e4m3:tensor", seed=prefix), place)


@pytest.mark.parametrize("kind", FEW, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"window_size": (100, 0)},
        {"causal": False, "window_size": (37, 150)},
        {"softcap": 5.0},
        {"sinks": np.array([0.3, -1.0, 4.0, -np.inf], np.float32)},
        {"out_scale": np.array([0.07], np.float32)},
    ],
    ids=lambda options: "-".join(options),
)
def test_options(place, kind, options):
    rows = [(300, 200), (0, 333)]
    problem = paged_problem(rows, kind=kind, dim=128, q_type="e4m3:token_head", **options)
    check(problem, place)


@pytest.mark.parametrize("kind", FEW, ids=str)
def test_mask_offsets(place, kind):
    rng = np.random.default_rng(0)
    start = rng.integers(0, 150, 333)
    offsets = np.stack([start, start + rng.integers(-3, 300, 333)], 1).astype(np.int32)
    problem = paged_problem(
        [(60, 200), (0, 133)],
        kind=kind,
        dim=128,
        q_type="e4m3:tensor",
        causal=False,
        mask_offsets=offsets,
    )
    check(problem, place)


@pytest.mark.parametrize("kind", FEW, ids=str)
def test_blocks_that_are_not_assigned(place, kind):
    problem = paged_problem([(500, 200), (0, 130)], kind=kind, dim=128, q_type="e4m3:tensor")
    problem.block_tables[0, [0, 3, 7]] = [-1, 2**31 - 1, 12345]
    problem.block_tables[1, :] = -1
    out, lse = check(problem, place)
    assert np.isneginf(lse[:, 200:]).all() and (out[200:] == 0).all()


@pytest.mark.parametrize("kind", FEW, ids=str)
def test_nan_stays_with_the_rows_that_see_it(place, kind):
    problem = paged_problem([(200, 300)], kind=kind, dim=128, q_type="e4m3:tensor")
    problem.v.elements[problem.slot(0, 333)[0], 0, 333 % 64, 5] = 0x7F
    problem.k.elements[problem.slot(0, 450)[0], 1, 450 % 64, 7] = 0xFF
    out, _ = check(problem, place)
    seen = np.isnan(out)
    assert seen[133:, :2, 5].all() and not seen[:133].any() and not seen[:, :2, 6].any()
    assert seen[250:, 2:].all() and not seen[:250, 2:].any()


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
    out, _ = check(problem, place)
    exact, _ = problem.reference()
    assert abs(np.mean(out) / np.mean(exact) - 1) < 5e-3


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_contiguous_keys(place, dim, causal):
    rows = [(300, 300), (77, 400), (0, 5), (129, 64), (200, 100)]
    problem = flash_problem(
        rows, heads=(4, 2), dim=dim, q_type="e4m3:tensor", descale_shape="batch", causal=causal
    )
    check(problem, place)
