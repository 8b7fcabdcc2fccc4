"""mla_sparse_attention traced, in a CUDA graph, and without queries."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from tests.attention.test_gpu_graph import capture
from tests.support.mla_sparse import (
    add_extra,
    check_lse,
    check_output,
    make_indices,
    make_problem,
)
from tests.support.static import run_all_modes
from tests.support.tensors import BF16, EMPTY_OUTPUTS, int32, to_numpy, to_paddle

RNG = np.random.default_rng
#: One page a window's cache, one of compressed tokens: tokens a page, and bytes of padding.
V4_WINDOW = {"page_size": 64, "padding": 64, "tokens": 300}
V4_C4 = {"page_size": 64, "padding": 64, "tokens": 400}


def attend_v4(q, cache, indices, length, extra, extra_indices, extra_length, sinks):
    return F.mla_sparse_attention(
        q,
        cache,
        indices,
        cache_format="fp8_584",
        topk_length=length,
        extra_cache=extra,
        extra_indices=extra_indices,
        extra_topk_length=extra_length,
        extra_cache_format="bf16",
        sinks=sinks,
        return_softmax_lse=True,
    )


def attend_fp8(q, cache, indices, scale, out):
    return F.mla_sparse_attention(q, cache, indices, cache_format="fp8", scale=scale, out=out)


@pytest.mark.parametrize("dynamic", [False, True])
def test_traced_and_saved(place, dynamic):
    problem = add_extra(make_problem(26, "fp8_584", 4), 27, "bf16_512", (9, 3, 0, 0, 5), 10)
    problem.options = {"sinks": RNG(28).normal(size=4).astype(np.float32)}
    (q, cache, indices), named = problem.arguments()
    given = [q, cache, indices, problem.lengths, problem.extra.data, problem.extra_indices]
    given += [problem.extra_lengths, named["sinks"]]
    outputs, _ = run_all_modes(attend_v4, given, place, dynamic=dynamic)
    want, want_lse, _ = problem.want()
    check_output(outputs[0], want)
    check_lse(outputs[1], want_lse)


def test_traced_in_place(place):
    problem = make_problem(29, "fp8", 2, (200,) * 5)
    (q, cache, indices), named = problem.arguments()
    problem.lengths = None
    given = [q, cache, indices, named["scale"], np.zeros((5, 2, 512), BF16)]
    outputs, inputs = run_all_modes(attend_fp8, given, place)
    check_output(outputs[0], problem.want()[0])
    np.testing.assert_array_equal(inputs[4], outputs[0])


def test_no_queries(place):
    if not EMPTY_OUTPUTS:
        pytest.skip("Paddle 2.6 returns no empty tensor")
    cache = to_paddle(np.zeros((1, 64, 656), np.uint8), place)
    q = to_paddle(np.zeros((0, 8, 576), BF16), place)
    indices = to_paddle(np.zeros((0, 64), np.int32), place)
    out, lse = F.mla_sparse_attention(
        q,
        cache,
        indices,
        cache_format="fp8_656",
        topk_length=int32([], place),
        extra_cache=cache,
        extra_indices=indices,
        return_softmax_lse=True,
    )
    assert out.shape == [0, 8, 512] and lse.shape == [8, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [8, 64, 128])
def test_a_graph_follows_lengths_and_indices(heads):
    first = make_problem(30, "fp8_584", heads, (0,) * 6, 256, **V4_WINDOW)
    add_extra(first, 31, "fp8_584", (0,) * 6, 128, **V4_C4)
    positional, named = first.tensors("gpu")
    out = to_paddle(np.zeros((6, heads, 512), BF16), "gpu")

    def step():
        return F.mla_sparse_attention(*positional, **named, out=out, return_softmax_lse=True)[1]

    step()
    with capture() as graph:
        lse = step()
    rng = RNG(32)
    for _ in range(5):
        now = first
        now.lengths = rng.integers(-1, 260, 6).astype(np.int32)
        now.extra_lengths = rng.integers(-1, 130, 6).astype(np.int32)
        now.indices = make_indices(rng, now.cache, 6, 256, now.lengths)
        now.extra_indices = make_indices(rng, now.extra, 6, 128, now.extra_lengths)
        for tensor, array in (
            (positional[2], now.indices),
            (named["topk_length"], now.lengths),
            (named["extra_indices"], now.extra_indices),
            (named["extra_topk_length"], now.extra_lengths),
        ):
            tensor.copy_(to_paddle(array, "gpu"), True)  # the graph has the tensor's address
        graph.replay()
        paddle.device.cuda.synchronize()
        want, want_lse, _ = now.want()
        check_output(to_numpy(out), want)
        check_lse(to_numpy(lse), want_lse)
    graph.reset()
