"""Error for an argument that is not a Paddle tensor: its type, and how to convert it."""

from __future__ import annotations

from typing import Any

#: Shares the memory of a torch tensor in every Paddle from 2.6 on.
_OF_TORCH = "paddle.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(x))"


def type_name(value: Any) -> str:
    """Full name of a value's type, such as ``"torch.Tensor"``; builtins without module
    (``"list"``).
    """
    kind = type(value)
    module = str(kind.__module__)
    return kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}"


def is_torch(value: Any) -> bool:
    """Whether a value has a type of torch, which need not be installed."""
    return str(type(value).__module__).split(".", 1)[0] == "torch"


def not_a_tensor(op: str, name: str, value: Any, expected: str = "a tensor") -> TypeError:
    """The error to raise if `value` must be a tensor and is not.

    Parameters
    ----------
    op, name : str
        Names of the operator and of its argument.
    value : any
    expected : str
        Alternatives to a Paddle tensor that the argument allows.
    """
    if is_torch(value):
        return TypeError(
            f"{op}: {name}: expected a paddle.Tensor, got {type_name(value)}; "
            f"{_OF_TORCH} converts it without a copy"
        )
    return TypeError(f"{op}: {name}: expected {expected}, got {type_name(value)}")
