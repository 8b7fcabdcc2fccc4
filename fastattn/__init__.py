"""fastattn: attention over a quantised KV cache for PaddlePaddle.

``fastattn.functional`` has the operators, and ``fastattn.backends`` the attention backends that a
server plugs in. ``fastattn.distributed`` has attention over a cache that is spread over processes.
``fastattn.reference`` has a NumPy model of every operator. They are imported on first use, so
``import fastattn`` works even if Paddle or the compiled library does not.

:func:`register` is for a process that loads a saved program.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from fastattn.version import __version__

__all__ = ["__version__", "backends", "distributed", "functional", "reference", "register"]

_SUBPACKAGES = frozenset({"backends", "distributed", "functional", "reference"})


def register() -> None:
    """Register the operators with Paddle, once.

    A saved program that has operators of this package can be loaded only after that: Paddle 3 ends
    the process at an operator that it does not know. ``paddle.jit.load``,
    ``paddle.static.load_inference_model`` and ``paddle.inference.create_predictor`` do it by
    themselves once :mod:`fastattn.functional` is imported. Call it where they were imported by name
    before, or where a program is loaded in another way.

    Raises
    ------
    ImportError
        If the library is missing, was built for another Paddle, or cannot be loaded.
    """
    from fastattn import _ops

    _ops.load()


def __getattr__(name: str) -> ModuleType:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"fastattn.{name}")
    raise AttributeError(f"module 'fastattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
