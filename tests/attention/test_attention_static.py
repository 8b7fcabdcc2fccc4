"""The attention operators in dygraph, traced by AST and by SOT, and saved and loaded."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from tests.support.attention import BLOCK_WISE_FP8, PLAIN, flash_problem, paged_problem
from tests.support.compare import assert_same_bits
from tests.support.holes import with_tables_of_heads
from tests.support.static import run_all_modes
from tests.support.tensors import to_numpy

SEQS = [(70, 3), (0, 2), (129, 1)]


def paged(q, key_cache, value_cache, tables, cu, decoder, this_time):
    return F.paged_attention(
        q, key_cache, value_cache, tables, cu, decoder, this_time, 3, 130, return_softmax_lse=True
    )


def paged_output_only(q, key_cache, value_cache, tables, cu, decoder, this_time):
    return F.paged_attention(q, key_cache, value_cache, tables, cu, decoder, this_time, 3, 130)


def paged_quantised(
    q, key_cache, value_cache, tables, cu, decoder, this_time, k_scales, v_scales, q_descale, sinks
):
    return F.paged_attention(
        q,
        key_cache,
        value_cache,
        tables,
        cu,
        decoder,
        this_time,
        3,
        130,
        cache_k_scales=k_scales,
        cache_v_scales=v_scales,
        cache_quant_type="block_wise_fp8",
        q_descale=q_descale,
        sinks=sinks,
        window_size=(80, -1),
        softcap=3.0,
        return_softmax_lse=True,
    )


def paged_holes(q, key_cache, value_cache, tables, cu, decoder, this_time, tree, windows):
    return F.paged_attention(
        q,
        key_cache,
        value_cache,
        tables,
        cu,
        decoder,
        this_time,
        3,
        130,
        tree_mask=tree,
        head_windows=windows,
        return_softmax_lse=True,
    )


def paged_codes(q, key_cache, value_cache, tables, cu, decoder, this_time, out_scale):
    return F.paged_attention(
        q, key_cache, value_cache, tables, cu, decoder, this_time, 3, 130, out_scale=out_scale
    )


def paged_in_place(q, key_cache, value_cache, tables, cu, decoder, this_time, out):
    return F.paged_attention(
        q, key_cache, value_cache, tables, cu, decoder, this_time, 3, 130, out=out
    )


def flash(q, k, v, cu_q, cu_k, mask_offsets):
    return F.flash_attention(
        q, k, v, cu_q, cu_k, 3, 132, mask_offsets=mask_offsets, return_softmax_lse=True
    )


def flash_codes(q, k, v, cu_q, cu_k, q_descale, k_descale, v_descale):
    return F.flash_attention(
        q,
        k,
        v,
        cu_q,
        cu_k,
        3,
        132,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        causal=True,
    )


def arrays(problem, *names, place="cpu"):
    """Tensor arguments of a problem as arrays, in the operator's order; `names` are keywords."""
    positional, keywords = problem.arguments(place)
    tensors = [x for x in positional if not isinstance(x, int)]
    return [to_numpy(x) for x in tensors + [keywords[name] for name in names]]


@pytest.mark.parametrize("dim", [64, 192])
def test_paged_attention(place, dim):
    problem = paged_problem(SEQS, dim=dim)
    outputs, _ = run_all_modes(paged, arrays(problem), place)
    expected = problem.check(place)
    assert_same_bits(outputs[0], expected[0], "out")
    assert_same_bits(outputs[1], expected[1], "lse")


@pytest.mark.parametrize("dim", [64, 192])
def test_paged_attention_saved_with_any_number_of_tokens(place, dim):
    problem = paged_problem(SEQS, dim=dim)
    outputs, _ = run_all_modes(
        paged_output_only, arrays(problem), place, modes=("saved",), dynamic=True
    )
    assert_same_bits(outputs[0], problem.run(place)[0], "out")


@pytest.mark.parametrize("dim, value_dim", [(128, 128), (192, 128)])
def test_a_program_knows_the_channels_of_values(dim, value_dim):
    shapes = ([-1, 4, dim], [5, 2, 64, dim], [5, 2, 64, value_dim], [3, 4], [4], [3], [3])
    paddle.enable_static()
    try:
        with paddle.static.program_guard(paddle.static.Program()):
            inputs = [
                paddle.static.data(f"x{i}", shape, "int32" if i > 2 else "bfloat16")
                for i, shape in enumerate(shapes)
            ]
            out, lse = paged(*inputs)
            assert list(out.shape) == [-1, 4, value_dim] and list(lse.shape) == [4, -1]
    finally:
        paddle.disable_static()


def test_paged_attention_with_scales_and_options(place):
    sinks = np.array([0.4, -3.0, 2.5, 0.0], np.float32)
    problem = paged_problem(
        SEQS,
        kind=BLOCK_WISE_FP8,
        q_type="e4m3:token_head",
        sinks=sinks,
        window_size=(80, -1),
        softcap=3.0,
    )
    names = ("cache_k_scales", "cache_v_scales", "q_descale", "sinks")
    outputs, _ = run_all_modes(paged_quantised, arrays(problem, *names), place)
    expected = problem.check(place)
    assert_same_bits(outputs[0], expected[0], "out")
    assert_same_bits(outputs[1], expected[1], "lse")


def test_paged_attention_with_codes_as_output(place):
    problem = paged_problem(SEQS, out_scale=np.array([0.021], np.float32))
    outputs, _ = run_all_modes(paged_codes, arrays(problem, "out_scale"), place)
    assert_same_bits(outputs[0], problem.check(place)[0], "codes")


def test_paged_attention_in_place(place):
    problem = paged_problem(SEQS, kind=PLAIN)
    expected, _ = problem.run(place)
    outputs, inputs = run_all_modes(
        paged_in_place, [*arrays(problem), np.zeros_like(expected)], place
    )
    assert_same_bits(outputs[0], expected, "returned")
    assert_same_bits(inputs[-1], expected, "given")


def test_flash_attention(place):
    offsets = np.array([[i, 70 + 9 * i] for i in range(6)], np.int32)
    problem = flash_problem([(3, 70), (2, 2), (1, 132)], mask_offsets=offsets)
    outputs, _ = run_all_modes(flash, arrays(problem, "mask_offsets"), place)
    expected = problem.check(place)
    assert_same_bits(outputs[0], expected[0], "out")
    assert_same_bits(outputs[1], expected[1], "lse")


@pytest.mark.parametrize("q_type", ["e4m3:tensor", "e4m3:token_head"])
def test_flash_attention_on_codes(place, q_type):
    problem = flash_problem([(3, 70), (2, 2), (1, 132)], q_type=q_type, causal=True)
    names = ("q_descale", "k_descale", "v_descale")
    outputs, _ = run_all_modes(flash_codes, arrays(problem, *names), place)
    assert_same_bits(outputs[0], problem.check(place)[0], "out")


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [bool, np.int64])
def test_masks_with_holes(place, dtype, dynamic):
    """A tree, a window of a head, and a table for each head."""
    if place == "gpu" and dtype is not bool:
        pytest.skip("is converted by Paddle's own kernel, which may not run there")
    tree = np.array([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]] * 3, dtype)
    windows = np.array([[-1, 0], [20, 3]], np.int32)
    problem = with_tables_of_heads(paged_problem(SEQS, tree_mask=tree, head_windows=windows))
    positional, _ = problem.arguments()
    arrays = [*map(to_numpy, positional[:7]), tree, windows]
    outputs, _ = run_all_modes(paged_holes, arrays, place, dynamic=dynamic)
    for got, expected in zip(outputs, problem.run(place)):
        assert_same_bits(got, expected)
    problem.check(place, results=tuple(outputs))
