"""Marks functions that run unchanged in dygraph and while a static program is traced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import paddle

F = TypeVar("F", bound=Callable[..., object])


def unified(function: F) -> F:
    """Keep dynamic-to-static transformation away from an operator's wrapper.

    Paddle 3 has a marker that serves AST and SOT tracing alike; Paddle 2.6 has one for AST only,
    and skips files in SOT.
    """
    marker = getattr(paddle.jit, "marker", None)
    if marker is not None and hasattr(marker, "unified"):
        return marker.unified(function)  # type: ignore[no-any-return]
    _skip_in_sot()
    return paddle.jit.not_to_static(function)  # type: ignore[no-any-return]


def _skip_in_sot() -> None:
    """Make the SOT of Paddle 2.6 run this package's frames as they are.

    It would rewrite them and lose the arguments of functions with keyword-only parameters.
    """
    skip = getattr(paddle.framework.core, "eval_frame_skip_file_prefix", None)
    if skip is not None:
        skip((str(Path(__file__).parent.parent),))
