"""Checks of arguments that are plain numbers."""

from __future__ import annotations

import numbers
from typing import Any


def as_float(op: str, name: str, value: Any) -> float:
    """Value of a real number of any kind, NumPy's included.

    Paddle's own conversion takes a NumPy string for a number and ends the process.

    Raises
    ------
    TypeError
        For anything else, booleans and tensors included.
    """
    if type(value) is float:
        return value
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    raise TypeError(f"{op}: {name}: expected float, got {type(value).__name__}")
