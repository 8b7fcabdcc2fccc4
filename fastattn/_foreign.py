"""Error of an argument that is no tensor of Paddle: what it is, and how another's is converted."""

from __future__ import annotations

from typing import Any

#: Shares the memory of a torch tensor, under every Paddle from 2.6 on.
_OF_TORCH = "paddle.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(x))"


def type_name(value: Any) -> str:
    """Full name of a value's type: ``"torch.Tensor"``, ``"numpy.ndarray"``; ``"list"`` alone."""
    kind = type(value)
    module = str(kind.__module__)
    return kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}"


def is_torch(value: Any) -> bool:
    """Whether the value is of a type of torch, which need not be installed."""
    return str(type(value).__module__).split(".", 1)[0] == "torch"


def not_a_tensor(op: str, name: str, value: Any, expected: str = "a tensor") -> TypeError:
    """The error to raise where `value` has to be a tensor and is none.

    Parameters
    ----------
    op, name : str
        The operator and its argument.
    value : any
    expected : str
        What the argument may be besides a tensor of Paddle.
    """
    if is_torch(value):
        return TypeError(
            f"{op}: {name}: expected a paddle.Tensor, got {type_name(value)}; "
            f"{_OF_TORCH} converts it without a copy"
        )
    return TypeError(f"{op}: {name}: expected {expected}, got {type_name(value)}")
