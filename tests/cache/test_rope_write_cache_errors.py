"""Errors of rope_write_cache_kv: exception type and text, at the Python layer and the raw op."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import _ops
from tests.support.tensors import DTYPES, int32, to_paddle


def zeros(shape: list[int], dtype: str = "float32") -> paddle.Tensor:
    """On the CPU, whatever the default device is."""
    return to_paddle(np.zeros(shape, DTYPES.get(dtype, dtype)))


def arguments(**changes: Any) -> dict[str, Any]:
    """Valid arguments of a small call, with changes."""
    base: dict[str, Any] = {
        "qkv": zeros([2, 8 * 64], "float16"),
        "key_cache": zeros([2, 2, 64, 64], "float16"),
        "value_cache": zeros([2, 2, 64, 64], "float16"),
        "rotary_embs": zeros([2, 1, 8, 1, 32]),
        "block_tables": int32([[0]]),
        "cu_seqlens_q": int32([0, 2]),
        "seq_lens_decoder": int32([0]),
        "seq_lens_this_time": int32([2]),
        "num_heads": 4,
        "num_kv_heads": 2,
    }
    return base | changes


def codes(**changes: Any) -> dict[str, Any]:
    """The same with an 8-bit cache."""
    base = {
        "key_cache": zeros([2, 2, 64, 64], "uint8"),
        "value_cache": zeros([2, 2, 64, 64], "uint8"),
        "cache_k_scales": to_paddle(np.ones(2, np.float32)),
        "cache_v_scales": to_paddle(np.ones(2, np.float32)),
        "cache_quant_type": "cache_fp8",
    }
    return arguments(**(base | changes))


_CACHE = zeros([2, 2, 64, 64], "float16")

ERRORS = [
    (
        "one cache",
        ValueError,
        "value_cache: it is written .* share memory with key_cache",
        {"key_cache": _CACHE, "value_cache": _CACHE},
    ),
    (
        "eps",
        ValueError,
        "rms_norm_eps: expected a finite number of at least 0, got -1",
        {"rms_norm_eps": -1.0},
    ),
    ("eps nan", ValueError, "rms_norm_eps: expected a finite number", {"rms_norm_eps": np.nan}),
    ("None", TypeError, "qkv: expected a tensor, got None", {"qkv": None}),
    ("list", TypeError, "qkv: expected a tensor, got list", {"qkv": [1.0]}),
    ("no cache", TypeError, "key_cache: expected a tensor, got None", {"key_cache": None}),
    ("fp32 qkv", TypeError, "qkv: expected dtype bfloat16", {"qkv": zeros([2, 512])}),
    ("rank", ValueError, "qkv: expected 2 dimensions", {"qkv": zeros([2, 8, 64], "float16")}),
    (
        "width",
        ValueError,
        r"qkv: expected shape \[\?, 512\], got \[2, 500\]",
        {"qkv": zeros([2, 500], "float16")},
    ),
    ("other type", TypeError, "qkv: expected", {"qkv": zeros([2, 512], "bfloat16")}),
    ("heads", ValueError, "num_heads: expected a multiple of num_kv_heads", {"num_heads": 3}),
    ("no heads", ValueError, "num_heads: expected at least 1, got 0", {"num_heads": 0}),
    ("kv heads", ValueError, "num_kv_heads: key_cache holds 2", {"num_kv_heads": 4}),
    ("negative", ValueError, "num_kv_heads: key_cache holds 2", {"num_kv_heads": -2}),
    (
        "table dtype",
        TypeError,
        "rotary_embs: expected dtype float32",
        {"rotary_embs": zeros([2, 1, 8, 1, 32], "float16")},
    ),
    (
        "table columns",
        ValueError,
        "rotary_embs: expected 32 or 64 columns",
        {"rotary_embs": zeros([2, 1, 8, 1, 16])},
    ),
    (
        "table shape",
        ValueError,
        "rotary_embs: expected shape",
        {"rotary_embs": zeros([2, 2, 8, 1, 32])},
    ),
    (
        "too few tables",
        ValueError,
        "rotary_embs: expected a table for each of the 2 sequences",
        {
            "rotary_embs": zeros([1, 2, 1, 8, 1, 32]),
            "block_tables": int32([[0], [1]]),
            "cu_seqlens_q": int32([0, 2, 2]),
            "seq_lens_decoder": int32([0, 0]),
            "seq_lens_this_time": int32([2, 0]),
        },
    ),
    ("odd rotary", ValueError, "rotary_dim: expected an even number", {"rotary_dim": 31}),
    ("big rotary", ValueError, "rotary_dim: expected an even number", {"rotary_dim": 128}),
    ("zero rotary", ValueError, "rotary_dim: expected an even number", {"rotary_dim": 0}),
    (
        "norm shape",
        ValueError,
        r"q_norm_weight: expected shape \[64\]",
        {"q_norm_weight": zeros([128])},
    ),
    (
        "norm dtype",
        TypeError,
        "k_norm_weight: expected dtype float32",
        {"k_norm_weight": zeros([64], "int32")},
    ),
    ("bias shape", ValueError, r"qkv_bias: expected shape \[512\]", {"qkv_bias": zeros([64])}),
    ("q_quant", ValueError, "q_quant: expected none, per_tensor", {"q_quant": "fp8"}),
    ("no q_scale", ValueError, "q_scale: q_quant 'per_tensor' needs", {"q_quant": "per_tensor"}),
    ("q_scale", ValueError, "q_scale: q_quant 'none' takes no scale", {"q_scale": zeros([1])}),
    (
        "q_scale shape",
        ValueError,
        r"q_scale: expected shape \[1\]",
        {"q_scale": zeros([2]), "q_quant": "per_tensor"},
    ),
    (
        "ids",
        ValueError,
        r"batch_id_per_token: expected shape \[2\]",
        {"batch_id_per_token": int32([0])},
    ),
    (
        "lengths",
        ValueError,
        r"cu_seqlens_q: expected shape \[2\]",
        {"cu_seqlens_q": int32([0, 1, 2])},
    ),
    (
        "type",
        NotImplementedError,
        "'cache_int4_zp' is not supported; supported: none, cache_int8",
        {"cache_quant_type": "cache_int4_zp"},
    ),
    (
        "heads of two sizes",
        NotImplementedError,
        "key_cache: head_dim 192 is not supported here; supported: 64, 96, 128, 256; write_",
        {
            "key_cache": zeros([2, 2, 64, 192], "float16"),
            "value_cache": zeros([2, 2, 64, 128], "float16"),
        },
    ),
    (
        "scales",
        ValueError,
        "cache_quant_type 'none' takes no scales",
        {"cache_k_scales": zeros([2])},
    ),
]


@pytest.mark.parametrize(
    ("error", "text", "changes"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS]
)
def test_errors_name_the_argument(error, text, changes):
    with pytest.raises(error, match="rope_write_cache_kv: .*" + text):
        F.rope_write_cache_kv(**arguments(**changes))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("rotary_embs", [2, 1, 0, 1, 32]),
        ("q_norm_weight", [0]),
        ("k_norm_weight", [0]),
        ("qkv_bias", [0]),
    ],
)
def test_an_empty_optional_tensor_is_not_an_absent_one(name, shape):
    with pytest.raises(ValueError, match=f"rope_write_cache_kv: {name}: expected a tensor with"):
        F.rope_write_cache_kv(**arguments(**{name: zeros(shape)}))


@pytest.mark.parametrize("missing", ["cache_k_scales", "cache_v_scales"])
def test_quantised_types_need_scales(missing):
    with pytest.raises(ValueError, match=f"{missing}: cache_quant_type 'cache_fp8' needs scales"):
        F.rope_write_cache_kv(**codes(**{missing: None}))


@pytest.mark.parametrize("name", ["cache_k_zp", "cache_v_zp"])
def test_zero_points_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}: .*'cache_fp8' is symmetric"):
        F.rope_write_cache_kv(**codes(**{name: zeros([2])}))
    with pytest.raises(NotImplementedError, match="'cache_int8_zp' is not supported"):
        F.rope_write_cache_kv(**codes(cache_quant_type="cache_int8_zp", **{name: zeros([2])}))


RAW_INPUTS = (
    "qkv",
    "key_cache",
    "value_cache",
    "rotary_embs",
    "block_tables",
    "cu_seqlens_q",
    "seq_lens_decoder",
    "seq_lens_this_time",
    "q_norm_weight",
    "k_norm_weight",
    "qkv_bias",
    "q_scale",
    "k_center",
    "k_feedback",
    "cache_k_scales",
    "cache_v_scales",
    "batch_id_per_token",
)
REQUIRED = tuple(name for name in RAW_INPUTS[:8] if name != "rotary_embs")


def call_raw(changes: dict[str, Any]) -> Any:
    """The registered operator itself, without the checks of fastattn's Python layers."""
    inputs = arguments(**{k: v for k, v in changes.items() if k in RAW_INPUTS})
    attrs = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "rms_norm_eps": 1e-6,
        "use_neox_rotary_style": False,
        "rotary_dim": -1,
        "qk_norm_before_rope": False,
        "q_quant": "none",
        "cache_quant_type": "none",
        "fp8_format": "e4m3",
        "k_rotation": "none",
        "q_rotation": "none",
    } | {k: v for k, v in changes.items() if k not in RAW_INPUTS}
    return paddle.base.core.eager._run_custom_op(
        "fastattn_rope_write_cache_kv", *(inputs.get(n) for n in RAW_INPUTS), *attrs.values()
    )


@pytest.mark.parametrize(
    "changes",
    [e[3] for e in ERRORS if e[0] != "list"],
    ids=[e[0] for e in ERRORS if e[0] != "list"],
)
def test_raw_operator_raises_as_well(changes):
    with pytest.raises((OSError, TypeError, ValueError, RuntimeError)):
        call_raw(changes)


@pytest.mark.parametrize("name", REQUIRED)
def test_raw_operator_survives_none_and_empty(name):
    with pytest.raises((OSError, TypeError, ValueError, RuntimeError)):
        call_raw({name: None})
    with pytest.raises((OSError, TypeError, ValueError, RuntimeError)):
        call_raw({name: zeros([0], "int32")})


def test_raw_operator_is_what_the_function_calls():
    outputs = call_raw({})
    assert list(outputs[0].shape) == [2, 4, 64]
    assert _ops.signature("rope_write_cache_kv").inputs == tuple(RAW_INPUTS)
