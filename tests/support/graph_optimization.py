"""What FastDeploy does with a model for ``graph_opt_level`` 1 and 2, without FastDeploy.

Its wrapper lets Paddle's SOT translate the model's ``forward`` in warm-up steps, with the first
dimension of every tensor of a step unknown. It refuses a model that needs more than one translation
or breaks off in one. From then on it runs the code that SOT generated, without SOT's guards.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import paddle
import pytest

#: Variables of FastDeploy's worker processes. A test's model is smaller than SOT's least program.
ENVIRONMENT = {
    "SOT_ENABLE_0_SIZE_FALLBACK": "0",
    "SOT_SPECIALIZED_DIM_NUMBERS": "no",
    "MIN_GRAPH_SIZE": "0",
}


class Broken(AssertionError):
    """The model cannot run as one program."""


def forget_translations() -> None:
    """Clear SOT's cache, which is of the process, and knows functions by their code."""
    from paddle.jit.sot.opcode_translator.executor.executor_cache import OpcodeExecutorCache

    OpcodeExecutorCache().clear()


class Optimized:
    """A model's ``forward`` as FastDeploy runs it.

    Parameters
    ----------
    model : paddle.nn.Layer
        Its ``forward`` takes lists of tensors or tensors, and last ``forward_meta``.
    level : int
        1, or 2 for CINN where Paddle has it.
    """

    def __init__(self, model: Any, level: int = 1) -> None:
        from paddle.jit import sot
        from paddle.jit.dy2static.utils import Backend

        forget_translations()
        self.model, self.forward = model, type(model).forward
        backend = Backend.CINN if level > 1 else Backend.PHI
        self._translated = sot.symbolic_translate(self.forward, training=False, backend=backend)
        self._code: Any = None

    def warm_up(self, *args: Any) -> Any:
        """Run a step by SOT, and keep the code that it generated."""
        from paddle.jit.sot.opcode_translator.executor.executor_cache import OpcodeExecutorCache

        for tensor in _tensors([*args[:-1], *vars(args[-1]).values()]):
            paddle.jit.marker.dynamic_dims(tensor, (0,))
        out = self._translated(self.model, *args)
        codes, _ = OpcodeExecutorCache().cache[self.forward.__code__]
        if len(codes) > 1:
            raise Broken(f"{len(codes)} translations")
        code = codes[0][0][0]
        if code is None or any(name.startswith("$") for name in code.co_names):
            raise Broken("the translation breaks off")
        self._code = code
        return out

    def __call__(self, *args: Any) -> Any:
        """Run a step by the kept code."""
        own = self.forward
        run = types.FunctionType(
            self._code, own.__globals__, own.__name__, own.__defaults__, own.__closure__
        )
        return run(self.model, *args)


def _tensors(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _tensors(value)
        elif isinstance(value, paddle.Tensor) and value.ndim:
            yield value


@pytest.fixture
def sot_of_fastdeploy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a worker process; skipped where Paddle has no such SOT."""
    if paddle.__version__.startswith("2."):
        pytest.skip("Paddle 2 has no markers for SOT")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@contextmanager
def operators_run(found: set[str]) -> Iterator[None]:
    """Collect the names of custom operators of the programs that run.

    FastDeploy replaces the run in the same way, to capture graphs.
    """
    from paddle.jit.dy2static import pir_partial_program

    def run(original: Any, inputs: Any, parameters: Any, attrs: Any) -> Any:
        program = original.__self__.origin_runnable_program.program
        found.update(re.findall(r"custom_op\.\w+", str(program)))
        return original(inputs, parameters, attrs)

    with pir_partial_program.replace_run_impl_guard(run):
        yield
