"""Timing of GPU work: CUDA graphs, driver events, and the floors that results are held against.

Paddle offers no event times and no empty kernel, so events, copies and one PTX kernel come from the
CUDA driver API (``libcuda.so.1``) through ctypes, on Paddle's own stream.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import paddle

from benchmarks.core.timing import Call

_EMPTY_KERNEL = b"""
.version 7.0
.target sm_70
.address_size 64
.visible .entry empty_kernel() { ret; }
"""

# Every thread XORs 16-byte words, four loads under way at a time; the branch keeps the loads.
_LOADS = "".join(
    f"  ld.global.nc.v4.u32 {{%x{i}, %x{i + 1}, %x{i + 2}, %x{i + 3}}}, [%pointer];\n"
    "  add.u64 %pointer, %pointer, %jump;\n"
    for i in (1, 5, 9, 13)
)
_XORS = "".join(
    f"  xor.b32 %x{i}, %x{i}, %x{i + step};\n"
    for step in (1, 2, 4, 8)
    for i in range(1, 17, 2 * step)
)
_READ_KERNEL = f"""
.version 7.0
.target sm_70
.address_size 64
.visible .entry read_kernel(.param .u64 source, .param .u64 words)
{{
  .reg .pred %more;
  .reg .b32 %x<17>, %block, %size, %thread, %grid;
  .reg .b64 %at, %end, %step, %next, %pointer, %jump;
  ld.param.u64 %pointer, [source];
  ld.param.u64 %end, [words];
  mov.u32 %block, %ctaid.x;
  mov.u32 %size, %ntid.x;
  mov.u32 %thread, %tid.x;
  mov.u32 %grid, %nctaid.x;
  mad.lo.u32 %x0, %block, %size, %thread;
  cvt.u64.u32 %at, %x0;
  mul.wide.u32 %step, %grid, %size;
  shl.b64 %jump, %step, 4;
  mad.lo.u64 %pointer, %at, 16, %pointer;
  mov.u32 %x0, 0;
again:
  mad.lo.u64 %next, %step, 3, %at;
  setp.ge.u64 %more, %next, %end;
  @%more bra done;
{_LOADS}{_XORS}  xor.b32 %x0, %x0, %x1;
  mad.lo.u64 %at, %step, 4, %at;
  bra again;
done:
  setp.ne.u32 %more, %x0, 0x13572468;
  @%more ret;
  ld.param.u64 %pointer, [source];
  st.global.u32 [%pointer], %x0;
  ret;
}}
""".encode()


@functools.lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def driver_call(name: str, *args: Any) -> None:
    """Call a function of the CUDA driver API; raises RuntimeError if it fails."""
    code = getattr(_driver(), name)(*args)
    if code != 0:
        text = ctypes.c_char_p()
        _driver().cuGetErrorName(code, ctypes.byref(text))
        raise RuntimeError(f"{name}: {(text.value or b'?').decode()}")


def stream() -> ctypes.c_void_p:
    """Raw handle of Paddle's current stream."""
    return ctypes.c_void_p(int(paddle.device.cuda.current_stream().cuda_stream or 0))


def driver_version() -> str:
    """CUDA version that the driver supports, e.g. ``"13.0"``."""
    version = ctypes.c_int()
    driver_call("cuDriverGetVersion", ctypes.byref(version))
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


class _Event:
    def __init__(self) -> None:
        self.handle = ctypes.c_void_p()
        driver_call("cuEventCreate", ctypes.byref(self.handle), 0)

    def record(self) -> None:
        driver_call("cuEventRecord", self.handle, stream())

    def microseconds_since(self, start: _Event) -> float:
        driver_call("cuEventSynchronize", self.handle)
        elapsed = ctypes.c_float()
        driver_call("cuEventElapsedTime", ctypes.byref(elapsed), start.handle, self.handle)
        return elapsed.value * 1e3


def median_event_us(work: Call, times: int = 20) -> float:
    """Median microseconds that the GPU takes from before some work to after it."""
    start, end = _Event(), _Event()
    taken = []
    for _ in range(times):
        start.record()
        work()
        end.record()
        taken.append(end.microseconds_since(start))
    return statistics.median(taken)


def median_eager_us(works: Sequence[Sequence[Call]], rounds: int = 15) -> list[tuple[float, float]]:
    """Median microseconds of lists of calls without a graph: the GPU's clock, and the host's.

    The lists take turns, so that what else the machine does meets all of them alike. The GPU is
    idle before each, and the garbage collector off.
    """
    taken: list[list[tuple[float, float]]] = [[] for _ in works]
    start, end = _Event(), _Event()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for index in range(rounds + 2):
            turns = list(zip(works, taken))
            for calls, spent in turns if index % 2 else reversed(turns):
                start.record()
                begin = time.perf_counter_ns()
                for call in calls:
                    call()
                host = (time.perf_counter_ns() - begin) / 1e3
                end.record()
                us = end.microseconds_since(start)
                if index >= 2:  # the first ones warm up
                    spent.append((us, host))
    finally:
        if collecting:
            gc.enable()
    return [
        (statistics.median(us), statistics.median(host)) for us, host in (zip(*x) for x in taken)
    ]


#: Seconds of replays before the first one that counts: clocks rise with the work after a pause.
WARM_UP_SECONDS = 0.025


def median_us(calls: Sequence[Call], replays: int = 30) -> float:
    """Median time of one call in microseconds, from replays of a graph that holds all of them.

    Give many calls over different buffers, more bytes than the L2 cache, to measure cold.
    """
    from paddle.device.cuda.graphs import CUDAGraph

    for call in calls:  # so that nothing is set up inside the capture
        call()
    paddle.device.cuda.synchronize()
    graph = CUDAGraph()
    graph.capture_begin()
    try:
        graph.kept = [call() for call in calls]  # outputs live in the graph's memory pool
    except Exception:
        with contextlib.suppress(Exception):
            graph.capture_end()  # or nothing else could run on this stream
        raise
    graph.capture_end()
    end = time.perf_counter() + WARM_UP_SECONDS
    while time.perf_counter() < end:
        for _ in range(3):
            graph.replay()
        paddle.device.cuda.synchronize()
    us = median_event_us(graph.replay, replays)
    paddle.device.cuda.synchronize()
    graph.reset()
    return us / len(calls)


#: Microseconds of work in a graph of :func:`steady_us`: what a replay costs once is then nothing.
STEADY_US = 1500
#: At most so many calls in it.
STEADY_CALLS = 400


def steady_us(calls: Sequence[Call]) -> float:
    """Median time of one call as :func:`median_us`, the calls repeated to fill a long graph."""
    first = list(calls) * max(1, 10 // len(calls))
    once = median_us(first, replays=3)
    wanted = min(STEADY_CALLS, STEADY_US / once)
    return median_us(list(calls) * max(1, int(wanted / len(calls))), replays=15)


#: Bytes of the buffers that bandwidths are measured over.
_BUFFER = 2 << 30


def _buffer() -> ctypes.c_uint64:
    """Memory of :data:`_BUFFER` bytes that hold values, not zeros."""
    paddle.to_tensor([0.0], place=paddle.CUDAPlace(0))  # makes the context current
    pointer = ctypes.c_uint64()
    driver_call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(_BUFFER))
    driver_call("cuMemsetD32_v2", pointer, ctypes.c_uint(0x3C003C01), ctypes.c_size_t(_BUFFER // 4))
    return pointer


def copy_bandwidth() -> float:
    """Device-to-device copy in GB/s, bytes read plus bytes written."""
    source, target = _buffer(), _buffer()
    size = ctypes.c_size_t(_BUFFER)
    us = median_event_us(
        lambda: driver_call("cuMemcpyDtoDAsync_v2", target, source, size, stream())
    )
    driver_call("cuMemFree_v2", source)
    driver_call("cuMemFree_v2", target)
    return 2 * _BUFFER / us / 1e3


@functools.cache
def kernel_of(ptx: bytes, name: bytes) -> ctypes.c_void_p:
    """A kernel of a PTX module, which is loaded once."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    driver_call("cuModuleLoadData", ctypes.byref(module), ptx)
    driver_call("cuModuleGetFunction", ctypes.byref(function), module, name)
    return function


@functools.lru_cache(maxsize=1)
def read_bandwidth() -> float:
    """Read-only bandwidth in GB/s: every word of a buffer once."""
    source = _buffer()
    kernel, words = kernel_of(_READ_KERNEL, b"read_kernel"), ctypes.c_uint64(_BUFFER // 16)
    pointers = (ctypes.c_void_p * 2)(
        *(ctypes.cast(ctypes.byref(x), ctypes.c_void_p) for x in (source, words))
    )
    multiprocessors = paddle.device.cuda.get_device_properties(0).multi_processor_count
    shape = (16 * multiprocessors, 1, 1, 256, 1, 1, 0)
    us = median_event_us(
        lambda: driver_call("cuLaunchKernel", kernel, *shape, stream(), pointers, None)
    )
    driver_call("cuMemFree_v2", source)
    return _BUFFER / us / 1e3


def fill(tensor: paddle.Tensor, words: Any) -> None:
    """Fill a GPU tensor with repetitions of the bytes of a NumPy array."""
    size, target = tensor.size * tensor.element_size(), tensor.data_ptr()
    done = min(size, words.nbytes)
    source = ctypes.c_void_p(words.ctypes.data)
    driver_call("cuMemcpyHtoD_v2", ctypes.c_uint64(target), source, ctypes.c_size_t(done))
    while 0 < done < size:
        more = min(done, size - done)
        end, begin = ctypes.c_uint64(target + done), ctypes.c_uint64(target)
        driver_call("cuMemcpyDtoD_v2", end, begin, ctypes.c_size_t(more))
        done += more


def launch_empty() -> None:
    """Launch a kernel of one thread that does nothing on Paddle's stream."""
    kernel, one = kernel_of(_EMPTY_KERNEL, b"empty_kernel"), (1, 1, 1)
    driver_call("cuLaunchKernel", kernel, *one, *one, 0, stream(), None, None)


@functools.lru_cache(maxsize=1)
def floors() -> tuple[float, float]:
    """Copy bandwidth in GB/s and time of an empty kernel as a graph's node in us, once a run."""
    return copy_bandwidth(), median_us([launch_empty] * 200)


def _kernel_module_version() -> str | None:
    """Version of the driver's kernel module, e.g. ``"580.159.04"``."""
    facts = Path("/proc/driver/nvidia/version")
    match = re.search(r"\b\d+\.\d+(\.\d+)?\b", facts.read_text()) if facts.exists() else None
    return match[0] if match else None


def machine() -> dict[str, Any]:
    """The GPU that the numbers belong to."""
    copy_gbs, empty_us = floors()
    return {
        "gpu": paddle.device.cuda.get_device_name(0),
        "gpu_driver": _kernel_module_version(),
        "driver_cuda": driver_version(),
        "copy_gbs": round(copy_gbs, 1),
        "empty_kernel_us": round(empty_us, 3),
    }
