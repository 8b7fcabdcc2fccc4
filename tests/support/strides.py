"""Caches as views of larger memory: other orders of the dimensions, gaps, and neighbours.

A layout is written once, as NumPy views; the tensors are views of the same bytes at the same
offsets and strides. What lies around them is random, and a test may ask whether it still does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import paddle
import pytest

from tests.support.compare import assert_same_bits
from tests.support.tensors import to_numpy, to_paddle

Shape = tuple[int, ...]
Alloc = Callable[[Shape], np.ndarray]
Views = list[np.ndarray]


def _spans(shapes: Sequence[Shape]) -> list[slice]:
    """Where a block of each tensor lies if they lie side by side."""
    ends = np.cumsum([0, *(int(np.prod(shape[1:])) for shape in shapes)])
    return [slice(begin, end) for begin, end in zip(ends, ends[1:])]


def _interleaved(alloc: Alloc, shapes: Sequence[Shape]) -> Views:
    """K and V of a block side by side."""
    spans = _spans(shapes)
    pool = alloc((shapes[0][0], spans[-1].stop))
    return [pool[:, span].reshape(shape) for span, shape in zip(spans, shapes)]


def _tokens_first(alloc: Alloc, shapes: Sequence[Shape]) -> Views:
    """The third dimension ahead of the heads: ``[num_blocks, 64, KV, D]``."""
    order = [(s[0], s[2], s[1], *s[3:]) for s in shapes]
    return [np.swapaxes(alloc(shape), 1, 2) for shape in order]


def _tokens_first_interleaved(alloc: Alloc, shapes: Sequence[Shape]) -> Views:
    """Both: ``[num_blocks, 2, 64, KV, D]``."""
    spans = _spans(shapes)
    pool = alloc((shapes[0][0], spans[-1].stop))
    order = [(s[0], s[2], s[1], *s[3:]) for s in shapes]
    views = [pool[:, span].reshape(shape) for span, shape in zip(spans, order)]
    return [np.swapaxes(view, 1, 2) for view in views]


def _head_slice(alloc: Alloc, shapes: Sequence[Shape]) -> Views:
    """Some heads of a cache that has more."""
    return [alloc((s[0], s[1] + 3, *s[2:]))[:, 1 : 1 + s[1]] for s in shapes]


def _layers(alloc: Alloc, shapes: Sequence[Shape]) -> Views:
    """A layer of a pool whose blocks hold all layers."""
    spans = _spans(shapes)
    pool = alloc((shapes[0][0], 3, spans[-1].stop))
    return [pool[:, 1, span].reshape(shape) for span, shape in zip(spans, shapes)]


def _heads_first(alloc: Alloc, shapes: Sequence[Shape]) -> Views:
    """``[KV, num_blocks, 64, D]``: a head's stride is the largest."""
    return [np.swapaxes(alloc((s[1], s[0], *s[2:])), 0, 1) for s in shapes]


def _gaps(alloc: Alloc, shapes: Sequence[Shape]) -> Views:
    """Rows that are longer than the cache's."""
    return [alloc((*s[:-1], s[-1] + 48))[..., 16 : 16 + s[-1]] for s in shapes]


def _unlike(alloc: Alloc, shapes: Sequence[Shape]) -> Views:
    """K in one order and V in another."""
    return [_tokens_first(alloc, shapes[:1])[0], _head_slice(alloc, shapes[1:])[0]]


#: Orders of the planes of a block and KV head, which are contiguous themselves.
PLANE_LAYOUTS = {
    "interleaved": _interleaved,
    "head_slice": _head_slice,
    "layers": _layers,
    "heads_first": _heads_first,
}
LAYOUTS = {
    **PLANE_LAYOUTS,
    "tokens_first": _tokens_first,
    "tokens_first_interleaved": _tokens_first_interleaved,
    "gaps": _gaps,
    "unlike": _unlike,
}
#: For scales [num_blocks, KV, 64]: what each layout of the caches is tried with.
_SCALE_LAYOUTS = {
    "interleaved": _interleaved,
    "layers": _layers,
    "heads_first": _heads_first,
    "gaps": _gaps,
}


class Placed:
    """Tensors that are views of memory on a place, and the same memory as NumPy arrays."""

    def __init__(self, arrays: Sequence[np.ndarray], layout: str, place: str, seed: int = 0):
        """Lay out two arrays of one dtype with one entry a block, K's and V's."""
        rng = np.random.default_rng(seed)
        dtype = arrays[0].dtype
        self._pools: list[np.ndarray] = []

        def alloc(shape: Shape) -> np.ndarray:
            count = int(np.prod(shape)) * dtype.itemsize
            self._pools.append(rng.integers(0, 256, count, np.uint8).view(dtype))
            return self._pools[-1].reshape(shape)

        shapes = [a.shape for a in arrays]
        scales = arrays[0].ndim == 3 or arrays[0].shape[3] <= 8  # of a token, or of its blocks
        if scales:
            shapes = [(*s[:2], int(np.prod(s[2:]))) for s in shapes]
        layouts = _SCALE_LAYOUTS if scales else LAYOUTS
        made = layouts.get(layout, _head_slice)(alloc, shapes)
        self._views = [view.reshape(a.shape) for view, a in zip(made, arrays)]
        for view, array in zip(self._views, arrays):
            assert any(np.shares_memory(view, pool) for pool in self._pools)
            view[...] = array
        self._memory = [to_paddle(pool.copy(), place) for pool in self._pools]
        self.tensors = [self._tensor(view) for view in self._views]

    def _tensor(self, view: np.ndarray) -> paddle.Tensor:
        for pool, memory in zip(self._pools, self._memory):
            if np.shares_memory(pool, view):
                offset = view.ctypes.data - pool.ctypes.data
                strides = [s // view.itemsize for s in view.strides]
                return strided(memory, list(view.shape), strides, offset)
        raise AssertionError("a view of no pool")

    def assert_holds(self, arrays: Sequence[np.ndarray], what: str = "") -> None:
        """The views hold `arrays`, and everything around them is as it was."""
        for view, array in zip(self._views, arrays):
            view[...] = array
        for i, (pool, memory) in enumerate(zip(self._pools, self._memory)):
            assert_same_bits(to_numpy(memory), pool, f"{what} memory {i}")


@contextlib.contextmanager
def default_place(place: str):
    """Where tensors are made that are not told."""
    paddle.set_device(place)
    try:
        yield
    finally:
        paddle.set_device("cpu")


def strided(
    memory: paddle.Tensor, shape: Sequence[int], strides: Sequence[int], offset: int = 0
) -> paddle.Tensor:
    """View of `memory` with strides in elements, `offset` bytes from its start."""
    try:
        view = paddle.as_strided(memory, list(shape), list(strides), offset)
    except RuntimeError as error:
        pytest.skip(f"Paddle {paddle.__version__} makes no views here: {error}")
    assert list(view.strides) == list(strides)
    assert view.data_ptr() - memory.data_ptr() == offset
    return view


class PeakMemory:
    """Growth of the memory in use between :meth:`start` and :meth:`growth`, at its highest.

    On the CPU that of the process, whoever allocates; on a GPU that of Paddle's allocator, which
    the operators use for everything.
    """

    def __init__(self, place: str):
        self._gpu = place == "gpu"

    def start(self) -> None:
        if self._gpu:
            # A peak from before must not hide a new one.
            self._filler = None
            missing = paddle.device.cuda.max_memory_allocated() - self._now()
            with default_place("gpu"):
                self._filler = paddle.empty([missing], dtype="uint8") if missing > 0 else None
        else:
            Path("/proc/self/clear_refs").write_text("5")
        self._before = self._now()

    def growth(self) -> int:
        peak = paddle.device.cuda.max_memory_allocated() if self._gpu else self._field("VmHWM")
        return peak - self._before

    def _now(self) -> int:
        return paddle.device.cuda.memory_allocated() if self._gpu else self._field("VmRSS")

    @staticmethod
    def _field(name: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
        raise AssertionError(name)
