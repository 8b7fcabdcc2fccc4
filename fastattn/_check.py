"""``FASTATTN_CHECK``: what tensors hold is checked before every operator call in dygraph.

Operators check shapes and types, which the host knows. Block tables, lengths, slots and scales may
be on a GPU, and no operator waits for them: a wrong one is clamped or its tokens are left out. Here
they are copied to the host, where NumPy looks at them (``_check_rules.py``), so a call waits for
everything that was queued before it. While a CUDA graph is captured nothing can be read, and calls
are made unchecked; so are those of a program that is traced.
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
    """Within it, block tables may leave out what sequences need, and may end before they do.

    For calls of this package that mean it: a rank attends to the blocks that it holds.
    """
    before = getattr(_thread, "partial", False)
    _thread.partial = True
    try:
        yield
    finally:
        _thread.partial = before


def _readable() -> bool:
    """Whether tensors can be read now: not while a program is traced, or a graph captured."""
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
    """`_ops.call` after a check of the arguments' contents.

    Parameters
    ----------
    call, signature : functions of :mod:`fastattn._ops`
    level : int
        PARTIAL: block tables may leave out blocks in every call, as a rank's tables do.
    """
    from fastattn import _check_rules

    @functools.wraps(call)
    def wrapper(op: str, inputs: tuple[Any, ...], attrs: tuple[Any, ...] = ()) -> Any:
        if _readable():
            meant = getattr(_thread, "partial", False)
            partial = meant or level == PARTIAL
            _check_rules.check(signature(op), inputs, attrs, partial=partial, clipped=meant)
        return call(op, inputs, attrs)

    wrapper.checks = True  # type: ignore[attr-defined]
    return wrapper


@contextlib.contextmanager
def checking(level: int = WHOLE) -> Iterator[None]:
    """Check the calls within, of every thread, if they are not checked already."""
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
