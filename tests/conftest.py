"""Places to run on: every operator test takes `place` and runs on the CPU, and on a GPU if any."""

from __future__ import annotations

import paddle
import pytest

from fastattn import _ops


def _places() -> list[str]:
    if paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0:
        return ["cpu", "gpu"]
    return ["cpu"]


def pytest_generate_tests(metafunc):
    if "place" in metafunc.fixturenames:
        metafunc.parametrize("place", _places())


@pytest.fixture(autouse=True, scope="session")
def _library():
    _ops.load()
