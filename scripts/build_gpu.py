#!/usr/bin/env python3
"""Build the GPU library. The machine does not need a GPU.

    scripts/build_gpu.py --python VENV/bin/python [--archs "90a;100a"] [--out build/gpu]

The given Python must have a CUDA build of Paddle (`pip install paddlepaddle-gpu==2.6.2`). nvcc is
found through CUDA_HOME or PATH. The result is `OUT/_fastattn_ops.so` with `_build_info.py` next to
it. It depends on the version of that Paddle but not on its Python. Copy both files to the GPU
machine and name the library in FASTATTN_LIBRARY. The modules next to it fit one Python version;
copy them too if the GPU machine has that version (calls in dygraph use `_direct`).
`scripts/test_gpu.sh` tests the library there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="Python with a CUDA Paddle")
    parser.add_argument("--archs", help="GPU architectures, default: FASTATTN_ARCHS or 90a")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder to write")
    arguments = parser.parse_args()
    if arguments.archs:
        os.environ["FASTATTN_ARCHS"] = arguments.archs
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        python = os.path.abspath(
            arguments.python
        )  # not resolved, because the Python of a virtual environment is a link
        command = [python, "setup_ops.py", "build_ext", "--cuda=on", "--build-lib", folder]
        if subprocess.call(command, cwd=ROOT) != 0:
            sys.exit(1)
        for path in Path(folder, "fastattn").iterdir():
            os.replace(path, out / path.name)
    print(f"wrote {out / '_fastattn_ops.so'}")


if __name__ == "__main__":
    main()
