"""Random numbers that neighbouring tests draw again are kept: drawing them takes longer than tests.

A generator of the same state gives the same numbers, so a test has what it would have drawn, and
the generator is left in the state that it would have.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

#: Bytes of what is kept; what was used longest ago goes first.
LIMIT = 48 << 20

_kept: OrderedDict[Any, tuple[dict[str, Any], np.ndarray]] = OrderedDict()
_size = 0


def _key_of(state: dict[str, Any]) -> tuple[Any, ...]:
    inner = state["state"]
    return inner["state"], inner["inc"], state["has_uint32"], state["uinteger"]


def kept(draw: Callable[..., np.ndarray], rng: np.random.Generator, *arguments: Any) -> np.ndarray:
    """``draw(rng, *arguments)``, a copy of the caller's own; `rng` is one of ``default_rng``."""
    global _size
    key = (draw, arguments, _key_of(rng.bit_generator.state))
    if key in _kept:
        _kept.move_to_end(key)
        rng.bit_generator.state, found = _kept[key]
        return found.copy()
    made = draw(rng, *arguments)
    if made.nbytes <= LIMIT // 4:
        _kept[key] = (rng.bit_generator.state, made)
        _size += made.nbytes
        while _size > LIMIT:
            _, (_, oldest) = _kept.popitem(last=False)
            _size -= oldest.nbytes
        return made.copy()
    return made
