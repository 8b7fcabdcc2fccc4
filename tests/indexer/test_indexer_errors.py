"""What the indexer operators refuse, with and without the Python layer."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import _ops
from tests.support.indexer import cos_sin, key_case
from tests.support.tensors import BF16, to_paddle

RNG = np.random.default_rng


def query_error_case():
    return {
        "positions": np.arange(2),
        "q": np.zeros((2, 3, 128), BF16),
        "cos_sin_cache": cos_sin(4),
        "weights": np.zeros((2, 3), np.float32),
        "softmax_scale": 1.0,
        "head_scale": 1.0,
        "quant": "fp8",
    }


def query_errors():
    return [
        ("positions", None, TypeError, "positions: expected a tensor, got None"),
        ("positions", np.arange(3), ValueError, r"positions: expected shape \[2\], got \[3\]"),
        (
            "positions",
            np.zeros(2, np.float32),
            TypeError,
            "positions: expected dtype int32 or int64",
        ),
        (
            "q",
            np.zeros((2, 3, 128), np.float32),
            TypeError,
            "q: expected dtype bfloat16, got float32",
        ),
        ("q", np.zeros((2, 3, 64), BF16), ValueError, r"q: expected shape \[\?, \?, 128\]"),
        ("q", np.zeros((6, 128), BF16), ValueError, r"q: expected shape"),
        (
            "cos_sin_cache",
            cos_sin(4)[:, :32],
            ValueError,
            r"cos_sin_cache: expected shape \[\?, 64\]",
        ),
        (
            "cos_sin_cache",
            np.zeros((4, 64), np.float16),
            TypeError,
            "cos_sin_cache: expected dtype",
        ),
        ("weights", np.zeros((2, 4), np.float32), ValueError, r"weights: expected shape \[2, 3\]"),
        ("weights", np.zeros((2, 3), np.int32), TypeError, "weights: expected dtype float32"),
        ("quant", "int8", ValueError, "quant: expected fp8 or mxfp4, got 'int8'"),
        ("quant", "fp8_512", ValueError, "quant: expected fp8 or mxfp4, got 'fp8_512'"),
    ]


def key_error_case():
    return key_case(RNG(12), "fp8", 4, [np.array([3, 7])])


def key_errors():
    return [
        ("state_cache", None, TypeError, "state_cache: expected a tensor, got None"),
        (
            "state_cache",
            np.zeros((4, 4, 512), np.float16),
            TypeError,
            "state_cache: expected dtype",
        ),
        ("state_cache", np.zeros((4, 4, 256), np.float32), ValueError, r"shape \[\?, \?, 512\]"),
        ("state_cache", np.zeros((4, 512), np.float32), ValueError, "state_cache: expected shape"),
        (
            "block_tables",
            np.zeros((1, 2), np.int64),
            TypeError,
            "block_tables: expected dtype int32",
        ),
        ("block_tables", np.zeros(2, np.int32), ValueError, "block_tables: expected 2 dimensions"),
        (
            "batch_id_per_token",
            np.zeros(2, np.int64),
            TypeError,
            "batch_id_per_token: expected dtype",
        ),
        ("batch_id_per_token", np.zeros((2, 1), np.int32), ValueError, "expected 1 dimensions"),
        ("positions", np.arange(3), ValueError, r"positions: expected shape \[2\], got \[3\]"),
        ("state_slots", np.zeros(2, np.float32), TypeError, "state_slots: expected dtype"),
        (
            "kv_slots",
            np.zeros(1, np.int64),
            ValueError,
            r"kv_slots: expected shape \[2\], got \[1\]",
        ),
        (
            "rms_norm_weight",
            np.ones(64, np.float32),
            ValueError,
            r"expected shape \[128\], got \[64\]",
        ),
        ("rms_norm_weight", np.ones(128, np.float16), TypeError, "rms_norm_weight: expected dtype"),
        (
            "cos_sin_cache",
            cos_sin(4)[:, :32],
            ValueError,
            r"cos_sin_cache: expected shape \[\?, 64\]",
        ),
        ("kv_cache", np.zeros((3, 2112), np.int8), TypeError, "kv_cache: expected dtype uint8"),
        ("kv_cache", np.zeros((3, 2108), np.uint8), ValueError, "pages of at least 2112 bytes"),
        ("kv_cache", np.zeros((3, 2113), np.uint8), ValueError, "a multiple of 4, got shape"),
        ("kv_cache", np.zeros(4224, np.uint8), ValueError, r"expected \[num_pages, page_bytes\]"),
        ("compress_ratio", 8, NotImplementedError, "compress_ratio: expected 4 or 128, got 8"),
        ("compress_ratio", 0, NotImplementedError, "compress_ratio: expected 4 or 128, got 0"),
        ("compress_ratio", 128, ValueError, r"state_cache: expected shape \[\?, \?, 256\]"),
        ("page_size", 0, ValueError, "page_size: expected a positive number of tokens, got 0"),
        ("page_size", -16, ValueError, "page_size: expected a positive number"),
        ("page_size", 2**31 - 1, ValueError, "pages of at least"),
        ("quant", "int8", ValueError, "quant: expected fp8, mxfp4 or fp8_512, got 'int8'"),
    ]


RAW_ORDER = {
    "indexer_q_rope_quant": list(query_error_case()),
    "indexer_kv_compress_insert": list(key_error_case()),
}


def run_wrong(op, case, name, value, raw):
    case = {**case, name: value}
    args = {k: to_paddle(v) if isinstance(v, np.ndarray) else v for k, v in case.items()}
    if not raw:
        return getattr(F, op)(**args)
    return paddle.base.core.eager._run_custom_op(
        "fastattn_" + op, *(args[k] for k in RAW_ORDER[op])
    )


@pytest.mark.parametrize(
    ("op", "name", "value", "error", "text"),
    [("indexer_q_rope_quant", *e) for e in query_errors()]
    + [("indexer_kv_compress_insert", *e) for e in key_errors()],
)
def test_errors_name_the_argument_in_python_and_in_the_raw_operator(op, name, value, error, text):
    case = query_error_case() if op == "indexer_q_rope_quant" else key_error_case()
    with pytest.raises(error, match=text):
        run_wrong(op, case, name, value, raw=False)
    with pytest.raises((OSError, RuntimeError, ValueError, TypeError), match=text):
        run_wrong(op, case, name, value, raw=True)


@pytest.mark.parametrize("op", RAW_ORDER)
def test_raw_operator_refuses_none_for_every_tensor(op):
    case = query_error_case() if op == "indexer_q_rope_quant" else key_error_case()
    _ops.load()
    for name, value in case.items():
        if isinstance(value, np.ndarray):
            with pytest.raises((OSError, RuntimeError, ValueError, TypeError)):
                run_wrong(op, case, name, None, raw=True)


def test_an_empty_rotation_table_is_refused():
    empty = np.zeros((0, 64), np.float32)
    with pytest.raises(ValueError, match="cos_sin_cache: expected at least 1 position"):
        run_wrong("indexer_q_rope_quant", query_error_case(), "cos_sin_cache", empty, raw=False)
