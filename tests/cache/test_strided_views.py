"""Arithmetic of strided views, compiled alone: which share memory; planes of tensor maps."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess

import numpy as np
import pytest

from tests.support import ROOT

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("views") / "strided_view.so"
    flags = ["-O2", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    source = ROOT / "tests/support/strided_view.cc"
    subprocess.run(["g++", *flags, f"-I{ROOT / 'custom_ops'}", "-o", path, source], check=True)
    return ctypes.CDLL(str(path))


def _int64s(values):
    return (ctypes.c_int64 * max(len(values), 1))(*values)


def _arguments(begin, dims):
    return ctypes.c_int64(begin), _int64s([x for dim in dims for x in dim]), len(dims)


def may_overlap(library, a, b, element) -> bool:
    return bool(library.may_overlap(*_arguments(*a), *_arguments(*b), ctypes.c_int64(element)))


def repeats_itself(library, a, element) -> bool:
    return bool(library.repeats_itself(*_arguments(*a), ctypes.c_int64(element)))


def bytes_of(view, element) -> list[int]:
    """Every byte of every element."""
    begin, dims = view
    starts = [
        begin + sum(i * stride for i, (_, stride) in zip(index, dims))
        for index in itertools.product(*(range(size) for size, _ in dims))
    ]
    return [start + i for start in starts for i in range(element)]


def test_random_views(library):
    """No shared byte is missed; views that need not be refused seldom are."""
    rng = np.random.default_rng(0)
    apart = refused = 0
    for _ in range(6000):
        element = int(rng.choice([1, 2, 4]))
        views = []
        for _ in range(2):
            dims = [
                (int(rng.integers(1, 5)), element * int(rng.integers(-3, 40)))
                for _ in range(rng.integers(0, 4))
            ]
            views.append((1000 + int(rng.integers(0, 200)), dims))
        if rng.random() < 0.5:
            views[1] = views[1][0], views[0][1]
        both = [bytes_of(view, element) for view in views]
        shared = bool(set(both[0]) & set(both[1]))
        found = may_overlap(library, *views, element)
        assert found or not shared, views
        apart += not shared
        refused += found and not shared
        if len(set(both[0])) < len(both[0]):
            assert repeats_itself(library, views[0], element), views
    assert apart > 1000 and refused < apart / 100


def test_layouts_of_one_pool_are_told_exactly(library):
    """[blocks, layers, 2, KV, 64, D]: any two of its K and V, in any order of their dimensions."""
    rng = np.random.default_rng(1)
    blocks, layers, kv, tokens, dim, element = 3, 2, 2, 4, 4, 2
    plane = tokens * dim * element
    side, layer, block = kv * plane, 2 * kv * plane, layers * 2 * kv * plane
    planes_first = [(blocks, block), (kv, plane), (tokens, dim * element), (dim, element)]
    tokens_first = [(blocks, block), (kv, dim * element), (tokens, kv * dim * element)]
    tokens_first.append((dim, element))
    one_head = [(blocks, block), (tokens, dim * element), (dim, element)]
    found = set()
    for _ in range(300):
        views = []
        for _ in range(2):
            dims = [planes_first, tokens_first, one_head][rng.integers(3)]
            begin = int(rng.integers(layers)) * layer + int(rng.integers(2)) * side
            if dims is one_head:
                begin += int(rng.integers(kv)) * plane
            views.append((begin, [dims[i] for i in rng.permutation(len(dims))]))
        shared = bool(set(bytes_of(views[0], element)) & set(bytes_of(views[1], element)))
        assert may_overlap(library, *views, element) == shared, views
        assert not repeats_itself(library, views[0], element)
        found.add(shared)
    assert found == {True, False}


def test_empty_and_repeated_views(library):
    full = (0, [(4, 8), (8, 1)])
    assert not may_overlap(library, full, (0, [(0, 8), (8, 1)]), 1)
    assert not repeats_itself(library, (0, [(0, 0), (8, 1)]), 1)
    assert repeats_itself(library, (0, [(4, 0), (8, 1)]), 1)  # expanded
    assert repeats_itself(library, (0, [(4, 7), (8, 1)]), 1)
    assert not repeats_itself(library, (0, [(1, 0), (8, 1)]), 1)


def _plane(library, strides, blocks, heads, element, block=0, head=0):
    result = (ctypes.c_int64 * 3)()
    fits = library.find_plane(_int64s(strides), blocks, heads, element, block, head, result)
    return bool(fits), *result


@pytest.mark.parametrize("element", [1, 2])
@pytest.mark.parametrize(
    "strides",
    [
        (3 * 8192, 8192, 128),  # contiguous
        (6 * 8192, 8192, 128),  # K and V of one pool
        (3 * 8192, 128, 3 * 128),  # tokens first
        (8192, 5 * 8192, 128),  # heads first
        (3 * 8192 + 48, 8192 + 32, 128),  # gaps
        (2**33, 2**33 + 64, 128),
    ],
)
def test_planes_have_the_addresses_of_their_strides(library, strides, element):
    blocks, heads = 5, 3
    fits, stride, _, size = _plane(library, strides, blocks, heads, element)
    assert fits and stride % 16 == 0
    numbers = set()
    for block in range(blocks):
        for head in range(heads):
            _, _, number, _ = _plane(library, strides, blocks, heads, element, block, head)
            assert number * stride == (block * strides[0] + head * strides[1]) * element
            assert 0 <= number < size
            numbers.add(number)
    assert len(numbers) == blocks * heads
    # A block that is not assigned lies behind all of them.
    assert _plane(library, strides, blocks, heads, element, -1, 1)[2] >= size


def test_a_contiguous_cache_counts_its_planes(library):
    assert _plane(library, (3 * 8192, 8192, 128), 5, 3, 1, 4, 2) == (True, 8192, 14, 15)


@pytest.mark.parametrize(
    ("strides", "blocks"),
    [
        ((3 * 8192 + 8, 8192, 128), 5),  # 8 bytes
        ((3 * 8192, 8192, 136), 5),  # rows of another alignment
        ((3 * 2**33 + 16, 2**33, 128), 2),  # more than 2^31 steps of 16 bytes
        ((2**41, 2**41, 128), 2),  # a stride of more than 2^40 bytes
        ((0, 8192, 128), 5),
        ((3 * 8192, 8192, 128), 0),
    ],
)
def test_what_the_copy_engine_cannot_take(library, strides, blocks):
    assert not _plane(library, strides, blocks, 3, 1)[0]
