#!/usr/bin/env python3
"""Compile the CUDA side without a CUDA build of Paddle.

    python scripts/check_cuda.py [--all] [--out build/check_cuda]

Every `custom_ops/api/*.cc` is compiled as in a build with a CUDA Paddle, against the headers of the
installed Paddle and of the CUDA toolkit. One kernel source of each folder and every launcher are
compiled; `--all` compiles all kernels. Nothing is linked or run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "custom_ops"))

from builder import instances, toolchain  # noqa: E402
from builder.project import CUSTOM_OPS, Build  # noqa: E402


def chosen(kernels: list[str], everything: bool) -> list[str]:
    """One kernel of each folder, and the launchers."""
    first = {str(Path(kernel).parent): kernel for kernel in reversed(kernels)}
    return [
        kernel
        for kernel in kernels
        if everything or kernel in first.values() or Path(kernel).name == "launch.cu"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="compile every kernel")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "check_cuda")
    arguments = parser.parse_args()
    import paddle

    paddle.is_compiled_with_cuda = lambda: True  # compilation needs only the headers of CUDA
    try:
        build = Build("on")
        build.objects = arguments.out.resolve()
        build.objects.mkdir(parents=True, exist_ok=True)
        instances.write(CUSTOM_OPS / toolchain.GENERATED)
        library = build.extensions()[0]
        kernels = [source for source in library.sources if source.endswith(".cu")]
        some = chosen(kernels, arguments.all)
        api = [source for source in library.sources if source.startswith("custom_ops/api/")]
        library.sources = [*some, *api]
        build.compile([library])
    except toolchain.BuildError as error:
        sys.exit(f"error: {error}")
    print(
        f"{len(api)} sources against Paddle {build.paddle} with CUDA, {len(some)} of "
        f"{len(kernels)} kernels for {';'.join(build.archs)}: compiled"
    )


if __name__ == "__main__":
    main()
