"""What a build finds on the machine: compilers, Paddle, the CUDA toolkit, GPU architectures."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ARCH = "90a"

#: What to fetch where there is none; two versions of it do not read each other's logs.
NINJA = "ninja>=1.10"

#: Where builder/instances.py writes, seen from ``custom_ops``.
GENERATED = "../build/generated"

OLDEST_GCC = (8, 0)

# First toolkit that compiles for an architecture; 12.0 is also what the kernels' instructions need
# (PTX 8.0: wgmma, setmaxnreg, bulk copies).
OLDEST_CUDA = (12, 0)
_ARCH_SINCE = {100: (12, 8), 101: (12, 8), 103: (12, 9), 110: (13, 0), 120: (12, 8), 121: (12, 9)}
_FAMILY_SINCE = (12, 9)  # the "f" targets
_GONE_IN_CUDA_13 = frozenset({*range(75), 101})  # 101 has become 110
# Architectures whose full instruction set exists only as the architecture-specific target "a".
_SPECIFIC = frozenset({90, *_ARCH_SINCE})


class ToolchainError(RuntimeError):
    """Something that the build needs is missing or was asked for in the wrong way."""


@dataclass(frozen=True)
class Paddle:
    """The Paddle that the operators are built for."""

    version: str
    root: Path  # the package's folder
    with_cuda: bool


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit."""

    home: Path
    nvcc: Path
    version: tuple[int, int]

    @property
    def library_dir(self) -> Path:
        """Folder of ``libcudart_static.a``."""
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            if (self.home / folder / "libcudart_static.a").exists():
                return self.home / folder
        raise ToolchainError(f"libcudart_static.a is not in the CUDA toolkit at {self.home}")


def require_paddle(pip: str | None = None) -> None:
    """Refuse to go on without a Paddle, with the line to type; `pip` is how it starts.

    None is fetched: `paddlepaddle` and `paddlepaddle-gpu` are two distributions of one module, and
    only the user knows which of them, in which version, the environment is meant to have.
    """
    if importlib.util.find_spec("paddle") is not None:
        return
    line = f"{pip or f'{shlex.quote(sys.executable)} -m pip'} install paddlepaddle"
    if shutil.which("nvidia-smi"):
        line += "-gpu    # the one that fits the GPU's driver"
    raise ToolchainError(
        f"Paddle is not installed for {sys.executable}. The operators are built against the "
        f"Paddle that they will run in, so install one first:\n\n    {line}\n"
    )


def require_pip() -> None:
    """Refuse to go on where pip, which installs the wheel, is missing (as in uv's environments)."""
    # Not importlib.util.find_spec: setuptools' import hook takes that for pip itself running, and
    # leaves Python 3.11 and older with the distutils of the standard library.
    if importlib.machinery.PathFinder.find_spec("pip") is None:
        raise ToolchainError(
            f"pip is missing for {sys.executable}: `{shlex.quote(sys.executable)} -m ensurepip` "
            "(or `uv pip install pip`) first"
        )


def find_ninja() -> str | None:
    """Path of ninja: beside this Python, where pip puts it, else in PATH."""
    folders = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    return shutil.which("ninja", path=folders)


@functools.cache
def find_paddle() -> Paddle:
    """Describe the Paddle that this Python imports."""
    require_paddle()
    try:
        import paddle
    except Exception as error:  # of many types: a missing library, a NumPy that does not fit
        first = next(iter(str(error).strip().splitlines()), "no message")
        raise ToolchainError(
            f"Paddle is installed for {sys.executable} but does not import: "
            f"{type(error).__name__}: {first} (Paddle 2.6 needs numpy<2)"
        ) from error
    root = Path(paddle.__file__).parent
    return Paddle(paddle.__version__, root, bool(paddle.is_compiled_with_cuda()))


def find_cxx(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Command of the C++ compiler: ``CXX``, else g++, c++ or clang++."""
    if environ.get("CXX"):
        return shlex.split(environ["CXX"])
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name, path=environ.get("PATH")):
            return [name]
    raise ToolchainError("no C++ compiler: install g++ (8 or newer) or name one in CXX")


def find_cuda(environ: Mapping[str, str] = os.environ) -> Cuda | None:
    """CUDA toolkit of ``CUDA_HOME`` or ``CUDA_PATH``, else of nvcc in PATH or /usr/local/cuda."""
    candidates = [environ[v] for v in ("CUDA_HOME", "CUDA_PATH") if environ.get(v)]
    if not candidates:
        on_path = shutil.which("nvcc", path=environ.get("PATH"))
        candidates = [str(Path(on_path).resolve().parents[1])] if on_path else []
        candidates.append("/usr/local/cuda")
    for home in map(Path, candidates):
        nvcc = home / "bin" / "nvcc"
        # An nvcc in PATH may be a wrapper script outside any toolkit; its headers tell.
        if nvcc.exists() and (home / "include" / "cuda_runtime.h").exists():
            text = _output(str(nvcc), "--version")
            match = re.search(r"release (\d+)\.(\d+)", text)
            if match is None:
                raise ToolchainError(f"{nvcc} --version tells no version: {text!r}")
            return Cuda(home, nvcc, (int(match[1]), int(match[2])))
    return None


@functools.cache
def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise ToolchainError(f"{command[0]} does not run: {error}") from error
    return done.stdout or done.stderr


def compiler_identity(command: Sequence[str]) -> str:
    """First line of ``command --version``."""
    return _output(*command, "--version").strip().splitlines()[0]


def gcc_version(command: Sequence[str]) -> tuple[int, int] | None:
    """Version of a GCC, by the macros that it defines; None for another compiler."""
    text = _output(*command, "-dM", "-E", "-x", "c++", os.devnull)
    macros = dict(re.findall(r"^#define (\w+) (\d+)\s*$", text, re.M))
    if "__GNUC__" not in macros or "__clang__" in macros:
        return None
    return int(macros["__GNUC__"]), int(macros.get("__GNUC_MINOR__", 0))


def check_cxx(command: Sequence[str]) -> None:
    """Refuse a GCC that is too old for the sources; other compilers are taken as they are."""
    found = gcc_version(command)
    if found is not None and found < OLDEST_GCC:
        raise ToolchainError(
            f"{shlex.join(command)} is GCC {found[0]}.{found[1]}, and the sources need "
            f"{OLDEST_GCC[0]} or newer: name a newer one in CXX, such as CXX=g++-12"
        )


def check_cuda(cuda: Cuda, archs: Sequence[str]) -> None:
    """Refuse a toolkit that is too old for the kernels or too old or new for an architecture."""
    found = ".".join(map(str, cuda.version))
    for arch in archs:
        number = int(arch.rstrip("af"))
        oldest = max(OLDEST_CUDA, _ARCH_SINCE.get(number, OLDEST_CUDA))
        if arch.endswith("f"):
            oldest = max(oldest, _FAMILY_SINCE)
        if cuda.version < oldest:
            raise ToolchainError(
                f"{cuda.nvcc} is of CUDA {found}, and sm_{arch} needs {oldest[0]}.{oldest[1]} or "
                "newer: name a newer toolkit in CUDA_HOME, or leave the CUDA kernels out with "
                "FASTATTN_ARCHS=none"
            )
        if cuda.version >= (13, 0) and number in _GONE_IN_CUDA_13:
            raise ToolchainError(
                f"{cuda.nvcc} is of CUDA {found}, which no longer compiles for sm_{arch} of "
                "FASTATTN_ARCHS: CUDA 12 does"
            )


def jobs(environ: Mapping[str, str] = os.environ) -> int:
    """Number of compilers to run at a time: ``MAX_JOBS``, else the number of CPUs."""
    text = environ.get("MAX_JOBS", "").strip() or str(os.cpu_count() or 1)
    if not text.isdigit() or int(text) < 1:
        raise ToolchainError(f"MAX_JOBS: expected a number of at least 1, got {text!r}")
    return int(text)


def detect_archs() -> list[str]:
    """Architectures of the GPUs that ``nvidia-smi`` lists, each once."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    found = re.findall(r"^\s*(\d+)\.(\d)\s*$", done.stdout if done.returncode == 0 else "", re.M)
    return list(dict.fromkeys(specific_arch(int(major + minor)) for major, minor in found))


def specific_arch(number: int) -> str:
    """Name of the target with every instruction of compute capability `number` (90 -> "90a")."""
    return f"{number}a" if number in _SPECIFIC else str(number)


def parse_archs(text: str | None, detected: Sequence[str] = ()) -> list[str]:
    """Read ``FASTATTN_ARCHS``, such as ``"90a;100a"``, ``"[80, 90]"`` or ``"9.0a"``.

    Gives architectures without a dot, each once, in the order given: what was detected for an empty
    text, none for ``"none"``.
    """
    text = (text or "").strip().strip("[]")
    if text.lower() == "none":
        return []
    entries = [e.strip(" \"'") for e in re.split(r"[;,\s]+", text) if e.strip(" \"'")]
    archs = []
    for entry in entries:
        name = re.sub(r"^(\d+)\.(\d)", r"\1\2", re.sub(r"^(sm_|compute_)", "", entry.lower()))
        if not re.fullmatch(r"\d{2,3}[af]?", name):
            raise ToolchainError(
                f"FASTATTN_ARCHS: expected a list such as '90a;100a' or 'none', got {entry!r}"
            )
        # The Hopper kernels need what only 90a has; every GPU of capability 9.0 runs it.
        archs.append("90a" if name == "90" else name)
    return list(dict.fromkeys(archs)) or list(detected) or [DEFAULT_ARCH]


def gencode(archs: Sequence[str]) -> list[str]:
    """Flags that make nvcc compile for exactly these architectures."""
    return [f for a in archs for f in ("-gencode", f"arch=compute_{a},code=sm_{a}")]


def cxx_flags(with_cuda: bool = False) -> list[str]:
    """Flags of the C++ sources of the operator library, beside those of Paddle's classes.

    `-ffp-contract=off` keeps the bit-exact paths free of fused multiply-adds; no -march, so that
    the library runs on any CPU of its family. Without Paddle's Python headers
    (`PADDLE_NO_PYTHON`) a file takes 3 s instead of 12 s and the library fits any Python.
    """
    return [
        *("-O3", "-DNDEBUG", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=off"),
        *("-fvisibility=hidden", "-DPADDLE_NO_PYTHON", "-I."),
        *(("-DPADDLE_WITH_CUDA", "-DFASTATTN_WITH_CUDA") if with_cuda else ()),
    ]


def nvcc_flags(
    cuda: Cuda, archs: Sequence[str], environ: Mapping[str, str] = os.environ
) -> list[str]:
    """Flags of the CUDA sources; they include no Paddle header."""
    flags = [
        *("-O3", "-DNDEBUG", "-std=c++17", "-DFASTATTN_WITH_CUDA", "-I.", f"-I{GENERATED}"),
        *("--expt-relaxed-constexpr", "-lineinfo", "-Xfatbin", "-compress-all"),
        "--ptxas-options=--warn-on-spills,--warn-on-local-memory-usage",
        "-Xcompiler=-fPIC,-fopenmp,-ffp-contract=off,-fvisibility=hidden",
    ]
    if cuda.version >= (13, 0):
        # Kernel templates stay callable from other files than the one that instantiates them.
        flags.append("-static-global-template-stub=false")
    if environ.get("CXX"):
        flags += ["-ccbin", shlex.split(environ["CXX"])[0]]
    return flags + gencode(archs)
