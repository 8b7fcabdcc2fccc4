"""quantize_q: 16-bit queries that the attention operators quantise to e4m3 themselves.

Against the fp64 model of the quantised queries, and bit by bit against the same operator on codes
that NumPy has made.
"""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest

import fastattn.functional as F
from fastattn import reference
from tests.support.attention import (
    BLOCK_WISE_FP8,
    NUMPY_TYPES,
    CacheKind,
    flash_problem,
    paged_problem,
)
from tests.support.compare import assert_same_bits
from tests.support.static import run_all_modes
from tests.support.tensors import EMPTY_OUTPUTS, skip_slices_on, to_numpy, to_paddle

STATIC = CacheKind("cache_fp8", "head")
KINDS = [
    CacheKind("cache_fp8", "tensor"),
    STATIC,
    CacheKind("cache_fp8", "head", scale_dtype="bfloat16"),
    BLOCK_WISE_FP8,
    CacheKind("block_wise_fp8", scale_dtype="bfloat16"),
]
FEW = [STATIC, BLOCK_WISE_FP8]

#: (cached, new) tokens: chunks at odd offsets, a prompt, decode, speculative and resting sequences.
MIXED = [(333, 129), (0, 150), (100, 1), (0, 0), (51, 77), (64, 3)]
FLASH = [(150, 300), (1, 77), (0, 5), (129, 129), (3, 64)]


def with_unequal_queries(problem):
    """Sizes of queries from 1/100 to 100 over tokens and heads, and a few that are 0 or tiny."""
    rng = np.random.default_rng(5)
    tokens, heads, _ = problem.q.shape
    sizes = 10.0 ** rng.uniform(-2, 0.5, (tokens, heads, 1))
    sizes[::7, 0] = 0
    sizes[3::11, -1] = 1e-6  # below the floor in fp32, rounded or not
    q = (problem.q.astype(np.float64) * sizes).astype(np.float32)
    return dataclasses.replace(problem, q=q.astype(problem.q.dtype))


def codes_first(problem, place):
    """What the operator makes of codes and scales that NumPy has made."""
    codes, descale = reference.quantize_query(problem.q)
    options = {**problem.options, "quantize_q": False}
    of_codes = dataclasses.replace(problem, q=codes, q_descale=descale, options=options)
    names = {dtype: name for name, dtype in NUMPY_TYPES.items()}
    coded = problem.options.get("out_scale") is not None
    return of_codes.run(place, out_dtype="auto" if coded else names[problem.q.dtype])


def check(problem, place):
    """Hold a problem with quantize_q to both references."""
    out, lse = problem.check(place)
    expected, expected_lse = codes_first(problem, place)
    owned = problem.owned()
    assert_same_bits(out[owned], expected[owned], "out")
    assert_same_bits(lse[:, owned], expected_lse[:, owned], "lse")


# The definition.


def test_codes_and_scales_of_the_model():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(9, 3, 64)) * 10.0 ** rng.uniform(-3, 3, (9, 3, 1))
    q = q.astype(ml_dtypes.bfloat16)
    q[2, 1] = 0
    codes, descale = reference.quantize_query(q)
    x = q.astype(np.float64)
    largest = np.abs(x).max(axis=-1)
    np.testing.assert_allclose(descale, np.maximum(largest, 1e-6) / 448, rtol=1e-7)
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * descale[..., None]
    step = np.maximum(2.0**-4 * np.abs(x), 2.0**-10 * descale[..., None])
    assert (np.abs(values - x) <= step * (1 + 1e-6)).all()
    assert ((codes & 0x7F).max(axis=-1) == 0x7E).sum() == 9 * 3 - 1  # 448 is reached but by zeros
    assert not codes[2, 1].any()


# Both references.


@pytest.mark.few_on_cpu
@pytest.mark.parametrize("q_type", ["bfloat16", "float16"])
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_mixed_seqs(place, kind, dim, q_type):
    problem = paged_problem(
        MIXED, kind=kind, dim=dim, q_type=q_type, padding=5, quantize_q=True, seed=dim
    )
    check(with_unequal_queries(problem), place)


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (8, 1), (5, 5)], ids=str)
@pytest.mark.parametrize("kind", FEW, ids=str)
def test_query_head_groups(place, kind, heads):
    seqs = [(70, 100), (200, 1), (0, 13)]
    check(paged_problem(seqs, kind=kind, heads=heads, dim=128, quantize_q=True), place)


@pytest.mark.parametrize("new", [1, 4])
@pytest.mark.parametrize("kind", FEW, ids=str)
def test_decoding_seqs(place, kind, new):
    seqs = [(63, new), (1000, new), (0, new), (64, 0)]
    check(paged_problem(seqs, kind=kind, heads=(8, 2), dim=128, quantize_q=True), place)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False, "window_size": (37, 150)},
        {"softcap": 5.0},
        {"sinks": np.array([0.3, -1.0, 4.0, -np.inf], np.float32)},
        {"out_scale": np.array([0.07], np.float32)},
        {"softmax_scale": -0.2},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("kind", FEW, ids=str)
def test_options(place, kind, options):
    problem = paged_problem([(300, 80), (0, 133), (9, 1)], kind=kind, quantize_q=True, **options)
    check(problem, place)


def test_fp32_results(place):
    problem = paged_problem(MIXED, kind=BLOCK_WISE_FP8, quantize_q=True)
    out, _ = problem.run(place, out_dtype="float32")
    rounded, _ = problem.run(place)
    assert out.dtype == np.float32
    assert_same_bits(out.astype(rounded.dtype), rounded, "the same before it is rounded")


@pytest.mark.parametrize("q_type", ["bfloat16", "float16"])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_contiguous_keys(place, dim, causal, q_type):
    problem = flash_problem(
        FLASH,
        dim=dim,
        q_type=q_type,
        kv_type="e4m3",
        descale_shape="batch",
        causal=causal,
        quantize_q=True,
    )
    check(with_unequal_queries(problem), place)


def test_it_is_not_the_default(place):
    """Without it the result is that of the 16-bit queries, which differs."""
    problem = paged_problem([(70, 100)], kind=BLOCK_WISE_FP8, dim=128)
    exact, _ = problem.reference()
    plain, _ = problem.run(place)
    assert_same_bits(problem.run(place, quantize_q=False)[0], plain, "quantize_q=False")
    quantised, _ = problem.run(place, quantize_q=True)
    error, quantised_error = (
        np.linalg.norm(out.astype(np.float64) - exact) / np.linalg.norm(exact)
        for out in (plain, quantised)
    )
    assert error < 0.004 < quantised_error < 0.06


@pytest.mark.parametrize("kind", FEW, ids=str)
def test_same_as_codes_of_the_cache_writer(place, kind):
    """rope_write_cache_kv quantises the same values with the same rule."""
    problem = paged_problem([(0, 70), (0, 1)], kind=kind, heads=(4, 2))
    positional, keywords = problem.arguments(place)
    rng = np.random.default_rng(3)
    qkv = rng.normal(size=(71, 8 * 64)) * 10.0 ** rng.uniform(-3, 1, (71, 1))
    table = to_paddle(reference.make_rotary_embs(128, 64), place)
    stored = {name: x for name, x in keywords.items() if name.startswith(("cache", "fp8"))}
    outputs = []
    for q_quant in ("none", "per_token_head"):
        q, descale = F.rope_write_cache_kv(
            to_paddle(qkv.astype(problem.q.dtype), place),
            *positional[1:3],
            table,
            *positional[3:7],
            num_heads=4,
            num_kv_heads=2,
            q_quant=q_quant,
            **stored,
        )
        quantise = q_quant == "none"
        out = F.paged_attention(
            q, *positional[1:], q_descale=descale, quantize_q=quantise, **stored
        )
        outputs.append(to_numpy(out))
    assert_same_bits(*outputs)


# What queries may hold, and how they may lie.


@pytest.mark.parametrize("q_type", ["bfloat16", "float16"])
@pytest.mark.parametrize("seqs", [[(100, 90)], [(100, 2)]], ids=["long", "short"])
def test_special_queries(place, seqs, q_type):
    """A NaN stays with its token and head; infinities saturate; zeros attend evenly."""
    problem = paged_problem(seqs, kind=BLOCK_WISE_FP8, q_type=q_type, quantize_q=True)
    clean, clean_lse = problem.run(place)
    problem.q[0, 0] = 0
    problem.q[0, 1, 5] = np.nan
    problem.q[0, 2] = np.nan
    problem.q[1, 0, 9] = np.inf
    problem.q[1, 1, 0] = -np.inf
    problem.q[1, 2, :2] = np.inf, np.nan
    largest = {"bfloat16": 3.3e38, "float16": 65504}[q_type]
    problem.q[1, 3] = largest
    out, lse = problem.run(place)
    expected, expected_lse = codes_first(problem, place)
    assert_same_bits(out, expected, "out")
    assert_same_bits(lse, expected_lse, "lse")
    for token, head in ((0, 1), (0, 2), (1, 2)):
        assert np.isnan(out[token, head].astype(np.float32)).all(), (token, head)
    assert np.isfinite(out[0, [0, 3]].astype(np.float32)).all()
    others = np.ones(out.shape[:2], bool)
    others[0, :3] = others[1] = False
    assert np.isfinite(lse.T[others]).all()
    if place == "cpu":  # a GPU's tile may rescale its rows together
        assert_same_bits(out[others], clean[others], "other tokens and heads")
        assert_same_bits(lse.T[others], clean_lse.T[others], "their LSE")
    else:
        np.testing.assert_allclose(
            out[others].astype(np.float32), clean[others].astype(np.float32), rtol=0.1, atol=0.1
        )


@pytest.mark.parametrize("kind", FEW, ids=str)
def test_queries_may_be_a_slice_of_qkv(place, kind):
    skip_slices_on(place)
    problem = paged_problem(MIXED, kind=kind, quantize_q=True)
    expected, expected_lse = problem.run(place)
    tokens, heads, dim = problem.q.shape
    qkv = np.full((tokens, heads + 3, dim + 8), np.nan, problem.q.dtype)
    qkv[:, 1:-2, 3:-5] = problem.q
    positional, keywords = problem.arguments(place)
    positional[0] = to_paddle(qkv, place)[:, 1:-2, 3:-5]
    out, lse = F.paged_attention(*positional, return_softmax_lse=True, **keywords)
    assert_same_bits(to_numpy(out), expected, "out")
    assert_same_bits(to_numpy(lse), expected_lse, "lse")


def test_padding_and_a_given_output(place):
    problem = paged_problem(
        [(3, 70), (70, 0), (9, 2)], kind=STATIC, spans=[71, 5, 4], padding=3, quantize_q=True
    )
    owned = problem.owned()
    problem.q[~owned] = np.nan
    expected, _ = problem.run(place)
    assert not expected[~owned].astype(np.float32).any()
    marker = np.full(expected.shape, 7.0, expected.dtype)
    given = to_paddle(marker, place)
    positional, keywords = problem.arguments(place)
    F.paged_attention(*positional, out=given, **keywords)
    assert_same_bits(to_numpy(given)[owned], expected[owned], "owned tokens")
    assert_same_bits(to_numpy(given)[~owned], marker[~owned], "tokens of no sequence")


def test_no_tokens(place):
    if not EMPTY_OUTPUTS:
        pytest.skip("this Paddle has no empty outputs")
    problem = paged_problem([(5, 0)], kind=BLOCK_WISE_FP8, quantize_q=True)
    out, lse = problem.run(place)
    assert out.shape == (0, 4, 64)
    assert lse.shape == (4, 0)


def test_no_seqs_but_tokens(place):
    problem = paged_problem([], kind=BLOCK_WISE_FP8, padding=3, quantize_q=True)
    out, lse = problem.run(place)
    assert not out.astype(np.float32).any()
    assert np.isneginf(lse).all()


# Every mode of Paddle.


def paged(q, key_cache, value_cache, tables, cu, decoder, this_time, k_scales, v_scales):
    return F.paged_attention(
        q,
        key_cache,
        value_cache,
        tables,
        cu,
        decoder,
        this_time,
        66,
        130,
        cache_k_scales=k_scales,
        cache_v_scales=v_scales,
        cache_quant_type="block_wise_fp8",
        return_softmax_lse=True,
        quantize_q=True,
    )


def flash(q, k, v, cu_q, cu_k, k_descale, v_descale):
    return F.flash_attention(
        q, k, v, cu_q, cu_k, 9, 132, k_descale=k_descale, v_descale=v_descale, quantize_q=True
    )


def arrays(problem, *names):
    """Tensor arguments as arrays, in the operator's order; `names` are keywords."""
    positional, keywords = problem.arguments()
    tensors = [x for x in positional if not isinstance(x, int)]
    return [to_numpy(x) for x in tensors + [keywords[name] for name in names]]


def test_paged_attention_in_every_mode(place):
    problem = paged_problem([(64, 66), (0, 2), (129, 1)], kind=BLOCK_WISE_FP8, quantize_q=True)
    inputs = arrays(problem, "cache_k_scales", "cache_v_scales")
    outputs, _ = run_all_modes(paged, inputs, place)
    expected = problem.check(place)
    assert_same_bits(outputs[0], expected[0], "out")
    assert_same_bits(outputs[1], expected[1], "lse")


def test_flash_attention_in_every_mode(place):
    problem = flash_problem([(3, 70), (9, 132)], q_type="float16", kv_type="e4m3", quantize_q=True)
    outputs, _ = run_all_modes(flash, arrays(problem, "k_descale", "v_descale"), place)
    assert outputs[0].dtype == np.float16
    assert_same_bits(outputs[0], problem.check(place)[0], "out")
