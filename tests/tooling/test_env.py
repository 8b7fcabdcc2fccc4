"""Memory and size of dequantised calls, as the environment tells them (fastattn/env.py)."""

import math
from pathlib import Path

import pytest

from fastattn import _ops, env

MIB, FROM = "FASTATTN_DEQUANTIZED_MIB", "FASTATTN_DEQUANTIZED_FROM"


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv(MIB, raising=False)
    monkeypatch.delenv(FROM, raising=False)


def test_defaults(monkeypatch):
    assert env.dequantized() == (512, 4e9)
    monkeypatch.setenv(MIB, "")
    assert env.dequantized() == (512, 4e9)


@pytest.mark.parametrize("text, value", [("0", 0), ("1.5", 1.5), ("1e3", 1000), ("inf", math.inf)])
def test_numbers(text, value, monkeypatch):
    monkeypatch.setenv(MIB, text)
    assert env.dequantized() == (value, 4e9)
    monkeypatch.setenv(FROM, text)
    assert env.dequantized() == (value, value)


@pytest.mark.parametrize("text", ["-1", "nan", "512MiB", "-inf"])
@pytest.mark.parametrize("name", [MIB, FROM])
def test_what_is_no_amount_warns_and_is_the_default(name, text, monkeypatch):
    monkeypatch.setenv(name, text)
    with pytest.warns(UserWarning, match=f"{name}: expected a number from 0 on, got '{text}'"):
        assert env.dequantized() == (512, 4e9)


def test_a_library_of_another_fastattn(monkeypatch):
    monkeypatch.setattr(_ops, "_checked_library", lambda: Path("libc.so.6"))
    with pytest.raises(ImportError, match=r"libc\.so\.6 cannot be loaded .*fastattn_limit_deq"):
        _ops.limit_dequantized(1.0, 1.0)
