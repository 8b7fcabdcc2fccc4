"""Makes FastDeploy believe that this machine has a GPU: platform, streams, compiled ops."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import paddle

from fastdeploy_check.stubs import OPS


class OpNotStoodInFor(RuntimeError):
    """FastDeploy called a compiled operator for which this check has no stand-in."""


def pretend_cuda() -> None:
    """Tell FastDeploy, and no other package, that Paddle was built with CUDA."""
    really = paddle.is_compiled_with_cuda

    def is_compiled_with_cuda() -> bool:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return caller.startswith("fastdeploy") or really()

    paddle.is_compiled_with_cuda = is_compiled_with_cuda
    paddle.device.is_compiled_with_cuda = is_compiled_with_cuda
    for name in ("pin_memory", "cuda"):
        setattr(paddle.Tensor, name, lambda self, *_, **__: self)

    class Event:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def record(self, *_: Any) -> None: ...
        def synchronize(self) -> None: ...
        def query(self) -> bool:
            return True

    cuda = paddle.device.cuda
    cuda.create_event, cuda.Event = Event, Event
    for name in ("synchronize", "empty_cache"):
        setattr(cuda, name, lambda *_, **__: None)
        setattr(paddle.device, name, lambda *_, **__: None)
    cuda.get_device_properties = lambda *_, **__: types.SimpleNamespace(
        name="H100", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132
    )
    paddle.device.get_device_properties = cuda.get_device_properties
    cuda.get_device_capability = lambda *_, **__: (9, 0)
    cuda.get_device_name = lambda *_, **__: "H100"
    cuda.device_count = lambda: 1
    for name in ("max_memory_allocated", "max_memory_reserved", "memory_allocated"):
        setattr(cuda, name, lambda *_, **__: 0)
    _divide_in_float32()
    _multiply_in_float32()
    _one_process()
    _mend_sot()
    wanted = paddle.set_flags

    def set_flags(flags: dict[str, Any]) -> None:
        for name, value in flags.items():  # this Paddle lacks the flags of a GPU build
            with contextlib.suppress(ValueError, RuntimeError):
                wanted({name: value})
            FLAGS[name] = value

    really_get = paddle.get_flags

    def get_flags(flags: Any) -> dict[str, Any]:
        names = [flags] if isinstance(flags, str) else list(flags)
        found = {}
        for name in names:
            if name in FLAGS:
                found[name] = FLAGS[name]
                continue
            try:
                found.update(really_get(name))
            except ValueError:
                found[name] = ""
        return found

    paddle.set_flags, paddle.get_flags = set_flags, get_flags


def _one_process() -> None:
    """Process groups of the only process: models ask for their sizes and ranks."""

    class Groups:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: 1 if "world_size" in name else 0 if "rank" in name else None

    fleet = importlib.import_module("paddle.distributed.fleet")
    topology = importlib.import_module("paddle.distributed.fleet.base.topology")
    fleet.fleet._hcg = topology._HYBRID_PARALLEL_GROUP = Groups()
    fleet.fleet._user_defined_strategy = fleet.DistributedStrategy()
    paddle.distributed.new_group = lambda *_, **__: None
    paddle.distributed.all_reduce = lambda *_, **__: None


def _mend_sot() -> None:
    """Let SOT translate ``if tensor is not None``, as in FastDeploy's norm.

    From Python 3.11 on this is an instruction of its own, at which Paddle 3.3's SOT breaks off.
    """
    package = "paddle.jit.sot.opcode_translator.executor"
    executor = importlib.import_module(f"{package}.opcode_executor").OpcodeExecutorBase
    tensor = importlib.import_module(f"{package}.variables").TensorVariable
    for name in dir(executor):
        if not (name.startswith("POP_JUMP") and name.endswith("_NONE")):
            continue
        really, jumps = getattr(executor, name), name.endswith("NOT_NONE")

        def jump(self: Any, instr: Any, really: Any = really, jumps: bool = jumps) -> Any:
            if not isinstance(self.stack.top, tensor):
                return really(self, instr)
            self.stack.pop()
            return self.jump_to(instr.jump_to) if jumps else None

        setattr(executor, name, jump)


def _divide_in_float32() -> None:
    """Paddle cannot divide bfloat16 on a CPU, but FastDeploy does so to load scales."""
    for name in ("__truediv__", "__rtruediv__"):
        really = getattr(paddle.Tensor, name)

        def divide(self: Any, other: Any, really: Any = really) -> Any:
            if self.dtype != paddle.bfloat16:
                return really(self, other)
            other = other.astype("float32") if isinstance(other, paddle.Tensor) else other
            return really(self.astype("float32"), other).astype("bfloat16")

        setattr(paddle.Tensor, name, divide)


def _multiply_in_float32() -> None:
    """Products and norms of bfloat16, which Paddle has only on a GPU, with one final rounding."""

    def widened(really: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [x for x in args if isinstance(x, paddle.Tensor)]
            if not any(x.dtype == paddle.bfloat16 for x in tensors):
                return really(*args, **kwargs)

            def wide(x: Any) -> Any:
                return x.astype("float32") if isinstance(x, paddle.Tensor) else x

            given = {name: wide(x) for name, x in kwargs.items()}
            out = really(*map(wide, args), **given)
            return out.astype("bfloat16")

        return call

    for name in ("matmul", "bmm"):
        setattr(paddle, name, widened(getattr(paddle, name)))

    def norm(centre: bool) -> Callable[..., Any]:
        def call(
            x: Any, norm_weight: Any, norm_bias: Any, epsilon: float, *_: Any, **options: Any
        ) -> tuple[Any, Any]:
            wide, residual = x.astype("float32"), options.get("residual")
            wide = wide if residual is None else wide + residual.astype("float32")
            centred = wide - wide.mean(-1, keepdim=True) if centre else wide
            scale = paddle.rsqrt((centred * centred).mean(-1, keepdim=True) + epsilon)
            out = centred * scale * norm_weight.astype("float32")
            out = out if norm_bias is None else out + norm_bias.astype("float32")
            return out.astype(x.dtype), wide.astype(x.dtype)

        return call

    incubated = importlib.import_module("paddle.incubate.nn.functional")
    incubated.fused_rms_norm, incubated.fused_layer_norm = norm(False), norm(True)
    incubated.fused_bias_act = _swiglu
    really = paddle.nn.functional.linear

    def linear(x: Any, weight: Any, bias: Any = None, name: Any = None) -> Any:
        if x.dtype != paddle.bfloat16:
            return really(x, weight, bias)
        out = paddle.matmul(x.astype("float32"), weight.astype("float32"))
        out = out if bias is None else out + bias.astype("float32")
        return out.astype("bfloat16")

    paddle.nn.functional.linear = linear
    layers = importlib.import_module("paddle.distributed.fleet.layers.mpu.mp_layers")
    layers.F.linear = linear


def _swiglu(x: Any, bias: Any = None, act_method: str = "gelu", **_: Any) -> Any:
    """Paddle's activation of two halves, which it has only on a GPU."""
    if act_method != "swiglu" or bias is not None:
        raise OpNotStoodInFor(f"fused_bias_act: {act_method}")
    gate, up = paddle.chunk(x.astype("float32"), 2, -1)
    return (gate * paddle.nn.functional.sigmoid(gate) * up).astype("bfloat16")


#: Flags that FastDeploy has set.
FLAGS: dict[str, Any] = {}


def install_ops(ops: dict[str, Callable[..., Any]]) -> None:
    """Replace FastDeploy's module of compiled operators by stand-ins."""

    class Ops(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__") and name.endswith("__"):
                raise AttributeError(name)

            def missing(*_: Any, **__: Any) -> Any:
                raise OpNotStoodInFor(f"{name}, an operator of this tree")

            missing.__name__ = name
            return ops.get(name, missing)

    module = Ops(OPS)
    module.__path__ = []
    sys.modules[OPS] = module
