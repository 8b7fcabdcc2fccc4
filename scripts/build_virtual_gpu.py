#!/usr/bin/env python3
"""Build the library whose CUDA kernels run on the CPU, in the interpreter of tests/virtual_gpu.

    scripts/build_virtual_gpu.py [--python VENV/bin/python] [--only REGEX]
    FASTATTN_LIBRARY=build/virtual_gpu/_fastattn_ops.so python -m pytest tests/cache -k gpu

The build needs nvcc, a CPU build of Paddle and a CPU with AVX2, FMA and F16C. About 300 sources
take 2 to 20 s each. FASTATTN_HEAD_DIMS=128 omits some of them, and `--only cuda/cache` omits all
others. Launchers that are not compiled return cudaErrorStubLibrary, and tests that need them are
skipped. `--machine-only` builds only the interpreter.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MACHINE = ROOT / "tests" / "virtual_gpu"
FLAGS = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Wno-missing-field-initializers", "-fPIC"]
# Products are fused only if a kernel asks for it.
FLAGS += ["-ffp-contract=off", "-mfma", "-mf16c", "-mavx2"]

sys.path.insert(0, str(ROOT / "custom_ops"))


def build_machine(out: Path) -> None:
    """Compile the interpreter and its replacement for libcudart into libvirtual_gpu.so."""
    from builder import toolchain

    home = toolchain.find_cuda()
    if home is None:
        sys.exit("error: no nvcc; set CUDA_HOME or PATH")
    cxx = toolchain.find_cxx()
    launcher = ["ccache"] if shutil.which("ccache") else []
    with tempfile.TemporaryDirectory(dir=out) as folder:
        sources = sorted(MACHINE.glob("*.cc"))
        objects = [Path(folder, f"{source.stem}.o") for source in sources]

        def compile_one(source: Path, target: Path) -> int:
            names = ["-isystem", f"{home}/include", "-c", str(source), "-o", str(target)]
            return subprocess.call([*launcher, *cxx, *FLAGS, *names])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            failed = any(list(pool.map(compile_one, sources, objects)))
        library = Path(folder, "libvirtual_gpu.so")
        link = [*cxx, "-shared", "-Wl,-z,defs", "-Wl,-soname,libvirtual_gpu.so"]
        # Without the instantiations of standard library templates: Paddle's library is linked for
        # them.
        link.append(f"-Wl,--version-script={MACHINE / 'exports.map'}")
        if failed or subprocess.call([*link, *map(str, objects), "-o", str(library)]) != 0:
            sys.exit("error: the interpreter does not compile; the compiler's message is above")
        os.replace(library, out / library.name)
    print(f"wrote {out / 'libvirtual_gpu.so'}")


def build_operators(python: str, only: str, out: Path) -> None:
    """Compile the package's library, with PTX instead of machine code."""
    with tempfile.TemporaryDirectory(dir=out) as folder:
        command = [python, "setup_ops.py", "build_ext", "--cuda=virtual", f"--only={only}"]
        if subprocess.call([*command, "--build-lib", folder], cwd=ROOT) != 0:
            sys.exit(1)
        for path in Path(folder, "fastattn").iterdir():
            os.replace(path, out / path.name)
    print(f"wrote {out / '_fastattn_ops.so'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="Python with a CPU Paddle")
    parser.add_argument("--machine-only", action="store_true", help="only the interpreter")
    parser.add_argument("--only", default="", help="regular expression for the paths of kernels")
    arguments = parser.parse_args()
    from builder.project import VIRTUAL_GPU

    VIRTUAL_GPU.mkdir(parents=True, exist_ok=True)
    build_machine(VIRTUAL_GPU)
    if not arguments.machine_only:
        # Not resolved, because the Python of a virtual environment is a link.
        build_operators(os.path.abspath(arguments.python), arguments.only, VIRTUAL_GPU)


if __name__ == "__main__":
    main()
