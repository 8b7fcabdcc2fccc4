#!/usr/bin/env python3
"""Compile the CUDA side without a CUDA build of Paddle.

    python scripts/check_cuda.py [--all] [--out build/check_cuda]

Every `custom_ops/api/*.cc` is compiled as in a build with a CUDA Paddle, against the headers of the
Paddle that is installed and those of the CUDA toolkit. Of the kernels, one source of each folder
and every launcher is compiled; `--all` compiles every one. Nothing is linked or run.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "custom_ops"))

from builder import instances, sources, toolchain  # noqa: E402
from builder.compile import CompileError, Unit, compile_all  # noqa: E402


def chosen(names: tuple[str, ...], everything: bool) -> list[str]:
    first = {str(Path(name).parent): name for name in reversed(names)}
    return [
        name
        for name in names
        if everything or name in first.values() or Path(name).name == "launch.cu"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="compile every kernel")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "check_cuda")
    arguments = parser.parse_args()
    cuda = toolchain.find_cuda()
    if cuda is None:
        sys.exit("no nvcc: set CUDA_HOME or PATH")
    paddle = toolchain.find_paddle()
    archs = toolchain.parse_archs(os.environ.get("FASTATTN_ARCHS"))
    found = sources.discover(ROOT / "custom_ops", with_cuda=True)
    cxx, nvcc = toolchain.find_cxx(), (str(cuda.nvcc), *toolchain.nvcc_flags(cuda, archs))
    identity = f"{toolchain.compiler_identity(tuple(cxx))} {cuda.version} {paddle.version}"
    launcher = tuple(toolchain.find_ccache())

    def unit(name: str, compiler: tuple[str, ...]) -> Unit:
        out = arguments.out.resolve() / f"{name.replace(toolchain.GENERATED, '.')}.o"
        return Unit(name, out, compiler, identity, launcher)

    instances.write(ROOT / "build" / "generated")
    names = (*found.cuda, *(f"{toolchain.GENERATED}/{name}" for name in instances.sources()))
    kernels = [unit(name, nvcc) for name in chosen(names, arguments.all)]
    host = (*cxx, *toolchain.cxx_flags(paddle, cuda))
    api = [unit(name, host) for name in found.cxx if name.startswith("api/")]
    try:
        compile_all([*kernels, *api], ROOT / "custom_ops", toolchain.jobs())
    except CompileError as error:
        sys.exit(f"error: {error}")
    print(
        f"{len(api)} sources against Paddle {paddle.version} with CUDA, {len(kernels)} of "
        f"{len(names)} kernels for {';'.join(archs)}: compiled"
    )


if __name__ == "__main__":
    main()
