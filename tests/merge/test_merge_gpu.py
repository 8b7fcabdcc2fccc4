"""CUDA kernels of merge_attn_states on strided tensors, which Paddle never hands to an operator."""

from __future__ import annotations

import ctypes
import subprocess

import numpy as np
import pytest

from custom_ops.builder import instances, toolchain
from fastattn import reference
from tests.support import ROOT
from tests.support.compare import assert_same_bits, assert_within
from tests.support.tensors import DTYPES

CUDA = toolchain.find_cuda()
DTYPE_CODES = {"float32": 0, "float16": 1, "bfloat16": 2}
KINDS = {"plain": 0, "static": 3, "dynamic": 4}
SCALE = np.array([0.05], np.float32)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(CUDA is None, reason="no nvcc")]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("merge") / "merge.so"
    instances.write(ROOT / "build/generated")
    roots = [ROOT / "custom_ops", ROOT / "build/generated"]
    folders = [root / "cuda" / name for root in roots for name in ("common", "merge")]
    kernels = sorted(source for folder in folders for source in folder.glob("*.cu"))
    cuda = toolchain.Cuda(CUDA, toolchain.find_archs())
    command = [cuda.nvcc, *cuda.flags, "-t0", "-shared", "-Xcompiler=-fvisibility=default"]
    command += [str(ROOT / "tests/support/merge_gpu.cu"), *map(str, kernels), "-o", str(path)]
    subprocess.run(command, cwd=ROOT / "custom_ops", check=True)
    return ctypes.CDLL(str(path))


def spread(array, order, pad, fill):
    """The same values in memory of axis order `order`, `pad` more elements on each axis."""
    memory = np.full([array.shape[i] + pad for i in order], fill, array.dtype)
    view = memory.transpose(np.argsort(order))
    view = view[tuple(slice(0, n) for n in array.shape)]
    view[...] = array
    return view


def sides(rng, tokens, heads, dim, dtype):
    arrays = []
    for _ in range(2):
        output = rng.normal(size=(tokens, heads, dim)).astype(DTYPES[dtype])
        lse = (2 * rng.normal(size=(heads, tokens))).astype(np.float32)
        gone = rng.random((heads, tokens)) < 0.1
        lse[gone] = np.where(rng.random(gone.sum()) < 0.5, -np.inf, np.inf)
        output[gone.T] = np.nan
        arrays += [output, lse]
    return arrays


def run(library, kind, dtype, merged, views, scales):
    """Runs on `views`: prefix, its LSE, suffix, its LSE, output, output LSE; writes in place."""
    tensors = [*views, SCALE if kind == "static" else None, scales]
    memory, sizes, offsets = [], [], []
    for view in tensors:
        base = view if view is None or view.base is None else view.base
        while base is not None and base.base is not None:
            base = base.base
        memory.append(None if base is None else base.ctypes.data)
        sizes.append(0 if base is None else base.nbytes)
        offsets.append(0 if base is None else view.ctypes.data - base.ctypes.data)
    tokens, heads, dim = views[0].shape
    group = 0 if scales is None else heads * dim // scales.shape[1]
    strides = [n // view.itemsize for view in views for n in view.strides[:2]]
    strides.append(0 if scales is None else scales.strides[0] // 4)
    int64s = [
        (ctypes.c_int64 * len(v))(*v)
        for v in (sizes, offsets, (tokens, merged, heads, dim, group), strides)
    ]
    pointers = (ctypes.c_void_p * len(memory))(*memory)
    status = library.merge_on_gpu(DTYPE_CODES[dtype], KINDS[kind], pointers, *int64s)
    assert status == 0


# Padding by whole packs: kernels of 16 bytes; else: those of single values.
@pytest.mark.parametrize("pad", [0, 8, 3])
@pytest.mark.parametrize("shape", [(13, 3, 24), (33, 4, 128), (9, 5, 256), (7, 2, 1024)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_strides(library, kind, dtype, shape, pad):
    tokens, heads, dim = shape
    arrays = sides(np.random.default_rng([pad, dim]), *shape, dtype)
    groups = heads if kind == "dynamic" else None
    kwargs = {"plain": {}, "static": {"output_scale": SCALE}, "dynamic": {"groups": groups}}[kind]
    merged = tokens - 2
    expected = reference.merge_attn_states(*arrays, prefill_tokens_with_context=merged, **kwargs)
    out_dtype = arrays[0].dtype if kind == "plain" else np.uint8
    fill = np.nan if kind == "plain" else 0xA5
    views = [
        spread(arrays[0], (1, 0, 2), pad, np.nan),  # heads first
        spread(arrays[1], (1, 0), pad, np.nan),  # tokens first
        spread(arrays[2], (0, 1, 2), pad, np.nan),
        spread(arrays[3], (0, 1), pad, np.nan),
        spread(np.zeros(shape, out_dtype), (0, 1, 2), 2 * pad, fill),
        spread(np.zeros_like(arrays[1]), (1, 0), pad, np.nan),
    ]
    scales = np.zeros((tokens, heads), np.float32) if kind == "dynamic" else None
    run(library, kind, dtype, merged, views, scales)
    assert_same_bits(views[4], expected[0])
    assert_within(views[5], expected[1], 2.0**-23 * (1 + np.abs(expected[1])))
    if kind == "dynamic":
        assert_same_bits(scales, expected[2])
    if pad:  # what lies between heads and tokens is untouched
        memory = views[4].base
        untouched = np.isnan(memory.astype(np.float32)) if kind == "plain" else memory == 0xA5
        assert untouched.sum() >= memory.size - views[4].size
    for view, array in zip(views[:4], arrays):
        assert_same_bits(view, array, "an input")


@pytest.mark.parametrize("pad", [0, 8, 3])
@pytest.mark.parametrize("dim", [24, 96, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("over", [0, 2])
def test_over_a_strided_input(library, over, dtype, dim, pad):
    shape = (129, 5, dim)
    arrays = sides(np.random.default_rng(dim), *shape, dtype)
    expected = reference.merge_attn_states(*arrays)
    orders = [(0, 1, 2), (0, 1), (1, 0, 2), (1, 0)]
    views = [spread(a, order, pad, np.nan) for a, order in zip(arrays, orders)]
    run(library, "plain", dtype, 129, [*views, views[over], views[over + 1]], None)
    assert_same_bits(views[over], expected[0])
    assert_within(views[over + 1], expected[1], 2.0**-23 * (1 + np.abs(expected[1])))
    for k in {0, 1, 2, 3} - {over, over + 1}:
        assert_same_bits(views[k], arrays[k], "an input that is no output")
