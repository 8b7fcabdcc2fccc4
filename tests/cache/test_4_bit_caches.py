"""Caches of 4-bit codes, int4 and MXFP4: steps that share bytes, layouts, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

import fastattn.functional as F
from fastattn import reference
from fastattn.reference.layout import unpack
from tests.support.cache import make_cache, make_step, make_values, write
from tests.support.compare import assert_same_bits
from tests.support.tensors import BF16, int32, to_numpy, to_paddle

INT4, MXFP4 = KINDS = ("block_wise_int4", "block_wise_mxfp4")


@pytest.mark.parametrize(
    ("quant_type", "scale_dtype"), [(INT4, np.float32), (INT4, BF16), (MXFP4, np.uint8)]
)
def test_one_token_at_a_time_is_the_prompt(place, quant_type, scale_dtype):
    """Decode steps write the bytes that a prompt does, and leave those of other tokens alone."""
    key, value = (make_values((70, 2, 64), np.float32, seed) for seed in (1, 2))
    step, num_blocks = make_step([0], [70])
    options = {} if quant_type == MXFP4 else {"scale_dtype": scale_dtype}
    whole, cache = (make_cache(quant_type, num_blocks, 2, 64, **options) for _ in range(2))
    whole = write(whole, key, value, step, place)
    assert whole.k_scales.dtype == scale_dtype
    for i in range(70):
        one = type(step)(step.block_tables, np.int32([0, 1]), np.int32([i]), np.int32([1]))
        cache = write(cache, key[i : i + 1], value[i : i + 1], one, place)
    for name in ("key", "value", "k_scales", "v_scales"):
        assert_same_bits(getattr(cache, name), getattr(whole, name), name)


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("quant_type", KINDS)
@pytest.mark.parametrize("kind", ["k", "v"])
def test_logical_and_back(place, kind, quant_type, dim):
    cache = make_cache(quant_type, 3, 2, dim)
    stored = cache.key if kind == "k" else cache.value
    options = {"kind": kind, "cache_quant_type": quant_type}
    logical = F.convert_cache_layout(
        to_paddle(stored, place), src="fastattn", dst="logical", **options
    )
    codes = unpack(stored, kind, "fastattn", int8=False, nibbles=True)
    assert_same_bits(to_numpy(logical), codes[..., ::2] | codes[..., 1::2] << 4)
    back = F.convert_cache_layout(logical, src="logical", dst="fastattn", **options)
    assert_same_bits(to_numpy(back), stored)
    modelled = reference.convert_cache_layout(stored, src="fastattn", dst="logical", **options)
    assert_same_bits(to_numpy(logical), modelled)


def write_with(quant_type, **changes):
    cache = make_cache(quant_type, 3, 2, 64)
    arguments = {
        "key": to_paddle(make_values((5, 2, 64), np.float32)),
        "value": to_paddle(make_values((5, 2, 64), np.float32)),
        "key_cache": to_paddle(cache.key),
        "value_cache": to_paddle(cache.value),
        "block_tables": int32([[0]]),
        "cu_seqlens_q": int32([0, 5]),
        "seq_lens_decoder": int32([0]),
        "seq_lens_this_time": int32([5]),
        "cache_k_scales": to_paddle(cache.k_scales),
        "cache_v_scales": to_paddle(cache.v_scales),
        "cache_quant_type": quant_type,
    }
    return F.write_cache_kv(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("quant_type", "changes", "error", "text"),
    [
        (
            INT4,
            {"key_cache": np.zeros((3, 2, 64, 80), np.uint8)},
            NotImplementedError,
            "key_cache: head_dim 160 is not supported; supported: 64, 96, 128, 192, 256",
        ),
        (
            INT4,
            {"key_cache": np.zeros((3, 2, 32, 32), np.uint8)},
            ValueError,
            r"key_cache: expected blocks of 64 tokens, shape \[num_blocks, KV, 64, D / 2\]",
        ),
        (
            INT4,
            {"value_cache": np.zeros((3, 2, 64, 64), np.uint8)},
            ValueError,
            r"value_cache: expected shape \[3, 2, 32, 64\], got \[3, 2, 64, 64\]",
        ),
        (
            INT4,
            {"key_cache": np.zeros((3, 2, 64, 32), np.int8)},
            TypeError,
            "key_cache: expected dtype uint8, got int8",
        ),
        (
            INT4,
            {"key": np.zeros((5, 2, 32), np.float32)},
            ValueError,
            r"key: expected shape \[\?, 2, 64\], got \[5, 2, 32\]",
        ),
        (
            MXFP4,
            {"key_cache": np.zeros((3, 2, 64, 80), np.uint8)},
            NotImplementedError,
            "key_cache: head_dim 160 is not supported; supported: 64, 96, 128, 192, 256",
        ),
        (
            MXFP4,
            {"key_cache": np.zeros((3, 2, 64, 32), np.int8)},
            TypeError,
            "key_cache: expected dtype uint8, got int8",
        ),
        (
            MXFP4,
            {"cache_k_scales": np.zeros((3, 2, 64), np.uint8)},
            ValueError,
            r"cache_k_scales: expected shape \[3, 2, 64, 2\], got \[3, 2, 64\]",
        ),
        (
            MXFP4,
            {"cache_v_scales": np.zeros((3, 2, 64, 4), np.uint8)},
            ValueError,
            r"cache_v_scales: expected shape \[3, 2, 64, 2\], got \[3, 2, 64, 4\]",
        ),
        (
            MXFP4,
            {"cache_k_scales": np.zeros((3, 2, 64, 2), np.float32)},
            TypeError,
            "cache_k_scales: expected dtype uint8, got float32",
        ),
    ],
)
def test_what_is_refused(quant_type, changes, error, text):
    write_with(quant_type)
    with pytest.raises(error, match=f"write_cache_kv: {text}"):
        write_with(quant_type, **{name: to_paddle(value) for name, value in changes.items()})


def caches_of_whole_rows(quant_type, dim):
    """Caches of one byte a channel, as someone makes them who forgets that a byte holds two."""
    value_dim = 128 if dim == 192 else dim
    key, value = np.zeros((3, 2, 64, dim), np.uint8), np.zeros((3, 2, value_dim, 64), np.uint8)
    shape, dtype = (3, 2, 64), np.float32
    if quant_type == MXFP4:
        shape, dtype = (3, 2, 64, dim // 32), np.uint8
    scales = [to_paddle(np.zeros(shape, dtype)) for _ in "kv"]
    return [to_paddle(key), to_paddle(value)], scales


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("quant_type", KINDS)
@pytest.mark.parametrize(
    "op",
    [
        *("write_cache_kv", "append_cache_kv_c8", "rope_write_cache_kv", "attention_step"),
        *("paged_attention", "sparse_paged_attention"),
    ],
)
def test_a_cache_of_whole_rows_is_named(quant_type, dim, op):
    """The error names the cache of the wrong width, not tensors of the right one."""
    caches, (k_scales, v_scales) = caches_of_whole_rows(quant_type, dim)
    seqs = int32([[0]]), int32([0, 5]), int32([0]), int32([5])
    options = {"cache_quant_type": quant_type, "k_rotation": "hadamard"}
    options["k_center"] = to_paddle(np.zeros((2, dim), np.float32))
    scales = {"cache_k_scales": k_scales, "cache_v_scales": v_scales}
    key = to_paddle(np.zeros((5, 2, dim), np.float32))
    q = to_paddle(np.zeros((5, 4, dim), BF16))
    qkv = to_paddle(np.zeros((5, 8 * dim), BF16))
    heads = {"num_heads": 4, "num_kv_heads": 2}
    calls = {
        "write_cache_kv": lambda: F.write_cache_kv(key, key, *caches, *seqs, **scales, **options),
        "append_cache_kv_c8": lambda: F.append_cache_kv_c8(
            *caches, key, key, seqs[0], int32([5]), seqs[1], **scales, dynamic_quant=True, **options
        ),
        "rope_write_cache_kv": lambda: F.rope_write_cache_kv(
            qkv, *caches, None, *seqs, **heads, **scales, **options
        ),
        "attention_step": lambda: F.attention_step(
            qkv, *caches, None, *seqs, 5, 5, **heads, **scales, **options
        ),
        "paged_attention": lambda: F.paged_attention(q, *caches, *seqs, 5, 5, **scales, **options),
        "sparse_paged_attention": lambda: F.sparse_paged_attention(
            q, *caches, *seqs, 5, 5, int32(np.zeros((5, 2, 1))), granularity=1, **scales, **options
        ),
    }
    text = rf"{op}: key_cache: expected D / 2 = {dim // 2} channels: a byte of {quant_type} holds"
    with pytest.raises(ValueError, match=text):
        calls[op]()


def test_other_widths_of_the_key_are_still_named():
    """A key of a wrong width is not taken for a head whose cache has whole rows."""
    cache = make_cache(INT4, 3, 2, 256)
    both = {"key_cache": to_paddle(cache.key), "value_cache": to_paddle(cache.value)}
    scales = {"cache_k_scales": to_paddle(cache.k_scales)}
    scales["cache_v_scales"] = to_paddle(cache.v_scales)
    with pytest.raises(ValueError, match=r"key: expected shape \[\?, 2, 256\], got \[5, 2, 64\]"):
        write_with(INT4, **both, **scales)


def test_other_types_take_no_bytes_as_scales():
    scales = to_paddle(np.zeros(make_cache(INT4, 3, 2, 64).k_scales.shape, np.uint8))
    with pytest.raises(TypeError, match="cache_k_scales: expected dtype float32 or bfloat16"):
        write_with(INT4, cache_k_scales=scales)


@pytest.mark.parametrize("quant_type", KINDS)
def test_fastdeploy_has_no_such_layout(quant_type):
    cache = to_paddle(make_cache(quant_type, 3, 2, 64).key)
    options = {"kind": "k", "cache_quant_type": quant_type}
    with pytest.raises(NotImplementedError, match="src: 'fastdeploy' has no order for block_wise"):
        F.convert_cache_layout(cache, src="fastdeploy", dst="logical", **options)
    with pytest.raises(NotImplementedError, match="dst: 'fastdeploy' has no order for block_wise"):
        F.convert_cache_blocks(cache, src="logical", dst="fastdeploy", **options)
