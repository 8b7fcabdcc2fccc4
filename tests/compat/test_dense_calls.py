"""Calls over contiguous keys as flash-attn's and FlashInfer's READMEs have them, against fp64."""

from __future__ import annotations

import importlib
import inspect

import numpy as np
import paddle
import pytest

from fastattn.compat import flash_attn, flashinfer
from fastattn.compat.flash_attn import flash_attn_func
from fastattn.compat.flashinfer import single_decode_with_kv_cache, single_prefill_with_kv_cache
from tests.support.shims import Sequence, check, values, visible_keys
from tests.support.tensors import BF16, skip_slices_on, to_numpy, to_paddle

FP16 = np.dtype(np.float16)
H, KV, D = 4, 2, 64


def made(queries, keys, *, batch=1, dtype=BF16, dim=D):
    rng = np.random.default_rng(queries + 1000 * keys)
    q = values(rng, (batch, queries, H, dim), dtype)
    k, v = (values(rng, (batch, keys, KV, dim), dtype, mean) for mean in (0.0, 0.7))
    return q, k, v


def sequences(q, k, v, **mask):
    visible = visible_keys(q.shape[1], k.shape[1], **mask)
    return [Sequence(*(x.astype(np.float64) for x in parts), visible) for parts in zip(q, k, v)]


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("queries", "keys"), [(70, 70), (1, 129), (5, 200)])
@pytest.mark.parametrize(
    ("options", "mask", "given"),
    [
        ({"causal": True}, {"causal": True}, {}),
        ({}, {}, {}),
        ({"causal": True, "window_size": (40, 0)}, {"causal": True, "window": (40, 0)}, {}),
        ({"window_size": None, "softcap": 7.0, "softmax_scale": 0.2}, {},
         {"softcap": 7.0, "scale": 0.2}),
    ],
    ids=str,
)  # fmt: skip
def test_flash_attn_func(place, dtype, queries, keys, options, mask, given):
    arrays = made(queries, keys, batch=3, dtype=dtype)
    tensors = [to_paddle(x, place) for x in arrays]
    out, lse, none = flash_attn_func(*tensors, return_attn_probs=True, **options)
    assert none is None and lse.shape == [3, H, queries]
    lse = np.concatenate(list(to_numpy(lse)), axis=1)
    flat = to_numpy(out).reshape(-1, H, D)
    check(sequences(*arrays, **mask), flat, lse, place, dtype, **given)
    assert (to_numpy(flash_attn_func(*tensors, **options)) == to_numpy(out)).all()


def test_flash_attn_func_with_fewer_keys_than_queries(place):
    q, k, v = made(9, 5)
    out = flash_attn_func(*(to_paddle(x, place) for x in (q, k, v)), causal=True)
    assert not to_numpy(out)[0, :4].astype(np.float32).any()
    seqs = sequences(q, k, v, causal=True)
    seqs[0].q, seqs[0].visible = seqs[0].q[4:], seqs[0].visible[4:]
    check(seqs, to_numpy(out)[0, 4:], None, place)


def test_the_line_that_replaces_a_packed_call(place):
    """``qkv[:, :, 0]`` is strided; its values are taken, not its memory."""
    skip_slices_on(place)
    q, _, v = made(20, 20, batch=2)
    k, v = (np.repeat(x, H // KV, axis=2) for x in (made(20, 20, batch=2)[1], v))
    qkv = to_paddle(np.stack([q, k, v], 2), place)
    out = flash_attn_func(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], causal=True)
    check(sequences(q, k, v, causal=True), to_numpy(out).reshape(-1, H, D), None, place)


def test_positions_are_flash_attn_2s():
    order = "q k v dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic"
    names = [*order.split(), "return_attn_probs"]
    assert list(inspect.signature(flash_attn_func).parameters) == names


def test_wrong_shapes():
    q, k, v = (paddle.to_tensor(x.astype(np.float32)) for x in made(3, 5, batch=2))
    with pytest.raises(ValueError, match=r"flash_attn_func: q: expected shape \[B, S, heads, D\]"):
        flash_attn_func(q[0], k, v)
    with pytest.raises(ValueError, match="flash_attn_func: v: expected 2 sequences of 5 keys"):
        flash_attn_func(q, k, v[:, :4])
    with pytest.raises(TypeError, match="dropout_p: expected a number, got NoneType"):
        flash_attn_func(q, k, v, None, True)  # FlashAttention-3's positions
    with pytest.raises(ValueError, match=r"decode_with_kv_cache: q: expected shape \[H, D\]"):
        single_decode_with_kv_cache(q, k[0], v[0])
    with pytest.raises(ValueError, match=r"k: expected shape \[kv_len, KV, D\]"):
        single_decode_with_kv_cache(q[0, 0], k, v)
    with pytest.raises(ValueError, match=r"prefill_with_kv_cache: q: expected shape \[qo_len, H"):
        single_prefill_with_kv_cache(q, k[0], v[0])
    with pytest.raises(ValueError, match="kv_layout: expected NHD or HND, got 'NDH'"):
        single_prefill_with_kv_cache(q[0], k[0], v[0], kv_layout="NDH")


# ---- FlashInfer ----------------------------------------------------------------------------------


def laid_out(array, layout, place):
    return to_paddle(array if layout == "NHD" else array.transpose(1, 0, 2), place)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize(
    ("options", "mask", "given"),
    [
        ({}, {}, {}),
        ({"window_left": 30}, {"window": (30, -1)}, {}),
        ({"logits_soft_cap": 5.0, "sm_scale": 0.1, "q_scale": 2.0, "k_scale": 1.5, "v_scale": 1},
         {}, {"softcap": 5.0, "scale": 0.3}),
    ],
    ids=str,
)  # fmt: skip
def test_single_decode(place, layout, options, mask, given):
    skip_slices_on(place)  # of HND; and the LSE becomes one of base 2 by Paddle
    q, k, v = made(1, 150, dtype=FP16)
    tensors = (
        to_paddle(q[0, 0], place),
        laid_out(k[0], layout, place),
        laid_out(v[0], layout, place),
    )
    out, lse = single_decode_with_kv_cache(*tensors, layout, return_lse=True, **options)
    assert out.shape == [H, D] and lse.shape == [H]
    natural = to_numpy(lse)[:, None] * np.float32(np.log(2))
    check(sequences(q, k, v, **mask), to_numpy(out)[None], natural, place, FP16, **given)
    assert (
        to_numpy(single_decode_with_kv_cache(*tensors, layout, **options)) == to_numpy(out)
    ).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("left", [-1, 20])
def test_single_prefill(place, causal, left):
    skip_slices_on(place)  # the LSE becomes one of base 2 by Paddle
    q, k, v = made(40, 90)
    tensors = [to_paddle(x[0], place) for x in (q, k, v)]
    out, lse = single_prefill_with_kv_cache(
        *tensors, causal=causal, window_left=left, return_lse=True
    )
    natural = to_numpy(lse).T * np.float32(np.log(2))
    mask = {"causal": causal, "window": (left, -1)}
    check(sequences(q, k, v, **mask), to_numpy(out), natural, place)


def test_modules_of_flashinfer():
    """Its own tests call ``flashinfer.decode.single_decode_with_kv_cache`` and the like."""
    found = set()
    for name in ("cascade", "decode", "page", "prefill"):
        module = importlib.import_module(f"fastattn.compat.flashinfer.{name}")
        assert getattr(flashinfer, name) is module
        for exported in module.__all__:
            assert getattr(module, exported) is getattr(flashinfer, exported)
            found.add(exported)
    assert found == {*flashinfer.__all__} - {"dense_block_tables"}


def test_positions_are_flashinfers():
    decode = list(inspect.signature(single_decode_with_kv_cache).parameters)
    assert decode[:6] == ["q", "k", "v", "kv_layout", "pos_encoding_mode", "use_tensor_cores"]
    prefill = list(inspect.signature(single_prefill_with_kv_cache).parameters)
    assert prefill[3:12] == [
        "scale_q", "scale_k", "scale_v", "o_dtype", "custom_mask", "packed_custom_mask", "causal",
        "kv_layout", "pos_encoding_mode",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "function",
    [
        *(getattr(flash_attn, name) for name in flash_attn.__all__),
        single_decode_with_kv_cache,
        single_prefill_with_kv_cache,
    ],
)
def test_docstring_names_every_argument(function):
    text = inspect.getdoc(function)
    for name in inspect.signature(function).parameters:
        assert name in text, name
