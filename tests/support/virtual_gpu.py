"""The virtual GPU: CUDA kernels in the interpreter of tests/virtual_gpu, over the CPU's memory.

It is there where FASTATTN_LIBRARY names what scripts/build_virtual_gpu.py wrote. Paddle knows
nothing of it: tensors "on the GPU" are the CPU's, and a flag says where operators run.
"""

from __future__ import annotations

import ctypes
import functools
import re
import runpy
from types import SimpleNamespace

import paddle
import paddle.device.cuda.graphs
import pytest

from fastattn import _ops


@functools.lru_cache(maxsize=1)
def runtime() -> ctypes.CDLL | None:
    """What takes libcudart's place, None where the library is of another build."""
    path = _ops.library_path().with_name("libvirtual_gpu.so").resolve()
    return ctypes.CDLL(str(path)) if path.exists() else None


def there() -> bool:
    """Whether the library's kernels run on a virtual GPU."""
    return runtime() is not None


def leaves_out(error: Exception) -> bool:
    """Whether a call failed only because this build leaves out a kernel or a head dimension."""
    dim = re.search(r"head_dim (= )?\d+ is not supported; supported: ", str(error))
    few_dims = dim is not None and "FASTATTN_HEAD_DIM_BITS" in _flags()
    return there() and (few_dims or "a kernel that was not built" in str(error))


@functools.lru_cache(maxsize=1)
def _flags() -> str:
    record = _ops.library_path().with_name("_build_info.py")
    return runpy.run_path(str(record))["FLAGS"] if record.exists() else ""


def turn(on: bool) -> None:
    """Have operators run on the virtual GPU, if there is one, or on the CPU."""
    library = runtime()
    if library is not None:
        library.virtual_gpu_turn(int(on))


def _skip(reason: str):
    def skip(*_args, **_options):
        pytest.skip(reason)

    return skip


def stand_in() -> None:
    """Give Paddle's functions for GPUs a meaning that fits."""
    set_device, cuda = paddle.set_device, paddle.device.cuda
    paddle.CUDAPlace = lambda index=0: paddle.CPUPlace()
    paddle.set_device = lambda name: set_device("cpu" if name.startswith("gpu") else name)
    cuda.synchronize = cuda.empty_cache = lambda *_: None
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=4, total_memory=1 << 32)
    cuda.get_device_properties = lambda *_: properties
    cuda.max_memory_allocated = cuda.memory_allocated = _skip("a virtual GPU counts no memory")
    cuda.graphs.CUDAGraph = _skip("a virtual GPU captures no graphs")
