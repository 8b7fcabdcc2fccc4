"""Error tables of the cache operators: exception and text, and no input that ends the process."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import _ops
from tests.support.cache import make_cache, make_step, make_values
from tests.support.compare import assert_same_bits
from tests.support.tensors import BF16, to_numpy, to_paddle

RAW_ERRORS = (OSError, ValueError, TypeError, RuntimeError)


def _zeros(shape, dtype="float32"):
    return paddle.zeros(shape, dtype)


def _write_arguments(cache_quant_type: str = "block_wise_fp8") -> dict:
    """Valid arguments: 2 sequences, 5 tokens, 2 KV heads, head_dim 64, 4 blocks."""
    step, num_blocks = make_step([3, 60], [1, 4], spare_blocks=1)
    cache = make_cache(cache_quant_type, num_blocks, 2, 64)
    names = ("block_tables", "cu_seqlens_q", "seq_lens_decoder", "seq_lens_this_time")
    arguments = {
        "key": to_paddle(make_values((5, 2, 64), np.float32)),
        "value": to_paddle(make_values((5, 2, 64), np.float32)),
        "key_cache": to_paddle(cache.key),
        "value_cache": to_paddle(cache.value),
        **{name: to_paddle(array) for name, array in zip(names, step.arrays)},
        "cache_quant_type": cache_quant_type,
    }
    if cache.k_scales is not None:
        arguments["cache_k_scales"] = to_paddle(cache.k_scales)
        arguments["cache_v_scales"] = to_paddle(cache.v_scales)
    return arguments


WRITE_REQUIRED = (
    "key",
    "value",
    "key_cache",
    "value_cache",
    "block_tables",
    "cu_seqlens_q",
    "seq_lens_decoder",
    "seq_lens_this_time",
)


#: (type, changed arguments, exception, text)
WRITE_ERRORS = [
    ("block_wise_fp8", {"key": lambda: np.zeros(3)}, TypeError, "key: expected a tensor, got num"),
    (
        "block_wise_fp8",
        {"key": lambda: _zeros([5, 2, 64], "int32")},
        TypeError,
        "key: expected dtype float32 or float16 or bfloat16, got int32",
    ),
    (
        "block_wise_fp8",
        {"key": lambda: _zeros([5, 128])},
        ValueError,
        r"key: expected shape \[\?, 2, 64\], got \[5, 128\]",
    ),
    (
        "block_wise_fp8",
        {"value": lambda: _zeros([5, 2, 64], "float16")},
        TypeError,
        "value: expected dtype float32, got float16",
    ),
    (
        "block_wise_fp8",
        {"value": lambda: _zeros([4, 2, 64])},
        ValueError,
        r"value: expected shape \[5, 2, 64\], got \[4, 2, 64\]",
    ),
    (
        "block_wise_fp8",
        {"key_cache": lambda: _zeros([3, 2, 32, 64], "uint8")},
        ValueError,
        r"key_cache: expected blocks of 64 tokens",
    ),
    (
        "block_wise_fp8",
        {"key_cache": lambda: _zeros([3, 2, 64, 80], "uint8")},
        NotImplementedError,
        "key_cache: head_dim 80 is not supported; supported: 64, 96, 128, 192, 256",
    ),
    (
        "block_wise_fp8",
        {"key_cache": lambda: _zeros([3, 2, 64, 192], "uint8")},
        ValueError,
        r"value_cache: expected shape \[3, 2, 128, 64\], got \[3, 2, 64, 64\]",
    ),
    (
        "block_wise_fp8",
        {
            "key_cache": lambda: _zeros([3, 2, 64, 192], "uint8"),
            "value_cache": lambda: _zeros([3, 2, 128, 64], "uint8"),
            "key": lambda: _zeros([5, 2, 192]),
        },
        ValueError,
        r"value: expected shape \[\?, 2, 128\], got \[5, 2, 64\]",
    ),
    (
        "cache_int8",
        {
            "key_cache": lambda: _zeros([3, 2, 64, 192], "uint8"),
            "value_cache": lambda: _zeros([3, 2, 128, 64], "uint8"),
            "cache_v_scales": lambda: _zeros([384]),
        },
        ValueError,
        r"cache_v_scales: expected shape \[1\], \[2\] \(KV heads\) or \[256\] "
        r"\(KV heads \* head_dim\), got \[384\]",
    ),
    (
        "block_wise_fp8",
        {"key_cache": lambda: _zeros([3, 2, 64, 64], "float32")},
        TypeError,
        "key_cache: expected dtype uint8 or float8_e4m3fn for block_wise_fp8, got float32",
    ),
    (
        "block_wise_fp8",
        {"value_cache": lambda: _zeros([3, 1, 64, 64], "uint8")},
        ValueError,
        "value_cache: expected shape",
    ),
    (
        "block_wise_fp8",
        {"cu_seqlens_q": lambda: _zeros([2], "int32")},
        ValueError,
        r"cu_seqlens_q: expected shape \[3\]",
    ),
    (
        "block_wise_fp8",
        {"block_tables": lambda: _zeros([2, 3], "int64")},
        TypeError,
        "block_tables: expected dtype int32, got int64",
    ),
    (
        "block_wise_fp8",
        {"block_tables": lambda: _zeros([6], "int32")},
        ValueError,
        "block_tables: expected 2 dimensions",
    ),
    (
        "block_wise_fp8",
        {"seq_lens_decoder": lambda: _zeros([3], "int32")},
        ValueError,
        r"seq_lens_decoder: expected shape \[2\]",
    ),
    (
        "block_wise_fp8",
        {"seq_lens_this_time": lambda: _zeros([2], "float32")},
        TypeError,
        "seq_lens_this_time: expected dtype int32, got float32",
    ),
    (
        "block_wise_fp8",
        {"batch_id_per_token": lambda: _zeros([4], "int32")},
        ValueError,
        r"batch_id_per_token: expected shape \[5\]",
    ),
    (
        "block_wise_fp8",
        {"cache_k_scales": lambda: None},
        ValueError,
        "cache_k_scales: cache_quant_type 'block_wise_fp8' needs scales, got None",
    ),
    (
        "block_wise_fp8",
        {"cache_v_scales": lambda: _zeros([2])},
        ValueError,
        r"cache_v_scales: expected shape \[\d, 2, 64\], got \[2\]",
    ),
    (
        "block_wise_fp8",
        {"fp8_format": lambda: "e5m2"},
        NotImplementedError,
        "fp8_format: block_wise_fp8 stores e4m3 only, got 'e5m2'",
    ),
    ("cache_fp8", {"fp8_format": lambda: "e3m4"}, ValueError, "fp8_format: expected e4m3 or e5m2"),
    (
        "cache_fp8",
        {"cache_k_scales": lambda: _zeros([128])},
        ValueError,
        r"cache_k_scales: expected shape \[1\] or \[2\] \(KV heads\), got \[128\]",
    ),
    (
        "cache_fp8",
        {"cache_k_scales": lambda: _zeros([2], "float16")},
        TypeError,
        "cache_k_scales: expected dtype float32 or bfloat16, got float16",
    ),
    (
        "cache_int8",
        {"cache_v_scales": lambda: _zeros([2], "bfloat16")},
        TypeError,
        "cache_v_scales: expected dtype float32, got bfloat16",
    ),
    (
        "none",
        {"cache_k_scales": lambda: _zeros([2])},
        ValueError,
        "cache_k_scales: cache_quant_type 'none' takes no scales",
    ),
    (
        "none",
        {
            "key": lambda: _zeros([5, 2, 64], "float16"),
            "value": lambda: _zeros([5, 2, 64], "float16"),
        },
        TypeError,
        "key: expected dtype float32 or the cache's bfloat16, got float16",
    ),
    (
        "none",
        {"key_cache": lambda: _zeros([3, 2, 64, 64], "uint8")},
        TypeError,
        "key_cache: expected dtype bfloat16 or float16, got uint8",
    ),
    (
        "none",
        {"value_cache": lambda: _zeros([4, 2, 64, 64], "float16")},
        ValueError,
        "value_cache: expected shape",
    ),
    (
        "none",
        {"cache_quant_type": lambda: "cache_int4_zp"},
        NotImplementedError,
        "cache_quant_type: 'cache_int4_zp' is not supported; supported: none, cache_int8, ",
    ),
    (
        "cache_int8",
        {"cache_v_zp": lambda: _zeros([2])},
        ValueError,
        "cache_v_zp: cache_quant_type 'cache_int8' is symmetric and takes no zero point",
    ),
    (
        "cache_int8",
        {"cache_quant_type": lambda: "cache_int8_zp", "cache_k_zp": lambda: _zeros([2])},
        NotImplementedError,
        "cache_quant_type: 'cache_int8_zp' is not supported; supported: none, cache_int8, ",
    ),
]


@pytest.mark.parametrize(("cache_quant_type", "changes", "error", "text"), WRITE_ERRORS)
def test_write_errors(cache_quant_type, changes, error, text):
    arguments = _write_arguments(cache_quant_type)
    before = to_numpy(arguments["key_cache"]).copy()
    arguments.update({name: make() for name, make in changes.items()})
    with pytest.raises(error, match=f"write_cache_kv: {text}"):
        F.write_cache_kv(**arguments)
    if "key_cache" not in changes:
        assert_same_bits(to_numpy(arguments["key_cache"]), before, "the cache after the error")


@pytest.mark.parametrize("name", WRITE_REQUIRED)
def test_write_none_for_a_tensor(name):
    arguments = _write_arguments()
    F.write_cache_kv(**arguments)
    arguments[name] = None
    with pytest.raises(TypeError, match=f"write_cache_kv: {name}: expected a tensor, got None"):
        F.write_cache_kv(**arguments)


@pytest.mark.parametrize("name", WRITE_REQUIRED)
def test_raw_write_refuses_none(name):
    arguments = _write_arguments()
    arguments[name] = None
    inputs = [arguments.get(n) for n in _ops.signature("write_cache_kv").inputs]
    with pytest.raises(RAW_ERRORS):
        paddle.base.core.eager._run_custom_op(
            "fastattn_write_cache_kv", *inputs, "block_wise_fp8", "e4m3", "none"
        )


def test_written_caches_must_be_contiguous():
    arguments = _write_arguments()
    arguments["key_cache"] = arguments["key_cache"].transpose([0, 1, 3, 2])
    if arguments["key_cache"].is_contiguous():
        pytest.skip("this Paddle copies on transpose")
    with pytest.raises(ValueError, match=r"write_cache_kv: key_cache: expected .* strides"):
        F.write_cache_kv(**arguments)


def test_heads_of_a_token_must_be_contiguous():
    arguments = _write_arguments()
    arguments["key"] = _zeros([5, 2, 128])[:, :, ::2]
    if arguments["key"].is_contiguous():
        pytest.skip("this Paddle copies on slicing")
    with pytest.raises(ValueError, match="write_cache_kv: key: expected the heads of a token"):
        F.write_cache_kv(**arguments)


@pytest.mark.parametrize("name", ["key_cache", "value_cache"])
def test_written_caches_take_no_gradient(name):
    arguments = _write_arguments("none")
    arguments["key"], arguments["value"] = (
        to_paddle(make_values((5, 2, 64), BF16)) for _ in range(2)
    )
    arguments[name].stop_gradient = False
    with pytest.raises(ValueError, match=f"write_cache_kv: {name}: it is written in place and"):
        F.write_cache_kv(**arguments)


@pytest.mark.parametrize("kind", ["none", "cache_fp8", "block_wise_int8"])
@pytest.mark.parametrize(
    ("written", "other"),
    [
        ("value_cache", "key_cache"),
        ("cache_v_scales", "cache_k_scales"),
        ("key_cache", "key"),
        ("value_cache", "value"),
    ],
)
def test_written_memory_is_not_shared(kind, written, other):
    arguments = _write_arguments(kind)
    if other.startswith("cache_") and kind == "none":
        pytest.skip("no scales")
    if other in ("key", "value"):
        if kind != "none":
            pytest.skip("dtypes differ")
        cache = arguments[written]
        tokens = cache.flatten()[: 5 * 2 * 64].reshape([5, 2, 64])
        if tokens.data_ptr() != cache.data_ptr():
            pytest.skip("this Paddle copies slices")
        arguments["key"] = arguments["value"] = to_paddle(make_values((5, 2, 64), BF16))
        arguments[other] = tokens
    else:
        arguments[written] = arguments[other]
    if kind == "cache_fp8" and other == "cache_k_scales":
        F.write_cache_kv(**arguments)  # they are read only
        return
    with pytest.raises(ValueError, match=f"{written}: it is written .* memory with {other}"):
        F.write_cache_kv(**arguments)


def _append_arguments(cache_quant_type: str = "block_wise_fp8") -> dict:
    """Valid arguments: 2 sequences, 64 tokens, 2 KV heads, head_dim 64."""
    step, num_blocks = make_step([3, 61], [0, 0], spare_blocks=1)
    cache = make_cache(cache_quant_type, num_blocks, 2, 64)
    return {
        "key_cache": to_paddle(cache.key),
        "value_cache": to_paddle(cache.value),
        "key": _zeros([64, 2, 64], "bfloat16"),
        "value": _zeros([64, 2, 64], "bfloat16"),
        "block_tables": to_paddle(step.block_tables),
        "seq_lens_decoder": to_paddle(step.seq_lens_decoder),
        "cu_seqlens_k": to_paddle(np.asarray([0, 3, 64], np.int32)),
        "cache_k_scales": to_paddle(cache.k_scales),
        "cache_v_scales": to_paddle(cache.v_scales),
        "dynamic_quant": cache_quant_type.startswith("block_wise"),
        "cache_quant_type": cache_quant_type,
    }


APPEND_ERRORS = [
    (
        "block_wise_k8v4",
        {"cache_layout": lambda: "fastdeploy"},
        NotImplementedError,
        "cache_layout: 'fastdeploy' has no order for block_wise_k8v4; supported: fastattn",
    ),
    (
        "block_wise_int4",
        {"cache_layout": lambda: "fastdeploy"},
        NotImplementedError,
        "cache_layout: 'fastdeploy' has no order for block_wise_int4; supported: fastattn",
    ),
    ("cache_fp8", {"key": lambda: "x"}, TypeError, "key: expected a tensor, got str"),
    (
        "cache_fp8",
        {"key": lambda: _zeros([64, 2, 64])},
        TypeError,
        "key: expected dtype bfloat16 or float16, got float32",
    ),
    (
        "cache_fp8",
        {"value": lambda: _zeros([64, 2, 64], "float16")},
        TypeError,
        "value: expected dtype bfloat16, got float16",
    ),
    (
        "cache_fp8",
        {"key": lambda: _zeros([64, 4, 64], "bfloat16")},
        ValueError,
        r"key: expected shape \[\?, 2, 64\], got \[64, 4, 64\]",
    ),
    (
        "cache_fp8",
        {"value": lambda: _zeros([63, 2, 64], "bfloat16")},
        ValueError,
        r"value: expected shape \[64, 2, 64\], got \[63, 2, 64\]",
    ),
    (
        "cache_fp8",
        {"cu_seqlens_k": lambda: _zeros([2], "int32")},
        ValueError,
        r"cu_seqlens_k: expected shape \[3\]",
    ),
    (
        "cache_fp8",
        {"seq_lens_decoder": lambda: _zeros([2], "int64")},
        TypeError,
        "seq_lens_decoder: expected dtype int32, got int64",
    ),
    (
        "cache_fp8",
        {"block_tables": lambda: _zeros([2], "int32")},
        ValueError,
        "block_tables: expected 2 dimensions",
    ),
    (
        "cache_fp8",
        {"dynamic_quant": lambda: True},
        ValueError,
        "dynamic_quant: cache_quant_type 'cache_fp8' has static scales, but dynamic_quant is True",
    ),
    (
        "block_wise_int8",
        {"dynamic_quant": lambda: False},
        ValueError,
        "dynamic_quant: cache_quant_type 'block_wise_int8' has dynamic scales, but dynamic_quant "
        "is False",
    ),
    (
        "cache_fp8",
        {"cache_quant_type": lambda: "none"},
        NotImplementedError,
        "cache_quant_type: 'none' stores no codes; supported: cache_int8, ",
    ),
    (
        "cache_fp8",
        {"cache_quant_type": lambda: "cache_int4_zp"},
        NotImplementedError,
        "cache_quant_type: 'cache_int4_zp' is not supported; supported: ",
    ),
    (
        "cache_fp8",
        {"cache_layout": lambda: "logical"},
        NotImplementedError,
        "cache_layout: 'logical' is not supported; supported: fastattn, fastdeploy",
    ),
    (
        "cache_fp8",
        {"cache_layout": lambda: "nhd"},
        ValueError,
        "cache_layout: expected fastattn, fastdeploy or logical, got 'nhd'",
    ),
    (
        "cache_int8",
        {"cache_k_zp": lambda: _zeros([2])},
        ValueError,
        "cache_k_zp: cache_quant_type 'cache_int8' is symmetric and takes no zero point",
    ),
    (
        "block_wise_fp8",
        {"cache_k_scales": lambda: _zeros([2])},
        ValueError,
        r"cache_k_scales: expected shape \[\d, 2, 64\], got \[2\]",
    ),
]


def test_appended_keys_and_values_are_not_the_same_tensor():
    arguments = _append_arguments()
    arguments["value"] = arguments["key"]
    with pytest.raises(ValueError, match=r"value: it is written .* share memory with key"):
        F.append_cache_kv_c8(**arguments)


@pytest.mark.parametrize(("cache_quant_type", "changes", "error", "text"), APPEND_ERRORS)
def test_append_errors(cache_quant_type, changes, error, text):
    arguments = _append_arguments(cache_quant_type)
    arguments.update({name: make() for name, make in changes.items()})
    with pytest.raises(error, match=f"append_cache_kv_c8: {text}"):
        F.append_cache_kv_c8(**arguments)
    for name in {"key", "value"} - set(changes):
        assert not to_numpy(arguments[name]).any(), "outputs stay as they are"


@pytest.mark.parametrize("name", [n for n, v in _append_arguments().items() if _ops.is_tensor(v)])
def test_append_none_for_a_tensor(name):
    arguments = _append_arguments()
    F.append_cache_kv_c8(**arguments)
    arguments[name] = None
    text = f"append_cache_kv_c8: {name}: expected a tensor, got None"
    with pytest.raises(TypeError, match=text):
        F.append_cache_kv_c8(**arguments)
    inputs = [arguments.get(n) for n in _ops.signature("append_cache_kv_c8").inputs]
    with pytest.raises(RAW_ERRORS):
        paddle.base.core.eager._run_custom_op(
            "fastattn_append_cache_kv_c8",
            *inputs,
            True,
            "block_wise_fp8",
            "fastattn",
            "e4m3",
            "none",
        )


CONVERT = {"kind": "v", "cache_quant_type": "cache_fp8", "src": "logical", "dst": "fastattn"}

CONVERT_ERRORS = [
    (lambda: None, {}, TypeError, "cache: expected a tensor, got None"),
    (lambda: _zeros([1, 1, 64], "uint8"), {}, ValueError, "cache: expected 4 dimensions"),
    (
        lambda: _zeros([1, 1, 128, 64], "uint8"),
        {},
        ValueError,
        r"cache: expected blocks of 64 tokens, shape \[num_blocks, KV, 64, D\] for kind 'v' in "
        r"layout 'logical', got \[1, 1, 128, 64\]",
    ),
    (
        lambda: _zeros([1, 1, 64, 32], "uint8"),
        {},
        NotImplementedError,
        "cache: head_dim 32 is not supported; supported: 64, 96, 128, 256",
    ),
    (
        lambda: _zeros([1, 1, 64, 64]),
        {},
        TypeError,
        "cache: expected dtype uint8, float8_e4m3fn or float8_e5m2 for cache_fp8, got float32",
    ),
    (
        lambda: _zeros([1, 1, 64, 64], "bfloat16"),
        {"cache_quant_type": "block_wise_int8"},
        TypeError,
        "cache: expected dtype uint8 or int8 for block_wise_int8, got bfloat16",
    ),
    (
        lambda: _zeros([1, 1, 64, 64], "uint8"),
        {"cache_quant_type": "none"},
        TypeError,
        "cache: expected dtype bfloat16 or float16 for none, got uint8",
    ),
    (
        lambda: _zeros([1, 1, 64, 64], "uint8"),
        {"cache_quant_type": "cache_int8_zp"},
        NotImplementedError,
        "cache_quant_type: 'cache_int8_zp' is not supported",
    ),
    (
        lambda: _zeros([1, 1, 64, 64], "uint8"),
        {"kind": "key"},
        ValueError,
        "kind: expected k or v, got 'key'",
    ),
    (
        lambda: _zeros([1, 1, 64, 64], "uint8"),
        {"src": "plain"},
        ValueError,
        "src: expected fastattn, fastdeploy or logical, got 'plain'",
    ),
    (
        lambda: _zeros([1, 1, 64, 64], "uint8"),
        {"dst": ""},
        ValueError,
        "dst: expected fastattn, fastdeploy or logical, got ''",
    ),
]


@pytest.mark.parametrize(("make", "changes", "error", "text"), CONVERT_ERRORS)
def test_convert_errors(make, changes, error, text):
    with pytest.raises(error, match=f"convert_cache_layout: {text}"):
        F.convert_cache_layout(make(), **{**CONVERT, **changes})


def test_raw_convert_refuses_none():
    with pytest.raises(RAW_ERRORS):
        paddle.base.core.eager._run_custom_op(
            "fastattn_convert_cache_layout", None, *CONVERT.values()
        )
