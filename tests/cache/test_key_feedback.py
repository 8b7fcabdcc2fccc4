"""k_feedback of the writers: every byte, the matrix against least squares in fp64, and its use."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import reference
from fastattn.reference.feedback import FEEDBACK_BLOCK, feedback_of
from fastattn.reference.hadamard import hadamard_matrix
from fastattn.reference.layout import unpack
from fastattn.reference.numerics import from_codes
from tests.cache.test_key_transform import centre, model
from tests.support.cache import Cache, assert_same_cache, make_cache, make_step, make_values
from tests.support.rope import check, make_case, run
from tests.support.tensors import DTYPES, to_numpy, to_paddle, value_dim

TYPES = ("cache_int8", "cache_fp8", "block_wise_int8", "block_wise_fp8", "block_wise_int4")
TYPES += ("block_wise_k8v4", "block_wise_kfp8v4")
CACHED = [0, 1, 63, 64, 65, 100, 320, 7]
NEW = [1, 0, 65, 64, 63, 1, 200, 5]


def queries(kv_heads: int, dim: int, tokens: int = 400) -> np.ndarray:
    """[tokens, KV, D] whose channels go together and differ in size; no two heads are alike."""
    rng = np.random.default_rng(kv_heads + dim)
    q = rng.normal(size=(tokens, kv_heads, dim)) * 10 ** rng.uniform(-1, 0.5, (kv_heads, dim))
    mix = np.linalg.qr(rng.normal(size=(kv_heads, dim, dim)))[0]
    return np.einsum("thi,hij->thj", q, mix)


def feedback(kv_heads: int, dim: int, rotation: str = "none") -> np.ndarray:
    q = queries(kv_heads, dim)
    return feedback_of(np.einsum("thi,thj->hij", q, q) / len(q), rotation)


def write(cache: Cache, key, value, step, place, **options) -> Cache:
    names = ("k_center", "k_feedback")
    for name in names:
        if options.get(name) is not None:
            options[name] = to_paddle(options[name], place)
    arrays = [cache.key, cache.value, cache.k_scales, cache.v_scales]
    tensors = [to_paddle(a.copy(), place) for a in arrays]
    F.write_cache_kv(
        to_paddle(key, place),
        to_paddle(value, place),
        *tensors[:2],
        *(to_paddle(a, place) for a in step.arrays),
        cache_k_scales=tensors[2],
        cache_v_scales=tensors[3],
        **cache.options,
        **options,
    )
    return Cache(*(to_numpy(t) for t in tensors), *cache.options.values())


@pytest.mark.parametrize("transform", ["none", "center", "hadamard", "center+hadamard"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("kind", TYPES)
def test_write(place, kind, head_dim, dtype, transform):
    step, num_blocks = make_step(CACHED, NEW)
    granularity = "tensor" if dtype == "float16" else "head"
    scale_dtype = DTYPES["bfloat16"] if dtype == "bfloat16" else np.float32
    cache = make_cache(
        kind, num_blocks, 3, head_dim, granularity=granularity, scale_dtype=scale_dtype
    )
    key = make_values((step.num_tokens, 3, head_dim), DTYPES[dtype], 1)
    value = make_values((step.num_tokens, 3, value_dim(head_dim)), DTYPES[dtype], 2)
    rotation = "hadamard" if "hadamard" in transform else "none"
    options = {
        "k_rotation": rotation,
        "k_center": centre(3, head_dim) if "center" in transform else None,
        "k_feedback": feedback(3, head_dim, rotation),
    }
    actual = write(cache, key, value, step, place, **options)
    expected = model(cache, key, value, step, **options)
    assert_same_cache(actual, expected)
    plain = model(cache, key, value, step, **{**options, "k_feedback": None})
    assert (plain.key != expected.key).any()  # the feedback is seen at all
    if expected.k_scales is not None:
        np.testing.assert_array_equal(plain.k_scales, expected.k_scales)
    np.testing.assert_array_equal(plain.value, expected.value)


@pytest.mark.parametrize("heads", [1, 2, 5])
@pytest.mark.parametrize("kind", TYPES)
def test_decode_steps(place, kind, heads):
    step, num_blocks = make_step([5, 63, 64, 130, 0], [1, 2, 1, 0, 1])
    cache = make_cache(kind, num_blocks, heads, 128)
    key, value = (make_values((step.num_tokens, heads, 128), DTYPES["bfloat16"], s) for s in (1, 2))
    options = {"k_rotation": "hadamard", "k_feedback": feedback(heads, 128, "hadamard")}
    actual = write(cache, key, value, step, place, **options)
    assert_same_cache(actual, model(cache, key, value, step, **options))


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("lengths", [([3, 64, 200, 1], [1, 1, 2, 0]), ([0, 30, 127], [70, 1, 140])])
@pytest.mark.parametrize("kind", TYPES)
def test_rope_write(place, kind, lengths, head_dim, dtype, rotation):
    case = make_case(
        *lengths,
        cache=(kind, "e4m3", "head"),
        head_dim=head_dim,
        dtype=DTYPES[dtype],
        norm=True,
        bias=head_dim == 64,
        neox=head_dim != 128,
    )
    case.options["k_rotation"] = rotation
    case.tensors["k_center"] = centre(2, head_dim)
    case.tensors["k_feedback"] = feedback(2, head_dim, rotation)
    check(case, place)


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
@pytest.mark.parametrize("dim", [64, 96])
def test_no_other_rounding_of_a_block_costs_less(dim, rotation):
    """Each block's errors are taken back as well as later blocks can, by least squares in fp64."""
    q = queries(2, dim)
    moment = np.einsum("thi,thj->hij", q, q) / len(q)
    matrix = hadamard_matrix(dim) if rotation == "hadamard" else np.eye(dim)
    found = feedback_of(moment, rotation, damping=1e-9).astype(np.float64)
    rng = np.random.default_rng(3)
    for head in range(2):
        seen = q[:, head] @ matrix  # queries as rotated keys meet them
        for first in range(0, dim - FEEDBACK_BLOCK, FEEDBACK_BLOCK):
            end = first + FEEDBACK_BLOCK
            error = rng.normal(size=FEEDBACK_BLOCK)
            best, *_ = np.linalg.lstsq(seen[:, end:], -seen[:, first:end] @ error, rcond=None)
            got = error @ found[head, first:end, end:]
            np.testing.assert_allclose(got, best, atol=1e-4 * np.abs(best).max())
        lower = np.tril(np.ones((dim // 8, dim // 8))).repeat(8, 0).repeat(8, 1)
        assert not (found[head] * lower).any()


def test_elements_that_are_not_read(place):
    """On and below the diagonal's blocks, whatever they are."""
    step, num_blocks = make_step([0, 9], [70, 1])
    cache = make_cache("block_wise_int4", num_blocks, 2, 64)
    key = make_values((71, 2, 64), np.float32, 3)
    known = feedback(2, 64)
    lower = np.tril(np.ones((8, 8), bool)).repeat(8, 0).repeat(8, 1)
    expected = write(cache, key, key, step, place, k_feedback=known)
    garbage = np.where(lower, np.float32(np.nan), known)
    assert_same_cache(write(cache, key, key, step, place, k_feedback=garbage), expected)


def test_heads_without_queries_have_none():
    assert not feedback_of(np.zeros((2, 64, 64)), "none").any()


@pytest.mark.parametrize(("kind", "gain"), [("block_wise_int4", 1.8), ("block_wise_int8", 1.8)])
def test_scores_have_smaller_errors(place, kind, gain):
    """What it is for: mean squared errors of q . k in fp64, with queries that were not seen."""
    step, num_blocks = make_step([0], [64])
    cache = make_cache(kind, num_blocks, 1, 128)
    key = np.random.default_rng(0).normal(size=(64, 1, 128)).astype(np.float32)
    q = queries(1, 128)
    seen, others = q[:200], q[200:, 0]
    known = feedback_of(np.einsum("thi,thj->hij", seen, seen) / 200, "hadamard")

    def error(**options) -> float:
        written = write(cache, key, key, step, place, k_rotation="hadamard", **options)
        block = step.block_tables[0, 0]
        int4 = kind == "block_wise_int4"
        codes = unpack(written.key, "k", "fastattn", int8=not int4, nibbles=int4)
        stored = from_codes(codes, "int4" if int4 else "int8")[block, 0].astype(np.float64)
        stored *= written.k_scales[block, 0, :, None]
        scores = others @ (hadamard_matrix(128) @ stored.T - key[:, 0].T)
        return float(np.mean(scores**2))

    assert error() > gain * error(k_feedback=known)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", TYPES)
def test_bad_values_stay_in_their_token(place, kind, bad):
    step, num_blocks = make_step([0], [70])
    cache = make_cache(kind, num_blocks, 2, 64)
    key = make_values((70, 2, 64), np.float32, 3)
    key[2, 0, 5] = bad
    options = {"k_rotation": "none", "k_feedback": feedback(2, 64)}
    written = write(cache, key, key, step, place, **options)
    assert_same_cache(written, model(cache, key, key, step, **options))
    clean = model(cache, np.where(np.isfinite(key), key, 1), key, step, **options)
    block = step.block_tables[0, 0]
    others = np.delete(np.arange(64), 2)
    np.testing.assert_array_equal(written.key[block, 0][others], clean.key[block, 0][others])
    np.testing.assert_array_equal(written.key[block, 1], clean.key[block, 1])


def test_codes_that_saturate_do_not_run_away(place):
    """A static scale that is far too small: codes stay at the end of their range."""
    step, num_blocks = make_step([0], [64])
    cache = make_cache("cache_int8", num_blocks, 1, 64)
    cache.k_scales[:] = 1e-4
    key = np.full((64, 1, 64), 3, np.float32)
    options = {"k_feedback": feedback(1, 64)}
    written = write(cache, key, key, step, place, **options)
    assert_same_cache(written, model(cache, key, key, step, **options))


@pytest.mark.parametrize(
    ("kind", "shape", "error", "text"),
    [
        ("none", (1, 64, 64), NotImplementedError, "k_feedback.*a scale for each head or token"),
        ("block_wise_mxfp4", (1, 64, 64), NotImplementedError, "k_feedback.*block_wise_mxfp4"),
        ("cache_fp8-e5m2", (1, 64, 64), NotImplementedError, "k_feedback.*e5m2"),
        ("cache_int8-channel", (1, 64, 64), NotImplementedError, "k_feedback.*scales of channels"),
        ("block_wise_int4", (64, 64), ValueError, r"k_feedback.*\[1, 64, 64\]"),
        ("block_wise_int4", (2, 64, 64), ValueError, r"k_feedback.*\[1, 64, 64\]"),
        ("block_wise_int4", (1, 64, 32), ValueError, r"k_feedback.*\[1, 64, 64\]"),
    ],
)
def test_errors(place, kind, shape, error, text):
    step, num_blocks = make_step([0], [2])
    kind, _, more = kind.partition("-")
    fp8_format = "e5m2" if more == "e5m2" else "e4m3"
    granularity = "channel" if more == "channel" else "head"
    cache = make_cache(kind, num_blocks, 1, 64, fp8_format=fp8_format, granularity=granularity)
    arrays = [cache.key, cache.value, cache.k_scales, cache.v_scales]
    tensors = [None if a is None else to_paddle(a.copy(), place) for a in arrays]
    key = to_paddle(np.ones((2, 1, 64), DTYPES["bfloat16"]), place)
    with pytest.raises(error, match=text):
        F.write_cache_kv(
            key,
            key,
            *tensors[:2],
            *(to_paddle(a, place) for a in step.arrays),
            cache_k_scales=tensors[2],
            cache_v_scales=tensors[3],
            k_feedback=to_paddle(np.ones(shape, np.float32), place),
            **cache.options,
        )
    assert all(
        a is None or np.array_equal(to_numpy(t), a, equal_nan=True) or a.dtype.kind == "V"
        for a, t in zip(arrays, tensors)
    )


def test_another_dtype_is_refused(place):
    case = make_case([0], [2], cache=("cache_int8", "e4m3", "head"))
    case.tensors["k_feedback"] = np.zeros((2, 64, 64), np.float16)
    with pytest.raises(TypeError, match=r"k_feedback.*float32"):
        run(case, place)


def test_it_may_not_be_in_the_cache(place):
    if place != "cpu":
        pytest.skip("reinterprets the cache's bytes")
    step, num_blocks = make_step([0], [2])
    cache = make_cache("block_wise_int8", num_blocks, 1, 64)
    scales = paddle.zeros([64, 1, 64])
    inside = scales.view([1, 64, 64])
    key = paddle.ones([2, 1, 64])
    with pytest.raises(ValueError, match="k_feedback"):
        F.write_cache_kv(
            key,
            key,
            *(paddle.zeros([64, 1, 64, 64], "uint8") for _ in range(2)),
            *(to_paddle(a, place) for a in step.arrays),
            cache_k_scales=scales,
            cache_v_scales=paddle.zeros([64, 1, 64]),
            k_feedback=inside,
            **cache.options,
        )


def test_make_cache_keeps_it_for_the_writer():
    known = paddle.to_tensor(feedback(2, 64, "hadamard"))
    cache = F.make_cache(2, 2, 64, "block_wise_int4", k_feedback=known)
    assert cache.arguments["k_feedback"] is known
    seqs = [paddle.to_tensor(x, "int32") for x in ([[1]], [0, 3], [0], [3])]
    key = paddle.to_tensor(make_values((3, 2, 64), np.float32, 5))
    both = cache.key_cache, cache.value_cache
    F.write_cache_kv(key, key, *both, *seqs, **cache.arguments)
    expected = F.make_cache(2, 2, 64, "block_wise_int4")
    arrays = [to_numpy(x) for x in (expected.key_cache, expected.value_cache)]
    scales = [to_numpy(x) for x in (expected.cache_k_scales, expected.cache_v_scales)]
    reference.write_cache_kv(
        to_numpy(key),
        to_numpy(key),
        *arrays,
        *(to_numpy(x) for x in seqs),
        cache_k_scales=scales[0],
        cache_v_scales=scales[1],
        cache_quant_type="block_wise_int4",
        k_rotation="hadamard",
        k_feedback=to_numpy(known),
    )
    np.testing.assert_array_equal(to_numpy(cache.key_cache), arrays[0])
    np.testing.assert_array_equal(to_numpy(cache.cache_k_scales), scales[0])
