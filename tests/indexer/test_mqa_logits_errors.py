"""What mqa_logits and paged_mqa_logits refuse."""

from __future__ import annotations

import paddle
import pytest

import fastattn.functional as F


def good_ragged():
    return {
        "q": paddle.zeros([3, 8, 128], "uint8"),
        "keys": paddle.zeros([5, 128], "uint8"),
        "weights": paddle.zeros([3, 8]),
        "starts": paddle.zeros([3], "int32"),
        "ends": paddle.zeros([3], "int32"),
        "k_scales": paddle.ones([5]),
    }


def good_paged():
    return {
        "q": paddle.zeros([2, 3, 8, 128], "uint8"),
        "cache": paddle.zeros([4, 64, 132], "uint8"),
        "weights": paddle.zeros([6, 8]),
        "context_lens": paddle.zeros([2], "int32"),
        "block_tables": paddle.zeros([2, 2], "int32"),
        "max_context_len": 100,
    }


SCALES = paddle.zeros([3, 8], "int32")
MXFP4 = {"quant": "mxfp4", "q": paddle.zeros([3, 8, 64], "uint8")}
WRONG_RAGGED = [
    ({"quant": "int4"}, ValueError, "quant: expected fp8 or mxfp4, got 'int4'"),
    (MXFP4, ValueError, "q_scales: expected a tensor with mxfp4, got None"),
    ({"q_scales": SCALES}, ValueError, "q_scales: expected None with fp8"),
    ({"q": paddle.zeros([3, 8, 128])}, TypeError, "q: expected dtype uint8"),
    ({"q": paddle.zeros([3, 128], "uint8")}, ValueError, "q: expected 3 dimensions"),
    ({"q": paddle.zeros([3, 8, 96], "uint8")}, NotImplementedError, "q: expected 64 or 128 chan"),
    ({"q": paddle.zeros([3, 12, 128], "uint8")}, NotImplementedError, "q: expected a multiple"),
    ({"q": paddle.zeros([3, 264, 128], "uint8")}, NotImplementedError, "q: expected a multiple"),
    ({"keys": paddle.zeros([5, 64], "uint8")}, ValueError, r"keys: expected shape \[\?, 128\]"),
    ({"keys": None}, TypeError, "keys: expected a tensor, got None"),
    ({"k_scales": paddle.ones([4])}, ValueError, r"k_scales: expected shape \[5\]"),
    ({"k_scales": paddle.ones([5], "int32")}, TypeError, "k_scales: expected dtype float32"),
    ({"weights": paddle.zeros([3, 9])}, ValueError, r"weights: expected shape \[3, 8\]"),
    ({"weights": paddle.zeros([3, 8], "float16")}, TypeError, "weights: expected dtype float32"),
    ({"starts": paddle.zeros([2], "int32")}, ValueError, r"starts: expected shape \[3\]"),
    ({"ends": paddle.zeros([3], "int64")}, TypeError, "ends: expected dtype int32"),
    ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k: expected at least 0, got -1"),
    ({"max_seqlen_k": 1.0}, TypeError, "max_seqlen_k: expected int, got float"),
    ({"out": paddle.zeros([3, 4])}, ValueError, r"out: expected shape \[3, 5\]"),
    ({"out": paddle.zeros([3, 5], "float16")}, TypeError, "out: expected dtype float32"),
]
WRONG_PAGED = [
    ({"quant": "fp4"}, ValueError, "quant: expected fp8 or mxfp4, got 'fp4'"),
    ({"q": paddle.zeros([6, 8, 128], "uint8")}, ValueError, "q: expected 4 dimensions"),
    ({"cache": paddle.zeros([4, 8448], "uint8")}, ValueError, "page_size: a cache of shape"),
    ({"cache": paddle.zeros([4, 64, 131], "uint8")}, ValueError, "cache: expected pages of at le"),
    ({"cache": paddle.zeros([4, 64, 132])}, TypeError, "cache: expected dtype uint8"),
    (
        {"cache": paddle.zeros([4], "uint8"), "page_size": 64},
        ValueError,
        "cache: expected .num_pag",
    ),
    ({"page_size": 65}, ValueError, "cache: expected pages of at least 8580 bytes"),
    ({"page_size": 0}, ValueError, "page_size: expected a positive number of tokens, got 0"),
    ({"page_size": 64.0}, TypeError, "page_size: expected int, got float"),
    ({"context_lens": paddle.zeros([3], "int32")}, ValueError, r"context_lens: expected shape"),
    ({"context_lens": paddle.zeros([2, 2], "int32")}, ValueError, r"context_lens: expected shape"),
    ({"block_tables": paddle.zeros([1, 2], "int32")}, ValueError, "block_tables: expected at lea"),
    ({"block_tables": paddle.zeros([2], "int32")}, ValueError, "block_tables: expected 2 dimen"),
    ({"weights": paddle.zeros([2, 3, 8])}, ValueError, r"weights: expected shape \[6, 8\]"),
    ({"max_context_len": -1}, ValueError, "max_context_len: expected at least 0, got -1"),
    ({"max_context_len": None}, TypeError, "max_context_len: expected int, got NoneType"),
    ({"out": paddle.zeros([6, 99])}, ValueError, r"out: expected shape \[6, 100\]"),
]


@pytest.mark.parametrize(("change", "error", "text"), WRONG_RAGGED)
def test_wrong_arguments(change, error, text):
    with pytest.raises(error, match=f"mqa_logits: {text}"):
        F.mqa_logits(**{**good_ragged(), **change})


@pytest.mark.parametrize(("change", "error", "text"), WRONG_PAGED)
def test_wrong_paged_arguments(change, error, text):
    with pytest.raises(error, match=f"paged_mqa_logits: {text}"):
        F.paged_mqa_logits(**{**good_paged(), **change})


def test_bytes_of_a_page_must_be_contiguous():
    cache = paddle.zeros([4, 64, 264], "uint8")[:, :, ::2]
    if cache.is_contiguous():
        pytest.skip("this Paddle copies on slicing")
    with pytest.raises(ValueError, match="paged_mqa_logits: cache: expected the bytes of a page"):
        F.paged_mqa_logits(**{**good_paged(), "cache": cache})


def test_out_apart_from_the_inputs():
    weights = paddle.zeros([8, 8])
    given = {**good_ragged(), "q": paddle.zeros([8, 8, 128], "uint8"), "weights": weights}
    given |= {"starts": paddle.zeros([8], "int32"), "ends": paddle.zeros([8], "int32")}
    with pytest.raises(ValueError, match=r"mqa_logits: out: .* share memory with weights"):
        F.mqa_logits(**given, max_seqlen_k=8, out=weights)
