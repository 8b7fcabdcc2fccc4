"""Installing: what is refused before the build, and what each way leaves behind.

scripts/check_install.py tries the same in fresh environments; here nothing is fetched.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import paddle
import pytest

from custom_ops.builder import project, toolchain
from custom_ops.builder.toolchain import BuildError
from fastattn.version import __version__
from tests.support import ROOT
from tests.support.toolkit import make_toolkit

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


def test_gcc_that_is_too_old(tmp_path, monkeypatch):
    compiler = fake_gcc(tmp_path, "__GNUC__ 7", "__GNUC_MINOR__ 5", "__VERSION__ 7.5.0")
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(BuildError, match=r"is GCC 7\.5, .* need 8 or newer.* CXX"):
        toolchain.find_cxx()


@pytest.mark.parametrize(
    "macros",
    [
        ["__GNUC__ 8", "__GNUC_MINOR__ 0"],
        ["__GNUC__ 15", "__GNUC_MINOR__ 1"],
        ["__GNUC__ 4", "__GNUC_MINOR__ 2", "__clang__ 1", "__clang_major__ 17"],
        ["__SOMETHING_ELSE__ 1"],
    ],
)
def test_compilers_that_are_taken(tmp_path, monkeypatch, macros):
    monkeypatch.setenv("CXX", str(fake_gcc(tmp_path, *macros)))
    assert toolchain.find_cxx() == [os.environ["CXX"]]


def test_a_compiler_that_does_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with pytest.raises(BuildError, match="none does not run"):
        toolchain.find_cxx()


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_the_version_of_the_real_compiler(monkeypatch):
    done = subprocess.run(["g++", "-dumpfullversion"], capture_output=True, text=True)
    monkeypatch.setenv("CXX", "g++")
    monkeypatch.setattr(toolchain, "OLDEST_GCC", 1000)
    if done.returncode == 0:  # not clang under that name
        with pytest.raises(BuildError) as error:
            toolchain.find_cxx()
        assert f"is GCC {'.'.join(done.stdout.split('.')[:2])}, and" in str(error.value)


def test_an_old_gcc_ends_the_build_before_the_first_file(tmp_path):
    compiler = fake_gcc(tmp_path, "__GNUC__ 7", "__GNUC_MINOR__ 5")
    done = setup_ops("build_ext", "--cuda=off", f"--build-lib={tmp_path}", CXX=str(compiler))
    assert done.returncode != 0
    assert "is GCC 7.5, and the sources need 8 or newer" in done.stderr
    assert "Traceback" not in done.stderr and "sources" not in done.stdout
    assert not (tmp_path / "compiled").exists()


@pytest.mark.parametrize(
    ("version", "archs", "needed"),
    [
        ("11.8", ["80"], r"(?s)CUDA 11\.8: the kernels need 12\.0 .*release 11\.8.* CUDA_HOME"),
        ("12.4", ["90a", "100a"], r"CUDA 12\.4: Unsupported .* 'compute_100a'\..* FASTATTN_ARCHS"),
        ("13.0", ["hopper"], r"CUDA 13\.0: Unsupported .* 'compute_hopper'\..* FASTATTN_ARCHS"),
    ],
)
def test_a_cuda_that_does_not_fit(tmp_path, version, archs, needed):
    home = make_toolkit(tmp_path / "cuda", version, archs[-1])
    with pytest.raises(BuildError, match=needed) as error:
        toolchain.Cuda(home, archs)
    assert str(error.value).startswith(f"{home}/bin/nvcc is of ")


def test_an_nvcc_that_fails_is_quoted(tmp_path):
    home = make_toolkit(tmp_path / "cuda", "13.0")
    script(tmp_path / "cuda" / "bin" / "nvcc", "echo 'version GLIBC_9 not found' >&2; exit 1")
    with pytest.raises(BuildError, match=r"bin/nvcc .* \(version GLIBC_9 not found\)"):
        toolchain.Cuda(home, ["90a"])


@pytest.mark.parametrize(("version", "archs"), [("12.0", ["80", "90a"]), ("13.0", ["75", "110a"])])
def test_a_cuda_that_fits(tmp_path, version, archs):
    assert toolchain.Cuda(make_toolkit(tmp_path / "cuda", version), archs).version == version


@pytest.mark.skipif(toolchain.find_cuda() is None, reason="no nvcc")
@pytest.mark.parametrize("suffix", ["", "a"])
def test_architectures_are_those_that_nvcc_lists(suffix):
    home = toolchain.find_cuda()
    command = [f"{home}/bin/nvcc", "--list-gpu-code"]
    known = subprocess.run(command, capture_output=True, text=True).stdout.split()
    for number in (70, 75, 80, 86, 89, 90, 100, 101, 103, 110, 120, 121):
        if f"sm_{number}" in known and (number >= 90 or not suffix):
            assert f"arch=compute_{number}{suffix},code=sm_{number}{suffix}" in (
                toolchain.Cuda(home, [f"{number}{suffix}"]).flags
            )
        else:
            with pytest.raises(BuildError, match=f"'compute_{number}{suffix}'"):
                toolchain.Cuda(home, [f"{number}{suffix}"])


@pytest.mark.parametrize("arch", ["hopper", "9", "90b", "-O3", "9.0.1"])
@pytest.mark.skipif(toolchain.find_cuda() is None, reason="no nvcc")
def test_what_is_no_architecture_is_named(monkeypatch, arch):
    monkeypatch.setenv("FASTATTN_ARCHS", f"90a;{arch}")
    with pytest.raises(BuildError, match=rf"'compute_{arch.replace('.', '').lower()}'"):
        toolchain.Cuda(toolchain.find_cuda(), toolchain.find_archs())


def test_an_old_nvcc_ends_the_build_before_the_first_file(tmp_path, monkeypatch):
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    home = make_toolkit(tmp_path / "cuda", "11.8")
    monkeypatch.setenv("CUDA_HOME", home)
    monkeypatch.setenv("CXX", str(fake_gcc(tmp_path, "__GNUC__ 12", "__GNUC_MINOR__ 2")))
    monkeypatch.setenv("FASTATTN_ARCHS", "90a")
    for option in ("auto", "on"):
        with pytest.raises(BuildError, match=r"11\.8: the kernels need 12\.0") as error:
            project.Build(option)
        assert f"{home}/bin/nvcc" in str(error.value)
    assert project.Build("off").cuda is None  # the CPU kernels need no nvcc


def test_cuda_kernels_that_cannot_be(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("FASTATTN_ARCHS", "90a")
    for with_cuda, problem in ((True, "no nvcc; set CUDA_HOME"), (False, "Paddle is a CPU build")):
        monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda with_cuda=with_cuda: with_cuda)
        with pytest.raises(BuildError, match=f"--cuda=on: {problem}"):
            project.Build("on")
        build = project.Build("auto")
        assert build.cuda is None and build.archs == []
        assert capsys.readouterr().out.startswith(f"building the CPU kernels only: {problem}")
    monkeypatch.setenv("FASTATTN_ARCHS", "none")
    assert project.Build("on").cuda is None and capsys.readouterr().out == ""


# --- Paddle and pip ------------------------------------------------------------------------------


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


@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_pip_fetches_no_paddle(tmp_path, monkeypatch, hook):
    backend = pytest.importorskip("custom_ops.builder.backend")
    hooks = backend.backend
    monkeypatch.setattr(backend, "find_ninja", lambda: "/usr/bin/ninja")
    assert getattr(hooks, f"get_requires_for_{hook}")() == []
    monkeypatch.setattr(backend, "find_ninja", lambda: None)
    assert getattr(hooks, f"get_requires_for_{hook}")() == ["ninja>=1.10"]
    call = f"prepare_metadata_for_{hook}({str(tmp_path)!r})"
    done = pep517(tmp_path, call, PATH=str(tmp_path))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert " -m pip install paddlepaddle\n" in done.stderr
    assert "--no-build-isolation" in done.stderr


def test_the_sources_fit_every_paddle(tmp_path):
    call = f"get_requires_for_build_sdist(); backend.build_sdist({str(tmp_path)!r})"
    done = pep517(tmp_path, call)
    assert done.returncode == 0, done.stderr
    folder = f"fastattn-{__version__}"
    with tarfile.open(tmp_path / f"{folder}.tar.gz") as archive:
        names = {Path(name).relative_to(folder).as_posix() for name in archive.getnames()}
    sources = subprocess.run(
        ["git", "ls-files", "benchmarks/*.py", "benchmarks/*.json"], cwd=ROOT, capture_output=True
    )
    assert {"setup_ops.py", "benchmarks/cli.py", *sources.stdout.decode().split()} <= names


def pep517(folder, call, **environ):
    """Call a hook where setuptools is the only package."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("setuptools is too old to build with")
    (folder / "site").mkdir()
    for path in Path(setuptools.__file__).parents[1].iterdir():
        if path.name.startswith(("setuptools", "_distutils_hack")):
            (folder / "site" / path.name).symlink_to(path)
    code = (
        "import site; site.getsitepackages = lambda: []; site.getusersitepackages = lambda: '/none'"
        f"; from builder.backend import backend; backend.{call}"
    )
    path = os.pathsep.join(["custom_ops", str(folder / "site")])
    return subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **environ},
    )


def test_a_paddle_that_does_not_import(tmp_path):
    (tmp_path / "paddle.py").write_text("raise RuntimeError('made for another NumPy')")
    done = setup_ops("build_ext", PYTHONPATH=str(tmp_path))
    if "fetching setuptools" in done.stdout:
        pytest.skip("setuptools is too old to build with")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: Paddle does not import for ")
    assert done.stderr.endswith("needs numpy<2): RuntimeError: made for another NumPy\n")


def test_without_pip(monkeypatch):
    toolchain.require_pip()
    monkeypatch.setattr(importlib.metadata, "distributions", lambda name: [])
    with pytest.raises(BuildError, match="-m ensurepip"):
        toolchain.require_pip()


@pytest.mark.parametrize(
    ("paddle", "numpy", "asked"),
    [
        ("2.6.2", "1.26.4", "numpy>=1.21,<2"),
        ("2.6.2", "2.2.6", "numpy>=1.21"),
        ("3.3.1", "1.26.4", "numpy>=1.21"),
        ("", "", "numpy>=1.21"),
    ],
)
def test_the_numpy_of_paddle_2_stays(paddle, numpy, asked):
    found = project.requirements(paddle, numpy)
    assert found[0] == asked and {"setuptools", "safetensors>=0.4"} <= set(found)
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


@pytest.fixture
def pip_calls(monkeypatch):
    """What `install` has pip do, after a build that only leaves a wheel."""
    ran: list[list[str]] = []

    def run(arguments, builds=True, fill_tree=True):
        assert builds and fill_tree  # whatever runs in the source tree finds that one first
        ran.append(arguments)
        make_wheel(Path(arguments[arguments.index("-d") + 1]))

    monkeypatch.setattr(extension, "run", run)
    monkeypatch.setattr(extension.subprocess, "call", lambda command: ran.append(command) or 0)
    return ran


def test_install_is_a_wheel_that_pip_installs(pip_calls, capsys):
    extension.install(["build_ext", "--cuda=off", "install", "-v"])
    build, first, second = pip_calls
    assert build[:3] == ["build_ext", "--cuda=off", "bdist_wheel"] and build[-1] == "-v"
    assert first[:4] == [sys.executable, "-m", "pip", "install"] and "--no-deps" in first
    assert second[-1] == f"numpy=={importlib.metadata.version('numpy')}"
    assert first[5] == second[5] and first[5].endswith(".whl")
    assert "installed fastattn-0.1.0+paddle3.3.1.cpu" in capsys.readouterr().out


def test_pip_that_fails_is_no_traceback(pip_calls, monkeypatch):
    monkeypatch.setattr(extension.subprocess, "call", lambda command: 1)
    with pytest.raises(BuildError, match="pip install failed"):
        extension.install(["install"])


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("fill_tree", [False, True])
def test_compiled_files_go_into_the_tree(tmp_path, monkeypatch, fill_tree):
    """All of them, each as a new file: a process may have the old one open."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("FASTATTN_ARCHS", "none")
    monkeypatch.setattr(extension, "ROOT", tmp_path)
    tree = tmp_path / "fastattn"
    tree.mkdir()
    (tree / "_fastattn_ops.so").write_text("old")
    build = project.Build()
    attributes = {"name": "fastattn", "version": "0.1.0", "ext_modules": build.extensions()}
    attributes["package_dir"] = {"": str(tmp_path)}
    distribution = extension.setuptools.Distribution(attributes)
    distribution.command_options["build"] = {"build_lib": ("test", str(tmp_path / "lib"))}
    command = extension.build_command(build, fill_tree)(distribution)

    def build_extensions():
        for name in [*command.get_outputs(), f"{command.build_lib}/fastattn/_build_info.py"]:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text("new")

    command.build_extensions = build_extensions
    command.ensure_finalized()
    with open(tree / "_fastattn_ops.so") as still_open:
        command.run()
        assert still_open.read() == "old"
    found = {path.name.partition(".")[0]: path.read_text() for path in tree.iterdir()}
    names = {"_fastattn_ops", "_build_info", *(m.rpartition(".")[2] for m in project.MODULES)}
    assert found == (dict.fromkeys(names, "new") if fill_tree else {"_fastattn_ops": "old"})
    suffixes = {path.name: path.suffixes for path in (tmp_path / "lib/fastattn").iterdir()}
    assert suffixes["_fastattn_ops.so"] == [".so"]  # for any Python; the modules are for this one
    assert all(len(found) == 2 for name, found in suffixes.items() if name[:2] in ("_h", "_d"))


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


def write_metadata(folder, name, version):
    path = folder / f"{name}-{version}.dist-info" / "METADATA"
    path.parent.mkdir()
    path.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


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
    write_metadata(packages, "pip", "23.0")
    for path in site.iterdir():  # what else there is, without setuptools and pip
        if path.name not in names and not path.name.startswith("pip"):
            (packages / path.name).symlink_to(path)
    if old:
        write_metadata(packages, "setuptools", old)
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
    assert "argument --cuda: invalid choice: 'maybe'" in done.stderr


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
