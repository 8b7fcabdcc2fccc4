#!/usr/bin/env python3
"""Build the GPU library, on a machine without a GPU if need be.

    scripts/build_gpu.py --python VENV/bin/python [--archs "90a;100a"] [--out build/gpu]

The Python named must have a CUDA build of Paddle (`pip install paddlepaddle-gpu==2.6.2`); nvcc is
found through CUDA_HOME or PATH. The result, `OUT/_fastattn_ops.so` with `_build_info.py` beside it,
depends on that Paddle's version but not on its Python: carry both files to the GPU machine and name
the library in FASTATTN_LIBRARY. The modules beside it fit one Python; carry them too where that is
the same (calls in dygraph go through `_direct`). `scripts/test_gpu.sh` tests the library there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="Python with a CUDA Paddle")
    parser.add_argument("--archs", help="GPU architectures, default: FASTATTN_ARCHS or 90a")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder to write")
    return parser.parse_args()


def build(out: Path) -> None:
    sys.path.insert(0, str(ROOT / "custom_ops"))
    from builder.compile import CompileError
    from builder.ops import Build
    from builder.sources import MODULES
    from builder.toolchain import ToolchainError

    try:
        # The modules fit this Python only; another one calls through Paddle's registry.
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        Build("on").run(
            out / "_fastattn_ops.so", {name: out / f"{name}{suffix}" for name in MODULES}
        )
    except (CompileError, ToolchainError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {out / '_fastattn_ops.so'}")


def main() -> None:
    arguments = parse_arguments()
    if arguments.archs:
        os.environ["FASTATTN_ARCHS"] = arguments.archs
    out = arguments.out.resolve()
    if Path(arguments.python).absolute() == Path(sys.executable).absolute():
        build(out)
    else:
        command = [arguments.python, __file__, "--python", arguments.python, "--out", str(out)]
        sys.exit(subprocess.call(command))


if __name__ == "__main__":
    main()
