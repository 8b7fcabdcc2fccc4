"""Installing: what is refused before the build, and what each way leaves behind.

scripts/check_install.py tries the same in fresh environments; here nothing is fetched.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest

from custom_ops.builder import project, toolchain, wheel
from tests.support import ROOT

extension = pytest.importorskip("custom_ops.builder.extension", reason="needs setuptools")


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def setup_ops(*arguments, flags=(), **environ):
    """Run setup_ops.py in a process of its own."""
    return subprocess.run(
        [sys.executable, *flags, "setup_ops.py", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environ},
    )


# --- compilers -----------------------------------------------------------------------------------


def fake_gcc(folder, *macros):
    """A compiler that tells these macros and writes down when it is asked to compile."""
    told = "\n".join(f"  echo '#define {macro}'" for macro in macros)
    text = (
        f'case " $* " in\n*" -dM "*)\n{told} ;;\n'
        f'*" --version "*) echo "g++ (a fake)" ;;\n*) echo "$@" >> "{folder}/compiled" ;;\nesac'
    )
    return script(folder / "g++", text)


def test_gcc_that_is_too_old(tmp_path):
    compiler = fake_gcc(tmp_path, "__GNUC__ 7", "__GNUC_MINOR__ 5", "__VERSION__ 7.5.0")
    with pytest.raises(toolchain.ToolchainError, match=r"is GCC 7\.5, .* need 8 or newer.* CXX"):
        toolchain.check_cxx([str(compiler)])


@pytest.mark.parametrize(
    "macros",
    [
        ["__GNUC__ 8", "__GNUC_MINOR__ 0"],
        ["__GNUC__ 15", "__GNUC_MINOR__ 1"],
        ["__GNUC__ 4", "__GNUC_MINOR__ 2", "__clang__ 1", "__clang_major__ 17"],
        ["__SOMETHING_ELSE__ 1"],
    ],
)
def test_compilers_that_are_taken(tmp_path, macros):
    toolchain.check_cxx([str(fake_gcc(tmp_path, *macros))])


def test_a_compiler_that_does_not_run(tmp_path):
    with pytest.raises(toolchain.ToolchainError, match="none does not run"):
        toolchain.check_cxx([str(tmp_path / "none")])


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_the_version_of_the_real_compiler():
    done = subprocess.run(["g++", "-dumpfullversion"], capture_output=True, text=True)
    found = toolchain.gcc_version(["g++"])
    assert found is None or done.stdout.startswith(f"{found[0]}.{found[1]}.")


def test_an_old_gcc_ends_the_build_before_the_first_file(tmp_path):
    compiler = fake_gcc(tmp_path, "__GNUC__ 7", "__GNUC_MINOR__ 5")
    done = setup_ops("build_ext", "--cuda=off", f"--build-lib={tmp_path}", CXX=str(compiler))
    assert done.returncode != 0
    assert "is GCC 7.5, and the sources need 8 or newer" in done.stderr
    assert "Traceback" not in done.stderr and "sources" not in done.stdout
    assert not (tmp_path / "compiled").exists()


def cuda_of(version):
    return toolchain.Cuda(Path("/c"), Path("/c/bin/nvcc"), version)


@pytest.mark.parametrize(
    ("version", "archs", "needed"),
    [
        ((11, 8), ["90a"], r"CUDA 11\.8, and sm_90a needs 12\.0 or newer"),
        ((11, 8), ["80"], r"CUDA 11\.8, and sm_80 needs 12\.0 or newer"),
        ((12, 4), ["90a", "100a"], r"CUDA 12\.4, and sm_100a needs 12\.8 or newer"),
        ((12, 8), ["103a"], r"CUDA 12\.8, and sm_103a needs 12\.9 or newer"),
        ((12, 8), ["120f"], r"CUDA 12\.8, and sm_120f needs 12\.9 or newer"),
        ((12, 9), ["110a"], r"CUDA 12\.9, and sm_110a needs 13\.0 or newer"),
        ((13, 0), ["90a", "70"], r"CUDA 13\.0, which no longer compiles for sm_70"),
    ],
)
def test_a_cuda_that_does_not_fit(version, archs, needed):
    with pytest.raises(toolchain.ToolchainError, match=needed):
        toolchain.check_cuda(cuda_of(version), archs)


@pytest.mark.parametrize(
    ("version", "archs"),
    [
        ((12, 0), ["80", "89", "90a"]),
        ((12, 8), ["100a", "120a"]),
        ((12, 9), ["121a", "120f"]),
        ((13, 0), ["75", "90a", "110a"]),
    ],
)
def test_a_cuda_that_fits(version, archs):
    toolchain.check_cuda(cuda_of(version), archs)


@pytest.mark.skipif(toolchain.find_cuda() is None, reason="no nvcc")
def test_architectures_are_those_that_nvcc_lists():
    """What the table refuses, the installed nvcc does not know either, and the other way round."""
    cuda = toolchain.find_cuda()
    command = [str(cuda.nvcc), "--list-gpu-code"]
    listed = subprocess.run(command, capture_output=True, text=True).stdout.split()
    known = {name[len("sm_") :] for name in listed}
    for number in (70, 75, 80, 86, 89, 90, 100, 101, 103, 110, 120, 121):
        arch = toolchain.specific_arch(number)
        try:
            toolchain.check_cuda(cuda, [arch])
            taken = True
        except toolchain.ToolchainError:
            taken = False
        assert taken == (arch in known or str(number) in known), arch


def test_an_old_nvcc_ends_the_build_before_the_first_file(tmp_path, monkeypatch):
    paddle = toolchain.Paddle("2.6.2", tmp_path / "paddle", with_cuda=True)
    monkeypatch.setattr(toolchain, "find_paddle", lambda: paddle)
    nvcc = script(tmp_path / "bin" / "nvcc", "echo 'Cuda compilation tools, release 11.8, V11.8'")
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(fake_gcc(tmp_path, "__GNUC__ 12", "__GNUC_MINOR__ 2")))
    monkeypatch.setenv("FASTATTN_ARCHS", "90a")
    for option in ("auto", "on"):
        with pytest.raises(toolchain.ToolchainError, match=r"11\.8.*sm_90a needs 12\.0") as error:
            project.Build(option)
        assert str(nvcc) in str(error.value)
    assert project.Build("off").cuda is None  # the CPU kernels need no nvcc


# --- Paddle and pip ------------------------------------------------------------------------------


def without_gpu(folder, monkeypatch):
    """A PATH without nvidia-smi."""
    monkeypatch.setenv("PATH", str(folder))


@pytest.mark.parametrize("command", ["install", "build_ext", "bdist_wheel"])
def test_without_paddle(tmp_path, command):
    done = setup_ops(command, flags=["-S"], PATH=str(tmp_path), PYTHONPATH="")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{shlex.quote(sys.executable)} -m pip install paddlepaddle\n" in done.stderr
    assert done.stdout == ""  # nothing was fetched or built


def test_without_paddle_on_a_machine_with_a_gpu(tmp_path):
    script(tmp_path / "nvidia-smi", "true")
    done = setup_ops("install", flags=["-S"], PATH=str(tmp_path), PYTHONPATH="")
    assert done.returncode == 1
    assert f"{shlex.quote(sys.executable)} -m pip install paddlepaddle-gpu" in done.stderr


@pytest.mark.parametrize(
    "hook", ["get_requires_for_build_wheel", "get_requires_for_build_editable"]
)
def test_pip_fetches_no_paddle(tmp_path, monkeypatch, hook):
    backend = pytest.importorskip("custom_ops.builder.backend")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(backend, "find_ninja", lambda: "/usr/bin/ninja")
    assert getattr(backend, hook)() == []
    monkeypatch.setattr(backend, "find_ninja", lambda: None)
    assert getattr(backend, hook)() == ["ninja>=1.10"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    without_gpu(tmp_path, monkeypatch)
    with pytest.raises(SystemExit) as error:
        getattr(backend, hook)()
    assert "\n    pip install paddlepaddle\n" in str(error.value)
    assert "--no-build-isolation" in str(error.value)
    assert backend.get_requires_for_build_sdist() == []  # the sources fit every Paddle


def test_a_paddle_that_does_not_import(tmp_path):
    (tmp_path / "paddle.py").write_text(
        "raise RuntimeError('made for another NumPy\\nsecond line')"
    )
    code = "from custom_ops.builder import toolchain; toolchain.find_paddle()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    last = done.stderr.splitlines()[-1]
    assert "ToolchainError" in last and "does not import" in last
    assert "RuntimeError: made for another NumPy (" in last


def test_without_pip(monkeypatch):
    toolchain.require_pip()
    monkeypatch.setattr(importlib.machinery.PathFinder, "find_spec", lambda name: None)
    with pytest.raises(toolchain.ToolchainError, match="-m ensurepip"):
        toolchain.require_pip()


@pytest.mark.parametrize(
    ("paddle", "numpy", "asked"),
    [
        ("2.6.2", "1.26.4", "numpy>=1.21,<2"),
        ("2.6.2", "2.2.6", "numpy>=1.21"),
        ("3.3.1", "1.26.4", "numpy>=1.21"),
        (None, None, "numpy>=1.21"),
    ],
)
def test_the_numpy_of_paddle_2_stays(paddle, numpy, asked):
    found = wheel.requirements(paddle, numpy)
    assert found[0] == asked and "setuptools" in found
    assert not any("paddle" in name for name in found)


# --- setuptools ----------------------------------------------------------------------------------


def make_wheel(folder):
    path = folder / "fastattn-0.1.0+paddle3.3.1.cpu-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("_fastattn_ops.so", "_host.cpython-311.so", "_build_info.py", "env.py"):
            archive.writestr(f"fastattn/{name}", f"new {name}")
        archive.writestr("fastattn/demo/_weights.so", "no part of the build")
        archive.writestr("fastattn-0.1.0.dist-info/WHEEL", "Root-Is-Purelib: false\n")
    return path


def test_compiled_files_go_into_the_tree(tmp_path):
    (tmp_path / "fastattn").mkdir()
    library = tmp_path / "fastattn" / "_fastattn_ops.so"
    library.write_text("old")
    with open(library) as still_open:
        names = wheel.unpack_compiled(make_wheel(tmp_path), tmp_path)
        assert still_open.read() == "old"
    found = sorted(path.name for path in (tmp_path / "fastattn").iterdir())
    assert found == ["_build_info.py", "_fastattn_ops.so", "_host.cpython-311.so"]
    assert len(names) == 3
    assert library.read_text() == "new _fastattn_ops.so" and os.access(library, os.X_OK)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """The install command, in a tree of its own, with what it would have run written down."""
    (tmp_path / "fastattn").mkdir()
    monkeypatch.setattr(extension, "ROOT", tmp_path)
    distribution = extension.BinaryDistribution({"name": "fastattn", "version": "0.1.0"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # setuptools' banner against `install` is a warning
        command = extension.Install(distribution)
    command.ensure_finalized()
    ran: list[tuple[str, ...]] = []
    monkeypatch.setattr(extension, "_pip", lambda *arguments: ran.append(arguments))

    def run_command(name):
        ran.append((name,))
        make_wheel(Path(distribution.get_command_obj("bdist_wheel").dist_dir))

    monkeypatch.setattr(command, "run_command", run_command)
    return command, ran


@pytest.mark.parametrize("debian", [False, True])
def test_install_under_either_distutils(install, monkeypatch, tmp_path, debian):
    """Debian's distutils puts a class before setuptools' own, whose method takes no keywords."""
    command, ran = install
    if debian:

        def reinitialize_command(command, reinit_subcommands=0):
            return install[0].distribution.reinitialize_command(command, reinit_subcommands)

        monkeypatch.setattr(command, "reinitialize_command", reinitialize_command)
    command.run()
    assert [step[0] for step in ran] == ["bdist_wheel", "install", "install"]
    assert "--no-deps" in ran[1] and ran[2][-1].startswith("numpy==")
    assert (tmp_path / "fastattn" / "_fastattn_ops.so").exists()


def test_pip_that_fails_is_no_traceback(monkeypatch):
    monkeypatch.setattr(extension.sys, "executable", "/bin/false")
    with pytest.raises(extension.SetupError, match="pip install failed"):
        extension._pip("install", "nothing")


def test_looking_for_pip_leaves_distutils_alone():
    code = (
        "from custom_ops.builder import toolchain; toolchain.require_pip(); "
        "import setuptools, distutils.core; print(distutils.core.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "_distutils" in done.stdout, done.stderr


FAKE_PIP = """
import os, sys
target = sys.argv[sys.argv.index("--target") + 1]
for name in {names!r}:
    os.symlink(os.path.join({site!r}, name), os.path.join(target, name))
"""


@pytest.mark.parametrize("old", ["65.5.0", None])
def test_a_setuptools_is_borrowed(tmp_path, old):
    """An environment with an old one or none: the build has its own, which its children lack."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("setuptools is too old to lend")
    site = Path(setuptools.__file__).parents[1]
    names = [path.name for path in site.glob("setuptools*")] + ["_distutils_hack"]
    packages = tmp_path / "site-packages"
    (packages / "pip").mkdir(parents=True)
    (packages / "pip" / "__init__.py").touch()
    text = FAKE_PIP.format(names=names, site=str(site))
    (packages / "pip" / "__main__.py").write_text(text)
    for path in site.iterdir():  # what else there is, without setuptools and pip
        if path.name not in names and not path.name.startswith("pip"):
            (packages / path.name).symlink_to(path)
    if old:
        (packages / f"setuptools-{old}.dist-info").mkdir()
        metadata = packages / f"setuptools-{old}.dist-info" / "METADATA"
        metadata.write_text(f"Metadata-Version: 2.1\nName: setuptools\nVersion: {old}\n")
    done = setup_ops("--version", flags=["-S"], PYTHONPATH=str(packages))
    # `-S` ends with this process: the one that it starts has the environment's site-packages.
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fetching setuptools>=77") and "0.1.0" in done.stdout
    assert "Warning" not in done.stderr


def test_a_ninja_is_borrowed(tmp_path):
    """What fetching one is told, and that the build goes on with it."""
    packages = tmp_path / "site"
    (packages / "pip").mkdir(parents=True)
    (packages / "pip" / "__init__.py").touch()
    (packages / "pip" / "__main__.py").write_text(
        "import os, sys\nprint(*sys.argv[1:])\n"
        "folder = os.path.join(sys.argv[sys.argv.index('--target') + 1], 'bin')\n"
        "os.mkdir(folder)\nninja = os.path.join(folder, 'ninja')\n"
        "open(ninja, 'w').write('#!/bin/sh\\nexit 1\\n')\nos.chmod(ninja, 0o755)\n"
    )
    if Path(sys.executable).with_name("ninja").exists():
        pytest.skip("this Python has a ninja beside it")
    path = os.pathsep.join(f for f in os.environ["PATH"].split(os.pathsep) if not has_ninja(f))
    done = setup_ops("build_ext", "--cuda=maybe", PYTHONPATH=str(packages), PATH=path)
    if "fetching setuptools" in done.stdout:
        pytest.skip("setuptools is too old to build with")
    assert done.stdout.startswith("fetching ninja>=1.10 for this build"), done.stderr
    assert "--target" in done.stdout and done.returncode != 0
    assert "--cuda: expected auto, on or off, got 'maybe'" in done.stderr


def has_ninja(folder):
    return (Path(folder) / "ninja").exists()


def test_what_was_borrowed_is_forgotten(monkeypatch):
    script = runpy.run_path(str(ROOT / "setup_ops.py"), run_name="setup_ops")
    forget = script["forget_borrowed"]
    monkeypatch.setenv("PYTHONPATH", "/kept")
    monkeypatch.delenv(script["BORROWED"], raising=False)
    assert forget() is False and os.environ["PYTHONPATH"] == "/kept"
    for before, after in (("/tmp/lent", None), (f"/tmp/lent{os.pathsep}/a:/b", "/a:/b")):
        monkeypatch.setenv(script["BORROWED"], "/tmp/lent")
        monkeypatch.setenv("PYTHONPATH", before)
        assert forget() is True and os.environ.get("PYTHONPATH") == after
        assert script["BORROWED"] not in os.environ


# --- the fresh environments ----------------------------------------------------------------------


@pytest.fixture
def check_install(monkeypatch):
    path = ROOT / "scripts" / "check_install.py"
    spec = importlib.util.spec_from_file_location("check_install", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "check_install", module)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_the_lines_that_are_tried_are_those_of_the_docs(check_install):
    lines = check_install.in_short()
    assert [line.split()[0] for line in lines] == ["pip", "python", "python"]
    assert lines[1] == "python setup_ops.py install"


def test_the_cases_cover_everything(check_install, capsys):
    versions = [((3, minor), debian) for minor in range(9, 14) for debian in (False, True)]
    pythons = [check_install.Python("/p", *each) for each in versions]
    cases = check_install.covering(pythons)
    assert {c.paddle for c in cases} == set(check_install.PADDLES)
    assert {v for c in cases for v in c.setuptools} == {"none", *check_install.SETUPTOOLS}
    assert {c.python.debian for c in cases} == {False, True}
    assert capsys.readouterr().out == ""
    every = {(c.python, c.paddle, v) for c in check_install.matrix(pythons) for v in c.setuptools}
    assert {(c.python, c.paddle, v) for c in cases for v in c.setuptools} <= every


def test_a_python_that_is_missing_is_said(check_install, capsys):
    python = check_install.Python("/p", (3, 11), False)
    cases = check_install.covering([python])
    assert [c.setuptools for c in cases] == [("65", "77"), ("none", "newest")]
    words = capsys.readouterr().out.splitlines()
    assert words[0].startswith("skipped: Debian's Python")
    assert "Python 3.12" in words[1] and words[1].endswith("trying with Python 3.11")
    assert check_install.covering([]) == []
