"""mla_sparse_attention against the fp64 model on the dequantised cache."""

from __future__ import annotations

import ctypes
import struct

import ml_dtypes
import numpy as np
import pytest

import fastattn.functional as F
from fastattn import _ops, reference
from fastattn.reference import mla_sparse
from fastattn.reference.mla import FORMATS, token_bytes
from fastattn.reference.mla_sparse import key_values
from tests.support.latent import SCALE, tokens
from tests.support.mla_sparse import (
    ANY_SCALE,
    KINDS,
    Problem,
    add_extra,
    check_lse,
    check_output,
    make_cache,
    make_indices,
    make_problem,
    queries,
)
from tests.support.strides import strided
from tests.support.tensors import BF16, int32, skip_slices_on, to_numpy, to_paddle

RNG = np.random.default_rng
HEADS = (1, 3, 8, 16, 64, 128)
#: One page a window's cache, one of compressed tokens: tokens a page, and bytes of padding.
V4_WINDOW = {"page_size": 64, "padding": 64, "tokens": 300}
V4_C4 = {"page_size": 64, "padding": 64, "tokens": 400}
V4_C128 = {"page_size": 2, "padding": 560, "tokens": 50}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_formats_and_heads(place, kind, heads):
    out, lse = make_problem(0, kind, heads).check(place)
    assert not out[1].any() and np.isneginf(lse[:, 1]).all()


@pytest.mark.parametrize("std", [0.25, 4.0])
@pytest.mark.parametrize("kind", KINDS)
def test_peaked_and_flat_softmax(place, kind, std):
    make_problem(1, kind, 5, (600, 599, 64, 63), 600, std=std).check(place)


@pytest.mark.parametrize("topk", [1, 2, 63, 64, 65, 129, 513, 2048])
@pytest.mark.parametrize(
    ("kind", "heads"),
    [("fp8_656", 9), ("fp8_584", 9), ("fp8_584", 64), ("bf16", 64), ("bf16_512", 17)],
)
def test_tails_that_no_tile_divides(place, kind, heads, topk):
    """Without lengths: every index counts."""
    problem = make_problem(2, kind, heads, (topk,) * 3, topk)
    problem.lengths = None
    problem.check(place)


@pytest.mark.parametrize(
    ("window", "compressed"),
    [
        ("fp8_584", "fp8_584"),
        ("bf16_512", "fp8_584"),
        ("fp8_584", "bf16_512"),
        ("fp8_528", "fp8_528"),
        ("fp8_584", "fp8_528"),
        ("bf16_512", "bf16_512"),
        ("fp8_656", "bf16"),
        ("fp8", "fp8_656_amax"),
        ("bf16", "fp8"),
        ("fp8", "fp8"),
    ],
)
@pytest.mark.parametrize("heads", [8, 64])
def test_two_caches_in_one_softmax(place, window, compressed, heads):
    problem = make_problem(3, window, heads, (128, 0, 5, 128, 0, 77), 128, page_size=64)
    add_extra(problem, 4, compressed, (0, 300, 512, 7, 0, 511), 512, page_size=32, tokens=700)
    out, lse = problem.check(place)
    assert not out[4].any() and np.isneginf(lse[:, 4]).all() and (out[:4] != 0).any(axis=-1).all()


@pytest.mark.parametrize("compressed", [V4_C4, V4_C128], ids=["C4", "C128"])
@pytest.mark.parametrize("heads", [8, 16, 64, 128])
def test_v4_window_and_compressed_tokens(place, heads, compressed):
    """Padded pages of unequal sizes, sinks, and more than one query a sequence."""
    problem = make_problem(5, "fp8_584", heads, (128, 128, 3, 4), 128, **V4_WINDOW)
    add_extra(problem, 6, "fp8_584", (512, 512, 0, 1), 512, **compressed)
    problem.options = {"sinks": RNG(7).normal(size=heads).astype(np.float32), "softmax_scale": 0.06}
    problem.check(place)


def test_a_second_cache_with_every_index(place):
    problem = add_extra(make_problem(8, "fp8_656", 4), 9, "fp8_656_amax", None, 90)
    problem.check(place)


@pytest.mark.parametrize("page_size", [1, 2, 61, 64, 69, 256, 576])
@pytest.mark.parametrize("kind", KINDS)
def test_pages_of_any_size(place, kind, page_size):
    padding = {"fp8_584": -page_size * 584 % 576, "fp8_528": -page_size * 528 % 512}.get(kind, 32)
    make_problem(10, kind, 6, page_size=page_size, padding=padding).check(place)


@pytest.mark.parametrize("scale", [192**-0.5, -0.03, 0.0])
@pytest.mark.parametrize(("kind", "heads"), [("fp8_656", 3), ("bf16", 64)])
def test_scales_of_the_scores(place, kind, heads, scale):
    problem = make_problem(11, kind, heads)
    problem.options = {"softmax_scale": scale}
    problem.check(place)


def test_sinks(place):
    problem = make_problem(12, "fp8_584", 6)
    sinks = np.array([0, -3, 4, -np.inf, np.inf, 30], np.float32)
    problem.options = {"sinks": sinks}
    out, lse = problem.run(place)
    want, want_lse, _ = problem.want()
    check_output(out[:, [0, 1, 2, 3, 5]], want[:, [0, 1, 2, 3, 5]])
    check_lse(lse, want_lse)  # without the sink
    assert not out[:, 4].any()
    problem.options = {}
    without = problem.run(place)[0]
    np.testing.assert_array_equal(without[:, 3], out[:, 3])  # -inf adds nothing
    np.testing.assert_array_equal(without[1], out[1])


@pytest.mark.parametrize("kind", ["bf16", "fp8_656", "fp8_584"])
def test_values_of_mean_1_over_32k_keys(place, kind):
    """A sum that is kept in too few bits loses what is small beside it."""
    rng = RNG(13)
    dim, count = KINDS[kind][2], 32768
    latents = (1 + 0.25 * rng.normal(size=(2048, dim))).astype(BF16)
    cache = make_cache(rng, KINDS[kind], 2048, latents=latents)
    q = queries(rng, 1, 2, dim, 0.05)
    problem = Problem(q, cache, rng.choice(cache.written, (1, count)).astype(np.int32))
    out, _ = problem.check(place)
    assert 0.9 < np.asarray(out, np.float64).mean() < 1.1


@pytest.mark.parametrize("heads", [3, 64])
def test_largest_logits(place, heads):
    problem = make_problem(34, "fp8_656", heads, std=3.0)
    problem.options = {"sinks": np.full(heads, 50, np.float32)}
    positional, named = problem.tensors(place)
    out, largest = F.mla_sparse_attention(*positional, **named, return_max_logits=True)
    want = problem.want()
    check_output(to_numpy(out), want[0])
    check_lse(to_numpy(largest), want[2])
    assert np.isneginf(to_numpy(largest)[:, 1]).all()


@pytest.mark.parametrize("heads", [3, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_largest_logits_of_nan_are_nan(place, kind, heads):
    """One score of a row, all of them, a head's query, +inf: where the LSE is NaN, and no more."""
    rng, dim = RNG(47), KINDS[kind][2]
    cache = make_cache(rng, KINDS[kind], 300, latents=rng.normal(size=(300, dim)).astype(BF16))
    q = queries(rng, 5, heads, dim)
    q[1, 2, 9] = np.nan
    q[3] = np.nan
    q[4, 0, 7] = np.inf
    indices = make_indices(rng, cache, 5, 90)
    indices[0, :] = -1
    problem = Problem(q, cache, indices)
    positional, named = problem.tensors(place)
    options = {"return_softmax_lse": True, "return_max_logits": True}
    _, lse, largest = map(to_numpy, F.mla_sparse_attention(*positional, **named, **options))
    _, want_lse, want = problem.want()
    bad = np.isnan(want)
    assert bad[2, 1] and bad[:, 3].all() and bad[0, 4] and bad.sum() == heads + 2
    np.testing.assert_array_equal(np.isnan(lse), bad)
    np.testing.assert_array_equal(np.isnan(want_lse), bad)
    np.testing.assert_array_equal(np.isnan(largest), bad)
    assert np.isneginf(largest[:, 0]).all()
    # The noise of one score, which is more than that of an LSE.
    rounded = 2e-3 if place == "gpu" and KINDS[kind] in ANY_SCALE else 0.0
    check_lse(np.where(bad, 0, largest), np.where(bad, 0, want), rounded)


@pytest.mark.parametrize("heads", [3, 64])
@pytest.mark.parametrize("kind", ["fp8_656", "fp8_584"])
def test_disjoint_halves_merge_as_they_are(place, kind, heads):
    """The LSE is what merge_attn_states takes, and the merged result that of all keys."""
    problem = make_problem(45, kind, heads, (200, 0, 37, 1, 130))
    positional, named = problem.tensors(place)
    states = []
    for half in range(2):
        mine = np.where(np.arange(200) % 2 == half, problem.indices, -1).astype(np.int32)
        states += F.mla_sparse_attention(
            *positional[:2],
            int32(mine, place),
            **named,
            return_softmax_lse=True,
            out_dtype="float32",
        )
    out, lse = F.merge_attn_states(*states)
    want, want_lse, _ = problem.want()
    check_lse(to_numpy(lse), want_lse)
    check_output(to_numpy(out), want)


@pytest.mark.parametrize("heads", [3, 16, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_fp32_output(place, kind, heads):
    """Not rounded: a CPU's is exact to fp32; one tile of keys, none, and many."""
    problem = make_problem(52, kind, heads, (200, 0, 37, 1, 130))
    rounded, _ = problem.run(place)
    problem.options = {"out_dtype": "float32"}
    out, lse = problem.run(place)
    problem.options = {}
    want, want_lse, _ = problem.want()
    assert out.dtype == np.float32
    check_output(out, want)
    check_lse(lse, want_lse, problem.noise(place))
    assert not out[1].any() and np.isneginf(lse[:, 1]).all()
    if place == "cpu":
        assert np.abs(out - want).max() <= 1e-5 * np.abs(want).max()
        np.testing.assert_array_equal(out.astype(BF16), rounded)
    problem.options = {"out": np.full(out.shape, 7, np.float32), "out_dtype": "float32"}
    positional, named = problem.tensors(place)
    result = F.mla_sparse_attention(*positional, **named)
    np.testing.assert_array_equal(to_numpy(named["out"]), to_numpy(result))
    np.testing.assert_array_equal(to_numpy(result), out)


def test_fp32_output_with_sinks_and_largest_logits(place):
    problem = make_problem(53, "fp8_584", 6)
    options = {"sinks": np.array([0, -3, 4, -np.inf, np.inf, 30], np.float32)}
    problem.options = {**options, "out_dtype": "float32"}
    positional, named = problem.tensors(place)
    out, largest = F.mla_sparse_attention(*positional, **named, return_max_logits=True)
    problem.options = options
    want = problem.want()
    np.testing.assert_array_equal(to_numpy(out)[:, 4], 0)
    check_output(np.delete(to_numpy(out), 4, 1), np.delete(want[0], 4, 1))
    check_lse(to_numpy(largest), want[2])


def test_an_index_that_stands_twice_counts_twice(place):
    rng = RNG(14)
    cache = make_cache(rng, KINDS["fp8_656"], 40)
    a, b = cache.written[:2]
    q = queries(rng, 1, 4, 576)
    problem = Problem(q, cache, np.array([[a, b, a, a]], np.int32))
    problem.check(place)
    once = Problem(q, cache, np.array([[a, b]], np.int32)).run(place)[1]
    assert (problem.run(place)[1] > once + 1e-3).all()


def test_caches_without_a_slot(place):
    q = queries(RNG(15), 2, 3, 576)
    for shape in ((0, 64, 656), (3, 0, 656)):
        empty = make_cache(RNG(15), KINDS["fp8_656"], 0, pages=1)
        empty.data, empty.page_size = np.zeros(shape, np.uint8), shape[1]
        problem = Problem(q, empty, np.array([[0, 1], [-1, 9]], np.int32))
        out, lse = problem.run(place)
        assert not out.any() and np.isneginf(lse).all()


@pytest.mark.parametrize("heads", [4, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_minus_infinity_are_no_keys(place, kind, heads):
    """All scores of a head are -inf: 0 and -inf, with a sink too; heads and queries beside it."""
    rng = RNG(46)
    latents = rng.normal(size=(300, KINDS[kind][2]))
    latents[:, 5] = -np.abs(latents[:, 5]) - 0.5
    cache = make_cache(rng, KINDS[kind], 300, latents=latents.astype(BF16))
    q = queries(rng, 3, heads, KINDS[kind][2])
    q[0, :, 5] = np.inf
    q[1, 2, 5] = np.inf
    problem = Problem(q, cache, make_indices(rng, cache, 3, 200))
    for sinks in (None, np.resize(np.float32([0.5, np.inf, -np.inf, 30]), heads)):
        problem.options = {} if sinks is None else {"sinks": sinks}
        out, lse = problem.run(place)
        gone = np.isneginf(lse)
        assert gone[:, 0].all() and gone[2, 1] and gone.sum() == heads + 1
        assert not out[0].any() and not out[1, 2].any() and not np.isnan(out).any()
        want, want_lse, _ = problem.want()
        np.testing.assert_array_equal(np.isneginf(want_lse), gone)
        check_output(out, want)
        check_lse(lse, want_lse, problem.noise(place))


@pytest.mark.parametrize("lengths", [True, False])
def test_no_columns_of_indices(place, lengths):
    """[T, 0] names no key, of either cache; the other one counts."""
    problem = add_extra(make_problem(47, "fp8_584", 5), 48, "fp8_584", (9, 3, 0, 0, 5), 10)
    problem.options = {"sinks": RNG(49).normal(size=5).astype(np.float32)}
    none = np.zeros((5, 0), np.int32)
    if not lengths:
        problem.lengths = problem.extra_lengths = None
        problem.indices = make_indices(RNG(50), problem.cache, 5, 30)
        problem.extra_indices = make_indices(RNG(51), problem.extra, 5, 10)
    (q, cache, indices), named = problem.tensors(place)
    named["extra_indices"] = to_paddle(none, place)
    got = F.mla_sparse_attention(q, cache, indices, **named)
    first = Problem(problem.q, problem.cache, problem.indices, problem.lengths)
    first.options = problem.options
    check_output(to_numpy(got), first.want()[0])
    problem.indices = none
    problem.check(place)
    out, lse = F.mla_sparse_attention(
        q, cache, to_paddle(none, place), **named, return_softmax_lse=True
    )
    assert not to_numpy(out).any() and np.isneginf(to_numpy(lse)).all()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("extra_cache", np.zeros((3, 64, 600), np.uint8), "extra_cache: expected"),
        ("extra_cache", np.zeros((3, 64, 584), np.float32), "extra_cache: expected dtype"),
        ("extra_topk_length", np.zeros(4, np.int32), r"extra_topk_length: expected shape \[5\]"),
        ("extra_topk_length", np.zeros(5, np.int64), "extra_topk_length: expected dtype int32"),
        ("extra_scale", np.ones(1, np.float32), "extra_scale: expected None for fp8_584"),
        ("extra_cache_format", "fp8_5", "extra_cache_format: 'fp8_5' is not supported"),
        ("extra_cache_format", "fp8_656", "q: expected 576 channels, those of extra_cache_format"),
        ("extra_indices", np.zeros((4, 0), np.int32), "extra_indices: expected shape"),
        ("extra_indices", None, "extra_indices: expected a tensor with extra_cache, got None"),
    ],
)
def test_no_columns_of_indices_excuse_nothing(name, value, message):
    problem = add_extra(make_problem(47, "fp8_584", 5), 48, "fp8_584", (9, 3, 0, 0, 5), 10)
    positional, named = problem.tensors("cpu")
    named["extra_indices"] = to_paddle(np.zeros((5, 0), np.int32), "cpu")
    F.mla_sparse_attention(*positional, **named)
    named[name] = to_paddle(value, "cpu") if isinstance(value, np.ndarray) else value
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        F.mla_sparse_attention(*positional, **named)


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_stays_where_it_is_seen(place, kind):
    """A NaN channel of a token, a NaN scale, a NaN in a query head."""
    problem = make_problem(16, kind, 4, (150, 150, 150), 150)
    problem.indices[1] = problem.cache.written[np.arange(150) % 250 + 20]
    problem.indices[[0, 2]] = problem.cache.written[np.arange(150) + 140]
    slot = int(problem.cache.written[25])
    page, row = divmod(slot, problem.cache.page_size)
    data = problem.cache.data
    if kind == "fp8_584":
        pages = data.reshape(len(data), -1)
        pages[page, 64 * 576 + 8 * row + 3] = 255  # a scale, in the page's other plane
    elif kind == "fp8_528":
        data.reshape(len(data), -1)[page, 64 * 512 + 16 * row + 15] = 255  # of the last channels
    elif kind == "fp8_656":
        data[page, row, 516:520] = np.frombuffer(np.float32(np.nan).tobytes(), np.uint8)
    elif data.dtype == BF16:
        data[page, row, -1] = np.nan  # a rotated channel
    else:
        data[page, row, 3] = 0x7F
    problem.q[2, 3, 100] = np.nan
    out, _ = problem.check(place)
    nan = np.isnan(np.asarray(out, np.float64))
    seen = nan.any(axis=-1).tolist()
    assert seen == [[False] * 4, [True] * 4, [False, False, False, True]]


def test_scales_beyond_bf16(place):
    """Scales of 24 bits: in bf16 they would move every score."""
    rng = RNG(17)
    cache = make_cache(rng, KINDS["fp8_656"], 64, pages=1)
    scales = cache.data.reshape(64, 656)[:, 512:528].view("<f4")
    scales[:] = rng.uniform(0.00390, 0.00392, (64, 4)).astype(np.float32)
    assert len(np.unique(scales)) > 100
    cache.kind = KINDS["fp8_656_amax"]
    q = queries(rng, 3, 8, 576)
    Problem(q, cache, np.arange(192, dtype=np.int32).reshape(3, 64) % 64).check(place)


# ---- layouts and results -----------------------------------------------------------------------


def test_strided_queries_and_indices(place):
    skip_slices_on(place)
    problem = make_problem(18, "fp8_656", 5)
    want = problem.run(place)
    positional, named = problem.tensors(place)
    rows, heads, dim = problem.q.shape
    wide = np.full((heads, rows, dim + 64), np.nan, BF16)  # heads outermost
    wide[:, :, 8 : 8 + dim] = problem.q.transpose(1, 0, 2)
    memory = to_paddle(wide, place)
    positional[0] = strided(memory, [rows, heads, dim], [dim + 64, rows * (dim + 64), 1], 16)
    ids = np.full((rows, 3, problem.indices.shape[1]), 2**31 - 1, np.int32)
    ids[:, 1] = problem.indices
    row = problem.indices.shape[1]
    positional[2] = strided(to_paddle(ids, place), [rows, row], [3 * row, 1], 4 * row)
    out, lse = F.mla_sparse_attention(*positional, **named, return_softmax_lse=True)
    np.testing.assert_array_equal(to_numpy(out), want[0])
    np.testing.assert_array_equal(to_numpy(lse), want[1])


@pytest.mark.parametrize("kind", ["bf16_512", "fp8_656", "fp8_584"])
def test_a_layer_of_a_pool(place, kind):
    """Pages of all layers side by side; what lies between them is NaN."""
    problem = make_problem(19, kind, 3)
    want = problem.run(place)
    data = problem.cache.data
    pool = np.full((len(data), 3, *data.shape[1:]), 0xFF, np.uint8).astype(data.dtype)
    pool[:, 1] = data
    width = data[0].size
    positional, named = problem.tensors(place)
    offset = width * data.itemsize
    strides = [3 * width, data.shape[2], 1]
    positional[1] = strided(to_paddle(pool, place), list(data.shape), strides, offset)
    out, _ = F.mla_sparse_attention(*positional, **named, return_softmax_lse=True)
    np.testing.assert_array_equal(to_numpy(out), want[0])


@pytest.mark.parametrize("shape", ["[pages, size, 1, W]", "[pages, 1, size, W]"])
def test_caches_of_four_dimensions(place, shape):
    problem = make_problem(20, "fp8_656", 3)
    want = problem.run(place)
    axis = 2 if shape == "[pages, size, 1, W]" else 1
    positional, named = problem.tensors(place)
    positional[1] = to_paddle(np.expand_dims(problem.cache.data, axis), place)
    np.testing.assert_array_equal(to_numpy(F.mla_sparse_attention(*positional, **named)), want[0])


def test_out_is_written_and_returned(place):
    problem = make_problem(21, "fp8_656", 3)
    want = problem.run(place)[0]
    positional, named = problem.tensors(place)
    out = to_paddle(np.full(want.shape, 7, BF16), place)
    result, lse = F.mla_sparse_attention(*positional, **named, return_softmax_lse=True, out=out)
    np.testing.assert_array_equal(to_numpy(result), want)
    np.testing.assert_array_equal(to_numpy(out), want)
    assert lse.shape == [3, 5]


@pytest.mark.parametrize("seed", range(24))
def test_random_problems(place, seed):
    rng = RNG(1000 + seed)
    kind = list(KINDS)[seed % len(KINDS)]
    rows, heads, topk = rng.integers(1, 7), rng.integers(1, 129), int(rng.integers(1, 400))
    page_size = int(rng.choice([1, 2, 16, 61, 64, 256]))
    padding = -page_size * 584 % 576 if kind == "fp8_584" else 0
    lengths = rng.integers(-3, topk + 20, rows)
    shape = {"page_size": page_size, "padding": padding, "tokens": int(rng.integers(1, 700))}
    problem = make_problem(seed, kind, int(heads), lengths, topk, **shape)
    if rng.random() < 0.5:
        others = [k for k, v in KINDS.items() if v[2] == KINDS[kind][2] and k != "fp8_584"]
        more = int(rng.integers(1, 300))
        lengths = None if rng.random() < 0.3 else rng.integers(-3, more + 20, rows)
        add_extra(problem, seed + 1, str(rng.choice(others)), lengths, more)
    if rng.random() < 0.5:
        problem.options["sinks"] = (3 * rng.normal(size=heads)).astype(np.float32)
    problem.check(place)


@pytest.mark.parametrize("isa", range(3), ids=["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    limit = ctypes.CDLL(str(_ops.library_path())).fastattn_limit_isa
    try:
        if limit(isa) != isa:
            pytest.skip("this processor does not have it")
        for kind in KINDS:
            make_problem(22, kind, 7).check("cpu")
        nan = make_problem(23, "fp8", 2)
        nan.cache.data[nan.cache.written[0] // 64, nan.cache.written[0] % 64, 7] = 0xFF
        nan.indices[3, 0] = nan.cache.written[0]
        out, _ = nan.run("cpu")
        assert np.isnan(np.asarray(out[3], np.float64)).any()
    finally:
        limit(2)


def test_heads_beside_a_head_do_not_change_its_bits(place):
    """Nor do the other queries of the call."""
    problem = make_problem(24, "fp8_656", 13)
    out, lse = problem.run(place)
    part = Problem(
        problem.q[2:4].copy(), problem.cache, problem.indices[2:4].copy(), problem.lengths[2:4]
    )
    np.testing.assert_array_equal(part.run(place)[0], out[2:4])
    if place == "cpu":  # on a GPU the number of heads chooses the kernel
        part.q = part.q[:, 5:6].copy()
        np.testing.assert_array_equal(part.run(place)[0], out[2:4, 5:6])
        np.testing.assert_array_equal(part.run(place)[1], lse[5:6, 2:4])


@pytest.mark.parametrize("cache_format", FORMATS)
def test_the_model_reads_what_the_writer_wrote(cache_format):
    """key_values against the tokens that were written, within the rounding of their codes."""
    x = tokens(RNG(25), 50, cache_format)
    scale = SCALE if cache_format == "fp8" else None
    rows, planes = token_bytes(*x, cache_format, scale=scale)
    page = np.concatenate([rows.reshape(1, -1), planes.reshape(1, -1)], axis=1)
    got = key_values(
        page.view(BF16) if cache_format == "bf16" else page,
        np.arange(50),
        cache_format,
        scale=scale,
        page_size=50,
    )
    want = np.concatenate(x, axis=1).astype(np.float64)
    fmt = FORMATS[cache_format]
    if cache_format == "bf16":
        np.testing.assert_array_equal(got, want)
        return
    step = np.full(want.shape, float(SCALE[0]))
    if cache_format == "fp8":
        want = np.clip(want, -448 * step, 448 * step)
    else:
        coded = 512 if cache_format == "fp8_528" else fmt.latent
        tiles = np.abs(want[:, :coded]).reshape(50, -1, fmt.tile)
        step[:, :coded] = (2 / 448 * np.maximum(tiles.max(-1), 1e-4)).repeat(fmt.tile, 1)
        np.testing.assert_array_equal(got[:, coded:], want[:, coded:])
    assert (np.abs(got - want) <= 2.0**-4 * np.abs(want) + 2.0**-10 * step).all()
    # Token 7, one channel after the other.
    codes = rows[7, : 576 if cache_format == "fp8" else coded].view(ml_dtypes.float8_e4m3fn)
    for channel, code in enumerate(codes.tolist()):
        tile = channel // max(fmt.tile, 1)
        if cache_format == "fp8":
            factor = float(SCALE[0])
        elif cache_format == "fp8_656":
            (factor,) = struct.unpack("<f", rows[7, 512 + 4 * tile : 516 + 4 * tile].tobytes())
        else:
            factor = 2.0 ** (int(planes[7, tile]) - 127)
        assert got[7, channel] == float(code) * factor


# ---- the comparators ---------------------------------------------------------------------------


def test_the_comparators_can_fail():
    rng = RNG(33)
    want = rng.normal(size=(4, 8, 512))
    lse = rng.normal(size=(4, 8))
    good = want.astype(BF16)
    check_output(good, want)
    check_lse(lse.astype(np.float32), lse)
    one = good.copy()
    one[2, 3, 17] += BF16.type(0.1)
    shifted, scaled, nan = good.copy(), good.copy(), good.copy()
    shifted[1, 2] = np.roll(shifted[1, 2], 1)
    scaled[0, 0] = scaled[0, 0] * BF16.type(1.0078125)  # a scale rounded to bf16
    nan[0, 0, 0] = np.nan
    noisy = (want * (1 + 0.004 * rng.normal(size=want.shape))).astype(BF16)
    small = want.copy()
    small[0, 0] *= 1e-3
    excused = small.copy()
    excused[0, 0] *= 1.01
    for got, exact in (
        *((x, want) for x in (one, shifted, scaled, nan, noisy)),
        (excused, small),
        (good, np.zeros_like(want)),
        (np.full_like(want, np.inf), want),
    ):
        with pytest.raises(AssertionError):
            check_output(got, exact)
    for got in (lse + 2e-5, np.where(lse > 1, -np.inf, lse), np.where(lse > 1, np.nan, lse)):
        with pytest.raises(AssertionError):
            check_lse(got, lse)
    assert reference.mla_sparse_attention is not F.mla_sparse_attention


@pytest.mark.parametrize("kind", ["fp8", "fp8_656_amax"])
def test_the_noise_of_keys_accepts_11_bits_and_refuses_8(kind, monkeypatch):
    """What a GPU is allowed where scales are no powers of two."""
    problem = make_problem(35, kind, 16, (200, 150, 37, 1, 130, 5, 64, 12))
    want, noise, read = problem.want()[1], problem.noise("gpu"), mla_sparse.key_values

    def rounded_to(bits):
        def keys(*arguments, **options):
            x = read(*arguments, **options)
            step = np.exp2(np.floor(np.log2(np.maximum(np.abs(x), 1e-300))) - bits + 1)
            return np.rint(x / step) * step

        monkeypatch.setattr(mla_sparse, "key_values", keys)
        return problem.want()[1]

    check_lse(rounded_to(11), want, noise)
    with pytest.raises(AssertionError, match="above the bound"):
        check_lse(rounded_to(8), want, noise)
