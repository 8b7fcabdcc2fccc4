"""convert_cache_blocks and convert_caches: in place, block range by block range, byte for byte."""

from __future__ import annotations

import doctest

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import backends, reference
from fastattn.backends import convert_caches
from fastattn.reference.layout import LAYOUTS, pack
from tests.support.compare import assert_same_bits
from tests.support.static import run_all_modes
from tests.support.tensors import BF16, to_numpy, to_paddle, value_dim

QUANTISED = ("cache_int8", "cache_fp8", "block_wise_int8", "block_wise_fp8")


def _bytes(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("kind", ["k", "v"])
@pytest.mark.parametrize("cache_quant_type", ["block_wise_int8", "cache_fp8"])
@pytest.mark.parametrize("dst", LAYOUTS)
@pytest.mark.parametrize("src", LAYOUTS)
def test_a_range_of_blocks_in_place(place, src, dst, cache_quant_type, kind, head_dim):
    options = {"kind": kind, "cache_quant_type": cache_quant_type, "src": src, "dst": dst}
    logical = _bytes((7, 3, 64, head_dim))
    int8 = "int8" in cache_quant_type
    cache, wanted = (pack(logical, kind, x, int8=int8).reshape(7, 3, -1) for x in (src, dst))
    shape = [(7, 3, 64, head_dim), (7, 3, head_dim, 64)][kind == "v" and src == "fastattn"]
    tensor = to_paddle(cache.reshape(shape).copy(), place)
    done = F.convert_cache_blocks(tensor, begin=2, end=5, **options)
    expected = cache.copy()
    expected[2:5] = wanted[2:5]
    assert_same_bits(to_numpy(tensor), expected.reshape(shape))
    assert_same_bits(to_numpy(done), expected.reshape(shape))
    F.convert_cache_blocks(tensor, end=2, **options)
    F.convert_cache_blocks(tensor, begin=5, **options)
    F.convert_cache_blocks(tensor, begin=4, end=4, **options)
    assert_same_bits(to_numpy(tensor).reshape(7, 3, -1), wanted)
    F.convert_cache_blocks(tensor, **{**options, "src": dst, "dst": src})
    assert_same_bits(to_numpy(tensor), cache.reshape(shape), "there and back")


@pytest.mark.parametrize("kind", ["k", "v"])
def test_type_none_stays_as_it_is(place, kind):
    cache = _bytes((2, 1, 64, 128)).view(BF16)
    tensor = to_paddle(cache.copy(), place)
    F.convert_cache_blocks(
        tensor, kind=kind, cache_quant_type="none", src="fastdeploy", dst="fastattn"
    )
    assert_same_bits(to_numpy(tensor), cache)


def _first_blocks(cache):
    return F.convert_cache_blocks(
        cache, kind="k", cache_quant_type="cache_int8", src="fastdeploy", dst="fastattn", end=2
    )


def _all_blocks(cache):
    return F.convert_cache_blocks(
        cache, kind="v", cache_quant_type="cache_fp8", src="fastattn", dst="fastdeploy"
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", [_first_blocks, _all_blocks])
def test_all_modes_of_paddle(place, function, dynamic):
    cache = _bytes((3, 2, 64, 64))
    outputs, inputs = run_all_modes(function, [cache], place, dynamic=dynamic)
    assert outputs[0].shape == cache.shape
    assert not np.array_equal(outputs[0], cache)
    if dynamic is False:
        assert_same_bits(inputs[0], outputs[0])


def _convert(cache, **changes):
    options = {"kind": "v", "cache_quant_type": "cache_fp8", "src": "fastdeploy", "dst": "fastattn"}
    return F.convert_cache_blocks(cache, **{**options, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"kind": "q"}, ValueError, "kind: expected k or v, got 'q'"),
        ({"src": "vllm"}, ValueError, "src: expected fastattn, fastdeploy or logical, got 'vllm'"),
        ({"dst": ""}, ValueError, "dst: expected"),
        ({"cache_quant_type": "cache_int4_zp"}, NotImplementedError, "'cache_int4_zp' is not"),
        ({"cache_quant_type": "none"}, TypeError, "expected dtype bfloat16 or float16"),
        ({"begin": -1}, ValueError, "begin: expected 0 <= begin <= end <= 2"),
        ({"begin": 2, "end": 1}, ValueError, "begin: expected 0 <= begin <= end <= 2"),
        ({"end": 3}, ValueError, "end: expected 0 <= begin <= end <= 2"),
        ({"begin": "0"}, TypeError, "begin"),
        ({"end": 1.5}, TypeError, "end"),
    ],
)
def test_bad_options(changes, error, text):
    cache = _bytes((2, 1, 64, 64))
    tensor = to_paddle(cache.copy())
    with pytest.raises(error, match=f"convert_cache_blocks: .*{text}"):
        _convert(tensor, **changes)
    assert_same_bits(to_numpy(tensor), cache, "nothing moved")


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "text"),
    [
        ((2, 1, 32, 64), np.uint8, ValueError, "expected blocks of 64 tokens"),
        ((2, 1, 64, 80), np.uint8, NotImplementedError, "head_dim 80"),
        ((2, 1, 64, 32), np.uint8, NotImplementedError, "supported: 64, 96, 128, 192, 256"),
        ((2, 64, 64), np.uint8, ValueError, "expected 4 dimensions"),
        ((2, 1, 64, 64), np.float32, TypeError, "expected dtype uint8"),
    ],
)
def test_bad_tensors(shape, dtype, error, text):
    with pytest.raises(error, match=f"convert_cache_blocks: cache: .*{text}"):
        _convert(to_paddle(np.zeros(shape, dtype)), kind="k")


def test_values_have_no_192_channels():
    cache = to_paddle(_bytes((2, 1, 64, 192)))
    with pytest.raises(NotImplementedError, match=r"head_dim 192 is .*: 64, 96, 128, 256"):
        _convert(cache, kind="v")
    assert to_numpy(_convert(cache, kind="k")).shape == (2, 1, 64, 192)


def test_no_tensor():
    for wrong in (None, 3, np.zeros((1, 1, 64, 64), np.uint8)):
        with pytest.raises(TypeError, match="convert_cache_blocks: cache"):
            _convert(wrong)


# The caches of a server.


def _server(cache_quant_type, layout, layers=3, head_dim=128):
    """Bytes of a server's caches in a layout: the same codes and scales for every layout."""
    dynamic = cache_quant_type.startswith("block_wise")
    caches = []
    for layer in range(layers):
        for kind, dim in zip("kv", (head_dim, value_dim(head_dim))):
            codes = _bytes((5, 2, 64, dim), seed=10 * layer + ord(kind))
            caches.append(pack(codes, kind, layout, int8="int8" in cache_quant_type))
        if dynamic:
            rng = np.random.default_rng(layer)
            caches += [rng.uniform(0.5, 2, (5, 2, 64)).astype(BF16) for _ in "kv"]
    return caches


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("cache_quant_type", QUANTISED)
def test_every_layer_both_ways(place, cache_quant_type, head_dim):
    theirs = _server(cache_quant_type, "fastdeploy", head_dim=head_dim)
    ours = _server(cache_quant_type, "fastattn", head_dim=head_dim)
    tensors = [to_paddle(x.copy(), place) for x in theirs]
    pointers = [x.data_ptr() for x in tensors]
    same = convert_caches(tensors, cache_quant_type=cache_quant_type)
    assert same is tensors and [x.data_ptr() for x in tensors] == pointers, "in place"
    for i, (tensor, wanted) in enumerate(zip(tensors, ours)):
        assert_same_bits(to_numpy(tensor), wanted, f"tensor {i}")
    convert_caches(tensors, cache_quant_type=cache_quant_type, src="fastattn", dst="fastdeploy")
    for i, (tensor, wanted) in enumerate(zip(tensors, theirs)):
        assert_same_bits(to_numpy(tensor), wanted, f"tensor {i}")


def test_ranges_in_any_order_and_in_several_calls(place):
    theirs, ours = (_server("block_wise_int8", x, layers=1) for x in ("fastdeploy", "fastattn"))
    tensors = [to_paddle(x.copy(), place) for x in theirs]
    options = {"cache_quant_type": "block_wise_int8"}
    convert_caches(tensors, block_ranges=[(4, 5), (1, 1), (0, 2)], **options)
    for tensor, before, after in zip(tensors[:2], theirs, ours):
        expected = after.copy()
        expected.reshape(5, -1)[2:4] = before.reshape(5, -1)[2:4]
        assert_same_bits(to_numpy(tensor), expected)
    convert_caches(tensors, block_ranges=iter([(2, 4)]), **options)
    for tensor, after in zip(tensors, ours):
        assert_same_bits(to_numpy(tensor), after)


def test_neighbouring_ranges_are_one(place, monkeypatch):
    theirs, ours = (_server("block_wise_int8", x, layers=1) for x in ("fastdeploy", "fastattn"))
    tensors = [to_paddle(x.copy(), place) for x in theirs]
    calls, convert = [], F.convert_cache_blocks

    def counted(cache, *, begin, end, **options):
        calls.append((begin, end))
        return convert(cache, begin=begin, end=end, **options)

    monkeypatch.setattr(F, "convert_cache_blocks", counted)
    ranges = [(2, 3), (0, 1), (2, 2), (1, 2), (4, 5)]
    convert_caches(tensors, cache_quant_type="block_wise_int8", block_ranges=ranges)
    assert calls == [(0, 3), (4, 5)] * 2
    for tensor, before, after in zip(tensors[:2], theirs, ours):
        expected = after.copy()
        expected.reshape(5, -1)[3] = before.reshape(5, -1)[3]
        assert_same_bits(to_numpy(tensor), expected)


def test_what_a_converted_cache_means(place):
    """append_cache_kv_c8 reads the same values before and after."""
    tensors = [to_paddle(x, place) for x in _server("block_wise_fp8", "fastdeploy", layers=1)]
    before, after = (
        [to_paddle(np.zeros((100, 2, 128), BF16), place) for _ in "kv"] for _ in range(2)
    )
    rows = [
        to_paddle(np.array(x, np.int32), place) for x in ([[3, 1], [0, -1]], [70, 30], [0, 70, 100])
    ]

    def read(out, layout):
        F.append_cache_kv_c8(
            tensors[0],
            tensors[1],
            *out,
            *rows,
            cache_k_scales=tensors[2],
            cache_v_scales=tensors[3],
            dynamic_quant=True,
            cache_quant_type="block_wise_fp8",
            cache_layout=layout,
        )

    read(before, "fastdeploy")
    convert_caches(tensors, cache_quant_type="block_wise_fp8", block_ranges=[(0, 2), (3, 4)])
    read(after, "fastattn")
    for a, b in zip(after, before):
        assert np.nanmax(np.abs(to_numpy(b).astype(np.float32))) > 0
        assert_same_bits(to_numpy(a), to_numpy(b))


def test_type_none_needs_nothing():
    caches = [to_paddle(np.zeros((2, 1, 64, 64), np.float16)) for _ in "kv"]
    assert convert_caches(caches, cache_quant_type="none") is caches


def test_no_layers_and_no_blocks():
    assert convert_caches([], cache_quant_type="cache_int8") == []
    caches = [paddle.zeros([0, 2, 64, 128], "uint8") for _ in "kv"]
    convert_caches(caches, cache_quant_type="cache_int8")


def _uint8(*shape):
    return to_paddle(np.zeros(shape, np.uint8))


@pytest.mark.parametrize(
    ("caches", "options", "error", "text"),
    [
        ([_uint8(2, 1, 64, 64)], {}, ValueError, "caches: type 'cache_int8' has 2 tensors a layer"),
        (
            [_uint8(2, 1, 64, 64)] * 2,
            {"cache_quant_type": "block_wise_fp8"},
            ValueError,
            "has 4 tensors a layer, got 2",
        ),
        ([_uint8(2, 1, 64, 64)] * 2, {}, ValueError, r"caches\[0\] and caches\[1\] share memory"),
        (
            [_uint8(2, 1, 64, 64), None],
            {},
            TypeError,
            r"caches\[1\]: expected a tensor, got NoneType",
        ),
        (
            [_uint8(2, 1, 64, 64), to_paddle(np.zeros((2, 1, 64, 64), np.float32))],
            {},
            TypeError,
            r"caches\[1\]: expected dtype uint8 .*got float32",
        ),
        (
            [_uint8(2, 1, 128, 64), _uint8(2, 1, 64, 128)],
            {},
            ValueError,
            r"caches\[0\]: expected shape \[num_blocks, KV, 64, D\], got \[2, 1, 128, 64\]",
        ),
        (
            [_uint8(2, 1, 64, 32), _uint8(2, 1, 64, 32)],
            {},
            NotImplementedError,
            r"caches\[0\]: head_dim 32",
        ),
        (
            [_uint8(2, 1, 64, 64), _uint8(2, 1, 64, 64)],
            {"block_ranges": [(0, 3)]},
            ValueError,
            r"block_ranges: expected 0 <= begin <= end <= 2",
        ),
        (
            [_uint8(9, 1, 64, 64), _uint8(9, 1, 64, 64)],
            {"block_ranges": [(5, 9), (1, 6)]},
            ValueError,
            r"block_ranges: \(1, 6\) and \(5, 9\) overlap",
        ),
        (
            [_uint8(2, 1, 64, 64), _uint8(2, 1, 64, 64)],
            {"block_ranges": [3]},
            TypeError,
            r"block_ranges: expected \(begin, end\) of ints, got 3",
        ),
        (
            [_uint8(2, 1, 64, 64), _uint8(2, 1, 64, 64)],
            {"block_ranges": [(0, 1.5)]},
            TypeError,
            r"block_ranges: expected \(begin, end\) of ints, got \(0, 1.5\)",
        ),
        ([], {"src": "vllm"}, ValueError, "src: expected fastattn, fastdeploy, logical"),
        (
            [],
            {"cache_quant_type": "cache_int4_zp"},
            NotImplementedError,
            "'cache_int4_zp' is not supported",
        ),
    ],
)
def test_lists_that_do_not_fit(caches, options, error, text):
    with pytest.raises(error, match=f"convert_caches: .*{text}"):
        convert_caches(caches, **{"cache_quant_type": "cache_int8", **options})


def test_nothing_moves_before_everything_is_checked():
    key = _bytes((2, 1, 64, 64))
    tensors = [to_paddle(key.copy()), _uint8(2, 1, 64, 64), _uint8(2, 1, 64, 64), _uint8(2, 1, 3)]
    with pytest.raises(ValueError, match=r"caches\[3\]"):
        convert_caches(tensors, cache_quant_type="cache_int8")
    assert_same_bits(to_numpy(tensors[0]), key)


def test_the_example():
    (test,) = doctest.DocTestFinder(recurse=False).find(
        backends.convert_caches, "convert_caches", globs={}
    )
    assert test.examples
    lines: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=lines.append)
    assert not lines, "".join(lines)


def test_the_reference_agrees_on_a_whole_cache():
    cache = _bytes((2, 2, 64, 128))
    options = {"kind": "v", "cache_quant_type": "cache_int8", "src": "fastdeploy"}
    wanted = reference.convert_cache_layout(cache, dst="fastattn", **options)
    tensor = F.convert_cache_blocks(to_paddle(cache.copy()), dst="fastattn", **options)
    assert_same_bits(to_numpy(tensor).reshape(wanted.shape), wanted)
