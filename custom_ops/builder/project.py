"""Description of the build: sources, Paddle extensions, and objects, which ninja makes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from . import instances, toolchain
from .toolchain import GENERATED, BuildError

ROOT = Path(__file__).resolve().parents[2]
CUSTOM_OPS = ROOT / "custom_ops"
LIBRARY = "fastattn._fastattn_ops"
#: Python modules next to the library, and the source of each.
MODULES = {"fastattn._host": "api/host_module.cc", "fastattn._direct": "api/direct_module.cc"}
#: Folder of scripts/build_virtual_gpu.py for the runtime that such a build links.
VIRTUAL_GPU = ROOT / "build" / "virtual_gpu"
# Flags that Paddle's classes add and a wheel must not have; docs/install.md gives the reasons.
_UNWANTED = ("-w", "-lcudart", "-Wl,--no-as-needed")

# ninja compiles again if the command has changed. So other facts that affect the objects, such as
# the compiler's version, are added to it as a comment.
_RULE = """\
builddir = {folder}
rule compile
  command = $compiler -MMD -MF $out.d -c $in -o $out  # {identity}
  depfile = $out.d
  deps = gcc
  description = $name
"""


def operators() -> list[str]:
    """Names of the operators, such as "quantize_fp8". Each has a kernel for every place."""
    headers = "".join(path.read_text(encoding="utf-8") for path in CUSTOM_OPS.glob("api/*.h"))
    found = []
    for path in CUSTOM_OPS.glob("api/*.cc"):
        text = path.read_text(encoding="utf-8")
        # A declaration names the operator by a constant, which its errors have too.
        constants = dict(re.findall(r'\bconstexpr .*\b(k\w+)(?:\[\])? = "(\w+)"', headers + text))
        names = re.findall(r"^FASTATTN_OPERATOR\(\s*\w+, (k\w+),", text, re.M)
        found += [constants[name] for name in names]
    return sorted(found)


def commit() -> str:
    """Commit of the sources, with ``-dirty`` if tracked files differ; "unknown" outside git."""
    # The git folder is named explicitly, because sources that are unpacked in another repository do
    # not belong to its commit.
    git = ["git", f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}", "describe"]
    options = ["--always", "--dirty", "--abbrev=12", "--exclude=*"]
    status, text = subprocess.getstatusoutput(f"{shlex.join([*git, *options])} 2>/dev/null")
    return text if status == 0 else "unknown"


def local_version(paddle: str, archs: list[str]) -> str:
    """Part of a wheel's version after the +, such as ``paddle3.3.1.sm90a.sm100a``."""
    version = re.sub(r"[^a-z0-9]+", ".", paddle.lower()).strip(".")
    return ".".join([f"paddle{version}", *([f"sm{arch}" for arch in archs] or ["cpu"])])


def requirements(paddle: str = "", numpy: str = "") -> list[str]:
    """Distributions that a wheel requires, in versions that change no other package."""
    # Paddle 2 needs NumPy 1, which pip would replace for the newest ml_dtypes.
    old = paddle.startswith("2.") and numpy.startswith("1.")
    return [
        "numpy>=1.21,<2" if old else "numpy>=1.21",
        *("ml_dtypes>=0.4", "rich>=12", "safetensors>=0.4"),
        "setuptools",  # Paddle imports it to load operators, and does not always require it
    ]


class Build:
    """The tools that were found, and the extensions to build with them.

    `cuda` is "auto", "on", "off" or "virtual". "virtual" builds against a CPU build of Paddle, with
    kernels for the interpreter in tests/virtual_gpu; only kernels whose paths match `only` are
    compiled.

    With `modules` the Python modules are built without the library, which fits any Python: a wheel
    for several has its own modules for each.
    """

    def __init__(self, cuda: str = "auto", only: str = "", modules: bool = False) -> None:
        try:
            head_dims = instances.head_dims()
        except ValueError as error:
            raise BuildError(str(error)) from None
        try:
            import paddle
        except Exception as error:  # of many types: a missing library, a NumPy that does not fit
            raise BuildError(
                f"Paddle does not import for {sys.executable} (Paddle 2.6 needs numpy<2): "
                f"{type(error).__name__}: {error}"
            ) from error
        self.virtual, self.modules = cuda == "virtual", modules
        if only and not self.virtual:
            raise BuildError("--only: other builds than --cuda=virtual have all kernels")
        with_cuda = paddle.is_compiled_with_cuda() or self.virtual
        self.paddle = paddle.__version__
        self.archs = toolchain.find_archs() if cuda != "off" else []
        if self.virtual:
            self.archs = ["90a"]
        home = toolchain.find_cuda() if self.archs and with_cuda else None
        if self.archs and home is None:
            problem = "no nvcc; set CUDA_HOME or PATH" if with_cuda else "Paddle is a CPU build"
            if cuda in ("on", "virtual"):
                raise BuildError(f"--cuda={cuda}: {problem}")
            print(f"building the CPU kernels only: {problem}")
            self.archs = []
        self.cuda = toolchain.Cuda(home, self.archs, self.virtual) if home else None
        self.label = local_version(self.paddle, self.archs)
        self.cxx = toolchain.find_cxx()
        self.cxx_version = toolchain.output(*self.cxx, "--version").splitlines()[0]
        self.flags = {"cxx": [*toolchain.CXX_FLAGS], "nvcc": []}
        found = sorted(p.relative_to(CUSTOM_OPS).as_posix() for p in CUSTOM_OPS.rglob("*.c[cu]"))
        self.sources = [s for s in found if s.endswith(".cc") and s not in MODULES.values()]
        self.dims: list[str] = []
        if head_dims != instances.ALL_HEAD_DIMS:
            self.dims = [f"-DFASTATTN_HEAD_DIM_BITS={instances.head_dim_bits()}"]
        self.flags["cxx"] += self.dims
        if self.cuda:
            of_gpu = "-DFASTATTN_VIRTUAL_GPU" if self.virtual else "-DPADDLE_WITH_CUDA"
            self.flags["cxx"] += [of_gpu, "-DFASTATTN_WITH_CUDA"]
            self.flags["nvcc"] = [*self.cuda.flags, *self.dims]
            # The longest compilations come first, so that none of them starts last.
            written = [f"{GENERATED}/{name}" for name in instances.sources()]
            slow = [s for s in self.sources if s.startswith("cpu/attention_")]
            rest = [s for s in self.sources if s not in slow]
            kernels = [*written, *(s for s in found if s.endswith(".cu"))]
            self.sources = [*slow, *(k for k in kernels if re.search(only, k)), *rest]
            # for Paddle, which would use the folder of an nvcc wrapper
            os.environ["CUDA_HOME"] = self.cuda.home
        # Paddle's own list would add targets that do not support the "a" instructions.
        os.environ.pop("PADDLE_CUDA_ARCH_LIST", None)
        os.environ["PADDLE_SKIP_CHECK_ABI"] = "1"  # an old compiler has already been refused
        self.num_cuda = sum(source.endswith(".cu") for source in self.sources)
        kind = "virtual" if self.virtual else "cuda" if self.cuda else "cpu"
        tag = f"{self.paddle}-{kind}-{sys.implementation.cache_tag}"
        self.objects = ROOT / "build" / "objects" / tag
        self.object_of: dict[str, str] = {}  # each source of an extension
        self.jobs = os.environ.get("MAX_JOBS", "").strip() or str(os.cpu_count())
        if not re.fullmatch(r"[1-9]\d*", self.jobs):
            raise BuildError(f"MAX_JOBS: expected a number of at least 1, got {self.jobs!r}")

    def extensions(self) -> list[Any]:
        """The library and the Python modules, in the form of Paddle's classes."""
        from paddle.utils import cpp_extension

        make, headers = cpp_extension.CppExtension, []
        link = ["-fopenmp", "-Wl,--exclude-libs,ALL"]
        if self.cuda and self.virtual:
            headers = [f"{self.cuda.home}/include", f"{self.cuda.home}/include/cccl"]
            link += [f"-L{VIRTUAL_GPU}", "-lvirtual_gpu", "-Wl,-rpath,$ORIGIN"]
        elif self.cuda:
            make, headers = cpp_extension.CUDAExtension, [f"{self.cuda.home}/include/cccl"]
            folders = ("lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")  # or lib64
            link += [f"-L{self.cuda.home}/{folder}" for folder in folders]
            link += ["-lcudart_static", "-lpthread", "-ldl", "-lrt"]
        parts = [] if self.modules else [(LIBRARY, self.sources, self.flags, link)]
        if Path(sysconfig.get_paths()["include"], "Python.h").exists():
            cxx = ["-O2", "-DNDEBUG", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-I."]
            cxx += self.dims
            cxx.append(f'-DFASTATTN_ARCHS="{";".join(self.archs)}"')
            cxx.append(f"-DFASTATTN_CUDA={int(self.cuda is not None)}")
            # before Paddle's library, which has some of the same functions
            link = ["-ldl", "-lstdc++"]
            parts += [(name, [source], {"cxx": cxx}, link) for name, source in MODULES.items()]
        elif self.modules:
            raise BuildError(f"--modules: no Python.h for {sys.executable}")
        else:
            print("no Python.h: without fastattn._host and _direct a call costs more host time")
        found = []
        for name, sources, flags, link in parts:
            each = make(
                [f"custom_ops/{source}" for source in sources],
                include_dirs=[*headers],
                extra_compile_args={kind: [*some] for kind, some in flags.items()},
                extra_link_args=["-Wl,-s", "-Wl,--as-needed", *link],
            )
            each.name, each.runtime_library_dirs = name, []
            for arguments in (each.extra_link_args, *each.extra_compile_args.values()):
                arguments[:] = [argument for argument in arguments if argument not in _UNWANTED]
            if name.endswith("_host"):  # 2.6's library has a mutex's functions, and would be needed
                each.extra_link_args.remove("-l:libpaddle.so")
            found.append(each)
        return found

    def compile(self, extensions: list[Any]) -> list[tuple[float, str]]:
        """Compile with ninja what has changed; return seconds and names, longest first."""
        folder = os.path.relpath(self.objects, CUSTOM_OPS)
        cuda = f"CUDA {self.cuda.version}, " if self.cuda else ""
        text = _RULE.format(folder=folder, identity=f"{cuda}{self.cxx_version}, {self.paddle}")
        launcher = ["ccache"] if shutil.which("ccache") else []
        for each in extensions:
            isystem = [flag for path in each.include_dirs for flag in ("-isystem", path)]
            for source in each.sources:
                command = [*launcher, *self.cxx, *each.extra_compile_args["cxx"], *isystem]
                if self.cuda and source.endswith(".cu"):
                    command = [*launcher, self.cuda.nvcc, *each.extra_compile_args["nvcc"]]
                seen = source[len("custom_ops/") :]
                name = seen.replace(f"{GENERATED}/", "")
                text += f"build {folder}/{name}.o: compile {seen}\n  name = {name}\n"
                text += f"  compiler = {shlex.join(command).replace('$', '$$')}\n"
                self.object_of[source] = f"{self.objects}/{name}.o"
        script, log = self.objects / "build.ninja", self.objects / ".ninja_log"
        for path in CUSTOM_OPS.rglob("*.[ch]*") if script.exists() else ():
            # ninja compares times, and files unpacked over an older release keep their own times.
            if path.stat().st_ctime > script.stat().st_mtime >= path.stat().st_mtime:
                os.utime(path)
        script.write_text(text, encoding="utf-8")
        before = log.read_text(encoding="utf-8") if log.exists() else ""
        os.environ["NINJA_STATUS"] = "[%f/%t] %e s  "
        ninja = [toolchain.find_ninja() or "ninja", "-f", f"{folder}/build.ninja", f"-j{self.jobs}"]
        process = subprocess.Popen(ninja, cwd=CUSTOM_OPS, stdout=subprocess.PIPE, errors="replace")
        failures = 0
        for line in process.stdout or ():
            failures += line.startswith("FAILED: ")
            if failures < 2:  # jobs that run at the same time as the first failure may fail, too
                print(line, end="", flush=True)
        if process.wait() != 0:
            raise BuildError("a source does not compile; the compiler's message is above")
        lines = [x for x in log.read_text(encoding="utf-8").splitlines() if x not in before]
        rows = [line.split("\t") for line in lines if not line.startswith("#")]
        times = [(int(end) - int(start), target) for start, end, _, target, _ in rows]
        return [(ms / 1000, name[len(folder) + 1 : -2]) for ms, name in sorted(times)[::-1]]

    def missing_launchers(self) -> str:
        """Object with the launchers that were not compiled. Each returns cudaErrorStubLibrary."""
        objects = [path for path in self.object_of.values() if "module.cc" not in path]
        names = re.findall(r" ([UTWV]) (_ZN8fastattn4cuda\w+)", toolchain.output("nm", *objects))
        missing = {name for kind, name in names if kind == "U"} - {n for k, n in names if k != "U"}
        source = self.objects / "missing.c"
        call = "int virtual_gpu_missing(const char*);\n"
        stubs = (f'int {n}(void) {{ return virtual_gpu_missing("{n}"); }}\n' for n in missing)
        source.write_text(call + "".join(sorted(stubs)), encoding="utf-8")
        made = self.objects / "missing.o"
        subprocess.check_call([*self.cxx, "-x", "c", "-fPIC", "-c", str(source), "-o", str(made)])
        return str(made)

    def info(self) -> str:
        """Text of ``_build_info.py``, without a date: the same build writes the same bytes."""
        places = ["cpu", "cuda"] if self.cuda else ["cpu"]
        return f'''\
"""How the compiled library was built (written by the build)."""

PADDLE_VERSION = {self.paddle!r}
COMMIT = {commit()!r}
WITH_CUDA = {self.cuda is not None}
ARCHS: list[str] = {self.archs}
NVCC = {self.cuda and self.cuda.version!r}
CXX = {self.cxx_version!r}
FLAGS = {" ".join([*self.flags["cxx"], *self.flags["nvcc"]])!r}
PLATFORM = {sysconfig.get_platform()!r}
NUM_SOURCES = {len(self.sources)}
NUM_CUDA_SOURCES = {self.num_cuda}
OPERATORS: dict[str, list[str]] = {dict.fromkeys(operators(), places)}
'''
