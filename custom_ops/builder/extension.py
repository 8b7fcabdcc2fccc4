"""The setuptools commands that build and install the package."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import ClassVar

from setuptools import Distribution, Extension, SetuptoolsDeprecationWarning
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info
from setuptools.command.install import install
from setuptools.errors import SetupError

from . import sources as source_lists
from .compile import CompileError
from .ops import BUILD_INFO, ROOT, Build
from .toolchain import ToolchainError, find_paddle
from .wheel import local_version, requirements, unpack_compiled

LIBRARY = "fastattn._fastattn_ops"
MODULES = {name: f"fastattn.{name}" for name in source_lists.MODULES}


def extensions() -> list[Extension]:
    """What setuptools is told: the operator library and the Python modules beside it."""
    modules = [Extension(name, sources=[], optional=True) for name in MODULES.values()]
    return [Extension(LIBRARY, sources=[]), *modules]


def install_requires() -> list[str]:
    """What the package asks pip for, in this environment."""
    try:
        return requirements(find_paddle().version, importlib.metadata.version("numpy"))
    except (ToolchainError, importlib.metadata.PackageNotFoundError):
        return requirements(None, None)  # an sdist, or the metadata of what cannot be built here


def build_command() -> type[build_ext]:
    """``build_ext`` command: a subclass of Paddle's ``BuildExtension``.

    Paddle's own command lets a file that fails to compile pass until the link, does not track
    headers, and writes a Python stub that an operator package does not want; so the whole build is
    replaced, while the type stays the one that Paddle's tools expect.
    """
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

        def initialize_options(self) -> None:
            super().initialize_options()
            self.cuda: str | None = None

        def finalize_options(self) -> None:
            super().finalize_options()
            self.cuda_option = self.cuda or "auto"

        def run(self) -> None:
            build_ext.run(self)
            if self.inplace:
                built = Path(self.get_ext_fullpath_in(self.build_lib, LIBRARY)).parent
                shutil.copyfile(built / BUILD_INFO, ROOT / "fastattn" / BUILD_INFO)

        def get_ext_fullpath_in(self, folder: str, name: str) -> str:
            return os.path.join(folder, self.get_ext_filename(name))

        def get_ext_filename(self, fullname: str) -> str:
            if fullname in (LIBRARY, LIBRARY.rpartition(".")[2]):
                return os.path.join(*fullname.split(".")) + ".so"
            return build_ext.get_ext_filename(self, fullname)

        def get_outputs(self) -> list[str]:
            return [
                *build_ext.get_outputs(self),
                os.path.join(self.build_lib, "fastattn", BUILD_INFO),
            ]

        def build_extensions(self) -> None:
            library = Path(self.get_ext_fullpath(LIBRARY)).resolve()
            modules = {
                name: Path(self.get_ext_fullpath(full)).resolve() for name, full in MODULES.items()
            }
            try:
                Build(self.cuda_option).run(library, modules)
            except (CompileError, ToolchainError) as error:
                raise SetupError(str(error)) from None

    return BuildExtension


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
            try:
                build = Build(option or "auto")
            except ToolchainError:
                pass  # no Paddle, no compiler: nothing can be built, and building says why
            else:
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
        if not self._called_by_user():
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

    def _called_by_user(self) -> bool:
        return not self.root and not self.single_version_externally_managed


def _pip(command: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", command, "--quiet", *arguments])
    if done.returncode != 0:
        raise SetupError(f"pip {command} failed; its message is above")


class BinaryDistribution(Distribution):
    """A distribution with compiled parts, so that its wheel is tagged for one platform."""

    def has_ext_modules(self) -> bool:
        """Whether it has compiled parts."""
        return True
