"""The commands that build and install, based on setuptools and Paddle's ``BuildExtension``."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.metadata
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import setuptools
from setuptools.build_meta import suppress_known_deprecation
from setuptools.command.build_ext import build_ext

from . import instances, toolchain
from .project import CUSTOM_OPS, LIBRARY, ROOT, Build, operators, requirements

BUILD_INFO = "fastattn/_build_info.py"


def install(arguments: list[str]) -> None:
    """Make a wheel and install it with pip, so that pip can also remove it."""
    at, numpy = arguments.index("install"), importlib.metadata.version("numpy")
    with tempfile.TemporaryDirectory() as folder:
        run([*arguments[:at], "bdist_wheel", "-d", folder, *arguments[at + 1 :]])
        (wheel,) = map(str, Path(folder).glob("*.whl"))
        # Then install its dependencies. The installed NumPy stays, because Paddle and other
        # packages run with it.
        for options in (["--no-deps", "--force-reinstall"], [f"numpy=={numpy}"]):
            pip = [sys.executable, "-m", "pip", "install", "--quiet", wheel, *options]
            if subprocess.call(pip) != 0:
                raise toolchain.BuildError("pip install failed; its message is above")
    print(f"installed {Path(wheel).name} for {sys.executable}")


def run(arguments: list[str], builds: bool = True, fill_tree: bool = True) -> None:
    """Run setuptools' commands; with `fill_tree`, also copy compiled files to the source tree."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--cuda", choices=("auto", "on", "off", "virtual"), default="auto")
    parser.add_argument("--only", default="")
    parser.add_argument("--modules", action="store_true")
    options, arguments = parser.parse_known_args(arguments)
    # The build prints its own progress. setuptools would add a line for every copied file.
    if not {"-v", "--verbose"}.intersection(arguments):
        arguments = ["--quiet", *arguments]
    if not builds:  # such as sdist: the sources fit every Paddle
        setuptools.setup(script_args=arguments, install_requires=requirements())
        return
    build = Build(options.cuda, options.only, options.modules)
    library = str(build.objects / "lib")
    build.objects.mkdir(parents=True, exist_ok=True)
    with open(build.objects / "lock", "w", encoding="utf-8") as lock, suppress_known_deprecation():
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another build is running; waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        # files of an older build do not belong in a wheel
        shutil.rmtree(library, ignore_errors=True)
        setuptools.setup(
            script_args=arguments,
            ext_modules=build.extensions(),
            cmdclass={"build_ext": build_command(build, fill_tree)},
            install_requires=requirements(build.paddle, importlib.metadata.version("numpy")),
            # A library fits one version of Paddle, so wheels for several versions need different
            # labels.
            options={"egg_info": {"tag_build": f"+{build.label}"}, "build": {"build_lib": library}},
        )


def build_command(build: Build, fill_tree: bool) -> type[build_ext]:
    """Paddle's ``BuildExtension``, with ninja for the compilations."""
    from paddle.utils.cpp_extension import BuildExtension as Base

    class BuildExtension(Base):
        def run(self) -> None:
            self.force = True  # distutils compares only times, not flags
            self.inplace = self.inplace or fill_tree
            build_ext.run(self)  # Paddle's method would write a Python module next to the library
            if self.inplace:
                shutil.copyfile(Path(self.build_lib, BUILD_INFO), ROOT / BUILD_INFO)

        def get_ext_filename(self, fullname: str) -> str:
            # the modules fit one Python version
            self.no_python_abi_suffix = LIBRARY.endswith(fullname)
            return super().get_ext_filename(fullname)

        def _record_op_info(self) -> None:
            """Do nothing: the method is for the Python module that is not written."""

        def build_extensions(self) -> None:
            print(f"building fastattn for {build.label}, {build.jobs} jobs", flush=True)
            compiler, cxx = self.compiler, build.cxx
            if build.cuda:
                instances.write(CUSTOM_OPS / toolchain.GENERATED)
            compiled = build.compile(self.extensions)
            if build.virtual:
                self.extensions[0].extra_objects = [build.missing_launchers()]
            compiler.compile = lambda sources, **_: [build.object_of[s] for s in sources]
            compiler.compiler_cxx = compiler.linker_exe = compiler.linker_exe_cxx = cxx
            compiler.linker_so = compiler.linker_so_cxx = [*cxx, "-shared"]
            # Suppresses "it will cost a few seconds", and Cython, which flushes its output.
            with contextlib.redirect_stdout(io.StringIO()):
                super().build_extensions()
            Path(self.build_lib, "fastattn", "version.txt").unlink(missing_ok=True)
            Path(self.build_lib, BUILD_INFO).write_text(build.info(), encoding="utf-8")
            print(
                f"{len(build.sources)} sources ({build.num_cuda} CUDA instances, "
                f"{len(operators())} operators), {len(compiled)} compiled"
            )
            if compiled:
                print("slowest: " + ", ".join(f"{name} {s:.1f} s" for s, name in compiled[:5]))

    return BuildExtension
