"""When the room for 16-bit keys and values is asked for again."""

from __future__ import annotations

import pytest

host = pytest.importorskip("fastattn._host")

MIB = 2**20
SECOND = 1000


def test_what_was_refused_is_asked_for_later():
    refused = host.RefusedBytes()
    assert refused.may_ask(512 * MIB, 0)
    refused.refuse(512 * MIB, 5 * SECOND)
    assert not refused.may_ask(512 * MIB, 5 * SECOND)
    assert not refused.may_ask(600 * MIB, 14 * SECOND)
    assert refused.may_ask(512 * MIB, 15 * SECOND)


def test_less_may_be_there_at_once():
    refused = host.RefusedBytes()
    refused.refuse(512 * MIB, 0)
    assert refused.may_ask(100 * MIB, 0)
    refused.refuse(100 * MIB, 1 * SECOND)
    assert not refused.may_ask(100 * MIB, 2 * SECOND)
    assert not refused.may_ask(512 * MIB, 2 * SECOND)
    assert refused.may_ask(99 * MIB, 2 * SECOND)


def test_pauses_double_up_to_ten_minutes():
    refused, now, pauses = host.RefusedBytes(), 0, []
    for _ in range(9):
        refused.refuse(MIB, now)
        begin = now
        while not refused.may_ask(MIB, now):
            now += SECOND
        pauses.append((now - begin) // SECOND)
    assert pauses == [10, 20, 40, 80, 160, 320, 600, 600, 600]


def test_memory_that_is_there_ends_it():
    refused = host.RefusedBytes()
    refused.refuse(512 * MIB, 0)
    refused.grant(100 * MIB)  # tells nothing of more
    assert not refused.may_ask(512 * MIB, 0)
    refused.grant(512 * MIB)
    assert refused.may_ask(512 * MIB, 0)
    refused.refuse(512 * MIB, 0)
    assert refused.may_ask(512 * MIB, 10 * SECOND)  # the first pause again
