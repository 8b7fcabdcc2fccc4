"""A copy by a kernel that is launched as the package's are, for the floors of small problems.

A small copy is mostly launch. From sm_90 on the operators' kernels are launched under the end of
their predecessors (programmatic dependent launch), and so is this one.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import paddle

from benchmarks.core import cuda

#: 16-byte words that a thread copies, threads of a CTA.
_THREADS = 256

_DEPENDENT = "  griddepcontrol.wait;\n  griddepcontrol.launch_dependents;\n"


def source_of(dependent: bool) -> str:
    """PTX of the kernel; `dependent`: it waits for its predecessor, which needs sm_90."""
    version, target = ("7.8", "sm_90") if dependent else ("7.0", "sm_70")
    return f"""
.version {version}
.target {target}
.address_size 64
.visible .entry copy_kernel(.param .u64 source, .param .u64 target, .param .u32 words)
{{
  .reg .pred %past;
  .reg .b32 %x<4>, %block, %thread, %at, %end;
  .reg .b64 %from, %to, %offset;
  ld.param.u32 %end, [words];
  mov.u32 %block, %ctaid.x;
  mov.u32 %thread, %tid.x;
  mad.lo.u32 %at, %block, {_THREADS}, %thread;
  setp.ge.u32 %past, %at, %end;
{_DEPENDENT if dependent else ""}  @%past ret;
  mul.wide.u32 %offset, %at, 16;
  ld.param.u64 %from, [source];
  ld.param.u64 %to, [target];
  add.u64 %from, %from, %offset;
  add.u64 %to, %to, %offset;
  ld.global.nc.v4.u32 {{%x0, %x1, %x2, %x3}}, [%from];
  st.global.v4.u32 [%to], {{%x0, %x1, %x2, %x3}};
  ret;
}}
"""


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, whose value takes 64 bytes from the eighth on."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


_PROGRAMMATIC_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


@functools.lru_cache(maxsize=1)
def _dependent() -> bool:
    return bool(paddle.device.cuda.get_device_properties(0).major >= 9)


def copy(target: paddle.Tensor, source: paddle.Tensor) -> None:
    """Copy a tensor's bytes, rounded down to a multiple of 16, on Paddle's stream."""
    words = target.size * target.element_size() // 16
    values = ctypes.c_uint64(source.data_ptr()), ctypes.c_uint64(target.data_ptr())
    arguments = (*values, ctypes.c_uint32(words))
    pointers = (ctypes.c_void_p * 3)(
        *(ctypes.cast(ctypes.byref(x), ctypes.c_void_p) for x in arguments)
    )
    attribute = _Attribute(_PROGRAMMATIC_SERIALIZATION, 0, (ctypes.c_int * 16)(1))
    config = _Config(
        (ctypes.c_uint * 3)(-(-words // _THREADS), 1, 1),
        (ctypes.c_uint * 3)(_THREADS, 1, 1),
        0,
        cuda.stream(),
        ctypes.pointer(attribute),
        1 if _dependent() else 0,
    )
    kernel = cuda.kernel_of(source_of(_dependent()).encode(), b"copy_kernel")
    cuda.driver_call("cuLaunchKernelEx", ctypes.byref(config), kernel, pointers, None)


def copy_us(pairs: Sequence[tuple[paddle.Tensor, paddle.Tensor]]) -> float:
    """Microseconds of a copy, of a graph of copies from second to first of the pairs."""
    return cuda.steady_us([functools.partial(copy, *pair) for pair in pairs])
