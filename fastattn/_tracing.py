"""Checks of an operator's arguments during a trace.

The operator's own C++ function makes them without data, with the shapes and dtypes that the program
knows (``custom_ops/api/direct_check.h``). Facts that only a run knows are checked at the run.
Dygraph calls do not use this module.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import paddle

from fastattn import _ops

#: Sizes that are tried in place of unknown ones. A refusal counts only if its text is the same with
#: each of them.
_GUESSES = (64, 128, 1)
#: Upper bound of the number of dimensions to correct.
_MOST_CORRECTIONS = 64

#: Dtypes that arguments may have; an operator's refusal names another one.
_DTYPES = frozenset(
    {
        *("bool", "int8", "uint8", "int16", "int32", "int64", "complex64", "complex128"),
        *("bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"),
    }
)

_SHAPE_ERROR = re.compile(r"\] \w+: (\w+): expected shape \[([\d, ?]+)\], got \[([\d, ]+)\]")


class _Fact(NamedTuple):
    """Shape and dtype of a tensor in a program; -1 is an unknown size."""

    dtype: str
    shape: tuple[int, ...]


def _fact(value: Any) -> _Fact:
    return _Fact(str(value.dtype).rpartition(".")[2], tuple(int(size) for size in value.shape))


def _check_view(op: str, name: str, value: Any) -> None:
    """Refuse to write into a view that the traced function itself made.

    A traced program computes a view as a separate tensor, so writes into it are lost.
    """
    define = getattr(value, "get_defining_op", None)
    made_by = define() if define is not None else None
    if made_by is None or made_by.name() not in getattr(paddle.base.framework, "stride_ops", ()):
        return
    raise ValueError(
        f"{op}: {name}: it is written in place and must not be a view that the traced function "
        f"made ({made_by.name()}): a program writes into a copy of it; make the view outside"
    )


def _sizes(text: str) -> list[int]:
    return [int(size) if size != "?" else -1 for size in text.split(", ")]


def _correct(
    sig: _ops.OpSignature, facts: list[_Fact | None], shapes: list[list[int]], text: str
) -> bool:
    """Give guessed sizes the values that a refused shape should have; False if none differs."""
    match = _SHAPE_ERROR.search(text)
    if match is None or match[1] not in sig.inputs:
        return False
    index = sig.inputs.index(match[1])
    fact, expected, got = facts[index], _sizes(match[2]), _sizes(match[3])
    if fact is None or got != shapes[index] or len(expected) != len(got):
        return False
    wrong = [i for i, size in enumerate(expected) if size not in (-1, got[i])]
    if not wrong or any(fact.shape[i] != -1 for i in wrong):
        return False
    for i in wrong:
        shapes[index][i] = expected[i]
    return True


def _refusal(
    sig: _ops.OpSignature, facts: list[_Fact | None], attrs: tuple[Any, ...], guess: int
) -> Exception | None:
    """The operator's error for the arguments, with `guess` in place of unknown sizes."""
    module, handle = _ops.helpers(), _ops.handle(sig.name)
    assert module is not None
    shapes = [[guess if n < 0 else n for n in fact.shape] if fact else [] for fact in facts]
    for _ in range(_MOST_CORRECTIONS):
        inputs = tuple(fact and (fact.dtype, shape) for fact, shape in zip(facts, shapes))
        try:
            module.check(handle, inputs, attrs)
            return None
        except (RuntimeError, MemoryError) as error:
            if not _correct(sig, facts, shapes, str(error)):
                return error
    return None


def check(sig: _ops.OpSignature, inputs: tuple[Any, ...], attrs: tuple[Any, ...]) -> None:
    """Refuse arguments that the operator would refuse, and writes that would be lost.

    Without ``fastattn._direct`` only lost writes are refused here; the rest is refused at the run.

    Parameters
    ----------
    sig : OpSignature
    inputs, attrs : tuple
        In the order of registration, with the correct Python types.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        With the operator's own text.
    """
    for i in sig.inplace.values():
        _check_view(sig.name, sig.inputs[i], inputs[i])
    if _ops.helpers() is None:
        return
    facts = [None if value is None else _fact(value) for value in inputs]
    if any(fact and fact.dtype not in _DTYPES for fact in facts):
        return
    known = not any(size < 0 for fact in facts if fact for size in fact.shape)
    errors: list[Exception] = []
    for guess in _GUESSES[:1] if known else _GUESSES:
        error = _refusal(sig, facts, attrs, guess)
        if error is None or (errors and str(error) != str(errors[0])):
            return
        errors.append(error)
    if not _ops.is_memory_error(errors[0]):  # results of this size matter only at a run
        _ops.reraise_of(sig, errors[0])
