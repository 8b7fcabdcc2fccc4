"""Shims that write in place: a call that is refused leaves every tensor as it was."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from fastattn.compat import flashinfer
from fastattn.compat.paddle import block_multihead_attention
from tests.support.tensors import int32, to_numpy


def block_multihead(**changes):
    """A prompt of two tokens and a decoding sequence; returns whether a cache was written."""
    caches = [paddle.full([2, 1, 64, 64], 6.0, "float16") for _ in "kv"]
    arguments = {
        "qkv": paddle.ones([3, 4 * 64], "float16"),
        "key_cache": caches[0],
        "value_cache": caches[1],
        "seq_lens_encoder": int32([[2], [0]]),
        "seq_lens_decoder": int32([[0], [2]]),
        "seq_lens_this_time": int32([[2], [1]]),
        "padding_offsets": None,
        "cum_offsets": None,
        "cu_seqlens_q": int32([0, 2, 3]),
        "cu_seqlens_k": None,
        "block_tables": int32([[0], [1]]),
        "quant_max_bound": 448.0,
        "quant_min_bound": -448.0,
        **changes,
    }
    error = None
    try:
        block_multihead_attention(**arguments)
    except Exception as caught:
        error = caught
    return any((to_numpy(cache) != 6).any() for cache in caches), error


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"max_dec_len_this_time": int32([-100])}, "max_dec_len_this_time: expected at least 0"),
        ({"out_scale": float("nan")}, "out_scale: expected a number"),
        ({"out_scale": float("inf")}, "out_scale: expected a number"),
        ({"out_scale": 1e-320}, "out_scale: expected a number"),
        ({"out_scale": 1e300}, "out_scale: expected a number"),
    ],
    ids=str,
)
def test_block_multihead_attention(changes, text):
    assert block_multihead(out_scale=0.5) == (True, None)
    written, error = block_multihead(**changes)
    assert isinstance(error, ValueError) and text in str(error) and not written


@pytest.mark.parametrize("dtype", ["float16", "float64", "int32"])
def test_merge_state_in_place(dtype):
    v, s = paddle.ones([1, 1, 64]), paddle.zeros([1, 1], dtype)
    with pytest.raises(
        TypeError, match=f"merge_state_in_place: s: expected dtype float32, got {dtype}"
    ):
        flashinfer.merge_state_in_place(v, s, 3 * v, paddle.zeros([1, 1]))
    assert bool((v == 1).all())


@pytest.mark.parametrize("name", ["batch_indices", "positions"])
def test_get_batch_indices_positions(name):
    results = {n: int32([9] * 4) for n in ("batch_indices", "positions")}
    results[name] = results[name].astype("int64")
    with pytest.raises(TypeError, match=f"{name}: expected dtype int32, got int64"):
        flashinfer.get_batch_indices_positions(int32([0, 1, 3]), int32([5, 9]), 4, **results)
    assert all((np.asarray(x) == 9).all() for x in results.values())
