"""Where benchmarks run: how tensors are made there, and how calls are timed beside floors.

A benchmark is written once for both devices. What differs is its table of shapes, which it looks
up with :meth:`Device.of`.
"""

from __future__ import annotations

import functools
import gc
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import ml_dtypes
import numpy as np
import paddle
from numpy.typing import NDArray

from benchmarks.core import cuda, timing
from benchmarks.core.copy_kernel import copy_us
from benchmarks.core.peers import COPY, EMPTY
from benchmarks.core.rows import Row
from benchmarks.core.timing import Call

T = TypeVar("T")
Shape = Sequence[int]


@functools.lru_cache(maxsize=8)
def _words(kind: str, seed: int) -> NDArray[Any]:
    """Normal values to repeat: bfloat16, e4m3, int8 codes of a sixteenth, float16 or float32."""
    values = np.random.default_rng(seed).standard_normal(1 << 22, dtype=np.float32)
    if kind == "bfloat16":
        return values.astype(ml_dtypes.bfloat16).view(np.uint16)
    if kind == "int8":
        return np.clip(np.rint(values * 16), -127, 127).astype(np.int8).view(np.uint8)
    if kind == "e4m3":
        return values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return values.astype(kind)


class Device(ABC):
    """A place to measure on."""

    kind: ClassVar[str]

    def __init__(self, place: Any, quick: bool) -> None:
        self.place = place
        self.quick = quick  # small shapes, few repetitions

    def of(self, table: Mapping[str, T]) -> T:
        """Entry of a table for this device: of ``"cpu quick"`` and the like, else of ``"cpu"``."""
        return table.get(f"{self.kind} quick" if self.quick else self.kind, table[self.kind])

    def array(self, values: Any, dtype: Any = None) -> paddle.Tensor:
        """Tensor of an array; uint16 holds the bits of bfloat16."""
        return paddle.to_tensor(np.ascontiguousarray(values, dtype), place=self.place)

    def int32(self, values: Any) -> paddle.Tensor:
        """Tensor of integers."""
        return self.array(values, np.int32)

    def uniform(self, shape: Shape, low: float = 0.8, high: float = 1.2) -> paddle.Tensor:
        """Float32 tensor, such as scales."""
        values = np.random.default_rng(0).uniform(low, high, tuple(shape))
        return self.array(values, np.float32)

    @abstractmethod
    def random(self, shape: Shape, kind: str = "bfloat16", seed: int = 0) -> paddle.Tensor:
        """Normal values, or their codes as uint8 where `kind` is ``"e4m3"`` or ``"int8"``.

        Tensors that are multiplied want seeds of their own: a query that is some key as well has a
        score like no other.
        """

    def empty(self, shape: Shape, dtype: str) -> paddle.Tensor:
        """Uninitialised tensor; benchmarks leave Paddle set to the CPU."""
        paddle.set_device(self.kind)
        try:
            return paddle.empty(list(shape), dtype)
        finally:
            paddle.set_device("cpu")

    def copies(self, moved: int, most: int = 64) -> int:
        """Calls over buffers of their own, of `moved` bytes each, that no cache holds together."""
        return 1

    def small_row(self, op: str, shape: str, calls: Sequence[Call], moved: int) -> Row:
        """:meth:`memory_row` of an operator whose small problems are mostly launch.

        On a GPU the copy beside it is then a kernel that is launched as the operator's is, in a
        graph over as many buffers, whatever its size.
        """
        return self.memory_row(op, shape, calls, moved)

    @abstractmethod
    def memory_row(self, op: str, shape: str, calls: Sequence[Call], moved: int) -> Row:
        """Row of a memory-bound operator beside its floor: a copy that moves as many bytes.

        Parameters
        ----------
        calls : sequence of callable
            The same work over different buffers.
        moved : int
            Bytes that one call has to read and write.
        """

    def wait(self) -> None:  # noqa: B027
        """Wait for all work."""

    def recovered(self) -> bool:
        """Whether more can be measured after a benchmark has failed."""
        return True

    def machine(self) -> dict[str, Any]:
        """What the numbers belong to."""
        return timing.machine()


class Cpu(Device):
    """The host, where a call is timed with the clock, in turn with a copy."""

    kind = "cpu"

    def __init__(self, quick: bool) -> None:
        super().__init__(paddle.CPUPlace(), quick)

    def random(self, shape: Shape, kind: str = "bfloat16", seed: int = 0) -> paddle.Tensor:
        """See :meth:`Device.random`."""
        return self.array(np.resize(_words(kind, seed), tuple(shape)))

    def memory_row(self, op: str, shape: str, calls: Sequence[Call], moved: int) -> Row:
        """See :meth:`Device.memory_row`."""
        source = np.ones(max(moved // 2, 1), np.uint8)
        target = np.empty_like(source)
        functions = [calls[0], lambda: np.copyto(target, source)]
        us, copy_us = timing.medians(functions, 3 if self.quick else 9)
        return Row(op, shape, us, moved / us / 1e3, "GB/s", COPY, copy_us)


class Gpu(Device):
    """The first GPU, where CUDA graphs of calls are replayed between events."""

    kind = "gpu"
    #: Bytes that the rotating buffers of a measurement add up to, several times an L2 cache.
    COLD_BYTES = 400 << 20
    #: Bytes up to which a copy is timed by itself: more of them take the time of their share.
    SMALL_BYTES = 64 << 20

    def __init__(self, quick: bool) -> None:
        super().__init__(paddle.CUDAPlace(0), quick)

    def random(self, shape: Shape, kind: str = "bfloat16", seed: int = 0) -> paddle.Tensor:
        """See :meth:`Device.random`."""
        tensor = self.empty(shape, "uint8" if kind in ("e4m3", "int8") else kind)
        cuda.fill(tensor, _words(kind, seed))  # no host makes gigabytes of values
        return tensor

    def copies(self, moved: int, most: int = 64) -> int:
        """See :meth:`Device.copies`."""
        return int(min(most, max(1, -(-self.COLD_BYTES // moved))))

    def us(self, calls: Sequence[Call]) -> float:
        """Median microseconds of one call of a graph that holds all of them."""
        return cuda.median_us(calls, replays=20)

    def memory_row(self, op: str, shape: str, calls: Sequence[Call], moved: int) -> Row:
        """See :meth:`Device.memory_row`; the floor is an empty kernel where that takes longer."""
        us = cuda.steady_us(calls)
        copy_gbs, empty_us = cuda.floors()
        copy_us = moved / copy_gbs / 1e3
        floor = (EMPTY, empty_us) if copy_us < empty_us else (COPY, copy_us)
        return Row(op, shape, us, moved / us / 1e3, "GB/s", *floor)

    def small_row(self, op: str, shape: str, calls: Sequence[Call], moved: int) -> Row:
        """See :meth:`Device.small_row`; large copies are the driver's."""
        if moved > self.SMALL_BYTES:
            return self.memory_row(op, shape, calls, moved)
        us, size = cuda.steady_us(calls), [max(moved // 2, 16)]
        pairs = [(self.empty(size, "uint8"), self.empty(size, "uint8")) for _ in calls]
        return Row(op, shape, us, moved / us / 1e3, "GB/s", COPY, copy_us(pairs))

    def wait(self) -> None:
        """See :meth:`Device.wait`."""
        paddle.device.cuda.synchronize()

    def recovered(self) -> bool:
        """See :meth:`Device.recovered`; an illegal access, say, leaves no usable context."""
        gc.collect()
        try:
            self.wait()
            paddle.device.cuda.empty_cache()
            return True
        except Exception:
            return False

    def machine(self) -> dict[str, Any]:
        """See :meth:`Device.machine`."""
        return {**timing.machine(), **cuda.machine()}


def present(quick: bool) -> Gpu | Cpu:
    """The GPU of this machine, or its CPU where Paddle has no GPU."""
    on_gpu = paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
    return Gpu(quick) if on_gpu else Cpu(quick)
