"""Tensors of torch in the place of Paddle's: every argument says so, and how to convert them."""

from __future__ import annotations

import functools
import inspect
import types

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import _foreign, _ops
from fastattn.compat import deep_gemm, fastdeploy, flash_attn, flash_mla, flashinfer
from fastattn.compat.paddle import block_multihead_attention
from tests.support import calls
from tests.support.tensors import int32


class Tensor:
    """What torch is not needed for: a type of its module, with the shape and dtype of a tensor."""

    def __init__(self, tensor):
        self.shape = tuple(tensor.shape)
        self.dtype = f"torch.{str(tensor.dtype).rpartition('.')[2]}"

    def dim(self):
        return len(self.shape)

    def is_contiguous(self):
        return True


Tensor.__module__, Tensor.__qualname__ = "torch", "Tensor"
TEXT = (
    "expected a paddle.Tensor, got torch.Tensor; "
    "paddle.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(x)) converts it without a copy"
)


def f16(*shape):
    return paddle.ones(shape, "float16")


def bf16(*shape):
    return paddle.ones(shape, "bfloat16")


def u8(*shape):
    return paddle.zeros(shape, "uint8")


def decode_wrapper(buffer, indptr, indices, last, q, pool, sinks, out):
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(buffer, "NHD")
    wrapper.plan(indptr, indices, last, 4, 1, 64, 64)
    return wrapper.run(q, pool, sinks=sinks, out=out)


def prefill_wrapper(queries, indptr, indices, last, q, k, v, mask):
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(u8(1), "NHD")
    wrapper.plan(queries, indptr, indices, last, 4, 1, 64, 64, custom_mask=mask)
    return wrapper.run(q, (k, v))


def graph_wrapper(buffer, indptr, indices, last):
    return flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        buffer, "NHD", True, False, indptr, indices, last
    )


def shims():
    """A right call of each function of a shim: the function and its arguments by name."""
    x, y = bf16(2, 1, 1, 64), bf16(3, 1, 64)
    nhd = [bf16(2, 64, 1, 64) for _ in "kv"]
    codes = u8(2, 64, 1, 64), u8(2, 1, 64, 64)
    one = paddle.ones([1])
    pages = int32([0, 2, 3]), int32([2, 0, 1]), int32([7, 64])
    pool = f16(3, 2, 64, 1, 64)
    yield flash_attn.flash_attn_with_kvcache, (x, *nhd, x, x), {
        "cache_seqlens": int32([0, 5]), "block_table": int32([[0], [1]]), "causal": True,
        "out": bf16(2, 1, 1, 64), "s_aux": one,
    }  # fmt: skip
    yield flash_attn.flash_attn_with_kvcache, (x, *nhd), {"page_table": int32([[0], [1]])}
    yield flash_attn.flash_attn_varlen_func, (y, y, y, int32([0, 3]), int32([0, 3]), 3, 3), {}
    yield flash_attn.flash_attn_varlen_func, (y, *nhd, int32([0, 3]), None, 3, 5), {
        "seqused_q": int32([3]), "seqused_k": int32([5]), "seq_lens_decoder": int32([2]),
        "block_table": int32([[0]]), "s_aux": one, "out": bf16(3, 1, 64),
    }  # fmt: skip
    yield flash_attn.flash_attn_varlen_func, (y, *codes, int32([0, 3]), None, 3, 5), {
        "seqused_k": int32([5]), "block_table": int32([[0]]), "k_descale": one, "v_descale": one,
    }  # fmt: skip
    yield flash_attn.flash_attn_func, (x, x, x), {}
    yield flashinfer.single_decode_with_kv_cache, (y[0], y, y), {}
    yield flashinfer.single_prefill_with_kv_cache, (y, y, y), {}
    yield decode_wrapper, (u8(1), *pages, f16(2, 4, 64), pool, paddle.ones([4]), f16(2, 4, 64)), {}
    mask = paddle.ones([2 * 71 + 64], "bool")
    halves = pool[:, 0], pool[:, 1]
    yield prefill_wrapper, (int32([0, 2, 3]), *pages, f16(3, 4, 64), *halves, mask), {}
    yield graph_wrapper, (u8(1), int32([0] * 3), int32([0] * 4), int32([0] * 2)), {}
    table = int32([1, 0]), int32([0, 2])
    where = int32([0, 0]), int32([63, 64])
    keys = f16(2, 1, 64), f16(2, 1, 64)
    yield flashinfer.append_paged_kv_cache, (*keys, *where, pool, *table, None), {}
    yield flashinfer.get_seq_lens, (pages[0], pages[2], 64), {}
    batch = int32([0, 1, 3]), int32([5, 9]), 4, int32([0] * 4), int32([0] * 4)
    yield flashinfer.get_batch_indices_positions, batch, {}
    v, s = paddle.ones([1, 1, 64]), paddle.zeros([1, 1])
    yield flashinfer.merge_state, (v, s, v + 1, s + 1), {}
    yield flashinfer.merge_state_in_place, (v, s, v + 1, s + 1), {}
    yield flashinfer.merge_states, (paddle.ones([1, 4, 1, 64]), paddle.zeros([1, 4, 1])), {}
    yield flashinfer.dense_block_tables, pages[:2], {}
    latent = bf16(1, 2, 16, 576)
    dense = latent, bf16(2, 64, 1, 576), int32([[0, 1]]), int32([5]), 512, None
    yield flash_mla.flash_mla_with_kvcache, dense, {"attn_sink": paddle.ones([16])}
    indices = int32([[[3, 70], [1, 1]]])
    rows = u8(2, 64, 1, 656)
    yield flash_mla.flash_mla_with_kvcache, (latent, rows, None, None, 512, None), {
        "is_fp8_kvcache": True, "indices": indices, "attn_sink": paddle.ones([16]),
        "topk_length": int32([2]), "extra_k_cache": rows, "extra_indices_in_kvcache": indices,
        "extra_topk_length": int32([1]),
    }  # fmt: skip
    sparse = bf16(1, 2, 576), bf16(4, 1, 576), int32([[[3, 0]]]), 0.06, 512
    yield flash_mla.flash_mla_sparse_fwd, (*sparse, paddle.ones([2]), int32([1])), {}
    prompt, slots = int32([[2], [0]]), int32([[0], [2]])
    step = slots, int32([[2], [1]]), None, None, int32([0, 2, 3]), None, int32([[0], [1]])
    caches = f16(2, 1, 64, 64), f16(2, 1, 64, 64)
    yield block_multihead_attention, (f16(3, 3 * 64), *caches, None, *step), {
        "qkv_bias": f16(192), "max_enc_len_this_time": prompt, "max_dec_len_this_time": slots,
        "rope_emb": paddle.ones([2, 1, 16, 1, 32]),
    }  # fmt: skip
    bytes_ = u8(2, 1, 64, 64), u8(2, 1, 64, 64)
    yield block_multihead_attention, (f16(3, 3 * 64), *bytes_, None, *step), {
        "quant_round_type": 0, "cache_k_dequant_scales": one, "cache_v_dequant_scales": one,
    }  # fmt: skip
    bounds = int32([0] * 3), int32([1] * 3)
    pair = u8(5, 128), paddle.ones([5])
    yield deep_gemm.fp8_mqa_logits, (u8(3, 32, 128), pair, paddle.ones([3, 32]), *bounds), {}
    paged = u8(2, 1, 32, 128), u8(4, 64, 1, 132), paddle.ones([2, 32]), int32([1, 1])
    yield deep_gemm.fp8_paged_mqa_logits, (*paged, int32([[0], [1]]), None, 64), {}
    yield deep_gemm.get_paged_mqa_logits_metadata, (int32([0, 1]), 64, 10), {}
    keys = paddle.ones([2, 128]), u8(1, 64, 132), paddle.to_tensor([1, -1]), 128, "ue8m0"
    yield fastdeploy.indexer_k_quant_and_cache, keys, {}
    gathered = u8(1, 64, 132), u8(1, 128), paddle.zeros([1, 4]), int32([[0]]), int32([0, 1])
    yield fastdeploy.cp_gather_indexer_k_quant_cache, gathered, {}
    new = bf16(1, 512), bf16(1, 1, 64), u8(1, 1, 64, 656), paddle.to_tensor([1]), None
    yield fastdeploy.dsk_attn_write_cache, (*new, "fp8_ds_mla"), {}


def assert_named(function, arguments, keywords):
    """Each tensor of a right call, replaced alone."""
    bind = functools.partial(inspect.signature(function).bind, *arguments, **keywords)
    for name, value in bind().arguments.items():
        if _ops.is_tensor(value):
            wrong = [Tensor(value)]
        elif isinstance(value, tuple) and all(_ops.is_tensor(x) for x in value):
            wrong = [(*value[:i], Tensor(value[i]), *value[i + 1 :]) for i in range(len(value))]
        else:
            continue
        for fake in wrong:
            bound = bind()
            bound.arguments[name] = fake
            with pytest.raises(TypeError) as error:
                function(*bound.args, **bound.kwargs)
            assert TEXT in str(error.value), (function.__name__, name, error.value)


def test_shims():
    count = 0
    for function, arguments, keywords in shims():
        function(*arguments, **keywords)
        assert_named(function, arguments, keywords)
        count += 1
    assert count > 25


@pytest.fixture(scope="module")
def operators():
    """The first call of each function that the small calls of all operators make."""
    made = {}

    def recorded(function):
        def run(*arguments, **keywords):
            made.setdefault(function.__name__, (function, arguments, keywords))
            return function(*arguments, **keywords)

        return run

    patch = pytest.MonkeyPatch()
    for module in (F, fastdeploy, calls):
        for name, value in vars(module).copy().items():
            home = str(getattr(value, "__module__", ""))
            if isinstance(value, types.FunctionType) and home.startswith("fastattn.") and (
                ".functional." in home or ".compat." in home
            ) and not name.startswith("_"):  # fmt: skip
                patch.setattr(module, name, recorded(value))
    for name in calls.OPERATORS:
        calls.make_call(name, "cpu")()
    patch.undo()
    return made


def test_operators(operators):
    assert len(operators) >= 38
    for function, arguments, keywords in operators.values():
        assert_named(function, arguments, keywords)


def test_other_types_are_named_in_full():
    assert _foreign.type_name(np.zeros(1)) == "numpy.ndarray"
    assert _foreign.type_name([]) == "list" and _foreign.type_name(None) == "NoneType"
    with pytest.raises(TypeError, match=r"quantize_fp8: x: expected a tensor, got numpy\.ndarray"):
        F.quantize_fp8(np.zeros((1, 128), np.float32))
