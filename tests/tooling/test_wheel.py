"""What a wheel holds and what its name tells."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from custom_ops.builder import project
from fastattn import _ops
from tests.support import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import check_wheel
import join_wheel

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


# --- what compiled files need --------------------------------------------------------------------

FINE = {
    "libraries": ["libpaddle.so", "libstdc++.so.6", "libc.so.6", "ld-linux-x86-64.so.2"],
    "versions": ["CXXABI_1.3.13", "GLIBCXX_3.4.29", "GLIBC_2.2.5", "GLIBC_2.34", "OMP_1.0"],
    "python": [],
    "paths": [],
}
LIBRARY = "fastattn/_fastattn_ops.so"
HOST = "fastattn/_host.cpython-311-x86_64-linux-gnu.so"


def test_needs_that_are_fine():
    assert check_wheel.binary_problems(LIBRARY, FINE, check_wheel.NEWEST) == []


@pytest.mark.parametrize(
    ("name", "kind", "entry", "problem"),
    [
        (LIBRARY, "libraries", "libpython3.11.so.1.0", "needs libpython3.11.so.1.0"),
        (LIBRARY, "libraries", "libcudart.so.12", "needs libcudart.so.12"),
        (HOST, "libraries", "libpaddle.so", "needs libpaddle.so"),
        (LIBRARY, "versions", "GLIBC_2.35", "needs GLIBC_2.35; newest: 2.34"),
        (LIBRARY, "versions", "GLIBCXX_3.4.30", "needs GLIBCXX_3.4.30; newest: 3.4.29"),
        (LIBRARY, "versions", "LLVM_5.0", "needs LLVM_5.0; newest: none"),
        (LIBRARY, "python", "PyList_New", "does not fit every Python: it needs PyList_New"),
        (LIBRARY, "paths", "/home/me/lib", "holds a path: /home/me/lib"),
    ],
)
def test_needs_that_are_refused(name, kind, entry, problem):
    libraries = [x for x in FINE["libraries"] if x != "libpaddle.so" or name == LIBRARY]
    found = {**FINE, "libraries": libraries}
    found[kind] = [*found[kind], entry]
    (line,) = check_wheel.binary_problems(name, found, check_wheel.NEWEST)
    assert line.startswith(f"{name} {problem}")
    newest = {**check_wheel.NEWEST, "GLIBC": (2, 39), "GLIBCXX": (3, 4, 33)}
    assert (check_wheel.binary_problems(name, found, newest) == []) is ("GLIBC" in entry)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_what_the_built_files_need(tmp_path):
    """The library nothing of Python; a module does, so the search for it finds something."""
    found = check_wheel.needs(_ops.library_path())
    assert "libpaddle.so" in found["libraries"] and found["python"] == []
    assert any(text.startswith("GLIBC_2.") for text in found["versions"])
    for module in _ops.library_path().parent.glob("_direct.*.so"):
        assert "PyList_New" in check_wheel.needs(module)["python"]
    text = tmp_path / "text.so"
    text.write_text("no library")
    (line,) = check_wheel.binary_problems("text.so", check_wheel.needs(text), check_wheel.NEWEST)
    assert line.startswith("text.so is no shared library")


# --- wheels for several Pythons ------------------------------------------------------------------


@pytest.fixture
def wheel(tmp_path):
    """A wheel for Python 3.9, and a folder with the modules of 3.13."""
    path = tmp_path / "fastattn-0.1.0+paddle3.3.1.cpu-cp39-cp39-linux_x86_64.whl"
    names = [n for n in GOOD_WHEEL if "_host" not in n]
    names += [f"fastattn/_{m}.cpython-39-x86_64-linux-gnu.so" for m in ("host", "direct")]
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, f"content of {name}")
        info = "fastattn-0.1.0+paddle3.3.1.cpu.dist-info"
        text = "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: cp39-cp39-linux_x86_64\n\n"
        archive.writestr(f"{info}/WHEEL", text)
        archive.writestr(f"{info}/RECORD", "old")
    folder = tmp_path / "modules" / "fastattn"
    folder.mkdir(parents=True)
    for module in ("host", "direct"):
        (folder / f"_{module}.cpython-313-x86_64-linux-gnu.so").write_text(module)
    return path, folder.parent


def test_a_joined_wheel(wheel, tmp_path):
    path, folder = wheel
    joined = join_wheel.join(path, [folder], tmp_path / "dist")
    assert joined.name == "fastattn-0.1.0+paddle3.3.1.cpu-cp39.cp313-none-linux_x86_64.whl"
    with zipfile.ZipFile(joined) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    info = "fastattn-0.1.0+paddle3.3.1.cpu.dist-info"
    tags = re.findall("^Tag: (.*)", contents[f"{info}/WHEEL"].decode(), re.M)
    assert tags == ["cp39-none-linux_x86_64", "cp313-none-linux_x86_64"]
    assert b"Root-Is-Purelib: false" in contents[f"{info}/WHEEL"]
    with zipfile.ZipFile(path) as archive:
        kept = {n: archive.read(n) for n in archive.namelist() if n.startswith("fastattn/")}
    added = {n for n in contents if n.startswith("fastattn/")} - set(kept)
    assert {n.partition(".")[0] for n in added} == {"fastattn/_host", "fastattn/_direct"}
    assert all(contents[name] == data for name, data in kept.items())
    rows = dict(line.split(",", 1) for line in contents[f"{info}/RECORD"].decode().splitlines())
    assert set(rows) == set(contents) and rows.pop(f"{info}/RECORD") == ","
    for name, row in rows.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(contents[name]).digest()).decode()
        assert row == f"sha256={digest.rstrip('=')},{len(contents[name])}"
    assert check_wheel.tag_problems(joined.name, contents) == []
    assert check_wheel.problems(contents, contents[f"{info}/WHEEL"].decode()) == []


def test_modules_that_are_not_joined(wheel, tmp_path):
    path, folder = wheel
    module = next(folder.glob("fastattn/_host*"))
    module.rename(module.with_name("_host.cpython-39-x86_64-linux-gnu.so"))
    with pytest.raises(join_wheel.JoinError, match="a module of another Python than the wheel's"):
        join_wheel.join(path, [folder], tmp_path / "dist")
    next(folder.glob("fastattn/_host*")).unlink()
    with pytest.raises(join_wheel.JoinError, match="cp313 has only _direct"):
        join_wheel.join(path, [folder], tmp_path / "dist")


@pytest.mark.parametrize(
    ("tags", "problem"),
    [
        ("cp311-cp311", None),  # for one Python, with or without its modules
        ("cp39.cp313-none", None),
        ("cp39-none", "_direct.cpython-313"),
        ("cp39.cp312.cp313-none", "_host.cpython-312"),
    ],
)
def test_tags_and_modules(tags, problem):
    names = [
        f"fastattn/_{module}.cpython-{version}-x86_64-linux-gnu.so"
        for module in ("host", "direct")
        for version in (39, 313)
    ]
    found = check_wheel.tag_problems(f"fastattn-0.1.0-{tags}-linux_x86_64.whl", names)
    assert (found == []) is (problem is None)
    assert problem is None or any(line.endswith(problem) for line in found)
