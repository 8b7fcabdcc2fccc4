#!/usr/bin/env python3
"""Compile the CUDA side without a CUDA build of Paddle.

    python scripts/check_cuda.py [--all] [--out build/check_cuda]

Every `custom_ops/api/*.cc` is compiled as in a build with a CUDA Paddle, against the headers of the
Paddle that is installed and those of the CUDA toolkit. Of the kernels, one source of each folder
and every launcher is compiled; `--all` compiles every one. Nothing is linked or run.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "custom_ops"))

from builder import instances, toolchain  # noqa: E402
from builder.compile import CompileError, Unit, compile_all  # noqa: E402
from builder.project import CUSTOM_OPS, Build  # noqa: E402


def chosen(units: list[Unit], everything: bool) -> list[Unit]:
    """One kernel of each folder and the launchers."""
    first = {str(Path(unit.name).parent): unit for unit in reversed(units)}
    return [
        unit
        for unit in units
        if everything or unit in first.values() or Path(unit.name).name == "launch.cu"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="compile every kernel")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "check_cuda")
    arguments = parser.parse_args()
    try:
        build = Build("on", dataclasses.replace(toolchain.find_paddle(), with_cuda=True))
        build.objects = arguments.out.resolve()
        instances.write(CUSTOM_OPS / toolchain.GENERATED)
        units = build.units(build.extensions()[:1])
        kernels = [unit for unit in units if unit.name.endswith(".cu")]
        some = chosen(kernels, arguments.all)
        api = [unit for unit in units if unit.name.startswith("api/")]
        jobs, identity = toolchain.jobs(), build.identity()
        compile_all([*some, *api], CUSTOM_OPS, build.objects, jobs, identity)
    except (CompileError, toolchain.ToolchainError) as error:
        sys.exit(f"error: {error}")
    print(
        f"{len(api)} sources against Paddle {build.paddle.version} with CUDA, {len(some)} of "
        f"{len(kernels)} kernels for {';'.join(build.archs)}: compiled"
    )


if __name__ == "__main__":
    main()
