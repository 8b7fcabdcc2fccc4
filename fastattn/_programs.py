"""Checks of the inputs of traced programs at every run.

Paddle copies an input of a program that is not contiguous or not on the program's device, and
passes an empty optional tensor as an absent one. An operator in the program cannot detect this: it
would write into the copy, or run without the tensor. So every run is checked, also of loaded
programs. A program without operators of this package is inspected only once.
"""

from __future__ import annotations

import functools
import importlib
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import paddle

from fastattn import _empty_inputs, _ops

_CUSTOM_OP = "custom_op." + _ops.PREFIX
_LOGGER = logging.getLogger("fastattn")


class _Use(NamedTuple):
    """An input or parameter of a program that is an argument of an operator."""

    is_parameter: bool
    position: int  # index in the program's inputs or parameters
    op: str
    name: str
    written: bool  # otherwise optional, and must not be empty
    # Position of the operator's first input, if it has one. If that is empty, this one may be
    # empty.
    counter: tuple[bool, int] | None = None


def _operations(block: Any) -> Iterator[Any]:
    for op in block.ops:
        yield op
        for inner in op.blocks():
            yield from _operations(inner)


def _uses(runner: Any) -> list[_Use]:
    """Inputs of a program that its operators write, or that must not be empty."""

    def place_of(value: Any) -> list[tuple[bool, int]]:
        return [(kind, at) for kind, at, known in places if value.is_same(known)]

    places = [(False, i, v) for i, v in enumerate(runner._inputs.var_list)]
    places += [(True, i, v) for i, v in enumerate(runner._param_values)]
    uses = []
    for op in _operations(runner._origin_main_program.global_block()):
        if not op.name().startswith(_CUSTOM_OP):
            continue
        sig = _ops.signature(op.name()[len(_CUSTOM_OP) :].rstrip("_"))
        written = set(sig.inplace.values())
        for i, name in enumerate(sig.inputs):
            counter: tuple[bool, int] | None = None
            if i not in written and not _empty_inputs.may_not_be_empty(sig, i):
                found = (
                    [] if not _empty_inputs.is_per_token(sig, i) else place_of(op.operand_source(0))
                )
                if not found:
                    continue
                counter = found[0]
            for place in place_of(op.operand_source(i)):
                uses.append(_Use(*place, sig.name, name, i in written, counter))
    return uses


def _check(use: _Use, tensor: Any, place: Any) -> None:
    if not use.written:
        if 0 in tensor.shape:
            raise ValueError(
                f"{use.op}: {use.name}: expected a tensor with elements, got shape "
                f"{list(tensor.shape)}"
            )
        return
    if not tensor.is_contiguous():
        raise ValueError(
            f"{use.op}: {use.name}: it is written in place and must be contiguous, got shape "
            f"{list(tensor.shape)} with strides {list(tensor.strides)}: a program writes into a "
            "copy"
        )
    if not use.is_parameter and tensor.stop_gradient and not tensor.place._equals(place):
        raise ValueError(
            f"{use.op}: {use.name}: it is written in place and must be on {place}, where the "
            f"program runs, got a tensor on {tensor.place}: a program writes into a copy"
        )


def _check_run(uses: list[_Use], runner: Any, inputs: Any) -> None:
    tensors = [x for x in paddle.utils.flatten(inputs) if not _is_constant(x)]
    if len(tensors) != len(runner._inputs.var_list):
        return
    place = paddle.framework._current_expected_place()
    for use in uses:
        tensor = (runner._params if use.is_parameter else tensors)[use.position]
        if use.counter is not None:
            is_parameter, position = use.counter
            if 0 in (runner._params if is_parameter else tensors)[position].shape:
                continue
        if isinstance(tensor, paddle.base.core.eager.Tensor):
            _check(use, tensor, place)


def _is_constant(value: Any) -> bool:
    """Whether an argument of a traced function is not an input of the program."""
    return not hasattr(value, "shape") or not hasattr(value, "dtype")


@functools.lru_cache(maxsize=1)
def watch() -> None:
    """Check all later runs of traced programs. Runs in Paddle 2 are not checked."""
    try:
        from paddle.jit.dy2static.pir_partial_program import PartialProgramLayer
    except ImportError:
        return
    known: weakref.WeakKeyDictionary[Any, list[_Use]] = weakref.WeakKeyDictionary()

    def checked(run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run)
        def checked_run(self: Any, inputs: Any) -> Any:
            uses = known.get(self)
            if uses is None:
                uses = known[self] = _uses(self)
            if uses:
                _check_run(uses, self, inputs)
            try:
                return run(self, inputs)
            except (MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
                _ops.reraise_named(error)

        return checked_run

    for name in ("__call__", "sot_call"):
        run = getattr(PartialProgramLayer, name, None)
        if run is not None:
            setattr(PartialProgramLayer, name, checked(run))


#: What loads saved programs: a module of Paddle, and a function in it.
_LOADERS = (
    ("paddle.jit", "load"),
    ("paddle.static", "load_inference_model"),
    ("paddle.inference", "create_predictor"),
)


@functools.lru_cache(maxsize=1)
def register_before_loading() -> None:
    """Have Paddle's functions that load a program register the operators first.

    Paddle 3 dereferences a null pointer at an operator that it does not know, and the process ends.
    The import of this package cannot register them: each call of any custom operator costs more
    with every one that is registered.
    """
    for module_name, name in _LOADERS:
        module = importlib.import_module(module_name)
        setattr(module, name, _registering(getattr(module, name)))


def _registering(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def loads(*args: Any, **options: Any) -> Any:
        try:
            _ops.load()
        except ImportError as error:  # the program may have none of them
            _LOGGER.warning("fastattn's operators are not registered with Paddle: %s", error)
        return load(*args, **options)

    return loads


def append_static(
    sig: _ops.OpSignature, inputs: tuple[Any, ...], attrs: tuple[Any, ...]
) -> list[Any]:
    """Append the operator to a legacy static program."""
    from paddle.base.layer_helper import LayerHelper

    helper = LayerHelper(_ops.PREFIX + sig.name)
    ins = {
        name + ("@OPTIONAL" if optional else ""): value
        for name, optional, value in zip(sig.inputs, sig.optional, inputs)
        if value is not None
    }
    outs: dict[str, Any] = {}
    pure = len(sig.inplace) == len(sig.outputs)
    for i, name in enumerate(sig.outputs):
        if i in sig.inplace:
            if inputs[sig.inplace[i]] is not None:
                suffix = "@OPTIONAL" if sig.optional[sig.inplace[i]] else ""
                written = inputs[sig.inplace[i]]
                # A variable that is fed does not keep an operator in a saved program. So an
                # operator that only writes in place returns new variables, which share their data
                # with the inputs.
                outs[name + suffix] = (
                    helper.create_variable(dtype=written.dtype) if pure else written
                )
        else:
            outs[name] = helper.create_variable(dtype="float32")
    helper.append_op(
        type=_ops.PREFIX + sig.name, inputs=ins, outputs=outs, attrs=dict(zip(sig.attrs, attrs))
    )
    return [outs.get(name, outs.get(name + "@OPTIONAL")) for name in sig.outputs]
