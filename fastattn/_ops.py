"""The compiled operators: find the library, call an operator, register with Paddle.

The import of this module loads nothing. The first :func:`call` (or :func:`load`) loads the library.

In dygraph an operator's C++ function is called through the module ``fastattn._direct``, with the
tensors as they are. The call bypasses Paddle's registry: for every call of a custom operator,
Paddle copies its table of all of them, so calls get slower with each registered operator. The
operators are registered when the first program is traced, or if ``_direct`` was not built.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.util
import math
import re
import runpy
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import paddle

from fastattn import _empty_inputs, _gpu_fits, env
from fastattn._attrs import typed_attrs
from fastattn._foreign import not_a_tensor

LIBRARY_NAME = "_fastattn_ops.so"
PREFIX = "fastattn_"

# The error of the checks in custom_ops/api/check.h, within Paddle's own text.
_ERROR = re.compile(
    r"\[(TypeError|ValueError|NotImplementedError|RuntimeError)\] (.*?)\s*(?:\n\s*\[|\Z)", re.S
)
# Paddle's own check of the type of an attribute.
_ATTRIBUTE_ERROR = re.compile(r"position (\d+)\) must be (\w+), but got ([\w.]+)")
# Messages for std::bad_alloc, from fastattn._direct and from Paddle.
_OUT_OF_MEMORY = ("out of memory", "std::bad_alloc")
_ERROR_TYPES = {
    "TypeError": TypeError,
    "ValueError": ValueError,
    "NotImplementedError": NotImplementedError,
    "RuntimeError": RuntimeError,
}


class OpSignature(NamedTuple):
    """Inputs, attributes and outputs of an operator, as built."""

    name: str  # the public name, without the prefix
    inputs: tuple[str, ...]
    optional: tuple[bool, ...]  # one per input
    attrs: tuple[str, ...]
    outputs: tuple[str, ...]
    inplace: dict[int, int]  # output index -> input index
    attr_types: tuple[int, ...]  # Paddle's AttrType, one per attribute

    @property
    def attr_names(self) -> list[str]:
        """Attributes without their types, which Paddle's registry tells as well."""
        return [name.split(":")[0] for name in self.attrs]


class _Direct(NamedTuple):
    """An operator in the form that ``fastattn._direct`` calls."""

    handle: int
    signature: OpSignature
    strided: tuple[bool, ...]  # inputs whose strides the operator supports, or refuses itself


def library_path() -> Path:
    """Path of the compiled library: ``FASTATTN_LIBRARY`` or the library in the package."""
    override = env.library()
    return Path(override) if override else Path(__file__).parent / LIBRARY_NAME


def _check_build(path: Path) -> None:
    """Refuse a library that was built for a Paddle version other than the imported one."""
    record = path.with_name("_build_info.py")  # the build writes it next to the library
    if not record.exists():
        return
    built = runpy.run_path(str(record)).get("PADDLE_VERSION")
    if built != paddle.__version__:
        raise ImportError(
            f"{path} was built for Paddle {built}, but Paddle {paddle.__version__} is imported. "
            "Custom operators fit one Paddle version only: rebuild with "
            "`python setup_ops.py install` (or `pip install .`) under this Paddle."
        )


def check_installation() -> None:
    """Say in one line that the package was built for another Paddle, or for other GPUs.

    ``fastattn.functional`` calls it when it is imported. Nothing is loaded. A library without a
    record of its build beside it is not checked, and a missing one shows at the first call.

    Raises
    ------
    ImportError
        If the library was built for another Paddle.

    Warns
    -----
    UserWarning
        If the current device is a GPU that runs none of the library's kernels. The CPU's kernels
        still work.
    """
    path = library_path()
    _check_build(path)
    device = paddle.device.get_device()
    record = path.with_name("_build_info.py")
    if not device.startswith("gpu") or not record.exists():
        return
    archs = runpy.run_path(str(record)).get("ARCHS")
    facts = paddle.device.cuda.get_device_properties(int(device.partition(":")[2] or 0))
    problem = _gpu_fits.problem(archs, (facts.major, facts.minor)) if archs else None
    if problem is not None:
        warnings.warn(f"{path}: {problem}", stacklevel=2)


def _checked_library() -> Path:
    """Path of the library, after a check that it exists and fits the imported Paddle."""
    path = library_path()
    if not path.exists():
        raise ImportError(
            f"fastattn's compiled operators are missing ({path}). Build them with "
            "`python setup_ops.py install`, or in a source tree, with `pip install -e .`."
        )
    _check_build(path)
    return path


def _cannot_load(path: Path, error: Exception) -> ImportError:
    return ImportError(f"{path} cannot be loaded into Paddle {paddle.__version__}: {error}")


#: Held while the library is loaded or registered, because several threads may make the first call.
_LOADING = threading.RLock()


@functools.lru_cache(maxsize=1)
def load() -> tuple[str, ...]:
    """Load the compiled library and register its operators with Paddle.

    Returns
    -------
    tuple of str
        Names of the registered operators, with the ``fastattn_`` prefix.

    Raises
    ------
    ImportError
        If the library is missing, was built for another Paddle, or cannot be loaded.
    """
    from paddle.base.framework import OpProtoHolder
    from paddle.utils.cpp_extension.extension_utils import load_op_meta_info_and_register_op

    path = _checked_library()
    try:
        with _LOADING:
            load_op_meta_info_and_register_op(str(path))
    except (OSError, RuntimeError, ValueError) as error:
        raise _cannot_load(path, error) from error
    _read_limits()
    from fastattn import _programs  # it imports this module

    _programs.watch()
    # Paddle returns only new operators. If another library was registered after ours was loaded, it
    # registered our operators too.
    return tuple(n for n in OpProtoHolder.instance().op_proto_map if n.startswith(PREFIX))


def _setter(name: str, *types: Any) -> Any:
    """The library's setter of this name, for a value from the environment."""
    path = _checked_library()
    try:
        function = getattr(ctypes.CDLL(str(path)), name)
    except AttributeError as error:
        raise _cannot_load(path, error) from error
    function.argtypes, function.restype = types, None
    return function


def limit_dequantized(mib: float, operations: float) -> None:
    """Set what docs/kernels/dequantize_kv.md calls by its variables."""
    limit = _setter("fastattn_limit_dequantized", ctypes.c_int64, ctypes.c_double)
    limit(int(min(mib, 2**20) * 2**20), operations)


@functools.lru_cache(maxsize=1)
def _read_limits() -> None:
    """Set the limits from the environment, once, when the library is first loaded in any way."""
    limit_dequantized(*env.dequantized())
    _setter("fastattn_set_kv_signal_mode", ctypes.c_int)(env.kv_signal_mode())


def _direct_module(library: Path) -> ModuleType | None:
    """The ``_direct`` module next to the library, or None."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = library.with_name(f"_direct{suffix}")
        if path.exists():
            spec = importlib.util.spec_from_file_location("fastattn._direct", path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    return None


_ATTRIBUTE_TYPES = {"int": 0, "float": 1, "std::string": 2, "bool": 6, "int64_t": 9}


class _Bound(NamedTuple):
    """``fastattn._direct`` and the operators of the library."""

    module: ModuleType | None
    operators: dict[str, _Direct]


_bound: list[_Bound] = []


def _bind() -> _Bound:
    """Load the library without registering it, once, from any number of threads."""
    with _LOADING:
        if not _bound:
            _bound.append(_load_library())
        return _bound[0]


@functools.lru_cache(maxsize=1)
def _load_direct() -> tuple[Any, dict[str, _Direct]]:
    """The function that calls operators, and the operators.

    None and an empty dict without ``_direct``, which is only built if Python's headers are
    installed.
    """
    module, operators = _bind()
    return (None if module is None else module.call), operators


def _load_library() -> _Bound:
    path = _checked_library()
    try:
        module = _direct_module(path)
        facts = {} if module is None else module.bind(str(path))
    except (ImportError, RuntimeError) as error:
        raise _cannot_load(path, error) from error
    if module is not None:
        _read_limits()
    operators = {}
    for name, (handle, inputs, optional, attrs, outputs, inplace, strided) in facts.items():
        pairs = [a.replace(" ", "").split(":", 1) for a in attrs]  # "causal: bool"
        names = tuple(attr for attr, _ in pairs)
        types = tuple(_ATTRIBUTE_TYPES[kind] for _, kind in pairs)
        op = name[len(PREFIX) :]
        signature = OpSignature(op, inputs, optional, names, outputs, inplace, types)
        operators[op] = _Direct(handle, signature, strided)
    return _Bound(module, operators)


@functools.lru_cache(maxsize=1)
def helpers() -> ModuleType | None:
    """``fastattn._direct``, or None if it was not built."""
    return _bind().module


def prepare() -> None:
    """Load the library without calling an operator, so that its errors show now.

    Raises
    ------
    ImportError
        As :func:`load`, which runs only if operators cannot be called directly.
    """
    if _load_direct()[0] is None:
        load()


def operators() -> tuple[str, ...]:
    """Names of the operators of the library, without the prefix.

    They are registered with Paddle only if they cannot be called directly.
    """
    run, found = _load_direct()
    return tuple(n[len(PREFIX) :] for n in load()) if run is None else tuple(found)


@functools.cache
def signature(op: str) -> OpSignature:
    """Signature of the operator ``fastattn_<op>``, as it was built."""
    _, operators = _load_direct()
    if op in operators:
        return operators[op].signature
    return registered_signature(op)


@functools.cache
def registered_signature(op: str) -> OpSignature:
    """Signature of the operator ``fastattn_<op>``, from Paddle's registry."""
    from paddle.base.framework import OpProtoHolder
    from paddle.utils.cpp_extension.extension_utils import parse_op_info

    load()
    name = PREFIX + op
    inputs, attrs, outputs = parse_op_info(name)
    inplace = paddle.base.core.eager._get_custom_operator_inplace_map(name)
    types = {a.name: a.type for a in OpProtoHolder.instance().get_op_proto(name).attrs}
    return OpSignature(
        op,
        tuple(i.split("@")[0] for i in inputs),
        tuple("@OPTIONAL" in i for i in inputs),
        tuple(attrs),
        tuple(o.split("@")[0] for o in outputs),
        dict(inplace),
        tuple(types[a] for a in attrs),
    )


@functools.lru_cache(maxsize=1)
def _tensor_types() -> tuple[type, ...]:
    types: list[type] = [paddle.Tensor, paddle.base.core.eager.Tensor, paddle.static.Variable]
    if hasattr(paddle, "pir"):
        types.append(paddle.pir.Value)
    return tuple(types)


def is_tensor(value: Any) -> bool:
    """Whether `value` is a tensor in any of Paddle's modes (eager, PIR, static graph)."""
    return isinstance(value, _tensor_types())


#: Fewer elements fit 64 bits in any dtype of a result: RequireBytesFit of api/check.h.
_MOST_ELEMENTS = 2**63 // 16


def _check_inputs(
    sig: OpSignature, values: tuple[Any, ...], attrs: tuple[Any, ...], *, copied: bool
) -> None:
    """Refuse arguments that are not tensors and, with `copied`, arguments that a copy would break.

    `copied` means that the call goes through Paddle's registry.
    """
    eager = paddle.base.core.eager.Tensor
    inplace = sig.inplace.values()
    for i, (name, value) in enumerate(zip(sig.inputs, values)):
        if value is None:
            if not sig.optional[i]:
                raise TypeError(f"{sig.name}: {name}: expected a tensor, got None")
            continue
        if not is_tensor(value):
            raise not_a_tensor(sig.name, name, value)
        if isinstance(value, eager) and value._is_initialized() and not value.is_dense():
            kind = "distributed" if value.is_dist() else "sparse"
            raise TypeError(f"{sig.name}: {name}: expected a dense tensor, got a {kind} one")
        # Paddle counts bytes in 64 bits: its copy of a view with repeats would have too few bytes.
        if isinstance(value, eager) and math.prod(value.shape) >= _MOST_ELEMENTS:
            raise ValueError(
                f"{sig.name}: {name}: expected sizes whose product fits 64 bits, got shape "
                f"{list(value.shape)}"
            )
        empty = sig.optional[i] and 0 in value.shape
        if empty and not _empty_inputs.may_be_empty(sig, i, values, attrs, registered=copied):
            raise ValueError(
                f"{sig.name}: {name}: expected a tensor with elements, got shape "
                f"{list(value.shape)}"
            )
        stays = copied and (i in inplace or name in _empty_inputs.CACHES)
        if stays and isinstance(value, eager) and not value.is_contiguous():
            raise ValueError(
                f"{sig.name}: {name}: expected a contiguous tensor, got shape "
                f"{list(value.shape)} with strides {list(value.strides)}"
            )


def is_memory_error(error: Exception) -> bool:
    """Whether an operator ran out of memory."""
    text = str(error)
    told = "ResourceExhausted" in text or any(words in text for words in _OUT_OF_MEMORY)
    return isinstance(error, MemoryError) or told


def reraise_of(sig: OpSignature, error: Exception) -> NoReturn:
    """Raise the error of Paddle or of ``fastattn._direct`` under the operator's name."""
    match = _ATTRIBUTE_ERROR.search(str(error))
    if match is not None:
        # Paddle's message has the position in the raw call, counted from 1 and including the
        # operator's name.
        index = int(match[1]) - len(sig.inputs) - 2
        if 0 <= index < len(sig.attrs):
            name, kind = sig.attrs[index].split(":")[0], {"long": "int"}.get(match[2], match[2])
            text = f"{sig.name}: {name}: expected {kind}, got {match[3]}"
            raise TypeError(text) from None
    if _ERROR.search(str(error)) is None:
        if is_memory_error(error):
            raise MemoryError(f"{sig.name}: {error}") from None
        if "output is not initialized" in str(error):  # Paddle 2.6; 3.x returns it
            raise NotImplementedError(
                f"Paddle {paddle.__version__} cannot return an empty tensor from a custom operator"
            ) from None
    reraise_named(error)


def reraise_named(error: Exception) -> NoReturn:
    """Raise the error of a program's run under the operator's name, if one of our operators caused
    it.
    """
    match = _ERROR.search(str(error))
    if match is None:
        raise error
    raise _ERROR_TYPES[match[1]](match[2]) from None


def call(op: str, inputs: tuple[Any, ...], attrs: tuple[Any, ...] = ()) -> list[Any]:
    """Run the operator ``fastattn_<op>`` in Paddle's current mode.

    Parameters
    ----------
    op : str
        Name without the ``fastattn_`` prefix.
    inputs : tuple of Tensor or None
        In the order of the operator's definition; None for an absent optional input.
    attrs : tuple
        In the order of the operator's definition.

    Returns
    -------
    list of Tensor
        All outputs, including those written in place. None for an absent optional tensor, and for a
        result that was not requested.
    """
    if paddle.in_dynamic_mode():
        run, operators = _load_direct()
        if run is not None:
            direct = operators[op]
            try:
                outputs = run(direct.handle, inputs, attrs, paddle.is_grad_enabled)
            except RuntimeError as error:
                reraise_of(direct.signature, error)
            if outputs is None:
                return _call_unusual(run, direct, inputs, attrs)
            return outputs  # type: ignore[no-any-return]
    return call_registered(op, inputs, attrs)


def _call_unusual(
    run: Any, direct: _Direct, inputs: tuple[Any, ...], attrs: tuple[Any, ...]
) -> list[Any]:
    """Make a call that ``_direct`` declined, or raise an error about its arguments."""
    sig = direct.signature
    _check_inputs(sig, inputs, attrs, copied=False)
    attrs = typed_attrs(sig, attrs)
    if paddle.is_grad_enabled():
        _tell_no_gradient(sig, inputs)
    taken = tuple(
        value if strided or value is None or value.is_contiguous() else value.contiguous()
        for value, strided in zip(inputs, direct.strided)
    )
    try:
        outputs = run(direct.handle, taken, attrs, None)
    except RuntimeError as error:
        reraise_of(sig, error)
    # Still declined: an undefined tensor, for which Paddle's registry raises the right error.
    return call_registered(sig.name, inputs, attrs) if outputs is None else list(outputs)


_told_no_gradient: set[str] = set()


def _tell_no_gradient(sig: OpSignature, inputs: tuple[Any, ...]) -> None:
    """Refuse to write tensors that require a gradient; warn once that an operator has none."""
    wanting = [i for i, value in enumerate(inputs) if value is not None and not value.stop_gradient]
    for i in wanting:
        if i in sig.inplace.values():
            raise ValueError(
                f"{sig.name}: {sig.inputs[i]}: it is written in place and must have "
                "stop_gradient = True"
            )
    if wanting and sig.name not in _told_no_gradient:
        _told_no_gradient.add(sig.name)
        warnings.warn(
            f"{sig.name}: {sig.inputs[wanting[0]]} wants a gradient (stop_gradient = False), but "
            "the operator has none: nothing flows back through it. Call it under paddle.no_grad().",
            RuntimeWarning,
            stacklevel=5,
        )


def _refuse_eager(sig: OpSignature, inputs: tuple[Any, ...]) -> None:
    """Refuse dygraph tensors in a static program, where Paddle would end the process.

    ``paddle.jit.to_static`` turns the tensors of a traced function into variables of the program.
    """
    if paddle.base.dygraph.base.in_to_static_mode():
        return
    for name, value in zip(sig.inputs, inputs):
        if isinstance(value, paddle.base.core.eager.Tensor):
            raise TypeError(
                f"{sig.name}: {name}: expected a variable of the static program, got a tensor of "
                "dygraph"
            )


def call_registered(op: str, inputs: tuple[Any, ...], attrs: tuple[Any, ...] = ()) -> list[Any]:
    """Make a :func:`call` through Paddle's registry: in programs, and in dygraph without
    ``_direct``.
    """
    load()
    sig = signature(op)
    _check_inputs(sig, inputs, attrs, copied=True)
    run = _runner()
    if run is not paddle.base.core.eager._run_custom_op:
        from fastattn import _tracing  # it imports this module

        _refuse_eager(sig, inputs)
        attrs = typed_attrs(sig, attrs)
        _tracing.check(sig, inputs, attrs)
    elif any(type(value) is int and value.bit_length() > 31 for value in attrs):
        attrs = typed_attrs(sig, attrs)  # Paddle wraps some integers, and wrongly refuses others
    if run is None:
        from fastattn import _programs  # it imports this module

        return _programs.append_static(sig, inputs, attrs)
    if run is paddle.base.core.eager._run_custom_op and paddle.is_grad_enabled():
        _tell_no_gradient(sig, inputs)
    try:
        outputs = run(PREFIX + op, *inputs, *attrs)
    except (MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        reraise_of(sig, error)
    if run is not paddle.base.core.eager._run_custom_op:
        # No operator has a gradient. Otherwise results would want one where an input does, such as
        # scales that are parameters, and Paddle refuses such a program in training mode.
        for value in outputs:
            if value is not None:
                value.stop_gradient = True
    # An absent optional tensor gives an empty tensor in the list, or no entry (PIR).
    absent = [i for i, source in sig.inplace.items() if inputs[source] is None]
    if not absent:
        return list(outputs)
    if len(outputs) == len(sig.outputs):
        return [None if i in absent else x for i, x in enumerate(outputs)]
    present = iter(outputs)
    return [None if i in absent else next(present) for i in range(len(sig.outputs))]


def _runner() -> Any:
    """Function that runs a custom operator in the current mode; None in a legacy static program."""
    if paddle.in_dynamic_mode():
        return paddle.base.core.eager._run_custom_op
    # Paddle 3 traces into PIR, where its _C_ops knows custom operators. Paddle 2.6 does not.
    if getattr(paddle.framework, "in_dynamic_or_pir_mode", bool)():
        return getattr(paddle._C_ops, "_run_custom_op", None)
    return None


_unwatched_call = call


def bound(op: str, fixed: dict[str, Any], open_names: list[str]) -> Callable[..., Any] | None:
    """The operator as a function of the arguments `open_names`, with all others fixed.

    Parameters
    ----------
    op : str
        Name without the ``fastattn_`` prefix.
    fixed : dict
        Inputs and attributes by name. An absent input is None.
    open_names : list of str

    Returns
    -------
    callable or None
        Its result is the operator's first result, or None where :func:`call` must make the call,
        which also finds out what is wrong. Only for a call that :func:`is_direct` permits. None in
        place of the function without ``_direct``, or for an attribute of a wrong type.
    """
    module, operators = _bind()
    if module is None:
        return None
    return module.bound(operators[op].handle, fixed, open_names, paddle.is_grad_enabled)  # type: ignore[no-any-return]


def is_direct() -> bool:
    """Whether a call now may bypass :func:`call`: in dygraph, if nothing observes the calls."""
    return call is _unwatched_call and paddle.in_dynamic_mode()


def handle(op: str) -> int:
    """Number of the operator ``fastattn_<op>`` in ``fastattn._direct``; -1 without it."""
    _, operators = _load_direct()
    return operators[op].handle if op in operators else -1


if env.check():
    from fastattn import _check

    call = _check.checked(call, signature, env.check())
if env.profile():
    from fastattn import _profile

    call = _profile.ranged(call)
if (_dump_settings := env.dump()) is not None:
    from fastattn.dump import record

    call = record.recorded(call, signature, _dump_settings)
if env.log_level():
    from fastattn import _log

    call = _log.logged(call, signature)
