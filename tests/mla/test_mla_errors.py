"""What the operators of latent caches refuse."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from tests.support.strides import strided
from tests.support.tensors import BF16, int32, to_paddle


def zeros(*shape, dtype=BF16):
    return to_paddle(np.zeros(shape, dtype))


def good_write():
    return {
        "latent": zeros(4, 512),
        "rope": zeros(4, 64),
        "cache": zeros(2, 64, 656, dtype=np.uint8),
        "slot_mapping": int32([0, 1, 2, 3]),
        "cache_format": "fp8_656",
    }


def good_gather():
    return {
        "cache": zeros(2, 64, 656, dtype=np.uint8),
        "out": zeros(4, 576),
        "block_tables": int32([[1]]),
        "seq_lens_decoder": int32([4]),
        "cu_seqlens_k": int32([0, 4]),
        "cache_format": "fp8_656",
    }


U8 = {"dtype": np.uint8}
FP8 = {"cache_format": "fp8", "cache": ((2, 64, 576), np.uint8)}
V4 = {"cache_format": "fp8_584", "cache": ((2, 64, 584), np.uint8), "latent": ((4, 448), BF16)}
BOTH = [
    ({"cache_format": "fp4_288"}, NotImplementedError, "cache_format: 'fp4_288' is not supported"),
    ({"cache_format": "FP8"}, NotImplementedError, "supported: bf16, fp8, fp8_656, fp8_584"),
    ({"cache": None}, TypeError, "cache: expected a tensor, got None"),
    ({"cache": ((2, 64, 656), BF16)}, TypeError, "cache: expected dtype uint8, got bfloat16"),
    ({"cache": ((2, 64, 656), np.int32)}, TypeError, "cache: "),
    ({"cache": ((2, 64, 584), np.uint8)}, ValueError, r"cache: expected shape \[\?, \?, 656\]"),
    ({"cache": ((2, 64, 2, 656), np.uint8)}, ValueError, "cache: expected shape"),
    ({"cache": ((656,), np.uint8)}, ValueError, "cache: expected shape"),
    ({"cache_format": "bf16"}, TypeError, "cache: expected dtype bfloat16, got uint8"),
    ({"page_size": 32}, ValueError, r"page_size: expected 64 as in cache's shape .*, got 32"),
    ({"cache": ((2, 6560), np.uint8)}, ValueError, "page_size: a cache .* got 0"),
    ({"cache": ((2, 6560), np.uint8), "page_size": -1}, ValueError, "positive number of tokens"),
    ({"cache": ((2, 6560), np.uint8), "page_size": 11}, ValueError, "at least 7216 elements"),
    ({"cache": ((2, 6560), np.uint8), "page_size": 2**31 - 1}, ValueError, "of at least"),
    (FP8, TypeError, "scale: expected a tensor for fp8, got None"),
    ({**FP8, "scale": ((1,), np.float16)}, TypeError, "scale: expected dtype float32"),
    ({**FP8, "scale": ((2,), np.float32)}, ValueError, r"scale: expected shape \[1\]"),
    ({"scale": ((1,), np.float32)}, ValueError, "scale: expected None for fp8_656, got a tensor"),
]
WRITE = [
    ({"cache_format": "fp8_528"}, NotImplementedError, "cache_format: 'fp8_528' is only read"),
    ({"latent": None}, TypeError, "latent: expected a tensor, got None"),
    ({"latent": ((4, 448), BF16)}, ValueError, r"latent: expected shape \[\?, 512\]"),
    ({"latent": ((4, 512), np.float16)}, TypeError, "latent: expected dtype bfloat16"),
    ({"rope": ((3, 64), BF16)}, ValueError, r"rope: expected shape \[4, 64\], got \[3, 64\]"),
    ({"rope": ((4, 64), np.float32)}, TypeError, "rope: expected dtype bfloat16"),
    ({"slot_mapping": ((5,), np.int64)}, ValueError, "slot_mapping: expected at most 4 slots"),
    ({"slot_mapping": ((2, 2), np.int64)}, ValueError, "slot_mapping: expected shape"),
    ({"slot_mapping": ((4,), np.float32)}, TypeError, "expected dtype int32 or int64"),
    ({"scale_rule": "ue8m0"}, ValueError, "scale_rule: expected pow2 or amax, got 'ue8m0'"),
    ({**V4, "scale_rule": "amax"}, ValueError, "amax is for fp8_656, got cache_format 'fp8_584'"),
]
GATHER = [
    ({"out": None}, TypeError, "out: expected a tensor, got None"),
    ({"out": ((4, 512), BF16)}, ValueError, r"out: expected shape \[\?, 576\]"),
    ({"out": ((4, 576), np.float32)}, TypeError, "out: expected dtype bfloat16"),
    ({"block_tables": ((1,), np.int32)}, ValueError, "block_tables: expected 2 dimensions"),
    ({"block_tables": ((1, 1), np.int64)}, TypeError, "block_tables: expected dtype int32"),
    ({"seq_lens_decoder": ((2,), np.int32)}, ValueError, r"expected shape \[1\], got \[2\]"),
    ({"cu_seqlens_k": ((1,), np.int32)}, ValueError, r"cu_seqlens_k: expected shape \[2\]"),
]


def made(change):
    return {k: zeros(*v[0], dtype=v[1]) if isinstance(v, tuple) else v for k, v in change.items()}


@pytest.mark.parametrize(("change", "error", "text"), BOTH + WRITE)
def test_wrong_arguments_of_the_writer(change, error, text):
    with pytest.raises(error, match=f"mla_write_cache: .*{text}"):
        F.mla_write_cache(**{**good_write(), **made(change)})


@pytest.mark.parametrize(("change", "error", "text"), BOTH + GATHER)
def test_wrong_arguments_of_the_reader(change, error, text):
    with pytest.raises(error, match=f"mla_gather_cache: .*{text}"):
        F.mla_gather_cache(**{**good_gather(), **made(change)})


def test_types_of_options():
    with pytest.raises(TypeError, match=r"mla_write_cache: page_size: expected int"):
        F.mla_write_cache(**good_write(), page_size="64")
    with pytest.raises(TypeError, match=r"mla_write_cache: scale: expected a tensor"):
        F.mla_write_cache(**good_write(), scale=0.5)


def test_strides_that_no_format_has():
    memory = zeros(2 * 64 * 700, dtype=np.uint8)
    wide = strided(memory, [2, 64, 584], [64 * 700, 700, 1])
    v4 = {**good_write(), **made(V4), "cache": wide}
    with pytest.raises(ValueError, match="expected stride 584 between a page's tokens in fp8_584"):
        F.mla_write_cache(**v4)
    apart = strided(memory, [2, 16, 656], [16 * 656 * 2, 656 * 2, 2])
    with pytest.raises(ValueError, match="expected stride 1 in the last dimension"):
        F.mla_write_cache(**{**good_write(), "cache": apart})
    repeated = strided(memory, [2, 64, 656], [0, 656, 1])
    with pytest.raises(ValueError, match="no two of its elements may share memory"):
        F.mla_write_cache(**{**good_write(), "cache": repeated})
    overlapping = strided(memory, [2, 64, 656], [63 * 656, 656, 1])
    with pytest.raises(ValueError, match="no two of its elements may share memory"):
        F.mla_write_cache(**{**good_write(), "cache": overlapping})
    # A reader may see a page twice.
    F.mla_gather_cache(**{**good_gather(), "cache": repeated})


def test_more_slots_than_32_bits_count():
    memory = zeros(64 * 656, dtype=np.uint8)
    many = strided(memory, [2**26, 64, 656], [0, 656, 1])
    with pytest.raises(ValueError, match=r"fewer than 2\^31 tokens"):
        F.mla_gather_cache(**{**good_gather(), "cache": many})


def test_what_is_written_lies_apart():
    cache = zeros(2, 64, 576)
    tokens = cache.reshape([128, 576])
    latent = strided(tokens, [4, 512], [576, 1], 0)
    with pytest.raises(ValueError, match=r"cache: .* share memory with latent"):
        F.mla_write_cache(latent, zeros(4, 64), cache, int32([0, 1, 2, 3]), cache_format="bf16")
    with pytest.raises(ValueError, match=r"out: .* share memory with cache"):
        F.mla_gather_cache(
            cache, tokens, int32([[1]]), int32([4]), int32([0, 4]), cache_format="bf16"
        )
    assert paddle.all(cache == 0)
