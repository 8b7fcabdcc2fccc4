"""Fault 21 of docs/faults.md, and that every fault of that list has its tests."""

from __future__ import annotations

import re

import pytest

from custom_ops.builder import toolchain
from tests.support import ROOT
from tests.support.toolkit import make_toolkit

SOURCES = [
    p for p in (ROOT / "custom_ops").rglob("*.*") if p.suffix in (".cc", ".cu", ".h", ".cuh")
]
FAULTS = re.findall(r"^\| (\d+) \| .* \| (`.*`) \|$", (ROOT / "docs/faults.md").read_text(), re.M)


def test_bug21_no_check_is_an_assertion():
    """-DNDEBUG removes an assert; a check must be there in every build."""
    for path in SOURCES:
        text = re.sub(r"//.*", "", path.read_text(encoding="utf-8"))
        assert not re.search(r"\b(assert\s*\(|NDEBUG\b)", text), path


def test_bug21_architectures_change_nothing_but_the_target(tmp_path):
    home = make_toolkit(tmp_path / "cuda", "13.0")
    hopper = toolchain.Cuda(home, ["90a"]).flags
    for archs in (["80"], ["86", "89"], ["100a", "120a"]):
        others = toolchain.Cuda(home, archs).flags
        assert others[: -2 * len(archs)] == hopper[:-2]
        targets = [f"arch=compute_{arch},code=sm_{arch}" for arch in archs]
        assert others[-2 * len(archs) :: 2] == ["-gencode"] * len(archs)
        assert others[1 - 2 * len(archs) :: 2] == targets


def test_faults_are_numbered():
    assert [int(number) for number, _ in FAULTS] == list(range(1, len(FAULTS) + 1))


@pytest.mark.parametrize(("number", "files"), FAULTS, ids=[number for number, _ in FAULTS])
def test_every_fault_has_its_tests(number, files):
    for name in re.findall(r"`([\w.]+)`", files):
        (path,) = (ROOT / "tests").rglob(name)
        text = path.read_text(encoding="utf-8")
        assert f"def test_bug{int(number):02}_" in text, name
