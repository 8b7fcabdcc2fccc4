"""What a wheel holds and what its name tells."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile

import pytest

from custom_ops.builder import project
from tests.support import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import check_wheel

GOOD_WHEEL = [
    "fastattn/__init__.py",
    "fastattn/_ops.py",
    "fastattn/_build_info.py",
    "fastattn/_fastattn_ops.so",
    "fastattn/_host.cpython-311-x86_64-linux-gnu.so",
    "fastattn/functional/quantize.py",
    "fastattn/py.typed",
    "fastattn/demo/model.npz",
    "fastattn/demo/recipe.json",
    "fastattn/demo/mla_sparse.npz",
    "fastattn/demo/mla_sparse.json",
    "fastattn/demo/held_out.txt",
    "fastattn-0.1.0.dist-info/METADATA",
    "fastattn-0.1.0.dist-info/licenses/LICENSE",
]


def test_good_wheel():
    assert check_wheel.problems(GOOD_WHEEL, "Root-Is-Purelib: false\n") == []


@pytest.mark.parametrize(
    "name",
    [
        "version.txt",
        "fastattn/version.txt",
        "fastattn/api/quantize.o",
        "build/temp/quantize.o",
        "fastattn/_fastattn_ops_pd_.so",
        "fastattn/_fastattn_ops.py",
        "fastattn/demo/demo-0123456789abcdef.npz",
        "fastattn/model.npz",
        "tests/tooling/test_build.py",
        "custom_ops/builder/wheel.py",
        "benchmarks/cli.py",
        "fastattn/bench/cli.py",
        "fastattn/__pycache__/env.cpython-311.pyc",
    ],
)
def test_wheel_with_something_else(name):
    assert check_wheel.problems([*GOOD_WHEEL, name]) == [f"must not be in the wheel: {name}"]


def test_wheel_without_its_library(tmp_path):
    names = [n for n in GOOD_WHEEL if n != "fastattn/_fastattn_ops.so"]
    assert check_wheel.problems(names) == ["missing: fastattn/_fastattn_ops.so"]
    path = tmp_path / "fastattn-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "")
        archive.writestr("fastattn-0.1.0.dist-info/WHEEL", "Root-Is-Purelib: true\n")
    done = subprocess.run(
        [sys.executable, check_wheel.__file__, path], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "missing: fastattn/_fastattn_ops.so" in done.stdout and "platform" in done.stdout


@pytest.mark.parametrize(
    ("paddle", "archs", "label"),
    [
        ("3.3.1", [], "paddle3.3.1.cpu"),
        ("2.6.2", ["90a"], "paddle2.6.2.sm90a"),
        ("3.4.0.dev20260101+Post-1", ["80", "100a"], "paddle3.4.0.dev20260101.post.1.sm80.sm100a"),
    ],
)
def test_local_version(paddle, archs, label):
    assert project.local_version(paddle, archs) == label
    assert re.fullmatch(r"[a-z0-9]+(\.[a-z0-9]+)*", label)  # what a version may end in


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("0.1.0+paddle3.3.1.sm90a", []),
        ("0.1.0+paddle3.3.1.cpu", ["the version ends in +paddle3.3.1.cpu, not +paddle3.3.1.sm90a"]),
        ("0.1.0", ["the version ends in +, not +paddle3.3.1.sm90a"]),
    ],
)
def test_the_name_of_a_wheel_tells_its_build(tmp_path, name, wrong):
    path = tmp_path / f"fastattn-{name}-cp311-cp311-linux_x86_64.whl"
    info = "PADDLE_VERSION = '3.3.1'\nARCHS = ['90a']\n"
    with zipfile.ZipFile(path, "w") as archive:
        for file in GOOD_WHEEL:
            archive.writestr(file, info if file.endswith("_build_info.py") else "")
        archive.writestr("fastattn-0.1.0.dist-info/WHEEL", "Root-Is-Purelib: false\n")
    assert check_wheel.check(path) == wrong
