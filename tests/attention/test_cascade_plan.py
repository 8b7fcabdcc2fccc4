"""A cascade plan belongs to the step that it was made for; numbers of the host must fit it."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn.backends import FlashAttentionBackend, ForwardMeta
from fastattn.backends.standalone import make_config
from tests.support.tensors import int32

TABLES = [[7, 2, 5], [7, 3, 6]]


def make_backend() -> FlashAttentionBackend:
    return FlashAttentionBackend(make_config(max_model_len=512), 2, 4, 64)


def make_meta(**changes) -> ForwardMeta:
    given = {"cached": [70, 100], "new": [1, 1], "block_tables": TABLES, "caches": []}
    return ForwardMeta.for_step(**{**given, "shared_prefix_tokens": 64, **changes})


def add(tensor):
    tensor.add_(int32([1] * tensor.shape[0]))


def set_value(tensor):
    tensor.set_value(tensor.numpy() + 1)  # leaves Paddle's count of writes as it is


def set_item(tensor):
    tensor[0] = 99


@pytest.mark.parametrize("write", [add, set_value, set_item])
@pytest.mark.parametrize(
    "name", ["seq_lens_decoder", "seq_lens_this_time", "cu_seqlens_q", "max_len_tensor_cpu"]
)
def test_a_plan_ends_when_its_lengths_are_written(name, write):
    backend, meta = make_backend(), make_meta()
    backend.init_attention_metadata(meta)
    backend.init_attention_metadata(meta)
    write(getattr(meta, name))
    with pytest.raises(ValueError, match=f"cascade_plan: forward_meta.{name} has changed since"):
        backend.init_attention_metadata(meta)


def test_a_plan_ends_when_a_field_is_replaced():
    backend, meta = make_backend(), make_meta()
    meta.block_tables = int32(TABLES)
    with pytest.raises(ValueError, match=r"forward_meta.block_tables has changed since the plan"):
        backend.init_attention_metadata(meta)


def test_a_new_plan_or_none_goes_on():
    backend, meta = make_backend(), make_meta()
    add(meta.seq_lens_decoder)
    meta.cascade_plan = F.plan_cascade(TABLES, [71, 101], [1, 1], 64)
    backend.init_attention_metadata(meta)
    assert backend.get_attention_meta().cascade_plan is meta.cascade_plan
    add(meta.seq_lens_decoder)
    with pytest.raises(ValueError, match="seq_lens_decoder has changed"):
        backend.init_attention_metadata(meta)
    meta.cascade_plan = None
    backend.init_attention_metadata(meta)


def test_a_plan_that_is_written_too_goes_on():
    """As a server does whose tensors keep their addresses."""
    backend, meta = make_backend(), make_meta()
    set_value(meta.seq_lens_decoder)
    set_value(meta.cascade_plan.suffix_seq_lens_decoder)
    backend.init_attention_metadata(meta)


def test_a_graph_is_written_into():
    backend, meta = make_backend(), make_meta(step_use_cudagraph=True)
    set_value(meta.seq_lens_decoder)
    backend.init_attention_metadata(meta)


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy])
def test_a_copy_has_its_own_record(clone):
    backend, meta = make_backend(), make_meta()
    set_value(meta.seq_lens_this_time)
    other = clone(make_meta())
    backend.init_attention_metadata(other)
    set_value(other.seq_lens_decoder)
    with pytest.raises(ValueError, match="seq_lens_decoder has changed"):
        backend.init_attention_metadata(other)


@pytest.mark.skipif(paddle.__version__.startswith("2."), reason="Paddle 2.6 cannot pickle a tensor")
def test_metadata_is_pickled_without_its_record():
    state = pickle.loads(pickle.dumps(make_meta(cascade_plan=None)))
    assert state.cascade_plan is None and list(state.seq_lens_decoder.shape) == [2]
    assert not any("record" in name for name in make_meta().__getstate__())


@pytest.mark.parametrize("value", [2**31, 2**32 + 7, -(2**31) - 1, 2**63 - 1, 2**70])
@pytest.mark.parametrize("dtype", [np.int64, object])
def test_values_that_int32_would_wrap(value, dtype):
    """2**32 + 7 became block 7."""
    if dtype is np.int64 and value >= 2**63:
        dtype = object
    tables = np.array([[7, 2], [value, 3]], dtype)
    for function in (
        lambda: F.plan_cascade(tables, [64, 64], [0, 1], 64),
        lambda: make_meta(block_tables=tables),
    ):
        with pytest.raises(ValueError, match=f"block_tables: expected int32 values, got {value}"):
            function()
    lengths = np.array([64, value], dtype)
    with pytest.raises(ValueError, match="seq_lens_decoder: expected int32 values"):
        F.plan_cascade(TABLES, lengths, [1, 1], 64)
    with pytest.raises(ValueError, match=r"ForwardMeta.for_step: cached: expected int32 values"):
        make_meta(cached=lengths)
    with pytest.raises(ValueError, match=r"ForwardMeta.for_step: new: expected int32 values"):
        make_meta(new=lengths)
    with pytest.raises(ValueError, match="num_tokens: expected int32 values"):
        make_meta(num_tokens=value)


def test_sums_that_int32_would_wrap():
    big = [2**31 - 1, 2]
    with pytest.raises(ValueError, match="seq_lens_this_time: expected a sum that fits int32"):
        F.plan_cascade(TABLES, [64, 64], big, 64)
    with pytest.raises(ValueError, match=r"ForwardMeta.for_step: new: expected int32 values"):
        make_meta(new=big)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"cached": [70.5, 100.0]}, TypeError, "cached: expected integers, got float64"),
        ({"new": [1.0, 1.9]}, TypeError, "new: expected integers, got float64"),
        ({"block_tables": [[7.9, 2]] * 2}, TypeError, "block_tables: expected integers"),
        ({"num_tokens": 2.5}, TypeError, "num_tokens: expected integers, got float64"),
        ({"num_tokens": 1}, ValueError, "num_tokens: expected at least 2, the sum of new, got 1"),
        ({"cached": [70, -1]}, ValueError, "cached: expected at least 0, got -1"),
        ({"new": [-3, 1]}, ValueError, "new: expected at least 0, got -3"),
        ({"cached": [70]}, ValueError, r"cached: expected shape \[2\], got \[1\]"),
        ({"block_tables": [7, 2]}, ValueError, r"block_tables: expected shape \[2, max_blocks\]"),
        ({"prefill": [True]}, ValueError, r"prefill: expected shape \[2\], got \[1\]"),
    ],
)
def test_wrong_numbers_of_a_step(changes, error, text):
    with pytest.raises(error, match=r"^ForwardMeta.for_step: " + text):
        make_meta(**changes)


def test_numbers_of_every_integer_type():
    for dtype in (np.int8, np.uint16, np.int64, np.uint64):
        meta = make_meta(cached=np.array([70, 100], dtype), new=tuple(np.ones(2, dtype)))
        assert meta.seq_lens_decoder.numpy().tolist() == [70, 100]
        assert meta.cascade_plan.suffix_seq_lens_decoder.dtype == paddle.int32
