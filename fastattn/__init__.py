"""fastattn: attention over a quantised KV cache for PaddlePaddle.

``fastattn.functional`` has the operators, and ``fastattn.backends`` the attention backends that a
server plugs in. ``fastattn.distributed`` has attention over a cache that is spread over processes.
``fastattn.reference`` has a NumPy model of every operator. They are imported on first use, so
``import fastattn`` works even if Paddle or the compiled library does not.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from fastattn.version import __version__

__all__ = ["__version__", "backends", "distributed", "functional", "reference"]

_SUBPACKAGES = frozenset({"backends", "distributed", "functional", "reference"})


def __getattr__(name: str) -> ModuleType:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"fastattn.{name}")
    raise AttributeError(f"module 'fastattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
