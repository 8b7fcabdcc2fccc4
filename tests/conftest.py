"""Places to run on: every operator test takes `place` and runs on the CPU, and on a GPU if any."""

from __future__ import annotations

import gc
import logging
import os

import paddle
import pytest

from fastattn import _ops
from tests.support import grid, virtual_gpu

# Tests without a `place` run here, and so do tensors made while tests are collected, whatever
# Paddle's default is.
paddle.set_device("cpu")


if virtual_gpu.there():
    virtual_gpu.stand_in()

# Pytest attaches itself to each logger that does not propagate, six times a test. Paddle has twenty
# of those; what they say reaches pytest through the root as well.
for _logger in logging.root.manager.loggerDict.values():
    if isinstance(_logger, logging.Logger) and _logger.name != "fastattn":
        _logger.propagate = True


def _places() -> list[str]:
    if virtual_gpu.there():
        return ["cpu", "gpu"]
    if paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0:
        return ["cpu", "gpu"]
    return ["cpu"]


def pytest_collection_modifyitems(config, items):
    """Tests of the mark `gpu`, which -k gpu chooses as well, are skipped where there is no GPU.

    What the mark `few_on_cpu` leaves out is slow, unless a case was asked for by its whole name.
    """
    if not any("[" in argument for argument in config.args):
        for item in grid.left_out_on_cpu(items):
            item.add_marker(pytest.mark.slow)
    if "gpu" not in _places():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Spare Python's collector the tests: a million objects that stay until the end.

    It would go over them again and again, a third of a second each time. It waits until they are
    there, and leaves them out from then on.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_generate_tests(metafunc):
    if "place" in metafunc.fixturenames:
        metafunc.parametrize("place", _places())


@pytest.fixture(autouse=True, scope="session")
def _library():
    _ops.load()


def _runs_on_gpu(item) -> bool:
    place = item.callspec.params.get("place") if hasattr(item, "callspec") else None
    return place == "gpu" or item.get_closest_marker("gpu") is not None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Have the operators run on the virtual GPU in tests of the place "gpu", fixtures included."""
    virtual_gpu.turn(_runs_on_gpu(item))
    try:
        return (yield)
    finally:
        virtual_gpu.turn(False)


def pytest_runtest_teardown(item):
    """Give what Paddle's allocator keeps back to the GPU: its other processes may need it."""
    if _runs_on_gpu(item) and "gpu" in _places():
        paddle.device.cuda.empty_cache()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skip a GPU test whose operator has no CUDA kernel; on the CPU nothing is skipped."""
    try:
        return (yield)
    except RuntimeError as error:
        missing = "no CUDA kernel in this build" in str(error) or virtual_gpu.leaves_out(error)
        if missing and _runs_on_gpu(item):
            pytest.skip(str(error))
        raise


def pytest_sessionfinish(session):
    """Fail where fewer tests passed than VIRTUAL_GPU_LEAST asks for: all may have been skipped."""
    least = int(os.environ.get("VIRTUAL_GPU_LEAST", "0"))
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    passed = len(reporter.stats.get("passed", ())) if reporter else 0
    if least > passed and session.exitstatus == pytest.ExitCode.OK:
        print(f"\n{passed} tests passed on the virtual GPU, at least {least} should have")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
