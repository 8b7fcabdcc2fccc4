"""tests.support.draws: what is kept is what would have been drawn."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support import draws
from tests.support.compare import assert_same_bits


def normal(rng, shape, mean):
    return rng.normal(mean, 1.0, shape).astype(np.float32)


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(draws, "_kept", type(draws._kept)())
    monkeypatch.setattr(draws, "_size", 0)


def test_the_numbers_and_the_generator_are_as_without_it():
    for _ in range(2):  # the second finds all
        plain, keeping = np.random.default_rng(3), np.random.default_rng(3)
        for shape, mean in (((4, 5), 0.0), ((3,), 1.0), ((3,), 0.0), ((4, 5), 0.0)):
            for rng in (plain, keeping):  # half of a 64-bit draw is left over
                rng.integers(0, 9, 1, np.int32)
            found = draws.kept(normal, keeping, shape, mean)
            assert_same_bits(found, normal(plain, shape, mean), "values")
            found[:] = 0  # the caller's own
        assert plain.bit_generator.state == keeping.bit_generator.state
    assert len(draws._kept) == 4


def test_other_arguments_other_states_and_other_functions_are_other_numbers():
    def wide(rng, shape, mean):
        return rng.normal(mean, 2.0, shape).astype(np.float32)

    cases = [(normal, 0, 0.0), (normal, 1, 0.0), (normal, 0, 1.0), (wide, 0, 0.0)]
    found = [draws.kept(d, np.random.default_rng(s), (6,), m) for d, s, m in cases]
    assert len({x.tobytes() for x in found}) == len(cases)


def test_memory_is_bound(monkeypatch):
    monkeypatch.setattr(draws, "LIMIT", 4000)
    for seed in range(8):
        draws.kept(normal, np.random.default_rng(seed), (200,), 0.0)  # 800 bytes
    draws.kept(normal, np.random.default_rng(0), (2000,), 0.0)  # too large to keep
    assert len(draws._kept) == 5 and draws._size == 4000
