"""``FASTATTN_PROFILE=1``: a named range around every operator call, for profilers.

``paddle.profiler.Profiler`` records the ranges while it is active. Nsight Systems records them if
Paddle can push NVTX ranges, as its GPU builds can. A range measures host time: it ends when the
kernels are queued, and a profiler shows the kernels below it. If the variable is not set, this
module is not imported.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import paddle
from paddle.profiler import RecordEvent


def _nvtx() -> tuple[Callable[[str], Any], Callable[[], Any]] | None:
    """Paddle's functions that push and pop an NVTX range; None if it has none that work."""
    core = paddle.base.core
    push, pop = (getattr(core, f"nvprof_nvtx_{name}", None) for name in ("push", "pop"))
    if push is None or pop is None:
        return None
    try:
        push("fastattn")
        pop()
    except Exception as error:
        warnings.warn(
            f"FASTATTN_PROFILE: Paddle cannot push NVTX ranges: {error}", RuntimeWarning, 2
        )
        return None
    return push, pop


def ranged(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `_ops.call` in a range with the operator's name."""
    nvtx = _nvtx()

    @functools.wraps(call)
    def wrapper(op: str, inputs: tuple[Any, ...], attrs: tuple[Any, ...] = ()) -> Any:
        name = f"fastattn::{op}"
        with RecordEvent(name):
            if nvtx is None:
                return call(op, inputs, attrs)
            push, pop = nvtx
            push(name)
            try:
                return call(op, inputs, attrs)
            finally:
                pop()

    return wrapper
