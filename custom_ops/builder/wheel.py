"""What a wheel of this package is called, asks for, and puts into the source tree."""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

# What a build writes, and a source tree does not have by itself.
_COMPILED = re.compile(r"fastattn/(_\w+(\.[\w.-]+)?\.so|_build_info\.py)\Z")


def local_version(paddle_version: str, archs: Sequence[str]) -> str:
    """What follows the + in the version of a wheel: the Paddle and the GPUs that it is built for.

    Examples
    --------
    >>> local_version("3.3.1", ["90a", "100a"]), local_version("2.6.2", [])
    ('paddle3.3.1.sm90a.sm100a', 'paddle2.6.2.cpu')
    """
    paddle = re.sub(r"[^a-z0-9]+", ".", paddle_version.lower()).strip(".")
    return ".".join([f"paddle{paddle}", *([f"sm{arch}" for arch in archs] or ["cpu"])])


def requirements(paddle_version: str | None, numpy_version: str | None) -> list[str]:
    """Distributions that a wheel asks for: those that it needs, in versions that change no others.

    `numpy_version` is the NumPy beside that Paddle. One of 1.x stays so under Paddle 2, which was
    made for it: the newest ml_dtypes would have pip replace it.
    """
    old = (paddle_version or "").startswith("2.") and (numpy_version or "").startswith("1.")
    # setuptools: Paddle imports it where it loads operators, and does not always ask for it.
    return ["numpy>=1.21,<2" if old else "numpy>=1.21", "ml_dtypes>=0.4", "rich>=12", "setuptools"]


def unpack_compiled(path: Path, root: Path) -> list[str]:
    """Put what the build of the wheel at `path` wrote into the source tree at `root`.

    The tree's ``fastattn`` comes first in the ``sys.path`` of whatever runs there, so it must work,
    too. Files are replaced in one step: a process may have the library open.
    """
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if _COMPILED.match(name)]
        for name in names:
            partial = root / f"{name}.partial"
            with archive.open(name) as packed, open(partial, "wb") as file:
                shutil.copyfileobj(packed, file)
            partial.chmod(0o755 if name.endswith(".so") else 0o644)
            os.replace(partial, root / name)
    return names
