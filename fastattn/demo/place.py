"""Places of the model and of its cache."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, NamedTuple

import paddle

_PROBE = (
    "import paddle; "
    "x = paddle.to_tensor([[1.0, 2.0]], place=paddle.CUDAPlace(0)); "
    "assert float(paddle.matmul(x + x, x, transpose_y=True)) == 10.0"
)
_PROBE_SECONDS = 120


class Places(NamedTuple):
    """Places of the dense layers, and of the cache with its attention, and a note for the user."""

    model: Any
    cache: Any
    note: str


class DeviceError(ValueError):
    """The requested device cannot be used. The message says why."""


def choose(device: str) -> Places:
    """Places for ``"cpu"`` or ``"gpu"``.

    Raises
    ------
    DeviceError
        If there is no GPU, or Paddle is a CPU build.
    """
    cpu = paddle.CPUPlace()
    if device == "cpu":
        return Places(cpu, cpu, "")
    if not paddle.is_compiled_with_cuda():
        raise DeviceError(
            f"--device gpu: Paddle {paddle.__version__} is a CPU build; install paddlepaddle-gpu "
            "and rebuild fastattn under it"
        )
    if paddle.device.cuda.device_count() == 0:
        raise DeviceError("--device gpu: Paddle finds no GPU")
    gpu = paddle.CUDAPlace(0)
    problem = _paddle_kernel_problem()
    if problem:
        return Places(
            cpu,
            gpu,
            f"Paddle's own kernels do not run on this GPU ({problem}): dense layers on CPU",
        )
    return Places(gpu, gpu, "")


def _paddle_kernel_problem() -> str:
    """Reason why Paddle cannot add and multiply on the GPU; empty if it can.

    The test runs in another process, because a kernel that was not built for this GPU leaves the
    CUDA context of its process unusable.
    """
    try:
        result = subprocess.run(
            [sys.executable, "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {_PROBE_SECONDS} s"
    if result.returncode == 0:
        return ""
    lines = [line.strip() for line in result.stderr.splitlines() if "rror" in line]
    return lines[-1][:200] if lines else f"exit status {result.returncode}"
