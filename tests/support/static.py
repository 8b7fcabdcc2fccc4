"""Every way in which Paddle runs a function: dygraph, traced by AST or SOT, saved and loaded."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle.static import InputSpec

from tests.support.compare import assert_same_bits
from tests.support.tensors import to_numpy, to_paddle

MODES = ("dygraph", "full_graph", "sot", "saved")


def run_all_modes(
    function: Callable[..., Any],
    arrays: Sequence[np.ndarray],
    place: str = "cpu",
    modes: Sequence[str] = MODES,
    dynamic: bool = False,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Run `function` in every mode and check that all give dygraph's bits.

    Parameters
    ----------
    function : callable
        A module-level ``def`` in a file (Paddle traces neither a lambda nor code from stdin). It
        takes one tensor for each array, by position, and returns a tensor or a tuple of tensors.
        Fix optional arguments and attributes inside it. Keep NumPy arrays of bfloat16 out of the
        globals of its file: SOT looks at them and fails.
    arrays : sequence of array
        Inputs; every mode gets its own copies, so that operators may write to them.
    place : {"cpu", "gpu"}
    modes : sequence of str
        Some of ``MODES``. "dygraph" always runs.
    dynamic : bool
        Save with the first dimension of every input unknown, as a server saves a model.

    Returns
    -------
    outputs : list of array
        What dygraph returned (every mode returned the same bits).
    inputs : list of array
        The inputs after the call, for operators that write in place (the same in every mode).
    """
    with _device(place):
        expected = _run(function, arrays, place)
        for mode in modes:
            if mode == "dygraph":
                continue
            if mode == "saved" and place == "gpu" and paddle.__version__.startswith("2."):
                continue  # it adds x * 1 + 0, and has no such kernel for recent GPUs
            with _runnable(function, mode, arrays, place, dynamic) as runnable:
                outputs, inputs = _run(runnable, arrays, place)
            assert len(outputs) == len(expected[0]), f"{mode}: {len(outputs)} outputs"
            for i, (a, b) in enumerate(zip(outputs, expected[0])):
                if mode == "saved" and paddle.__version__.startswith("2."):
                    b = b + np.zeros(1, b.dtype)  # it saves x * 1 + 0, which makes 0 of -0
                assert_same_bits(a, b, f"{mode}: output {i}")
            for i, (a, b) in enumerate(zip(inputs, expected[1])):
                assert_same_bits(a, b, f"{mode}: input {i} after the call")
    return expected


def _run(
    function: Callable[..., Any], arrays: Sequence[np.ndarray], place: str
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    # to_paddle may share memory with the array on the CPU: an in-place operator needs a copy.
    tensors = [to_paddle(np.array(array), place) for array in arrays]
    outputs = function(*tensors)
    if not isinstance(outputs, (list, tuple)):
        outputs = [outputs]
    return [to_numpy(x) for x in outputs], [to_numpy(x) for x in tensors]


@contextlib.contextmanager
def _runnable(
    function: Callable[..., Any],
    mode: str,
    arrays: Sequence[np.ndarray],
    place: str,
    dynamic: bool,
) -> Iterator[Callable[..., Any]]:
    if mode == "full_graph":
        static = paddle.jit.to_static(function, full_graph=True)
        # In training mode Paddle 2.6 asks every operator of the program for its gradient.
        static.eval()
        yield static
    elif mode == "sot":
        traced = paddle.jit.to_static(function, full_graph=False)
        if paddle.__version__.startswith("2.") and hasattr(traced, "eval"):
            traced.eval()  # under Python 3.12 Paddle 2.6 has no SOT and traces the full graph
        yield traced
    elif mode == "saved":
        specs = []
        for i, array in enumerate(arrays):
            tensor = to_paddle(array, place)
            shape = list(tensor.shape)
            if dynamic and shape:
                shape[0] = -1
            specs.append(InputSpec(shape, tensor.dtype, name=f"input{i}"))
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "model")
            static = paddle.jit.to_static(function, input_spec=specs, full_graph=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # saving a function, no parameters
                paddle.jit.save(static, path)
            loaded = paddle.jit.load(path)
            loaded.eval()
            yield loaded
    else:
        raise ValueError(f"unknown mode {mode!r}; known: {MODES}")


@contextlib.contextmanager
def _device(place: str) -> Iterator[None]:
    """Static programs run on the current device, whatever the place of their inputs."""
    before = paddle.get_device()
    paddle.set_device(place)
    try:
        yield
    finally:
        paddle.set_device(before)
