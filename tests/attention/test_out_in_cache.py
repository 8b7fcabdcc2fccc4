"""An `out` in the memory of what a call reads is refused, before anything is written."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn.distributed import paged_attention_dcp
from tests.support.tensors import int32

TEXT = "out: it is written and must not share memory with "


def memory_and_out(name):
    """Pool with `name` in it, and an `out` over its first bytes."""
    sizes = {"key_cache": [2, 2, 64, 64], "value_cache": [2, 2, 64, 64]}
    tensors = {k: paddle.full(size, 0.5, "bfloat16") for k, size in sizes.items()}
    tensors["sinks"] = paddle.zeros([4], "bfloat16")
    if name == "sinks":
        pool = paddle.zeros([2 * 4 * 64], "bfloat16")
        tensors["sinks"] = pool[:4]
        return tensors, pool.reshape([2, 4, 64]), pool
    pool = tensors[name]
    return tensors, pool.reshape([-1])[: 2 * 4 * 64].reshape([2, 4, 64]), pool


def calls(tensors, out):
    q = paddle.ones([2, 4, 64], "bfloat16")
    caches, sinks = (tensors["key_cache"], tensors["value_cache"]), tensors["sinks"]
    seqs = int32([[0, 1]]), int32([0, 2]), int32([64]), int32([2])
    plan = F.plan_cascade(np.array([[0, 1]]), [64], [2], 64)
    return {
        "paged_attention": lambda: F.paged_attention(
            q, *caches, *seqs, 2, 66, sinks=sinks, out=out
        ),
        "paged_attention_dcp": lambda: paged_attention_dcp(
            q, *caches, *seqs, 2, 66, sinks=sinks, out=out
        ),
        "cascade_attention": lambda: F.cascade_attention(
            q, *caches, plan, seqs[1], seqs[3], 2, 66, sinks=sinks, out=out
        ),
    }


@pytest.mark.parametrize("op", ["paged_attention", "paged_attention_dcp", "cascade_attention"])
@pytest.mark.parametrize("name", ["key_cache", "value_cache", "sinks"])
def test_an_out_in_an_input_is_refused(op, name):
    tensors, out, pool = memory_and_out(name)
    assert pool.data_ptr() == out.data_ptr()
    before = pool.astype("float32").numpy()
    with pytest.raises(ValueError, match=f"{op}: {TEXT}{name}"):
        calls(tensors, out)[op]()
    assert (pool.astype("float32").numpy() == before).all()


@pytest.mark.parametrize("op", ["paged_attention_dcp", "cascade_attention"])
def test_an_out_beside_them_is_written(op):
    tensors, _, _ = memory_and_out("key_cache")
    out = paddle.zeros([2, 4, 64], "bfloat16")
    calls(tensors, out)[op]()
    assert (out.astype("float32").numpy() > 0).all()


def test_a_plan_in_out_is_refused():
    """What a step's plan holds is read as well."""
    tensors, _, _ = memory_and_out("key_cache")
    q, out = paddle.ones([2, 4, 64], "bfloat16"), paddle.zeros([2, 4, 64], "bfloat16")
    plan = F.plan_cascade(np.array([[0, 1]]), [64], [2], 64)
    counts = out.reshape([-1])[:2].view("int32")
    assert counts.data_ptr() == out.data_ptr()
    plan = plan._replace(prefix_seq_lens_this_time=counts)
    with pytest.raises(ValueError, match=f"cascade_attention: {TEXT}prefix_seq_lens_this_time"):
        F.cascade_attention(
            q,
            tensors["key_cache"],
            tensors["value_cache"],
            plan,
            int32([0, 2]),
            int32([2]),
            2,
            66,
            out=out,
        )
