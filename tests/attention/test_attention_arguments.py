"""Attention arguments that share memory with the output, and numbers of every Python type."""

from __future__ import annotations

import numpy as np
import pytest

import fastattn.functional as F
from tests.attention.test_attention_errors import PAGED_NAMES, flash, paged, zeros
from tests.support.attention import flash_problem, paged_problem
from tests.support.compare import assert_same_bits
from tests.support.tensors import int32, to_numpy, to_paddle


@pytest.mark.parametrize("name", ["key_cache", "value_cache"])
def test_an_output_over_a_cache_is_refused(name):
    problem = paged_problem([(70, 3), (0, 61)])
    positional, keywords = problem.arguments("cpu")
    q, cache = positional[0], positional[PAGED_NAMES.index(name)]
    out = cache.flatten()[: q.size].reshape(q.shape)
    if out.data_ptr() != cache.data_ptr():
        pytest.skip("this Paddle copies slices")
    with pytest.raises(ValueError, match=f"out: it is written .* share memory with {name}"):
        F.paged_attention(*positional, out=out, **keywords)


@pytest.mark.parametrize("name", ["k", "v"])
def test_an_output_over_keys_or_values_is_refused(name):
    tensors = {n: zeros(72, 4, 64, dtype="bfloat16") for n in ("q", "k", "v")}
    lengths = int32([0, 72])
    with pytest.raises(ValueError, match=f"out: it is written .* share memory with {name}"):
        F.flash_attention(*tensors.values(), lengths, lengths, 72, 72, out=tensors[name])


def test_an_output_may_be_the_queries():
    for problem in (
        flash_problem([(70, 300), (1, 5000)]),
        flash_problem([(3, 70)], q_type="e4m3", kv_type="e4m3"),
    ):
        positional, keywords = problem.arguments("cpu")
        if problem.q.dtype == np.uint8 or "float8" in str(problem.q.dtype):
            keywords["out_scale"] = to_paddle(np.full(1, 0.01, np.float32))
        expected = to_numpy(F.flash_attention(*positional, **keywords))
        q = positional[0]
        F.flash_attention(*positional, out=q, **keywords)
        assert_same_bits(to_numpy(q), expected)


@pytest.mark.parametrize("value", ["0.1", np.str_("0.1"), True, b"1", [0.1], {}])
@pytest.mark.parametrize("name", ["softmax_scale", "softcap"])
@pytest.mark.parametrize("call", [flash, paged])
def test_numbers_of_another_type_are_refused(call, name, value):
    with pytest.raises(TypeError, match=f"{name}: expected float, got {type(value).__name__}"):
        call(**{name: value})


def test_numbers_of_numpy_are_numbers():
    expected = to_numpy(flash(softmax_scale=0.5, softcap=2.0))
    assert_same_bits(to_numpy(flash(softmax_scale=np.float32(0.5), softcap=np.int64(2))), expected)


def test_more_kv_heads_than_an_int_counts():
    q = zeros(3, 0, 64, dtype="bfloat16")
    k = zeros(0, 1 << 33, 64, dtype="bfloat16")
    with pytest.raises(ValueError, match="flash_attention: k: a dimension of 8589934592 is too"):
        F.flash_attention(q, k, k, int32([0, 3]), int32([0, 0]), 3, 0)
