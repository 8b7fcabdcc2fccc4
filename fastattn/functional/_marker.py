"""A marker for functions that run unchanged in dygraph and during tracing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import paddle

F = TypeVar("F", bound=Callable[..., object])


def unified(function: F) -> F:
    """Exclude an operator's wrapper from dynamic-to-static transformation.

    Paddle 3 has one marker for AST and SOT tracing. Paddle 2.6 has a marker for AST only; in SOT it
    skips files.
    """
    marker = getattr(paddle.jit, "marker", None)
    if marker is not None and hasattr(marker, "unified"):
        return marker.unified(function)  # type: ignore[no-any-return]
    _skip_in_sot()
    return paddle.jit.not_to_static(function)  # type: ignore[no-any-return]


def _skip_in_sot() -> None:
    """Make the SOT of Paddle 2.6 run the frames of this package unchanged.

    SOT would rewrite them and lose the arguments of functions with keyword-only parameters.
    """
    skip = getattr(paddle.framework.core, "eval_frame_skip_file_prefix", None)
    if skip is not None:
        skip((str(Path(__file__).parent.parent),))
