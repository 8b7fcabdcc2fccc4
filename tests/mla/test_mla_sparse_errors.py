"""What mla_sparse_attention refuses, dygraph and traced programs alike."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from tests.support.operators import calls, run
from tests.support.strides import strided
from tests.support.tensors import BF16, int32, to_paddle


def zeros(*shape, dtype=BF16):
    return to_paddle(np.zeros(shape, dtype))


def good():
    return {
        "q": zeros(2, 3, 576),
        "cache": zeros(2, 64, 656, dtype=np.uint8),
        "indices": int32([[0, 1], [2, 3]]),
        "cache_format": "fp8_656",
    }


U8, F32, I32 = np.uint8, np.float32, np.int32
EXTRA = {"extra_cache": ((2, 64, 656), U8), "extra_indices": ((2, 4), I32)}
V4 = {"cache_format": "fp8_584", "cache": ((2, 64, 584), U8), "q": ((2, 3, 512), BF16)}
WRONG = [
    ({"q": None}, TypeError, "q: expected a tensor, got None"),
    ({"q": ((2, 3, 576), F32)}, TypeError, "q: expected dtype bfloat16, got float32"),
    ({"q": ((2, 576), BF16)}, ValueError, "q: expected 3 dimensions"),
    ({"q": ((2, 3, 640), BF16)}, ValueError, "q: expected 576 or 512 channels"),
    ({"q": ((2, 3, 512), BF16)}, ValueError, "q: expected 576 channels, those of cache_format fp"),
    ({**V4, "q": ((2, 3, 576), BF16)}, ValueError, "q: expected 512 channels, those of cache_f"),
    ({"q": ((2, 129, 576), BF16)}, NotImplementedError, "q: expected 1 to 128 heads"),
    ({"q": ((2, 0, 576), BF16)}, NotImplementedError, "q: expected 1 to 128 heads"),
    ({"cache": None}, TypeError, "cache: expected a tensor, got None"),
    ({"cache": ((2, 64, 584), U8)}, ValueError, r"cache: expected shape \[\?, \?, 656\]"),
    ({"cache_format": "bf16"}, TypeError, "cache: expected dtype bfloat16, got uint8"),
    ({"cache_format": "fp8_288"}, NotImplementedError, "cache_format: 'fp8_288' is not supported"),
    ({"page_size": 32}, ValueError, r"page_size: expected 64 as in cache's shape"),
    ({"indices": None}, TypeError, "indices: expected a tensor, got None"),
    ({"indices": ((2, 2), np.int64)}, TypeError, "indices: expected dtype int32, got int64"),
    ({"indices": ((3, 2), I32)}, ValueError, r"indices: expected shape \[2, \?\]"),
    ({"indices": ((2, 1, 2), I32)}, ValueError, "indices: expected shape"),
    ({"topk_length": ((3,), I32)}, ValueError, r"topk_length: expected shape \[2\]"),
    ({"topk_length": ((2,), np.int64)}, TypeError, "topk_length: expected dtype int32"),
    ({"scale": ((1,), F32)}, ValueError, "scale: expected None for fp8_656"),
    ({"cache_format": "fp8", "cache": ((2, 64, 576), U8)}, TypeError, "scale: expected a tensor"),
    ({"sinks": ((4,), F32)}, ValueError, r"sinks: expected shape \[3\], got \[4\]"),
    ({"sinks": ((3,), BF16)}, TypeError, "sinks: expected dtype float32, got bfloat16"),
    ({"softmax_scale": float("nan")}, ValueError, "softmax_scale: expected a finite number"),
    ({"softmax_scale": "1"}, TypeError, "softmax_scale: expected float, got str"),
    ({"page_size": 1.0}, TypeError, "page_size: expected int, got float"),
    ({"return_softmax_lse": 1}, TypeError, "return_softmax_lse: expected bool"),
    ({"out": ((2, 3, 576), BF16)}, ValueError, r"out: expected shape \[2, 3, 512\]"),
    ({"out": ((2, 3, 512), F32)}, TypeError, "out: expected dtype bfloat16"),
    (
        {"out": ((2, 3, 512), BF16), "out_dtype": "float32"},
        TypeError,
        "out: expected dtype float32",
    ),
    (
        {"out_dtype": "float16"},
        ValueError,
        "out_dtype: expected bfloat16 or float32, got 'fl",
    ),
    # The second cache.
    ({"extra_cache_format": "e4m3"}, NotImplementedError, "extra_cache_format: 'e4m3' is not"),
    ({"extra_cache": ((2, 64, 656), U8)}, TypeError, "extra_indices: expected a tensor with extra"),
    ({"extra_indices": ((2, 4), I32)}, ValueError, "extra_indices: expected None without extra_ca"),
    ({"extra_topk_length": ((2,), I32)}, ValueError, "extra_topk_length: expected None without"),
    ({"extra_scale": ((1,), F32)}, ValueError, "extra_scale: expected None without extra_cache"),
    ({**EXTRA, "extra_cache": ((2, 64, 584), U8)}, ValueError, "extra_cache: expected shape"),
    (
        {**EXTRA, "extra_cache_format": "fp8_584"},
        ValueError,
        "q: expected 512 channels, those of extra",
    ),
    ({**EXTRA, "extra_cache_format": "bf16"}, TypeError, "extra_cache: expected dtype bfloat16"),
    ({**EXTRA, "extra_indices": ((3, 4), I32)}, ValueError, r"extra_indices: expected shape \[2"),
    ({**EXTRA, "extra_indices": ((3, 0), I32)}, ValueError, "extra_indices: expected shape"),
    ({**EXTRA, "extra_topk_length": ((2, 1), I32)}, ValueError, r"extra_topk_length: expected sh"),
    ({**EXTRA, "extra_scale": ((1,), F32)}, ValueError, "extra_scale: expected None for fp8_656"),
    ({**EXTRA, "extra_page_size": 8}, ValueError, "extra_page_size: expected 64 as in extra_cache"),
    ({**EXTRA, "extra_cache": ((2, 6560), U8)}, ValueError, "extra_page_size: a cache"),
]


def made(change):
    return {k: zeros(*v[0], dtype=v[1]) if isinstance(v, tuple) else v for k, v in change.items()}


@pytest.mark.parametrize(("change", "error", "text"), WRONG)
def test_wrong_arguments(change, error, text):
    with pytest.raises(error, match=f"mla_sparse_attention: {text}"):
        F.mla_sparse_attention(**{**good(), **made(change)})


#: Those that a program knows before it runs.
TRACED = {
    "heads": {"q": ((2, 130, 576), BF16)},
    "channels": {"q": ((2, 3, 64), BF16)},
    "channels of the format": {"q": ((2, 3, 512), BF16)},
    "channels of the second format": {**EXTRA, "extra_cache_format": "fp8_584"},
    "format": {"cache_format": "fp4_288"},
    "second format": {"extra_cache_format": "fp4_288"},
    "dtype of the second cache": {**EXTRA, "extra_cache_format": "bf16"},
    "no second cache": {"extra_topk_length": ((2,), I32)},
    "a second scale": {**EXTRA, "extra_scale": ((1,), F32)},
    "no second scale": {
        **EXTRA,
        "extra_cache_format": "fp8",
        "extra_cache": ((2, 64, 576), U8),
    },
    "int64 indices": {"indices": ((2, 2), np.int64)},
    "bf16 sinks": {"sinks": ((3,), BF16)},
    "softmax_scale": {"softmax_scale": float("inf")},
    "fp32 out": {"out": ((2, 3, 512), F32)},
    "bf16 out": {"out": ((2, 3, 512), BF16), "out_dtype": "float32"},
    "out_dtype": {"out_dtype": "auto"},
}


@pytest.mark.parametrize("name", TRACED)
def test_a_program_is_refused_as_dygraph_is(name):
    if paddle.__version__.startswith("2."):
        pytest.skip("Paddle 2.6 loses what a traced function closes over")
    call = calls()["mla_sparse_attention"].changed(**made(TRACED[name]))

    def error(function):
        with pytest.raises((TypeError, ValueError, NotImplementedError)) as found:
            function()
        return type(found.value), str(found.value)

    expected = error(lambda: run("mla_sparse_attention", call.inputs, call.attrs))

    def traced(q):
        return run("mla_sparse_attention", {**call.inputs, "q": q}, call.attrs)

    static = paddle.jit.to_static(traced, full_graph=True)
    kind, text = error(lambda: static(call.inputs["q"]))
    assert kind is expected[0] and expected[1] in text


def test_out_lies_apart_from_the_inputs():
    cache = zeros(2, 64, 576)
    keys = {**good(), "cache": cache, "cache_format": "bf16"}
    out = strided(cache, [2, 3, 512], [3 * 512, 512, 1], 1152)
    with pytest.raises(ValueError, match=r"out: .* share memory with cache"):
        F.mla_sparse_attention(**keys, out=out)
    memory = zeros(2 * 3 * 576)
    q, out = memory.reshape([2, 3, 576]), strided(memory, [2, 3, 512], [3 * 512, 512, 1])
    with pytest.raises(ValueError, match=r"out: .* share memory with q"):
        F.mla_sparse_attention(**{**keys, "q": q}, out=out)
    apart = strided(zeros(2 * 3 * 1024), [2, 3, 512], [3 * 1024, 1024, 1])
    with pytest.raises(ValueError, match="out: expected a contiguous tensor"):
        F.mla_sparse_attention(**keys, out=apart)


def test_strides_that_are_refused():
    memory = zeros(64 * 1024)
    for shape, strides in (([2, 3, 576], [3 * 1152, 1152, 2]),):
        with pytest.raises(ValueError, match="q: expected stride 1 in the last dimension"):
            F.mla_sparse_attention(**{**good(), "q": strided(memory, shape, strides)})
    indices = strided(int32(np.zeros(64)), [2, 4], [8, 2])
    with pytest.raises(ValueError, match="indices: expected stride 1 in the last dimension"):
        F.mla_sparse_attention(**{**good(), "indices": indices})
    wide = strided(zeros(2 * 64 * 700, dtype=U8), [2, 64, 584], [64 * 700, 700, 1])
    with pytest.raises(ValueError, match="expected stride 584 between a page's tokens in fp8_584"):
        F.mla_sparse_attention(**{**good(), **made(V4), "cache": wide})


@pytest.mark.parametrize("name", ["q", "cache", "out"])
def test_addresses_between_multiples_of_16_bytes(place, name):
    """A GPU refuses them, a CPU takes them."""
    made_here = good()
    tensors = {k: to_paddle(made_here[k].numpy(), place) for k in ("q", "cache", "indices")}
    shape = [2, 3, 512] if name == "out" else list(made_here[name].shape)
    dtype = U8 if name == "cache" else BF16
    memory = to_paddle(np.zeros(int(np.prod(shape)) + 64, dtype), place)
    for offset in (8, 16):
        strides = [shape[1] * shape[2], shape[2], 1]
        tensors[name] = strided(memory, shape, strides, offset)
        if place == "gpu" and offset == 8:
            text = f"{name}: expected an address of a multiple of 16"
            with pytest.raises(ValueError, match=text):
                F.mla_sparse_attention(**tensors, cache_format="fp8_656")
        else:
            F.mla_sparse_attention(**tensors, cache_format="fp8_656")
