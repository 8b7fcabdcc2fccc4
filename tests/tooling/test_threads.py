"""Any host thread may make the first call of a process, and several may call at once."""

from __future__ import annotations

import threading

import pytest

from fastattn import _ops
from tests.support.calls import CALLS, OPERATORS, make_call
from tests.support.compare import assert_same_bits
from tests.support.tensors import to_numpy


def in_thread(function):
    """What `function` returns, or raises, in a new thread."""
    outcome = []

    def run():
        try:
            outcome.append((function(), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def arrays(tensors):
    return [to_numpy(tensor) for tensor in tensors]


def test_every_operator_is_called():
    assert sorted(_ops.PREFIX + name for name in OPERATORS) == sorted(_ops.load())


@pytest.mark.parametrize("name", CALLS)
def test_the_first_call_of_a_thread(place, name):
    # A new thread has no CUDA context: functions of the driver, such as the one that encodes a
    # tensor map, would fail. Tensors are made here, since Paddle makes a context current for that.
    expected = arrays(make_call(name, place)())
    call = make_call(name, place)
    got = arrays(in_thread(call))
    assert len(got) == len(expected)
    for i, (a, b) in enumerate(zip(got, expected)):
        assert_same_bits(a, b, f"{name}: result {i}")


def test_eight_threads_call_different_operators(place):
    expected = {name: arrays(make_call(name, place)()) for name in CALLS}
    barrier = threading.Barrier(8)
    failures, results = [], []

    def run(worker: int, calls: list) -> None:
        try:
            barrier.wait(timeout=60)
            for name, call in calls:
                results.append((name, call()))
        except Exception as error:
            failures.append(f"thread {worker}: {type(error).__name__}: {error}")

    # Every thread makes every call, starting elsewhere in the list.
    lists = [
        [(name, make_call(name, place)) for name in CALLS[2 * i :] + CALLS[: 2 * i]]
        for i in range(8)
    ]
    threads = [threading.Thread(target=run, args=(i, calls)) for i, calls in enumerate(lists)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert failures == []
    assert len(results) == 8 * len(CALLS)
    for name, tensors in results:
        for i, (a, b) in enumerate(zip(arrays(tensors), expected[name])):
            assert_same_bits(a, b, f"{name}: result {i}")
