"""Checks of an operator's attributes."""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from fastattn._ops import OpSignature

#: Paddle's AttrType: INT, FLOAT, STRING, BOOLEAN and LONG.
_ATTRIBUTE_KINDS: dict[int, tuple[type, Any]] = {
    0: (int, numbers.Integral),
    1: (float, numbers.Real),
    2: (str, str),
    6: (bool, (bool, np.bool_)),
    9: (int, numbers.Integral),
}


def typed_attrs(sig: OpSignature, attrs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Attributes as plain Python values of the types that the operator was built with.

    Paddle 3 ends the process during a trace where it otherwise raises an error, so wrong types must
    not reach it.
    """
    checked = []
    for name, attr_type, value in zip(sig.attrs, sig.attr_types, attrs):
        kind, accepted = _ATTRIBUTE_KINDS[attr_type]
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise TypeError(
                f"{sig.name}: {name}: expected {kind.__name__}, got {type(value).__name__}"
            )
        bits = {0: 32, 9: 64}.get(attr_type)
        if bits and not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1):
            raise ValueError(f"{sig.name}: {name}: expected an int of {bits} bits, got {value}")
        try:
            checked.append(kind(value))
        except OverflowError:  # from an integer to a float
            raise ValueError(f"{sig.name}: {name}: expected a finite float, got {value}") from None
    return tuple(checked)
