"""Writers with a block table for each KV head: every byte and scale of the cache."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import fastattn.functional as F
from tests.cache.test_write_cache import model
from tests.support.cache import (
    QUANTISED,
    Step,
    assert_same_cache,
    make_cache,
    make_step,
    make_values,
    write,
)
from tests.support.compare import assert_same_bits
from tests.support.rope import CACHES, check, expected, make_case
from tests.support.tensors import BF16, DTYPES, int32, to_paddle, value_dim

CACHED, NEW = [0, 1, 63, 64, 320, 7], [1, 0, 70, 64, 2, 5]


def with_tables_of_heads(step: Step, num_blocks: int, kv_heads: int, seed: int = 0) -> Step:
    """The blocks of each KV head in an order of their own; some of them are not assigned."""
    rng = np.random.default_rng(seed)
    tables = np.repeat(step.block_tables[:, None], kv_heads, axis=1)
    for head in range(kv_heads):
        mine, order = tables[:, head], rng.permutation(num_blocks)
        known = (mine >= 0) & (mine < num_blocks)
        mine[known] = order[mine[known]]
    tables[2, 0, 1], tables[3, -1, 1] = -1, num_blocks
    return dataclasses.replace(step, block_tables=tables)


def test_the_model():
    """Each head is written as by its own table alone."""
    step, num_blocks = make_step(CACHED, NEW)
    step = with_tables_of_heads(step, num_blocks, 3)
    cache = make_cache("block_wise_fp8", num_blocks, 3, 64)
    key, value = (make_values((step.num_tokens, 3, 64), BF16, seed) for seed in (1, 2))
    together = model(cache, key, value, step)
    for head in range(3):
        own = dataclasses.replace(step, block_tables=step.block_tables[:, head])
        alone = model(cache, key, value, own)
        for name in ("key", "value", "k_scales", "v_scales"):
            got, want = getattr(together, name), getattr(alone, name)
            assert_same_bits(got[:, head], want[:, head], f"{name} of head {head}")


@pytest.mark.few_on_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize(("cache_quant_type", "fp8_format"), QUANTISED)
def test_write(place, cache_quant_type, fp8_format, head_dim, dtype):
    step, num_blocks = make_step(CACHED, NEW)
    step = with_tables_of_heads(step, num_blocks, 3)
    cache = make_cache(cache_quant_type, num_blocks, 3, head_dim, fp8_format=fp8_format)
    key = make_values((step.num_tokens, 3, head_dim), DTYPES[dtype], 1)
    value = make_values((step.num_tokens, 3, value_dim(head_dim)), DTYPES[dtype], 2)
    assert_same_cache(write(cache, key, value, step, place), model(cache, key, value, step))


@pytest.mark.parametrize(("cache_quant_type", "fp8_format"), QUANTISED)
def test_write_into_a_pool(place, cache_quant_type, fp8_format):
    """A cache of one head, whose blocks all heads share."""
    step, num_blocks = make_step(CACHED, NEW)
    step = with_tables_of_heads(step, num_blocks, 3)
    pool = 3 * num_blocks
    known = (step.block_tables >= 0) & (step.block_tables < num_blocks)
    heads = np.arange(3)[None, :, None]
    tables = np.where(known, step.block_tables * 3 + heads, pool).astype(np.int32)
    step = dataclasses.replace(step, block_tables=tables)
    cache = make_cache(cache_quant_type, pool, 1, 64, fp8_format=fp8_format)
    key, value = (make_values((step.num_tokens, 3, 64), BF16, seed) for seed in (1, 2))
    written = write(cache, key, value, step, place)
    assert_same_cache(written, model(cache, key, value, step))
    if cache.k_scales is not None and cache.k_scales.size > 1:
        for head in range(3):  # as by its own table alone
            own = dataclasses.replace(step, block_tables=tables[:, head])
            alone = model(cache, key[:, [head]], value[:, [head]], own)
            planes = np.unique(tables[:, head][tables[:, head] < pool])
            assert_same_bits(written.key[planes], alone.key[planes])


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16)], ids=str)
def test_write_without_quantisation(place, dtype):
    step, num_blocks = make_step(CACHED, NEW)
    step = with_tables_of_heads(step, num_blocks, 2)
    cache = make_cache("none", num_blocks, 2, 64, dtype=dtype)
    key, value = (make_values((step.num_tokens, 2, 64), dtype, seed) for seed in (1, 2))
    assert_same_cache(write(cache, key, value, step, place), model(cache, key, value, step))


@pytest.mark.parametrize("new", [[1, 1, 1, 1, 1, 1], NEW], ids=["decode", "prompts"])
@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"neox": True, "norm": True, "bias": True},
        {"rotary_dim": 32, "q_quant": "per_token_head"},
        {"norm": True, "norm_first": True, "kv_heads": 4, "q_quant": "per_tensor"},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_rope_write(place, options, cache, new):
    case = make_case(CACHED, new, cache=cache, **options)
    num_blocks = case.cache.key.shape[0]
    step = with_tables_of_heads(case.step, num_blocks, case.kv_heads)
    check(dataclasses.replace(case, step=step), place)


def test_equal_tables_write_what_one_table_writes(place):
    case = make_case(CACHED, NEW, cache=CACHES[-1])
    tables = np.repeat(case.step.block_tables[:, None], case.kv_heads, axis=1)
    *_, cache = check(
        dataclasses.replace(case, step=dataclasses.replace(case.step, block_tables=tables)), place
    )
    assert_same_cache(cache, expected(case)[2])


@pytest.mark.parametrize(
    ("shape", "text"),
    [((6, 3, 8), r"\[sequences, 2 \(KV heads\)"), ((6, 1, 2, 8), "expected 2 dim")],
)
def test_wrong_tables(shape, text):
    case = make_case(CACHED, NEW)
    step = dataclasses.replace(case.step, block_tables=np.zeros(shape, np.int32))
    with pytest.raises(ValueError, match=f"block_tables: .*{text}"):
        check(dataclasses.replace(case, step=step), "cpu")
    key = make_values((step.num_tokens, 2, 64), BF16)
    with pytest.raises(ValueError, match=f"block_tables: .*{text}"):
        write(case.cache, key, key, step, "cpu")


def test_operators_that_take_one_table_refuse_others():
    tables = int32(np.zeros((1, 2, 3)))
    caches = [to_paddle(np.zeros((3, 2, 64, 64), np.uint8)) for _ in range(2)]
    scales = {f"cache_{x}_scales": to_paddle(np.ones(2, np.float32)) for x in "kv"}
    out = [to_paddle(np.zeros((9, 2, 64), np.float16)) for _ in range(2)]
    with pytest.raises(ValueError, match="block_tables"):
        F.append_cache_kv_c8(
            *(*caches, *out, tables, int32([9]), int32([0, 9])),
            **scales,
            dynamic_quant=False,
            cache_quant_type="cache_fp8",
        )
