"""Steps of several new tokens a sequence: every byte and scale, at every offset in a block.

Tokens of one sequence are written together where V's bytes of them lie side by side, so that their
places matter: offsets, block boundaries, neighbours that are padding or have no block.
"""

from __future__ import annotations

import numpy as np
import pytest

from fastattn import reference
from tests.support.cache import (
    QUANTISED,
    Cache,
    Step,
    assert_same_cache,
    make_cache,
    make_step,
    make_values,
    write,
)
from tests.support.rope import CACHES, check, make_case
from tests.support.tensors import BF16, DTYPES, value_dim

NEW = (2, 3, 4, 5, 8)
#: Cached tokens of 64 sequences: every offset in a block, in no order, behind 0 to 2 blocks.
EVERY_OFFSET = [64 * (i % 3) + i * 37 % 64 for i in range(64)]


def check_write(cache: Cache, step: Step, head_dim: int, place: str, ids=None, dtype=BF16) -> Cache:
    """Compare the operator with the NumPy model; returns what it wrote."""
    heads = cache.key.shape[1]
    tokens = step.num_tokens if ids is None else len(ids)
    key = make_values((tokens, heads, head_dim), dtype, 1)
    value = make_values((tokens, heads, value_dim(head_dim)), dtype, 2)
    wanted = cache.copy()
    reference.write_cache_kv(
        key,
        value,
        wanted.key,
        wanted.value,
        *step.arrays,
        cache_k_scales=wanted.k_scales,
        cache_v_scales=wanted.v_scales,
        batch_id_per_token=ids,
        **wanted.options,
    )
    actual = write(cache, key, value, step, place, ids)
    assert_same_cache(actual, wanted)
    return actual


@pytest.mark.parametrize("new", NEW)
@pytest.mark.parametrize(("cache_quant_type", "fp8_format"), QUANTISED)
def test_every_offset(place, cache_quant_type, fp8_format, new):
    step, num_blocks = make_step(EVERY_OFFSET, [new] * 64)
    cache = make_cache(cache_quant_type, num_blocks, 3, 128, fp8_format=fp8_format)
    check_write(cache, step, 128, place)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 192, 256])
@pytest.mark.parametrize(("cache_quant_type", "fp8_format"), QUANTISED)
def test_every_head_dim(place, cache_quant_type, fp8_format, head_dim, dtype):
    step, num_blocks = make_step([5, 62, 127, 16], [4, 4, 4, 3])
    cache = make_cache(cache_quant_type, num_blocks, 3, head_dim, fp8_format=fp8_format)
    check_write(cache, step, head_dim, place, dtype=DTYPES[dtype])


@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
def test_every_granularity(place, granularity):
    step, num_blocks = make_step([5, 62, 127, 16], [4, 4, 4, 3])
    cache = make_cache("cache_int8", num_blocks, 3, 128, granularity=granularity)
    check_write(cache, step, 128, place)


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize(
    "cache_quant_type", ["cache_fp8", "block_wise_int8", "block_wise_int4", "block_wise_k8v4"]
)
def test_padding_among_the_tokens(place, cache_quant_type, with_ids):
    """Rooms that are not filled, tokens of no sequence, and of one that is not theirs."""
    step, num_blocks = make_step([64 + 9 * i % 64 for i in range(40)], [6] * 40)
    step.seq_lens_this_time[:] = np.arange(40) * 5 % 7
    ids = None
    if with_ids:
        ids = np.append(np.repeat(np.arange(40), 6), [-1, -1, 3]).astype(np.int32)
        ids[::11] = -1
        ids[5::31] = 39
    cache = make_cache(cache_quant_type, num_blocks, 2, 128)
    check_write(cache, step, 128, place, ids)


@pytest.mark.parametrize(
    "cache_quant_type", ["cache_int8", "block_wise_fp8", "block_wise_int4", "block_wise_kfp8v4"]
)
def test_blocks_that_are_not_there(place, cache_quant_type):
    """Sequences whose first, second or both blocks have no number in the cache."""
    step, num_blocks = make_step([60, 61, 62, 63] * 4, [8] * 16)
    for seq in range(16):
        entries = ([], [0], [1], [0, 1])[seq // 4]
        step.block_tables[seq, entries] = [-1, num_blocks + seq, -(2**31), 2**31 - 1][seq % 4]
    cache = make_cache(cache_quant_type, num_blocks, 2, 128)
    check_write(cache, step, 128, place)


@pytest.mark.parametrize("tokens", range(1, 10))
def test_one_sequence(place, tokens):
    """Warps without a token, and too few tokens to share."""
    step, num_blocks = make_step([61], [tokens])
    cache = make_cache("block_wise_fp8", num_blocks, 1, 128)
    check_write(cache, step, 128, place)


@pytest.mark.parametrize("new", NEW)
@pytest.mark.parametrize("cache", CACHES[1:], ids="-".join)
def test_rotated_and_written(place, cache, new):
    cached = EVERY_OFFSET[::5]
    case = make_case(cached, [new] * len(cached), cache=cache, head_dim=128, kv_heads=3, heads=6)
    check(case, place)


@pytest.mark.parametrize("rotary_dim", [None, 64, 48])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_rotation_with_options(place, bias, norm, rotary_dim):
    """Whole heads, a part that lanes hold wholly, and one that takes the kernel of any option."""
    options = {"bias": bias, "norm": norm, "rotary_dim": rotary_dim, "neox": True}
    cached = EVERY_OFFSET[::9]
    check(
        make_case(
            cached,
            [4] * len(cached),
            cache=CACHES[-1],
            head_dim=128,
            q_quant="per_token_head",
            **options,
        ),
        place,
    )
