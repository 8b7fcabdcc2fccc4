"""``FASTATTN_LOG``: a log of operator calls through :mod:`logging`, before each kernel starts.

Level 1 logs (INFO) the first call of every configuration. A configuration is an operator with the
dtypes, places, options and shapes of its inputs, without the first dimension, which varies from
step to step. Level 2 also logs (DEBUG) every call with all its inputs, so the last line identifies
the call that crashed. Level 3 adds the kernels that the call takes and their plan. Contents of
tensors are never read, because that would wait for the device. At level 0 this module is not
imported.

The logger is ``fastattn``. Its lines go only to stderr, because Paddle gives the root logger a
handler of its own, which would repeat them. If an application adds a handler to the logger
``fastattn``, at any time, the lines go there instead.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any

import paddle

from fastattn import env

LEVEL = env.log_level()
LOGGER = logging.getLogger("fastattn")

#: Maximum number of configurations that level 1 remembers; it logs no further ones.
MOST_CONFIGURATIONS = 1000


class _StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to the current `sys.stderr`, unless the logger has another handler."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.setFormatter(
            logging.Formatter("%(asctime)s fastattn %(process)d %(levelname)s %(message)s")
        )

    @property
    def stream(self) -> Any:
        return sys.stderr

    def filter(self, record: logging.LogRecord) -> Any:
        return LOGGER.handlers == [self] and super().filter(record)


def _dtype(value: Any) -> str:
    return str(value.dtype).rpartition(".")[2]


def _is_eager(value: Any) -> bool:
    """Whether a value has a place and strides. Variables of a traced program warn when asked."""
    return isinstance(value, paddle.base.core.eager.Tensor)


def _place(value: Any) -> str:
    return str(value.place).removeprefix("Place(").removesuffix(")") if _is_eager(value) else ""


def describe(value: Any) -> str:
    """A tensor as ``bfloat16[4, 8, 128] gpu:0``, another value by ``repr``. Never raises."""
    try:
        if not hasattr(value, "dtype") or not hasattr(value, "shape"):
            return repr(value)
        text = f"{_dtype(value)}{list(value.shape)} {_place(value)}".rstrip()
        if _is_eager(value) and not value.is_contiguous():
            text += f" strides {list(value.strides)}"
        return text
    except Exception as error:
        return f"<{type(value).__name__}: {type(error).__name__}>"


def _configuration(op: str, inputs: tuple[Any, ...], attrs: tuple[Any, ...]) -> Any:
    """Key of a configuration for level 1. It omits numbers, such as lengths and scales."""
    key: list[Any] = [op]
    for value in inputs:
        if hasattr(value, "dtype") and hasattr(value, "shape"):
            key.append((_dtype(value), tuple(value.shape)[1:], _place(value)))
        else:
            key.append(type(value))
    return tuple([*key, *(x for x in attrs if isinstance(x, (str, bool)))])


def _line(names: Iterable[str], values: tuple[Any, ...]) -> str:
    return ", ".join(f"{name}={describe(v)}" for name, v in zip(names, values))


def _plan_of(sig: Any, inputs: tuple[Any, ...], attrs: tuple[Any, ...]) -> str:
    """Kernels and launches of a call."""
    from fastattn import _plan  # it imports nothing of Paddle's by itself

    given = {n: t for n, t in zip(sig.inputs, inputs) if t is not None and hasattr(t, "shape")}
    shapes = {n: (_dtype(t), [int(size) for size in t.shape]) for n, t in given.items()}
    places = [str(t.place) for t in given.values() if _is_eager(t)]
    gpu = next((place for place in places if "gpu:" in place), None)
    place = "gpu:" + gpu.partition("gpu:")[2].rstrip(")") if gpu else "cpu"
    options = dict(zip(sig.attr_names, attrs))
    facts = _plan.facts_of(sig.name, shapes, options, _plan.device_of(place))
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def logged(call: Callable[..., Any], signature: Callable[[str], Any]) -> Callable[..., Any]:
    """Wrap `_ops.call` with a log."""
    seen: set[Any] = set()
    count = 0

    @functools.wraps(call)
    def wrapper(op: str, inputs: tuple[Any, ...], attrs: tuple[Any, ...] = ()) -> Any:
        nonlocal count
        count += 1
        try:
            key = _configuration(op, inputs, attrs)
            new = key not in seen and len(seen) < MOST_CONFIGURATIONS
            if new or LEVEL > 1:
                sig = signature(op)
                parts = _line(sig.inputs, inputs), _line(sig.attr_names, attrs)
                text = ", ".join(filter(None, parts))
                if new:
                    seen.add(key)
                    LOGGER.info("%s first called so: %s", op, text)
                if LEVEL > 1:
                    LOGGER.debug("call %d: %s: %s", count, op, text)
                if LEVEL > 2:
                    LOGGER.debug("call %d: %s: %s", count, op, _plan_of(sig, inputs, attrs))
        except Exception as error:  # a call that cannot be described is still made
            LOGGER.debug("call %d: %s: %s: %s", count, op, type(error).__name__, error)
        return call(op, inputs, attrs)

    return wrapper


if LEVEL:
    LOGGER.setLevel(logging.INFO if LEVEL == 1 else logging.DEBUG)
    if not LOGGER.handlers:
        LOGGER.addHandler(_StderrHandler())
        LOGGER.propagate = False
