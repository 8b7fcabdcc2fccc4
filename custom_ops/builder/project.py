"""What is built: the tools that were found, the sources, and Paddle's extensions of them."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import instances, toolchain
from .compile import Unit

if TYPE_CHECKING:
    from setuptools import Extension

ROOT = Path(__file__).resolve().parents[2]
CUSTOM_OPS = ROOT / "custom_ops"
LIBRARY = "fastattn._fastattn_ops"
#: Python modules beside the library, and the source of each.
MODULES = {"fastattn._host": "api/host_module.cc", "fastattn._direct": "api/direct_module.cc"}

_OPERATOR = re.compile(r"^PD_BUILD_OP\(\s*fastattn_(\w+)\s*\)", re.M)
# What Paddle's classes ask for and a wheel must not have: docs/install.md says why.
_UNWANTED = ("-w", "-lcudart", "-Wl,--no-as-needed")


def discover(root: Path, with_cuda: bool) -> tuple[list[str], list[str]]:
    """C++ and CUDA sources of the library under `root`, sorted, but those that the build writes."""

    def find(pattern: str) -> list[str]:
        return sorted(path.relative_to(root).as_posix() for path in root.glob(pattern))

    cxx = [*find("api/*.cc"), *find("cpu/**/*.cc")]
    return [n for n in cxx if n not in MODULES.values()], find("cuda/**/*.cu") if with_cuda else []


def operators(root: Path, with_cuda: bool) -> dict[str, list[str]]:
    """Places that each operator has a kernel for, such as ``{"quantize_fp8": ["cpu"]}``.

    One that ``api/<family>.cc`` registers has a CUDA kernel when that file or another
    ``api/<family>_*.cc`` includes a header of ``cuda/``.
    """
    found = {}
    texts = {path.stem: path.read_text(encoding="utf-8") for path in root.glob("api/*.cc")}
    for stem, text in texts.items():
        family = [other for name, other in texts.items() if (name + "_").startswith(stem + "_")]
        on_gpu = with_cuda and any('#include "cuda/' in other for other in family)
        for operator in _OPERATOR.findall(text):
            found[operator] = ["cpu", "cuda"] if on_gpu else ["cpu"]
    return dict(sorted(found.items()))


def commit(root: Path = ROOT) -> str:
    """Commit that is built, with ``-dirty`` when tracked files differ; "unknown" outside git."""
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run([*describe, "--exclude=*"], capture_output=True, text=True)
    except OSError:
        return "unknown"
    # A folder unpacked inside another repository must not report that one's commit.
    known = done.returncode == 0 and (root / ".git").exists()
    return done.stdout.strip() if known else "unknown"


def build_info_text(info: dict[str, Any]) -> str:
    """Source of ``_build_info.py``. No time of day: the same build writes the same bytes."""
    types = {list: ": list[str]", dict: ": dict[str, list[str]]"}  # mypy cannot tell an empty one
    lines = [f"{name}{types.get(type(value), '')} = {value!r}" for name, value in info.items()]
    title = '"""How the compiled library was built (written by the build)."""'
    return "\n".join([title, "", *lines, ""])


class Build:
    """The tools that were found, and what is built with them.

    `cuda_option` says whether to build the CUDA part: "auto" (with a CUDA build of Paddle and
    nvcc), "on" or "off".
    """

    def __init__(self, cuda_option: str = "auto", paddle: toolchain.Paddle | None = None) -> None:
        self.paddle = paddle or toolchain.find_paddle()
        # Paddle's own list would add targets that cannot run the "a" instructions.
        os.environ.pop("PADDLE_CUDA_ARCH_LIST", None)
        listed = os.environ.get("FASTATTN_ARCHS")
        self.archs = toolchain.parse_archs(listed, toolchain.detect_archs())
        self.cuda = self._choose_cuda(cuda_option)
        self.cxx = toolchain.find_cxx()
        toolchain.check_cxx(self.cxx)
        if self.cuda is None:
            self.archs = []
        else:
            toolchain.check_cuda(self.cuda, self.archs)
        self.cxx_sources, self.cuda_sources = discover(CUSTOM_OPS, self.cuda is not None)
        if self.cuda:
            written = [f"{toolchain.GENERATED}/{name}" for name in instances.sources()]
            self.cuda_sources = [*written, *self.cuda_sources]  # these take longest
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
            say("no nvcc found: building the CPU kernels only (set CUDA_HOME for the CUDA part)")
        return found

    def extensions(self) -> list[Extension]:
        """The library and the Python modules, as Paddle's classes describe them."""
        flags = {"cxx": toolchain.cxx_flags(self.cuda is not None), "nvcc": self._nvcc_flags()}
        link = ["-fopenmp", "-Wl,--exclude-libs,ALL"]
        if self.cuda:
            link += [f"-L{self.cuda.library_dir}", "-lcudart_static", "-lpthread", "-ldl", "-lrt"]
        found = [self._extension(LIBRARY, [*self.cuda_sources, *self.cxx_sources], flags, link)]
        include = Path(sysconfig.get_paths()["include"])
        if not (include / "Python.h").exists():
            say(
                "Python.h is not installed: building without fastattn._direct (calls in dygraph "
                "then cost more host time) and fastattn._host"
            )
            return found
        archs = f'-DFASTATTN_ARCHS="{";".join(self.archs)}"'
        cxx = ["-O2", "-DNDEBUG", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-I.", archs]
        cxx.append(f"-DFASTATTN_CUDA={int(self.cuda is not None)}")
        link = ["-ldl", "-lstdc++"]  # before Paddle's library, which has some of its functions, too
        for name, source in MODULES.items():
            found.append(self._extension(name, [source], {"cxx": [*cxx]}, link))
        return found

    def _nvcc_flags(self) -> list[str]:
        return toolchain.nvcc_flags(self.cuda, self.archs) if self.cuda else []

    def _extension(
        self, name: str, sources: list[str], flags: dict[str, list[str]], link: list[str]
    ) -> Extension:
        from paddle.utils import cpp_extension

        make = cpp_extension.CppExtension
        if self.cuda:
            make = cpp_extension.CUDAExtension
            os.environ["CUDA_HOME"] = str(self.cuda.home)  # not where a wrapper of nvcc is
        folder = os.path.join(self.cuda.home, "include", "cccl") if self.cuda else ""
        found = make(
            [os.path.relpath(CUSTOM_OPS / source, ROOT) for source in sources],
            include_dirs=[folder] if os.path.isdir(folder) else [],
            extra_compile_args=flags,
            extra_link_args=["-Wl,-s", "-Wl,--as-needed", *link],
        )
        found.name = name
        found.runtime_library_dirs = []
        for arguments in (found.extra_link_args, *found.extra_compile_args.values()):
            arguments[:] = [argument for argument in arguments if argument not in _UNWANTED]
        return found

    def units(self, extensions: list[Extension]) -> list[Unit]:
        """The compilations of these extensions."""
        return [self._unit(each, source) for each in extensions for source in each.sources]

    def _unit(self, extension: Extension, source: str) -> Unit:
        flags: Any = extension.extra_compile_args
        if source.endswith(".cu") and self.cuda:
            command = [str(self.cuda.nvcc), *flags["nvcc"]]
        else:
            folders = [f for folder in extension.include_dirs for f in ("-isystem", folder)]
            command = [*self.cxx, *flags["cxx"], *folders]
        seen = os.path.relpath(ROOT / source, CUSTOM_OPS)
        name = seen.replace(f"{toolchain.GENERATED}/", "")
        launcher = ["ccache"] if shutil.which("ccache") else []
        return Unit(name, seen, self.objects / f"{name}.o", (*launcher, *command))

    def identity(self) -> str:
        """What decides the objects, beside sources and flags."""
        versions = [self.paddle.version, toolchain.compiler_identity(self.cxx)]
        return "\n".join([*versions, str(self.cuda and self.cuda.version)])

    def info(self) -> dict[str, Any]:
        """What ``_build_info.py`` records."""
        return {
            "PADDLE_VERSION": self.paddle.version,
            "COMMIT": commit(),
            "WITH_CUDA": self.cuda is not None,
            "ARCHS": list(self.archs),
            "NVCC": ".".join(map(str, self.cuda.version)) if self.cuda else None,
            "CXX": toolchain.compiler_identity(self.cxx),
            "FLAGS": " ".join([*toolchain.cxx_flags(), *self._nvcc_flags()]),
            "PLATFORM": f"{platform.system().lower()}-{platform.machine()}",
            "NUM_SOURCES": len(self.cxx_sources) + len(self.cuda_sources),
            "NUM_CUDA_SOURCES": len(self.cuda_sources),
            "OPERATORS": operators(CUSTOM_OPS, self.cuda is not None),
        }


#: As `Build`, looked for once.
find_build = functools.cache(Build)


def say(line: str) -> None:
    """Print a line of progress."""
    print(line, flush=True)
