"""What update_block_summaries and select_key_blocks refuse, by name."""

from __future__ import annotations

import numpy as np
import pytest

import fastattn.functional as F
from tests.support.attention import BLOCK_WISE_FP8
from tests.support.selection import selection_problem
from tests.support.tensors import int32, to_paddle

SEQS = ("block_tables", "cu_seqlens_q", "seq_lens_decoder", "seq_lens_this_time")


def zeros(*shape, dtype=np.float32):
    return to_paddle(np.zeros(shape, dtype))


def update(**changed):
    problem = selection_problem([(70, 3), (0, 2)], kind=BLOCK_WISE_FP8)
    arguments = {
        "summaries": to_paddle(problem.start()),
        "key_cache": to_paddle(problem.k.packed()),
        "value_cache": to_paddle(problem.v.packed()),
        **dict(zip(SEQS, map(int32, problem.seqs()))),
        "granularity": 64,
        "cache_k_scales": to_paddle(problem.k.scales),
        "cache_v_scales": to_paddle(problem.v.scales),
        **problem.cache_options(),
    }
    return F.update_block_summaries(**{**arguments, **changed})


def select(**changed):
    problem = selection_problem([(70, 3), (0, 2)])
    arguments = {
        "q": to_paddle(problem.q),
        "summaries": to_paddle(problem.start()),
        **dict(zip(SEQS, map(int32, problem.seqs()))),
        "k": 2,
        "granularity": 64,
    }
    return F.select_key_blocks(**{**arguments, **changed})


UPDATES = {
    "none": ({"summaries": None}, TypeError, "summaries: expected a tensor, got None"),
    "dtype": (
        {"summaries": zeros(6, 2, 1, 1, 64, dtype=np.float16)},
        TypeError,
        "summaries: expected dtype float32 or bfloat16, got float16",
    ),
    "shape": (
        {"summaries": zeros(6, 2, 1, 2, 64)},
        ValueError,
        r"summaries: expected shape \[6, 2, 1, 1, 64\], got \[6, 2, 1, 2, 64\]",
    ),
    "shape_of_16": (
        {"granularity": 16},
        ValueError,
        r"summaries: expected shape \[6, 2, 4, 1, 64\], got",
    ),
    "shape_of_minmax": (
        {"kind": "minmax"},
        ValueError,
        r"summaries: expected shape \[6, 2, 1, 2, 64\], got",
    ),
    "granularity": (
        {"granularity": 4},
        ValueError,
        "granularity: expected 16, 32, 64 or 128 tokens, got 4",
    ),
    "granularity_type": ({"granularity": 64.0}, TypeError, "granularity: expected int, got float"),
    "kind": ({"kind": "median"}, ValueError, "kind: expected mean, minmax or pooled, got 'median'"),
    "no_weights": (
        {"kind": "pooled"},
        ValueError,
        "pool_weights: kind 'pooled' needs weights, got None",
    ),
    "weights": ({"pool_weights": zeros(2, 64, 64)}, ValueError, "pool_weights: expected None"),
    "shape_of_weights": (
        {"kind": "pooled", "pool_weights": zeros(2, 32, 64)},
        ValueError,
        r"pool_weights: expected shape \[2, 64, 64\], got \[2, 32, 64\]",
    ),
    "dtype_of_weights": (
        {"kind": "pooled", "pool_weights": zeros(2, 64, 64, dtype=np.float16)},
        TypeError,
        "pool_weights: expected dtype float32, got float16",
    ),
    "scales": ({"cache_k_scales": None}, ValueError, "cache_k_scales"),
    "cache_type": (
        {"cache_quant_type": "cache_int4_zp"},
        NotImplementedError,
        "cache_quant_type: 'cache_int4_zp' is not supported; supported: none, ",
    ),
    "center": (
        {"k_center": zeros(2, 32)},
        ValueError,
        r"k_center: expected shape \[2, 64\], got \[2, 32\]",
    ),
    "lengths": (
        {"seq_lens_decoder": zeros(1, dtype=np.int32)},
        ValueError,
        "seq_lens_decoder: expected shape",
    ),
}

SELECTIONS = {
    "none": ({"q": None}, TypeError, "q: expected a tensor, got None"),
    "q_rank": ({"q": zeros(5, 256)}, ValueError, "q: expected 3 dimensions"),
    "heads": ({"q": zeros(5, 3, 64)}, ValueError, "q: expected a multiple of the 2 KV heads"),
    "head_dim": (
        {"q": zeros(5, 4, 128)},
        ValueError,
        "summaries: expected head_dim 128 as q has, got 64",
    ),
    "shape": (
        {"summaries": zeros(6, 2, 2, 1, 64)},
        ValueError,
        r"summaries: expected shape \[-1, -1, 1, 1, -1\]|summaries: expected shape \[\?, \?, 1",
    ),
    "dtype": (
        {"summaries": zeros(6, 2, 1, 1, 64, dtype=np.float16)},
        TypeError,
        "summaries: expected dtype float32 or bfloat16, got float16",
    ),
    "granularity": ({"granularity": 1}, ValueError, "granularity: expected 16, 32, 64 or 128"),
    "kind": ({"kind": "max"}, ValueError, "kind: expected mean, minmax or pooled, got 'max'"),
    "reduction": ({"reduction": "mean"}, ValueError, "reduction: expected max or sum, got 'mean'"),
    "no_k": ({"k": 0}, ValueError, "k: expected 1 to 4096, got 0"),
    "k": ({"k": 4097}, ValueError, "k: expected 1 to 4096, got 4097"),
    "k_type": ({"k": 2.0}, TypeError, "k: expected int, got float"),
    "first": ({"first_blocks": -1}, ValueError, "first_blocks: expected 0 to 2147483647, got -1"),
    "last": ({"last_blocks": 0}, ValueError, "last_blocks: expected 1 to 2147483647, got 0"),
    "taken": (
        {"first_blocks": 2, "last_blocks": 1},
        ValueError,
        r"k: expected at least first_blocks \+ last_blocks = 3, got 2",
    ),
    "descale": ({"q_descale": zeros(1)}, ValueError, "q_descale: expected None for bfloat16"),
}


@pytest.mark.parametrize("changed, error, text", UPDATES.values(), ids=list(UPDATES))
def test_updates_that_are_refused(changed, error, text):
    with pytest.raises(error, match=f"update_block_summaries: {text}"):
        update(**changed)


@pytest.mark.parametrize("changed, error, text", SELECTIONS.values(), ids=list(SELECTIONS))
def test_selections_that_are_refused(changed, error, text):
    with pytest.raises(error, match=f"select_key_blocks: ({text})"):
        select(**changed)


def test_the_calls_themselves_are_right():
    assert update().shape == [6, 2, 1, 1, 64]
    assert select().shape == [5, 2, 2]


def test_summaries_apart_from_the_inputs():
    problem = selection_problem([(70, 3), (0, 2)], kind=BLOCK_WISE_FP8)
    scales = to_paddle(problem.k.scales)
    pool = scales.flatten()
    assert pool.shape[0] >= 6 * 2 * 64
    summaries = pool[: 6 * 2 * 64].reshape([6, 2, 1, 1, 64])
    shared = summaries.data_ptr() == scales.data_ptr()
    if not shared:
        pytest.skip("this Paddle copies")
    with pytest.raises(ValueError, match=r"summaries: .*share memory with cache_k_scales"):
        update(summaries=summaries, cache_k_scales=scales)
