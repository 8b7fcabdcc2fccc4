"""The setuptools commands that build and install the package."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from setuptools import Distribution, SetuptoolsDeprecationWarning
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info
from setuptools.command.install import install
from setuptools.errors import SetupError

from . import instances, toolchain
from .compile import CompileError, compile_all
from .project import CUSTOM_OPS, MODULES, ROOT, build_info_text, find_build, say
from .toolchain import ToolchainError, find_paddle
from .wheel import local_version, requirements, unpack_compiled

BUILD_INFO = "fastattn/_build_info.py"


def install_requires() -> list[str]:
    """What the package asks pip for, in this environment."""
    try:
        return requirements(find_paddle().version, importlib.metadata.version("numpy"))
    except (ToolchainError, importlib.metadata.PackageNotFoundError):
        return requirements(None, None)  # an sdist, or the metadata of what cannot be built here


def build_command() -> type[build_ext]:
    """``build_ext`` command: Paddle's ``BuildExtension``, with ninja for the compilations."""
    try:
        from paddle.utils.cpp_extension import BuildExtension as Base
    except ImportError:
        Base = build_ext  # without Paddle (metadata, sdist); building says what is missing

    class BuildExtension(Base):  # type: ignore[misc, valid-type]
        description = "build the operator library"
        user_options: ClassVar[list[tuple[str, str | None, str]]] = [
            *Base.user_options,
            ("cuda=", None, "build the CUDA part: auto (default), on or off"),
        ]
        problem = ""

        def initialize_options(self) -> None:
            super().initialize_options()
            self.cuda: str | None = None

        def finalize_options(self) -> None:
            if "sdist" not in self.distribution.commands:
                try:
                    self.build = find_build(self.cuda or "auto")
                    self.distribution.ext_modules = self.build.extensions()
                except ToolchainError as error:
                    self.problem = str(error)  # metadata needs no compiler
            super().finalize_options()

        def run(self) -> None:
            if self.problem:
                raise SetupError(self.problem)
            build_ext.run(self)  # Paddle's would write a Python module beside the library
            if self.inplace:
                shutil.copyfile(Path(self.build_lib, BUILD_INFO), ROOT / BUILD_INFO)

        def get_ext_filename(self, fullname: str) -> str:
            fits_one_python = any(name.endswith(fullname) for name in MODULES)
            named_by = build_ext if fits_one_python else Base
            return named_by.get_ext_filename(self, fullname)

        def get_outputs(self) -> list[str]:
            return [*build_ext.get_outputs(self), os.path.join(self.build_lib, BUILD_INFO)]

        def _check_abi(self) -> None:
            """Nothing: `Build` has refused a compiler that is too old."""

        def _record_op_info(self) -> None:
            """Nothing: it is for the Python module that is not written."""

        def build_extensions(self) -> None:
            start, build = time.monotonic(), self.build
            kind = f"CUDA {';'.join(build.archs)}" if build.cuda else "CPU"
            jobs = toolchain.jobs()
            say(f"fastattn: {kind} operators for Paddle {build.paddle.version}, {jobs} jobs")
            units = build.units(self.extensions)
            try:
                with _lock(build.objects):
                    if build.cuda:
                        instances.write(CUSTOM_OPS / toolchain.GENERATED)
                    seconds = compile_all(
                        units, CUSTOM_OPS, build.objects, jobs, build.identity(), say
                    )
                    self._link({unit.source: os.fspath(unit.object) for unit in units})
            except (CompileError, ToolchainError) as error:
                raise SetupError(str(error)) from None
            info = build.info()
            Path(self.build_lib, BUILD_INFO).write_text(build_info_text(info), encoding="utf-8")
            say(
                f"{info['NUM_SOURCES']} sources ({info['NUM_CUDA_SOURCES']} CUDA instances, "
                f"{len(info['OPERATORS'])} operators) in {time.monotonic() - start:.1f} s"
            )
            if seconds:
                slowest = [f"{name} {took:.1f} s" for name, took in list(seconds.items())[:5]]
                say("slowest: " + ", ".join(slowest))

        def _link(self, objects: dict[str, str]) -> None:
            compiler, cxx = self.compiler, self.build.cxx
            for name in ("compiler_cxx", "linker_exe", "linker_exe_cxx"):
                if name in compiler.executables:
                    compiler.set_executable(name, cxx)
            for name in ("linker_so", "linker_so_cxx"):
                if name in compiler.executables:
                    compiler.set_executable(name, [*cxx, "-shared"])
            compiler.compile = lambda sources, **_: [
                objects[os.path.relpath(ROOT / source, CUSTOM_OPS)] for source in sources
            ]
            # distutils compares times only: not the flags, nor the objects of another Paddle.
            self.force = compiler.force = True
            # "it will cost a few seconds"; Cython, where installed, flushes what it is given.
            with contextlib.redirect_stdout(io.StringIO()):
                super().build_extensions()
            Path(self.build_lib, "fastattn", "version.txt").unlink(missing_ok=True)

    return BuildExtension


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keep a second build out of the same objects."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another build is running; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class BuildPy(build_py):
    """``build_py`` that starts from an empty folder: what an older build left is in no wheel."""

    def run(self) -> None:
        """Copy the Python sources."""
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "fastattn", ignore_errors=True)
        super().run()


class EggInfo(egg_info):
    """Metadata of a build: its version ends in what it is built for.

    A library fits one version of Paddle, so wheels for several must be told apart. The sources fit
    all of them: an sdist has the plain version.
    """

    def finalize_options(self) -> None:
        """Add the tag, before the version is settled."""
        if not self.tag_build and "sdist" not in self.distribution.commands:
            option = getattr(self.distribution.get_command_obj("build_ext"), "cuda", None)
            with contextlib.suppress(ToolchainError):  # then building says why it cannot
                build = find_build(option or "auto")
                self.tag_build = "+" + local_version(build.paddle.version, build.archs)
        super().finalize_options()


class Install(install):
    """``setup_ops.py install``: a wheel, installed by pip, so that pip can also remove it.

    setuptools' own command copies files without a record, and older versions make eggs.
    """

    def initialize_options(self) -> None:
        """As setuptools', but without its banner against a command that this one replaces."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SetuptoolsDeprecationWarning)
            super().initialize_options()

    def run(self) -> None:
        """Build a wheel, install it, and put its compiled files into the source tree."""
        if self.root or self.single_version_externally_managed:
            super().run()  # bdist_wheel fills its folder through this command
            return
        with tempfile.TemporaryDirectory() as folder:
            # No keyword arguments here: the method of Debian's distutils takes none.
            wheel = self.reinitialize_command("bdist_wheel")
            wheel.dist_dir = folder
            self.run_command("bdist_wheel")
            (path,) = Path(folder).glob("*.whl")
            unpack_compiled(path, ROOT)
            _pip("install", "--no-deps", "--force-reinstall", str(path))
            # What it depends on. Paddle and others run with the NumPy that is there: it stays.
            _pip("install", str(path), f"numpy=={importlib.metadata.version('numpy')}")
        print(f"installed {self.distribution.get_fullname()} for {sys.executable}")


def _pip(command: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", command, "--quiet", *arguments])
    if done.returncode != 0:
        raise SetupError(f"pip {command} failed; its message is above")


class BinaryDistribution(Distribution):
    """A distribution with compiled parts, so that its wheel is tagged for one platform."""

    def has_ext_modules(self) -> bool:
        """Whether it has compiled parts."""
        return True
