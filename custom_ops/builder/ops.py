"""One build of the compiled part: what is compiled, with which flags, and into what."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import instances, toolchain
from . import sources as source_lists
from .compile import CompileError, Unit, compile_all

ROOT = Path(__file__).resolve().parents[2]
CUSTOM_OPS = ROOT / "custom_ops"
BUILD_INFO = "_build_info.py"


def commit(root: Path = ROOT) -> str:
    """Commit that is built, with ``-dirty`` when tracked files differ; "unknown" outside git."""
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run([*describe, "--exclude=*"], capture_output=True, text=True)
    except OSError:
        return "unknown"
    # A folder unpacked inside another repository must not report that one's commit.
    if done.returncode != 0 or not (root / ".git").exists():
        return "unknown"
    return done.stdout.strip()


def build_info_text(info: dict[str, Any]) -> str:
    """Source of ``_build_info.py``. No time of day: the same build writes the same bytes."""
    types = {list: ": list[str]", dict: ": dict[str, list[str]]"}  # mypy cannot tell an empty one
    lines = [f"{name}{types.get(type(value), '')} = {value!r}" for name, value in info.items()]
    return '"""How the compiled library was built (written by the build)."""\n\n' + "\n".join(
        [*lines, ""]
    )


class Build:
    """The tools that were found, what is built with them, and the steps of building it.

    Parameters
    ----------
    cuda_option : str
        Whether to build the CUDA part: "auto" (with a CUDA build of Paddle and nvcc), "on", "off".
    """

    def __init__(self, cuda_option: str = "auto") -> None:
        self.paddle = toolchain.find_paddle()
        # Paddle's own list would add targets that cannot run the "a" instructions.
        os.environ.pop("PADDLE_CUDA_ARCH_LIST", None)
        self.archs = toolchain.parse_archs(
            os.environ.get("FASTATTN_ARCHS"), toolchain.detect_archs()
        )
        self.cuda = self._choose_cuda(cuda_option)
        if self.cuda is None:
            self.archs = []
        self.cxx = toolchain.find_cxx()
        toolchain.check_cxx(self.cxx)
        if self.cuda is not None:
            toolchain.check_cuda(self.cuda, self.archs)
        self.sources = source_lists.discover(CUSTOM_OPS, self.cuda is not None)
        kind = "cuda" if self.cuda else "cpu"
        tag = f"{self.paddle.version}-{kind}-{sys.implementation.cache_tag}"
        self.objects = ROOT / "build" / "objects" / tag

    def _choose_cuda(self, option: str) -> toolchain.Cuda | None:
        if option not in ("auto", "on", "off"):
            raise toolchain.ToolchainError(f"--cuda: expected auto, on or off, got {option!r}")
        if option == "off" or not self.archs:
            return None
        if not self.paddle.with_cuda:
            if option == "on":
                raise toolchain.ToolchainError(
                    f"--cuda=on: Paddle {self.paddle.version} at {self.paddle.root} is a CPU build"
                )
            return None
        found = toolchain.find_cuda()
        if found is None and option == "on":
            raise toolchain.ToolchainError("--cuda=on: no nvcc; set CUDA_HOME or PATH")
        if found is None:
            _say("no nvcc found: building the CPU kernels only (set CUDA_HOME for the CUDA part)")
        return found

    def library_units(self) -> list[Unit]:
        """Compilations of the operator library, CUDA first because it takes longest."""
        units = []
        launcher = tuple(toolchain.find_ccache())
        if self.cuda is not None:
            nvcc = (str(self.cuda.nvcc), *toolchain.nvcc_flags(self.cuda, self.archs))
            identity = f"{self.cuda.version} {toolchain.compiler_identity(tuple(self.cxx))}"
            instances.write(CUSTOM_OPS / toolchain.GENERATED)
            for name in instances.sources():
                source = f"{toolchain.GENERATED}/{name}"
                units.append(Unit(source, self.objects / f"{name}.o", nvcc, identity, launcher))
            for name in self.sources.cuda:
                units.append(Unit(name, self.objects / f"{name}.o", nvcc, identity, launcher))
        cxx = (*self.cxx, *toolchain.cxx_flags(self.paddle, self.cuda))
        identity = f"{toolchain.compiler_identity(tuple(self.cxx))} {self.paddle.version}"
        for name in self.sources.cxx:
            units.append(Unit(name, self.objects / f"{name}.o", cxx, identity, launcher))
        return units

    def module_units(self) -> dict[str, Unit]:
        """Compilations of the Python modules, by name; none without ``Python.h``."""
        include = toolchain.python_include()
        if include is None:
            _say(
                "Python.h is not installed: building without fastattn._direct (calls in dygraph "
                "then cost more host time) and fastattn._host"
            )
            return {}
        flags = [
            *toolchain.module_flags(self.paddle, include),
            f'-DFASTATTN_ARCHS="{";".join(self.archs)}"',
            f"-DFASTATTN_CUDA={int(self.cuda is not None)}",
        ]
        identity = f"{toolchain.compiler_identity(tuple(self.cxx))} {self.paddle.version}"
        launcher = tuple(toolchain.find_ccache())
        return {
            name: Unit(
                source, self.objects / f"{source}.o", (*self.cxx, *flags), identity, launcher
            )
            for name, source in self.sources.modules.items()
        }

    def num_cuda_sources(self) -> int:
        """Hand-written and generated ones."""
        return len(self.sources.cuda) + len(instances.sources()) if self.cuda else 0

    def info(self) -> dict[str, Any]:
        """What ``_build_info.py`` records."""
        flags = toolchain.cxx_flags(None) + (
            toolchain.nvcc_flags(self.cuda, self.archs) if self.cuda else []
        )
        return {
            "PADDLE_VERSION": self.paddle.version,
            "COMMIT": commit(),
            "WITH_CUDA": self.cuda is not None,
            "ARCHS": list(self.archs),
            "NVCC": ".".join(map(str, self.cuda.version)) if self.cuda else None,
            "CXX": toolchain.compiler_identity(tuple(self.cxx)),
            "FLAGS": " ".join(flags),
            "PLATFORM": toolchain.platform_name(),
            "NUM_SOURCES": len(self.sources.cxx) + self.num_cuda_sources(),
            "NUM_CUDA_SOURCES": self.num_cuda_sources(),
            "OPERATORS": source_lists.operators(CUSTOM_OPS, self.sources),
        }

    def link(self, units: list[Unit], flags: list[str], target: Path) -> None:
        """Link objects into `target`, replaced in one step: a process may have it open."""
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        command = [*self.cxx, *(str(u.object) for u in units), *flags, "-o", str(partial)]
        done = subprocess.run(command, cwd=CUSTOM_OPS, capture_output=True, text=True)
        if done.returncode != 0:
            raise CompileError(f"linking {target.name} failed:\n{done.stderr}")
        os.replace(partial, target)

    def run(self, library: Path, modules: Mapping[str, Path]) -> None:
        """Compile and link everything, and write ``_build_info.py`` beside the library.

        Parameters
        ----------
        library : Path
            The operator library to write.
        modules : mapping of str to Path
            Python modules to write, by their names in ``sources.MODULES``.
        """
        start = time.monotonic()
        library_units, module_units = self.library_units(), self.module_units()
        jobs = toolchain.jobs()
        kind = f"CUDA {';'.join(self.archs)}" if self.cuda else "CPU"
        _say(f"fastattn: {kind} operators for Paddle {self.paddle.version}, {jobs} jobs")
        with _lock(self.objects):
            units = [*library_units, *module_units.values()]
            report = compile_all(units, CUSTOM_OPS, jobs, _say)
            self.link(library_units, toolchain.link_flags(self.paddle, self.cuda), library)
            for name, unit in module_units.items():
                self.link([unit], toolchain.module_link_flags(self.paddle), modules[name])
        info = self.info()
        (library.parent / BUILD_INFO).write_text(build_info_text(info), encoding="utf-8")
        _say(
            f"{info['NUM_SOURCES']} sources ({info['NUM_CUDA_SOURCES']} CUDA instances, "
            f"{len(info['OPERATORS'])} operators) in {time.monotonic() - start:.1f} s"
        )
        if report.seconds:
            _say("slowest: " + ", ".join(f"{n} {s:.1f} s" for n, s in report.slowest()))


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keep a second build out of the same objects."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another build is running; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(line: str) -> None:
    print(line, flush=True)
