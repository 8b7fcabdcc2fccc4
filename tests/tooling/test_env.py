"""fastattn/env.py: where the environment is read, and the memory of dequantised calls."""

import math
import re
from pathlib import Path

import pytest

from fastattn import _ops, env
from tests.support import ROOT

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


#: Modules that hand the environment to a child, set what it lacks, or report it: they obey none.
OTHERS = {
    *("cli/show_config.py", "cli/collect_env.py", "cli/replay.py"),
    *("demo/cli.py", "evaluate/cli.py", "dump/record.py"),
}


def test_variables_are_read_in_one_place_and_all_are_in_its_tables():
    package = ROOT / "fastattn"
    reading = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"\bos\.(environ|getenv)\b|from os import", path.read_text("utf-8"))
    }
    assert reading == {"env.py", *OTHERS}
    for path in (ROOT / "benchmarks").rglob("*.py"):
        assert not re.search(r"os\.environ.*FASTATTN_", path.read_text("utf-8")), path
    source = (package / "env.py").read_text("utf-8").replace(env.__doc__, "")
    names = set(re.findall(r'"((?:[A-Z]+_)+[A-Z_]+|FLAGS_\w+)"', source))
    told = set(re.findall(r"``([A-Z]+_\w+)``", env.__doc__))
    dequantized = {MIB, FROM}  # told as one, with *
    assert names - dequantized == told and dequantized <= names


def test_variables_of_fastdeploy(monkeypatch):
    for name in ("ENABLE_EP_DP", "SHM_UUID", "CUDA_VISIBLE_DEVICES", "FASTATTN_BENCH_PEERS"):
        monkeypatch.delenv(name, raising=False)
    assert env.visible_devices() is env.shared_memory_id() is env.bench_peers() is None
    monkeypatch.setenv("ENABLE_EP_DP", "1")
    assert env.shared_memory_id() == ""
    monkeypatch.setenv("SHM_UUID", "7a")
    assert env.shared_memory_id() == "7a"
    monkeypatch.setenv("ENABLE_EP_DP", "0")
    assert env.shared_memory_id() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert env.visible_devices() == ["3", "5"]
    for text, wanted in (("1", True), ("true", True), ("0", False), ("", False)):
        monkeypatch.setenv(env.KV_SIGNAL_SWITCH, text)
        assert env.kv_signals() is wanted
