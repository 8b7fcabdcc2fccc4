"""``FASTATTN_CHECK``: checks of tensor contents before every operator call in dygraph.

Operators check shapes and types, which the host knows. Block tables, lengths, slots and scales may
be on a GPU, and no operator waits for them. So a wrong value is clamped, or its tokens are left
out. This module copies them to the host, where NumPy checks them (``_check_rules.py``); a call
therefore waits for everything that was queued before it. Calls during the capture of a CUDA graph
and during a trace are not checked, because nothing can be read then.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import paddle

#: Levels of ``env.check()`` but 0, which is off.
WHOLE, PARTIAL = 1, 2

_thread = threading.local()


@contextlib.contextmanager
def partial_tables() -> Iterator[None]:
    """In this context, block tables may omit blocks that sequences need, and may end early.

    It is for calls of this package in which that is correct: a rank attends only to its own blocks.
    """
    before = getattr(_thread, "partial", False)
    _thread.partial = True
    try:
        yield
    finally:
        _thread.partial = before


def readable() -> bool:
    """Whether tensors can be read now: not during a trace or the capture of a graph."""
    if not paddle.in_dynamic_mode():
        return False
    sot = getattr(paddle.base.dygraph.base, "in_sot_simulation_mode", None)
    if sot is not None and sot():
        return False
    capturing = getattr(paddle.base.core, "is_cuda_graph_capturing", None)
    return capturing is None or not capturing()


def checked(
    call: Callable[..., Any], signature: Callable[[str], Any], level: int = WHOLE
) -> Callable[..., Any]:
    """Wrap `_ops.call` with a check of the contents of its arguments.

    Parameters
    ----------
    call, signature : functions of :mod:`fastattn._ops`
    level : int
        With PARTIAL, block tables may omit blocks in every call, as a rank's tables do.
    """
    from fastattn import _check_rules

    @functools.wraps(call)
    def wrapper(op: str, inputs: tuple[Any, ...], attrs: tuple[Any, ...] = ()) -> Any:
        if readable():
            meant = getattr(_thread, "partial", False)
            partial = meant or level == PARTIAL
            _check_rules.check(signature(op), inputs, attrs, partial=partial, clipped=meant)
        return call(op, inputs, attrs)

    wrapper.checks = True  # type: ignore[attr-defined]
    return wrapper


@contextlib.contextmanager
def checking(level: int = WHOLE) -> Iterator[None]:
    """Check the calls of all threads in this context, if they are not checked already."""
    from fastattn import _ops

    before = _ops.call
    if getattr(before, "checks", False):
        yield
        return
    _ops.call = checked(before, _ops.signature, level)
    try:
        yield
    finally:
        _ops.call = before
