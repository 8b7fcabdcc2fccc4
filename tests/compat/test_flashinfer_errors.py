"""What FlashInfer's wrappers refuse here, by its name, and what does not fit the plan."""

from __future__ import annotations

import paddle
import pytest

from fastattn.compat.flashinfer import (
    BatchDecodeWithPagedKVCacheWrapper,
    BatchPrefillWithPagedKVCacheWrapper,
)
from tests.support.flashinfer import DECODE, KV, PREFILL, D, Step, workspace
from tests.support.tensors import int32, to_paddle


class TestRefused:
    def planned(self, **options):
        step = Step(DECODE)
        wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace("cpu"))
        wrapper.plan(*step.pages(), *step.sizes(), **options)
        return wrapper, step

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"pos_encoding_mode": "ROPE_LLAMA"}, "pos_encoding_mode: ROPE_LLAMA"),
            ({"pos_encoding_mode": "ALIBI"}, "pos_encoding_mode: ALIBI"),
            ({"window_right": 3}, "window_right"),
        ],
    )
    def test_plan(self, options, text):
        with pytest.raises(NotImplementedError, match=f"plan: {text}"):
            self.planned(**options)

    @pytest.mark.parametrize("page_size", [1, 16, 32, 80])
    def test_page_sizes(self, page_size):
        step = Step([(1, 70)], page_size=page_size)
        wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace("cpu"))
        with pytest.raises(NotImplementedError, match=f"page_size: pages of {page_size} tokens"):
            wrapper.plan(*step.pages(), *step.sizes())

    @pytest.mark.parametrize(
        "name", ["packed_custom_mask", "prefix_len_ptr", "token_pos_in_items_ptr",
                 "max_item_len_ptr", "head_dim_vo"]
    )  # fmt: skip
    def test_prefill_plan(self, name):
        step = Step(PREFILL)
        wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace("cpu"))
        value = 128 if name == "head_dim_vo" else int32([1])
        with pytest.raises(NotImplementedError, match=f"plan: {name}"):
            wrapper.plan(int32(step.starts), *step.pages(), *step.sizes(), **{name: value})

    @pytest.mark.parametrize(
        "name", ["lse", "kv_cache_sf", "skip_softmax_threshold_scale_factor", "v_scale", "k_scale"]
    )
    def test_run(self, name):
        wrapper, step = self.planned()
        value = paddle.ones([1])
        with pytest.raises(NotImplementedError, match=f"run: {name}"):
            wrapper.run(to_paddle(step.q), step.cache("cpu"), **{name: value})

    def test_run_with_what_was_not_planned(self):
        wrapper, step = self.planned()
        q, cache = to_paddle(step.q), step.cache("cpu")
        with pytest.raises(NotImplementedError, match=r"run: \*args"):
            wrapper.run(q, cache, 1.0)
        with pytest.raises(ValueError, match="window_left: planned with -1, got 5"):
            wrapper.run(q, cache, window_left=5)
        with pytest.raises(ValueError, match="q: expected 7 queries as planned, got 6"):
            wrapper.run(q[:6], cache)
        with pytest.raises(ValueError, match=r"q: expected shape \[T, 4, 64\]"):
            wrapper.run(q[:, :2], cache)
        with pytest.raises(ValueError, match="expected 2 KV heads as planned, got 1"):
            wrapper.run(q, cache[:, :, :, :1])
        big = Step(DECODE, page_size=128)
        with pytest.raises(ValueError, match="expected pages of 64 tokens as planned, got 128"):
            wrapper.run(q, big.cache("cpu"))
        with pytest.raises(RuntimeError, match=r"plan\(\) comes first"):
            BatchDecodeWithPagedKVCacheWrapper(workspace("cpu")).run(q, cache)

    def test_caches_that_would_have_to_be_copied(self):
        step = Step([(1, 70)], page_size=128)
        wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace("cpu"), "HND")
        wrapper.plan(*step.pages(), *step.sizes())
        with pytest.raises(NotImplementedError, match="HND pages of 128 tokens"):
            wrapper.run(to_paddle(step.q), step.cache("cpu", "HND"))
        wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace("cpu"))
        wrapper.plan(*step.pages(), *step.sizes())
        layers = paddle.zeros([len(step.k), 2, 2, 128, KV, D], "float16")
        with pytest.raises(NotImplementedError, match="128 tokens that are not contiguous"):
            wrapper.run(to_paddle(step.q), layers[:, 0])

    @pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
    def test_8_bit_pools(self, kv_layout):
        step = Step([(1, 70)], dim=128)
        wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace("cpu"), kv_layout)
        wrapper.plan(*step.pages(), *step.sizes())
        shape = [4, 2, 64, KV, 128] if kv_layout == "NHD" else [4, 2, KV, 64, 128]
        with pytest.raises(NotImplementedError, match=r"8-bit values of shape .* in place"):
            wrapper.run(to_paddle(step.q), paddle.zeros(shape, "uint8"))

    def test_8_bit_values_that_may_have_either_layout(self):
        step = Step([(1, 70)])
        wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace("cpu"), "HND")
        wrapper.plan(*step.pages(), *step.sizes())
        codes = paddle.zeros([4, KV, 64, 64], "uint8")
        with pytest.raises(NotImplementedError, match="whose two layouts look the same"):
            wrapper.run(to_paddle(step.q), (codes, codes))

    def test_page_tables(self):
        step = Step(DECODE)
        wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace("cpu"))
        indptr, indices, last = step.pages()
        with pytest.raises(ValueError, match="last_page_len: expected 1 to 64, got 65"):
            wrapper.plan(indptr, indices, last + 64, *step.sizes())
        with pytest.raises(ValueError, match="last_page_len: expected 7 sequences, got 6"):
            wrapper.plan(indptr, indices, last[:6], *step.sizes())
        with pytest.raises(ValueError, match="indptr: ends at"):
            wrapper.plan(indptr, indices[:3], last, *step.sizes())
        with pytest.raises(ValueError, match="q_len_per_req: a sequence has fewer than 2 keys"):
            wrapper.plan(indptr, indices, last, *step.sizes(), q_len_per_req=2)

    def test_constructors(self):
        with pytest.raises(ValueError, match="kv_layout: expected NHD or HND"):
            BatchDecodeWithPagedKVCacheWrapper(workspace("cpu"), "DHN")
        with pytest.raises(NotImplementedError, match="jit_args"):
            BatchDecodeWithPagedKVCacheWrapper(workspace("cpu"), jit_args=["x"])
        with pytest.raises(NotImplementedError, match="custom_mask_buf"):
            BatchPrefillWithPagedKVCacheWrapper(workspace("cpu"), custom_mask_buf=workspace("cpu"))
        with pytest.raises(TypeError, match="paged_kv_indptr_buffer: expected a tensor"):
            BatchDecodeWithPagedKVCacheWrapper(workspace("cpu"), use_cuda_graph=True)
