"""Search of the machine for Paddle, compilers, the CUDA toolkit and GPU architectures."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

#: Requirement for ninja if it is missing. Different versions of ninja cannot read each other's
#: logs.
NINJA = "ninja>=1.10"
#: Output folder of builder/instances.py, relative to ``custom_ops``.
GENERATED = "../build/generated"
OLDEST_GCC = 8
OLDEST_CUDA = 12  # PTX 8.0: wgmma, setmaxnreg, bulk copies
#: Flags for the library, in addition to Paddle's. Products are bit-exact because fused
#: multiply-adds are off. Without -march the library runs on any CPU of its family. Without Paddle's
#: Python headers a file compiles in 3 s instead of 12 s, and the library fits any Python.
CXX_FLAGS = (
    *("-O3", "-DNDEBUG", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=off"),
    *("-fvisibility=hidden", "-DPADDLE_NO_PYTHON", "-I."),
)


class BuildError(RuntimeError):
    """A requirement of the build is missing or does not fit, or a source does not compile."""


def require_paddle() -> None:
    """Stop if Paddle is missing, with the command that installs it.

    Paddle is not fetched, because `paddlepaddle` and `paddlepaddle-gpu` are two distributions of
    one module. Only the user knows which of them, and which version, the environment should have.
    """
    if importlib.util.find_spec("paddle") is None:
        gpu = "-gpu    # the one that fits the GPU's driver" if shutil.which("nvidia-smi") else ""
        raise BuildError(
            f"Paddle is not installed for {sys.executable}. The operators are built against the "
            "Paddle that they will run in, so install one first:\n\n"
            f"    {shlex.quote(sys.executable)} -m pip install paddlepaddle{gpu}\n\n"
            "The build environments of uv and `python -m build` do not see one that is installed: "
            "build with --no-build-isolation there."
        )


def require_pip() -> None:
    """Stop if pip, which installs the wheel, is missing (as in uv's environments)."""
    if not any(importlib.metadata.distributions(name="pip")):
        raise BuildError(
            f"pip is missing for {sys.executable}: `{shlex.quote(sys.executable)} -m ensurepip` "
            "(or `uv pip install pip`) first"
        )


def not_writable_in(root: Path) -> Path | None:
    """First file or folder of the source tree that a build writes and this user may not write."""
    for name in ("build/objects", "fastattn.egg-info", "fastattn"):
        path = root / name
        while not path.exists():
            path = path.parent
        if not os.access(path, os.W_OK | os.X_OK):
            return path
    return None


def not_writable(path: object, root: Path) -> BuildError:
    """Advice for a file or folder of the source tree that cannot be written."""
    copy = shlex.join(["cp", "-r", str(root), "fastattn-build"])
    return BuildError(
        f"{path} cannot be written, and a build writes into build/, fastattn/ and "
        f"fastattn.egg-info/ of the source tree. Build in a copy of your own: {copy} && chmod -R "
        "u+w fastattn-build && cd fastattn-build"
    )


def copy_sources(root: Path, to: Path) -> None:
    """Copy what a wheel is built from into a folder that can be written."""
    skipped = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.py")
    for name in ("custom_ops", "fastattn"):
        # The modes of files are not copied; copytree always copies the modes of folders.
        shutil.copytree(root / name, to / name, ignore=skipped, copy_function=shutil.copyfile)
    for name in ("LICENSE", "README.md", "pyproject.toml", "setup_ops.py"):
        shutil.copyfile(root / name, to / name)
    for folder, _, _ in os.walk(to):
        os.chmod(folder, 0o755)


def build_elsewhere(root: Path, arguments: list[str], by_pip: bool) -> int:
    """Run setup_ops.py in a temporary copy of the tree; return its exit status."""
    print(f"{root} cannot be written: building in a copy in {tempfile.gettempdir()}", flush=True)
    # pip's build environment is found as in this process: by the backend.
    as_pip = "import sys; sys.path.insert(0, 'custom_ops'); from builder.backend import backend; "
    script = ["-c", f"{as_pip}backend.run_setup()"] if by_pip else ["setup_ops.py"]
    with tempfile.TemporaryDirectory(prefix="fastattn-") as folder:
        copy_sources(root, Path(folder))
        return subprocess.call([sys.executable, *script, *arguments], cwd=folder)


def find_ninja() -> str | None:
    """Path of ninja: next to this Python, where pip puts it, otherwise in PATH."""
    folders = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    return shutil.which("ninja", path=folders)


def output(*command: str) -> str:
    """Output of a command."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    return done.stdout or done.stderr


def find_cxx() -> list[str]:
    """Command of the C++ compiler: ``CXX``, else g++, c++ or clang++. An old GCC is refused."""
    names = [os.environ.get("CXX"), *filter(shutil.which, ("g++", "c++", "clang++"))]
    command = shlex.split(next(filter(None, names), ""))
    if not command:
        raise BuildError(f"no C++ compiler: install g++ ({OLDEST_GCC} or newer) or name one in CXX")
    text = output(*command, "-dM", "-E", "-x", "c++", os.devnull)
    macros = dict(re.findall(r"^#define (\w+) (\d+)\s*$", text, re.M))
    if "__clang__" not in macros and int(macros.get("__GNUC__", OLDEST_GCC)) < OLDEST_GCC:
        raise BuildError(
            f"{shlex.join(command)} is GCC {macros['__GNUC__']}.{macros['__GNUC_MINOR__']}, and "
            f"the sources need {OLDEST_GCC} or newer: name a newer one in CXX, such as CXX=g++-12"
        )
    return command


def find_cuda() -> str | None:
    """CUDA toolkit of ``CUDA_HOME`` or ``CUDA_PATH``, else of nvcc in PATH or /usr/local/cuda."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = os.path.realpath(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    for home in [named] if named else [on_path[: -len("/bin/nvcc")], "/usr/local/cuda"]:
        # An nvcc in PATH may be a wrapper script outside any toolkit, so its headers are checked.
        if os.path.exists(f"{home}/bin/nvcc") and os.path.exists(f"{home}/include/cuda_runtime.h"):
            return home
    return None


class Cuda:
    """A CUDA toolkit and its flags. A toolkit that is too old, or lacks one of `archs`, is refused.

    With `virtual` the kernels stay PTX, which tests/virtual_gpu interprets.
    """

    def __init__(self, home: str, archs: list[str], virtual: bool = False) -> None:
        self.home, self.nvcc = home, f"{home}/bin/nvcc"
        text = output(self.nvcc, "--version")
        self.version = (re.findall(r"release (\d+\.\d+)", text) or ["0.0"])[0]
        flags = ["-O3", "-DNDEBUG", "-std=c++17", "-DFASTATTN_WITH_CUDA", "-I.", f"-I{GENERATED}"]
        # -lineinfo would make the library three times as large. NVCC_APPEND_FLAGS can add it.
        flags += ["--expt-relaxed-constexpr"]
        flags += ["-Xfatbin", "-compress=false" if virtual else "-compress-all"]
        flags += ["--ptxas-options=--warn-on-spills,--warn-on-local-memory-usage"]
        flags += ["-Xcompiler=-fPIC,-fopenmp,-ffp-contract=off,-fvisibility=hidden"]
        if float(self.version) >= 13:
            # Kernel templates stay callable from files other than the one that instantiates them.
            flags.append("-static-global-template-stub=false")
        if os.environ.get("CXX"):
            flags += ["-ccbin", shlex.split(os.environ["CXX"])[0]]
        kind = "compute" if virtual else "sm"
        flags += [f for a in archs for f in ("-gencode", f"arch=compute_{a},code={kind}_{a}")]
        self.flags = flags
        dryrun = output(self.nvcc, *flags, "--dryrun", "-c", "-x", "cu", os.devnull)
        problem = "".join(re.findall(r"^nvcc fatal *: *(.*)", dryrun, re.M))
        if float(self.version) < OLDEST_CUDA:
            problem = f"the kernels need {OLDEST_CUDA}.0 or newer ({text.strip()})"
        if problem:
            raise BuildError(
                f"{self.nvcc} is of CUDA {self.version}: {problem}. Name another toolkit in "
                "CUDA_HOME, or other architectures in FASTATTN_ARCHS (none: no CUDA kernels)"
            )


def find_archs() -> list[str]:
    """GPU architectures of ``FASTATTN_ARCHS``: ``"90a;100a"``, ``"[80, 90]"``, ``"9.0a"``, "none".

    If it is empty, the architectures of the GPUs found, with all of their instructions, or 90a
    without a GPU.
    """
    names = re.findall(r"[^][;,\s\"']+", os.environ.get("FASTATTN_ARCHS", "").lower())
    if not names and shutil.which("nvidia-smi"):
        text = output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
        names = [f"{n}a" if float(n) >= 9 else n for n in re.findall(r"^\d+\.\d$", text, re.M)]
    names = [re.sub(r"^(sm_|compute_)|\.", "", name) for name in names or ["90a"]]
    # The Hopper kernels need instructions of 90a. Every GPU of capability 9.0 supports them.
    names = ["90a" if name == "90" else name for name in names]
    return list(dict.fromkeys(names)) if names != ["none"] else []
