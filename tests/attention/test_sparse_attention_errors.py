"""What sparse_paged_attention refuses besides what paged_attention does."""

from __future__ import annotations

import numpy as np
import pytest

import fastattn.functional as F
from tests.support.attention import BLOCK_WISE_FP8, CacheKind
from tests.support.sparse import sparse_problem
from tests.support.tensors import int32, to_paddle

BF16_CACHE = CacheKind()
NAMES = (
    *("q", "key_cache", "value_cache", "block_tables", "cu_seqlens_q", "seq_lens_decoder"),
    *("seq_lens_this_time", "max_seqlen_q", "max_seqlen_k"),
)


def call(kind=BF16_CACHE, **changed):
    problem = sparse_problem([(70, 3), (0, 2)], kind=kind)
    positional, keywords = problem.arguments()
    arguments = {
        **dict(zip(NAMES, positional)),
        "selected": int32(problem.selected),
        "selected_lens": int32(problem.selected_lens),
        **problem.lists(),
        **keywords,
    }
    return F.sparse_paged_attention(**{**arguments, **changed})


def zeros(*shape, dtype=np.int32):
    return to_paddle(np.zeros(shape, dtype))


CASES = {
    "no_list": ({"selected": None}, TypeError, "selected: expected a tensor, got None"),
    "array": ({"selected": np.zeros(3)}, TypeError, "selected: expected a tensor, got numpy"),
    "list_dtype": (
        {"selected": zeros(5, 1, 3, dtype=np.int64)},
        TypeError,
        "selected: expected dtype int32, got int64",
    ),
    "list_rank": ({"selected": zeros(5, 3)}, ValueError, "selected: expected 3 dimensions"),
    "list_tokens": (
        {"selected": zeros(4, 1, 3)},
        ValueError,
        r"selected: expected shape \[5, 1, width\] or \[5, 2, width\] \(tokens, 1 or KV heads, "
        r"entries\), got \[4, 1, 3\]",
    ),
    "list_groups": ({"selected": zeros(5, 4, 3)}, ValueError, r"got \[5, 4, 3\]"),
    "list_stride": (
        {"selected": zeros(3, 5, 1).transpose([1, 2, 0])},
        ValueError,
        "selected: expected stride 1 in the last dimension",
    ),
    "lens_dtype": (
        {"selected_lens": zeros(5, 1, dtype=np.int64)},
        TypeError,
        "selected_lens: expected dtype int32",
    ),
    "lens_shape": ({"selected_lens": zeros(5)}, ValueError, r"selected_lens: expected shape \[5, "),
    "lens_groups": ({"selected_lens": zeros(5, 2)}, ValueError, r"expected shape \[5, 1\]"),
    "granularity": (
        {"granularity": 8},
        ValueError,
        "granularity: expected 1, 4, 16, 32, 64 or 128 tokens, got 8",
    ),
    "granularity_type": ({"granularity": 1.0}, TypeError, "granularity: expected int, got float"),
    "window": ({"window": -1}, ValueError, "window: expected 0 to 2147483647, got -1"),
    "sinks": ({"sink_tokens": -1}, ValueError, "sink_tokens: expected 0 to 2147483647, got -1"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap: expected a finite number of at least 0"),
    "scales": ({"kind": BLOCK_WISE_FP8, "cache_k_scales": None}, ValueError, "cache_k_scales"),
    "zero_head_dim": (
        {"q": zeros(5, 4, 128, dtype=np.float32)},
        ValueError,
        "key_cache: expected head_dim 128 as q has, got 64",
    ),
    "center": (
        {"k_center": zeros(2, 64, dtype=np.float32)},
        NotImplementedError,
        "k_center: cache_quant_type 'none' is not supported",
    ),
    "max_seqlen": ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q: expected at least 0, got -1"),
    "out_dtype": ({"out_dtype": "int8"}, ValueError, "out_dtype: expected auto, float32"),
}


@pytest.mark.parametrize("changed, error, text", CASES.values(), ids=list(CASES))
def test_refused(changed, error, text):
    with pytest.raises(error, match=f"sparse_paged_attention: .*{text}|{text}"):
        call(**changed)


def test_the_call_itself_is_right():
    assert call().shape == [5, 4, 64]
    assert call(kind=BLOCK_WISE_FP8).shape == [5, 4, 64]


def test_an_output_apart_from_the_inputs():
    problem = sparse_problem([(70, 3), (0, 2)])
    positional, keywords = problem.arguments()
    lists = int32(problem.selected)
    with pytest.raises(ValueError, match=r"out: .*share memory"):
        F.sparse_paged_attention(
            *positional, lists, out=positional[0], **problem.lists(), **keywords
        )
