"""Faults of docs/faults.md that concern attention over latent caches."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import reference
from tests.support.latent import tokens
from tests.support.mla_sparse import (
    FAR,
    KINDS,
    Problem,
    add_extra,
    check_lse,
    check_output,
    make_cache,
    make_problem,
    queries,
)
from tests.support.strides import default_place, strided
from tests.support.tensors import BF16, int32, to_numpy, to_paddle

RNG = np.random.default_rng


def test_bug20_attention_sees_what_the_write_before_it_wrote(place):
    """100 repeats of write and attend, in one stream, with other tokens each time."""
    rng = RNG(0)
    q = to_paddle(queries(rng, 4, 16, 576), place)
    cache = to_paddle(np.full((4, 64, 656), 0xFF, np.uint8), place)
    slots = rng.permutation(256)
    indices = int32(np.tile(slots, (4, 1)), place)
    written = [
        [to_paddle(x, place) for x in tokens(RNG(seed), 256, "fp8_656")] for seed in range(4)
    ]
    expected = {}
    for i in range(100 if place == "gpu" else 8):
        latent, rope = written[i % 4]
        F.mla_write_cache(latent, rope, cache, int32(slots, place), cache_format="fp8_656")
        out = F.mla_sparse_attention(q, cache, indices, cache_format="fp8_656")
        now = to_numpy(out).view(np.uint16)
        np.testing.assert_array_equal(now, expected.setdefault(i % 4, now))
    assert len({x.tobytes() for x in expected.values()}) == 4


@pytest.mark.parametrize("heads", [8, 64, 128])
@pytest.mark.parametrize("batch", [1, 2, 31, 32, 64])
def test_bug40_all_lengths_zero(place, batch, heads):
    problem = make_problem(1, "fp8_584", heads, (0,) * batch, 128, tokens=4)
    add_extra(problem, 2, "fp8_584", (0,) * batch, 64, tokens=4)
    problem.options = {"sinks": np.ones(heads, np.float32)}
    out, lse = problem.run(place)
    assert not out.any() and np.isneginf(lse).all()


@pytest.mark.parametrize("kind", ["fp8_584", "fp8_656", "bf16"])
def test_bug31_pages_beyond_2_gib(place, kind):
    """Slots whose byte addresses do not fit 32 bits. Few pages of the pool are ever touched."""
    rng = RNG(3)
    cache_format, _, dim = KINDS[kind]
    width = {"bf16": 576, "fp8_584": 584, "fp8_656": 656}[kind]
    page = 64 * width + (64 if kind == "fp8_584" else 0)
    bytes_of = 2 if kind == "bf16" else 1
    pages = (2**31 + 2**27) // (page * bytes_of)
    if place == "gpu" and paddle.device.cuda.get_device_properties().total_memory < 2**33:
        pytest.skip("a small GPU")
    with default_place(place):
        memory = paddle.empty([pages, page], "bfloat16" if kind == "bf16" else "uint8")
    latent, rope = tokens(rng, 60, cache_format)
    slots = np.r_[0:10, pages * 64 - 50 : pages * 64]
    cache = strided(memory, [pages, 64, width], [page, width, 1])
    rows = [to_paddle(x, place) for x in (latent, rope)]
    F.mla_write_cache(*rows, cache, int32(slots, place), cache_format=cache_format)
    q = queries(rng, 2, 8, dim)
    indices = np.tile(slots, (2, 1)).astype(np.int32)
    out, lse = F.mla_sparse_attention(
        to_paddle(q, place),
        cache,
        int32(indices, place),
        cache_format=cache_format,
        return_softmax_lse=True,
    )
    small = np.zeros((1, 64, width), BF16 if kind == "bf16" else np.uint8)
    small = reference.mla_write_cache(latent, rope, small, np.arange(60), cache_format=cache_format)
    want, want_lse, _ = reference.mla_sparse_attention(
        q, small, np.tile(np.arange(60), (2, 1)), cache_format=cache_format
    )
    check_output(to_numpy(out), want)
    check_lse(to_numpy(lse), want_lse)


def test_bug30_a_page_written_byte_by_byte(place):
    """Two tokens of a planar page and of an interleaved one, packed by hand."""
    one, two = 0x38, 0x40  # e4m3
    bf16 = {1.0: b"\x80\x3f", 4.0: b"\x80\x40"}
    planar = bytes([one] * 448) + bf16[1.0] * 64 + bytes([two] * 448) + bf16[4.0] * 64
    planar += bytes([127, 128, 126, 127, 127, 127, 127, 0]) + bytes([129] * 7 + [0])
    row = [1.0] * 64 + [2.0] * 64 + [0.5] * 64 + [1.0] * 320
    rows = [np.array(row), np.array([8.0] * 448 + [4.0] * 64)]
    interleaved = b"".join(
        bytes([code] * 512) + np.array(scales, "<f4").tobytes() + bf16[rope] * 64
        for code, scales, rope in ((one, [1, 2, 0.5, 3], 1.0), (two, [5, 1, 1, 0.25], 4.0))
    )
    latents = [np.repeat([1.0, 2, 0.5, 3], 128), np.repeat([10.0, 2, 2, 0.5], 128)]
    pages = {
        "fp8_584": (planar + b"\xff" * (1728 - 1168), 512, rows),
        "fp8_656": (interleaved, 576, latents),
    }
    for cache_format, (page, dim, values) in pages.items():
        cache = np.stack([np.full(len(page), 0xFF, np.uint8), np.frombuffer(page, np.uint8)])
        out = F.mla_sparse_attention(
            to_paddle(np.zeros((3, 2, dim), BF16), place),
            to_paddle(cache, place),
            int32([[2, -1], [3, -1], [3, 2]], place),
            cache_format=cache_format,
            page_size=2,
        )
        got = to_numpy(out).astype(np.float64)
        for want, row in zip((values[0], values[1], (values[0] + values[1]) / 2), got):
            np.testing.assert_array_equal(row, [want[:512]] * 2)


@pytest.mark.parametrize("heads", [8, 16, 64, 128])
def test_bug22_the_same_tokens_elsewhere_give_the_same_bits(place, heads):
    """Pages in another order: the same keys in the same order, at every run."""
    problem = make_problem(4, "fp8_656", heads, (200, 130, 64), 200)
    first = problem.run(place)
    rng, count = RNG(5), len(problem.cache.data)
    data, indices = problem.cache.data.copy(), problem.indices.copy()
    for _ in range(20 if place == "gpu" else 4):
        order = rng.permutation(count)
        problem.cache.data = data[order]
        inside = (indices >= 0) & (indices < problem.cache.slots)
        moved = np.argsort(order)[np.where(inside, indices, 0) // 64] * 64 + indices % 64
        problem.indices = np.where(inside, moved, indices).astype(np.int32)
        for now, before in zip(problem.run(place), first):
            np.testing.assert_array_equal(now, before)


@pytest.mark.parametrize("heads", [8, 64, 128])
def test_bug03_queries_without_a_key(place, heads):
    """First tiles without a key, whole queries without one; 0 times NaN is nothing."""
    problem = make_problem(6, "fp8_656", heads, (200,) * 6, 200)
    problem.indices[0] = -1
    problem.indices[1, :199] = -1
    problem.indices[2, 1:] = problem.cache.slots
    problem.indices[3] = np.resize(FAR, 200)
    problem.indices[4, :64], problem.indices[4, 100:] = -1, -1
    problem.options = {"sinks": np.full(heads, 0.5, np.float32)}
    problem.indices[1, 199] = problem.indices[2, 0] = problem.cache.written[0]
    out, lse = problem.check(place)
    assert not out[[0, 3]].any() and np.isneginf(lse[:, [0, 3]]).all()
    assert np.isfinite(lse[:, [1, 2, 4, 5]]).all()


@pytest.mark.parametrize("heads", [1, 7, 17, 65, 127])
def test_bug41_a_sink_for_each_head(place, heads):
    """Heads that no tile divides, each with its own fp32 sink; the memory behind them is NaN."""
    problem = make_problem(7, "fp8_584", heads, (128, 3, 64), 128)
    sinks = RNG(8).normal(size=heads).astype(np.float32) * 3
    problem.options = {"sinks": sinks}
    problem.check(place)
    positional, named = problem.tensors(place)
    memory = to_paddle(np.concatenate([sinks, np.full(128, np.nan, np.float32)]), place)
    named["sinks"] = strided(memory, [heads], [1])
    want, *_ = problem.want()
    check_output(to_numpy(F.mla_sparse_attention(*positional, **named)), want)


@pytest.mark.parametrize("heads", [8, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_bug42_nan_behind_a_length(place, kind, heads):
    """make_problem puts slots of NaN and far away ones behind every length."""
    problem = make_problem(9, kind, heads, (1, 63, 64, 65, 100, 0), 128)
    behind = np.arange(128) >= problem.lengths[:, None]
    assert set(FAR) & set(problem.indices[behind].tolist())
    unwritten = ~np.isin(problem.indices, [*problem.cache.written, *FAR, -7, problem.cache.slots])
    assert unwritten[behind].any() and not unwritten[~behind].any()
    out, _ = problem.check(place)
    assert not np.isnan(np.asarray(out, np.float64)).any()


def test_bug43_strides_of_indices(place):
    """Rows of a [b, s_q, topk] tensor that is itself a slice of a wider one."""
    problem = make_problem(10, "fp8_656", 4, (60, 60, 60, 60), 60)
    wide = np.full((4, 100), 2147480000, np.int32)
    wide[:, :60] = problem.indices
    want, want_lse = problem.run(place)
    positional, named = problem.tensors(place)
    positional[2] = strided(to_paddle(wide, place), [4, 60], [100, 1])
    out, lse = F.mla_sparse_attention(*positional, **named, return_softmax_lse=True)
    np.testing.assert_array_equal(to_numpy(out), want)
    np.testing.assert_array_equal(to_numpy(lse), want_lse)


def test_bug22_calls_leave_nothing_behind(place):
    """Large and small calls in turn, with unequal formats and numbers of heads."""
    problems = [
        make_problem(11, "fp8_656", 128, (200, 3), 200),
        make_problem(12, "fp8_584", 8, (64,) * 7, 64),
        make_problem(13, "bf16", 64, (500,), 500),
    ]
    first = [problem.run(place) for problem in problems]
    for i in (2, 0, 1, 1, 0, 2):
        for now, before in zip(problems[i].run(place), first[i]):
            np.testing.assert_array_equal(now, before)


@pytest.mark.parametrize("page_size", [1, 2])
@pytest.mark.parametrize("topk", [1, 3, 61, 100])
def test_bug44_small_pages_and_tails(place, page_size, topk):
    """A top-k wider than the sequence, and tokens of padding that name nothing."""
    padding = -page_size * 584 % 576
    problem = make_problem(
        14, "fp8_584", 3, (topk,) * 3, topk, tokens=5, page_size=page_size, padding=padding
    )
    problem.indices[1] = -1  # padding
    problem.indices[2, 5:] = -1  # a sequence of five tokens
    problem.check(place)


def test_bug44_one_query_of_one_key(place):
    rng = RNG(15)
    cache = make_cache(rng, KINDS["fp8_656"], 1, 1, pages=1)
    problem = Problem(queries(rng, 1, 1, 576), cache, np.zeros((1, 1), np.int32))
    out, _ = problem.check(place)
    value = reference.mla_gather_cache(
        cache.data,
        np.zeros((1, 576), BF16),
        np.zeros((1, 1), np.int32),
        [1],
        [0, 1],
        cache_format="fp8_656",
    )
    np.testing.assert_array_equal(out[0, 0], value[0, :512])
