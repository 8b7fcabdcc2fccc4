"""What a user gets wrong about a build ends in one line."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys

import pytest

from tests.support import ROOT

pytest.importorskip("custom_ops.builder.extension", reason="needs setuptools")
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1


def run(tree, *arguments, script="setup_ops.py", before=None, **environ):
    return subprocess.run(
        [sys.executable, script, *arguments],
        capture_output=True,
        text=True,
        cwd=tree,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environ},
        preexec_fn=before,
    )


@pytest.fixture
def tree(tmp_path):
    """What setup_ops.py runs of a source tree before it compiles."""
    folder = tmp_path / "source tree"
    shutil.copytree(ROOT / "custom_ops" / "builder", folder / "custom_ops" / "builder")
    shutil.copy(ROOT / "setup_ops.py", folder)
    (folder / "fastattn").mkdir()
    yield folder
    for path in (folder, folder / "fastattn", folder / "build", folder / "build" / "objects"):
        if path.exists():
            path.chmod(0o755)


@pytest.mark.parametrize("value", ["80", "96", "64,80", "wide"])
def test_head_dims_that_no_kernel_has(value):
    done = run(ROOT, "build_ext", "--inplace", FASTATTN_HEAD_DIMS=value)
    assert done.returncode == 1 and done.stdout == ""
    got = value.replace(",", ", ")
    assert done.stderr == (
        "error: FASTATTN_HEAD_DIMS: expected some of 64, 96, 128, 192, 256, and 64 or 128 among "
        f"them, got {got}\n"
    )


@pytest.mark.parametrize("script", ["custom_ops/builder/instances.py", "scripts/check_cuda.py"])
def test_head_dims_that_no_kernel_has_by_hand(script):
    done = run(ROOT, script=script, FASTATTN_HEAD_DIMS="80")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: FASTATTN_HEAD_DIMS: expected some of 64, ")


def obey_modes() -> None:
    """Be a user whom modes bind, which root is not."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


def run_bound(tree, *arguments, **options):
    """Run as a user whom modes bind."""
    try:
        return run(tree, *arguments, before=obey_modes, **options)
    except subprocess.SubprocessError:
        pytest.skip("this process cannot give up its rights")


@pytest.mark.parametrize("command", ["build_ext", "bdist_wheel", "dist_info"])
@pytest.mark.parametrize("name", ["", "fastattn", "build/objects"])
def test_a_tree_that_cannot_be_written(tree, command, name):
    (tree / "build" / "objects").mkdir(parents=True)
    (tree / name).chmod(0o555)
    done = run_bound(tree, command)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tree / name} cannot be written, and a build writes into")
    assert f"cp -r '{tree}' fastattn-build" in line


STUB = """
import os, sys
def told(arguments, *_, **options):
    assert os.access(".", os.W_OK) and os.path.isfile("pyproject.toml")
    assert os.path.isfile("fastattn/env.py") and not os.path.exists("fastattn/old.so")
    open("fastattn/_fastattn_ops.so", "w").close()
    print(os.getcwd(), arguments, options)
    sys.exit(3 if "fail" in arguments else 0)
install = run = told
"""


def make_read_only(tree, folder):
    """Give the tree what a copy has, and take its modes; return a folder for the copy."""
    (tree / "custom_ops" / "builder" / "extension.py").write_text(STUB)
    for name in ("LICENSE", "README.md", "pyproject.toml", "fastattn/env.py", "fastattn/old.so"):
        (tree / name).touch()
    for path in (tree / "fastattn", tree):
        path.chmod(0o555)
    folder.mkdir()
    return folder


@pytest.mark.parametrize(("argument", "status"), [("-v", 0), ("fail", 3)])
def test_install_from_a_tree_that_cannot_be_written(tree, tmp_path, argument, status):
    """It builds in a copy, which is gone afterwards."""
    elsewhere = make_read_only(tree, tmp_path / "elsewhere")
    done = run_bound(tree, "install", argument, TMPDIR=str(elsewhere))
    assert done.returncode == status, done.stderr
    first, second = done.stdout.splitlines()
    assert first == f"{tree} cannot be written: building in a copy in {elsewhere}"
    assert second.startswith(f"{elsewhere}/fastattn-") and f"['install', '{argument}']" in second
    assert list(elsewhere.iterdir()) == [] and not (tree / "fastattn/_fastattn_ops.so").exists()


@pytest.mark.parametrize("command", ["dist_info", "bdist_wheel", "editable_wheel"])
def test_pip_in_a_tree_that_cannot_be_written(tree, tmp_path, command):
    """The backend builds in a copy, too; an editable install needs the tree itself."""
    elsewhere = make_read_only(tree, tmp_path / "elsewhere")
    hook = tmp_path / "hook.py"
    hook.write_text(
        "import sys; sys.path.insert(0, 'custom_ops'); from builder.backend import backend\n"
        "backend.run_setup()\nprint('the hook goes on')\n"
    )
    done = run_bound(tree, command, "--to=x", script=str(hook), TMPDIR=str(elsewhere))
    if command == "editable_wheel":
        assert done.returncode == 1 and "cannot be written, and a build writes" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    _, second, third = done.stdout.splitlines()
    assert f"['{command}', '--to=x']" in second and "'fill_tree': True" in second
    assert third == "the hook goes on" and list(elsewhere.iterdir()) == []


def test_a_file_that_another_user_left(tree):
    stub = "def run(*_, **__):\n    raise PermissionError(13, 'Permission denied', 'left/lock')\n"
    (tree / "custom_ops" / "builder" / "extension.py").write_text(stub)
    done = run(tree, "build_ext")
    assert done.returncode == 1
    assert done.stderr.startswith("error: left/lock cannot be written, and a build writes into")
    assert len(done.stderr.splitlines()) == 1
