"""No operator reads or writes behind its tensors on a CPU."""

from __future__ import annotations

import subprocess
import sys

import paddle
import pytest

pytestmark = pytest.mark.skipif(
    paddle.__version__.startswith("2."), reason="Paddle 2.6 takes no DLPack tensors of NumPy"
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.support.guard", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_nothing_behind_a_tensor_is_touched():
    done = run()
    assert done.stdout.endswith("done\n"), done.stdout[-300:] + done.stderr[-2000:]


def test_a_byte_behind_a_guarded_tensor_ends_the_process():
    done = run("--touch")
    assert done.returncode < 0 and "done" not in done.stdout
