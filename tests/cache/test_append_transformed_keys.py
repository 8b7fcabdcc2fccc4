"""append_cache_kv_c8 of K that was stored rotated or less a centre."""

from __future__ import annotations

import numpy as np
import pytest

import fastattn.functional as F
from fastattn import reference
from fastattn.reference.cache import code_of
from tests.support.cache import QUANTISED, is_dynamic, make_cache
from tests.support.compare import assert_same_bits
from tests.support.tensors import DTYPES, to_numpy, to_paddle, value_dim

TYPES = tuple(dict.fromkeys(name for name, _ in QUANTISED))
CACHED = [70, 0, 64, 1, 200]
#: Room for one token less, for all, and for some more.
STARTS = [3, 72, 72, 140, 141, 360]


def arguments(kind, head_dim, dtype, *, granularity="head"):
    rng = np.random.default_rng(2)
    blocks = [-(-n // 64) for n in CACHED]
    order = iter(rng.permutation(sum(blocks) + 2))
    tables = np.full((len(CACHED), max(blocks) + 1), -1, np.int32)
    for row, count in zip(tables, blocks):
        row[:count] = [next(order) for _ in range(count)]
    tables[4, 1] = 10**6  # not assigned: its tokens keep their contents
    cache = make_cache(kind, sum(blocks) + 2, 3, head_dim, granularity=granularity)
    if cache.key.dtype == np.uint8 and kind.endswith("fp8"):
        cache.key[(cache.key & 0x7F) == 0x7F] = 1  # the centre of a NaN is one
    dims = (head_dim, value_dim(head_dim))
    out = [np.full((365, 3, dim), 7, DTYPES[dtype]) for dim in dims]
    lengths = (tables, np.array(CACHED, np.int32), np.array(STARTS, np.int32))
    return cache, out, lengths


def run(cache, out, lengths, place, **options):
    outputs = [to_paddle(x.copy(), place) for x in out]
    center = options.pop("k_center", None)
    F.append_cache_kv_c8(
        to_paddle(cache.key, place),
        to_paddle(cache.value, place),
        *outputs,
        *(to_paddle(x, place) for x in lengths),
        cache_k_scales=to_paddle(cache.k_scales, place),
        cache_v_scales=to_paddle(cache.v_scales, place),
        dynamic_quant=is_dynamic(cache.cache_quant_type),
        k_center=None if center is None else to_paddle(center, place),
        **cache.options,
        **options,
    )
    return [to_numpy(x) for x in outputs]


@pytest.mark.parametrize(
    ("rotation", "centred"), [("hadamard", False), ("none", True), ("hadamard", True)]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("kind", TYPES)
def test_bits(place, kind, head_dim, dtype, rotation, centred):
    granularity = "channel" if kind == "cache_int8" else "head"
    cache, out, lengths = arguments(kind, head_dim, dtype, granularity=granularity)
    center = np.random.default_rng(5).normal(size=(3, head_dim)).astype(np.float32)
    options = {"k_rotation": rotation, "k_center": center if centred else None}
    got = run(cache, out, lengths, place, **options)
    reference.append_cache_kv_c8(
        cache.key,
        cache.value,
        *out,
        *lengths,
        cache_k_scales=cache.k_scales,
        cache_v_scales=cache.v_scales,
        **cache.options,
        **options,
    )
    assert_same_bits(got[0], out[0], "key")
    assert_same_bits(got[1], out[1], "value")


@pytest.mark.parametrize("kind", TYPES)
def test_gives_back_what_was_written(place, kind):
    rng = np.random.default_rng(1)
    key = rng.normal(size=(100, 2, 64)).astype(np.float32)
    key[..., 7] += 20
    center = key.mean(0)
    cache = make_cache(kind, 3, 2, 64)
    if not is_dynamic(kind):
        cache.k_scales[...] = 5 / (127 if code_of(kind) == "int8" else 448)
    tensors = [
        to_paddle(x.copy(), place) for x in (cache.key, cache.value, cache.k_scales, cache.v_scales)
    ]
    transform = {"k_rotation": "hadamard", "k_center": to_paddle(center, place)}
    scales = {"cache_k_scales": tensors[2], "cache_v_scales": tensors[3], **cache.options}
    ints = [to_paddle(np.array(x, np.int32), place) for x in ([[2, 0]], [0, 100], [0], [100])]
    values = to_paddle(key, place)
    F.write_cache_kv(values, values, *tensors[:2], *ints, **scales, **transform)
    out = [to_paddle(np.zeros((100, 2, 64), np.float16), place) for _ in "kv"]
    F.append_cache_kv_c8(
        *tensors[:2], *out, ints[0], ints[3], ints[1],
        dynamic_quant=is_dynamic(kind), **scales, **transform,
    )  # fmt: skip
    error = to_numpy(out[0]).astype(np.float64) - key
    bound = {"int8": 0.02, "e4m3": 0.06, "int4": 0.15, "e2m1": 0.2}[code_of(kind)]
    assert np.sqrt(np.mean(error**2)) < bound


def test_another_layout_is_refused(place):
    cache, out, lengths = arguments("block_wise_int8", 64, "float16")
    cache.value = cache.value.reshape(cache.key.shape)
    with pytest.raises(NotImplementedError, match=r"cache_layout: 'fastdeploy' is not supported"):
        run(cache, out, lengths, place, k_rotation="hadamard", cache_layout="fastdeploy")
