"""Marks functions that run unchanged in dygraph and while a static program is traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import paddle

F = TypeVar("F", bound=Callable[..., object])


def unified(function: F) -> F:
    """Keep dynamic-to-static transformation away from an operator's wrapper.

    Paddle 3 has a marker that serves AST and SOT tracing alike; Paddle 2.6 has one for AST only.
    """
    marker = getattr(paddle.jit, "marker", None)
    if marker is not None and hasattr(marker, "unified"):
        return marker.unified(function)  # type: ignore[no-any-return]
    return paddle.jit.not_to_static(function)  # type: ignore[no-any-return]
