"""Calls of operators around Paddle's registry (``custom_ops/api/direct_module.cc``)."""

from collections.abc import Callable
from typing import Any

_Facts = tuple[
    int,
    tuple[str, ...],
    tuple[bool, ...],
    tuple[str, ...],
    tuple[str, ...],
    dict[int, int],
    tuple[bool, ...],
]

def flat(tensor: Any) -> Any: ...
def unchanged(
    object: Any, kinds: tuple[str, ...], names: tuple[str, ...], seen: list[Any]
) -> bool: ...
def bind(path: str) -> dict[str, _Facts]: ...
def call(
    handle: int,
    inputs: tuple[Any, ...],
    attrs: tuple[Any, ...],
    gradients_count: Callable[[], bool] | None,
) -> list[Any] | None: ...
def check(
    handle: int, inputs: tuple[tuple[str, list[int]] | None, ...], attrs: tuple[Any, ...]
) -> None: ...
def bound(
    handle: int,
    fixed: dict[str, Any],
    open: list[str],
    gradients_count: Callable[[], bool],
) -> Callable[..., Any] | None: ...
