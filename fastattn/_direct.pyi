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
    own: dict[str, Any], kinds: tuple[str, ...], names: tuple[str, ...], seen: list[Any]
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
def step(
    plan: tuple[Any, ...],
    own: dict[str, Any],
    caches: list[Any],
    forward_meta: Any,
    qkv: Any,
    lengths: tuple[int, int] | None,
    max_keys: int,
    scales: tuple[Any, Any] | None,
) -> Any: ...
