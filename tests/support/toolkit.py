"""A CUDA toolkit that only says what it is."""

from __future__ import annotations

from pathlib import Path

NVCC = """#!/bin/sh
case " $* " in
*" --version "*) echo 'Cuda compilation tools, release {version}, V{version}.20' ;;
*" --dryrun "*"compute_{unknown},"* | *"compute_{unknown},"*" --dryrun "*)
  echo "nvcc fatal   : Unsupported gpu architecture 'compute_{unknown}'" >&2
  exit 1 ;;
*) echo '#$ _SPACE_=' >&2 ;;
esac
"""


def make_toolkit(folder: Path, version: str, unknown: str = "none") -> str:
    """Write one whose nvcc does not compile for the architecture `unknown`; its folder."""
    nvcc = folder / "bin" / "nvcc"
    for path in (nvcc, folder / "include" / "cuda_runtime.h"):
        path.parent.mkdir(parents=True)
        path.touch()
    nvcc.write_text(NVCC.format(version=version, unknown=unknown))
    nvcc.chmod(0o755)
    return str(folder)
