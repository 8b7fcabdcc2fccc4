"""Fault 21 of docs/faults.md, and that every fault of that list has its tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from custom_ops.builder import toolchain
from tests.support import ROOT

SOURCES = [
    p for p in (ROOT / "custom_ops").rglob("*.*") if p.suffix in (".cc", ".cu", ".h", ".cuh")
]
FAULTS = re.findall(r"^\| (\d+) \| .* \| (`.*`) \|$", (ROOT / "docs/faults.md").read_text(), re.M)


def test_bug21_no_check_is_an_assertion():
    """-DNDEBUG removes an assert; a check must be there in every build."""
    for path in SOURCES:
        text = re.sub(r"//.*", "", path.read_text(encoding="utf-8"))
        assert not re.search(r"\b(assert\s*\(|NDEBUG\b)", text), path


def test_bug21_architectures_change_nothing_but_the_target():
    cuda = toolchain.Cuda(Path("cuda"), Path("cuda/bin/nvcc"), (13, 0))
    hopper = toolchain.nvcc_flags(cuda, ["90a"])
    for archs in (["80"], ["86", "89"], ["100a", "120a"]):
        others = toolchain.nvcc_flags(cuda, archs)
        without_target = [f for f in others if f not in toolchain.gencode(archs)]
        assert without_target == [f for f in hopper if f not in toolchain.gencode(["90a"])]


def test_faults_are_numbered():
    assert [int(number) for number, _ in FAULTS] == list(range(1, 24))


@pytest.mark.parametrize(("number", "files"), FAULTS, ids=[number for number, _ in FAULTS])
def test_every_fault_has_its_tests(number, files):
    for name in re.findall(r"`([\w.]+)`", files):
        (path,) = (ROOT / "tests").rglob(name)
        text = path.read_text(encoding="utf-8")
        assert f"def test_bug{int(number):02}_" in text, name
