"""What a wheel of this package may hold, and what its version tells."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

_REQUIRED = (
    "fastattn/_fastattn_ops.so",
    "fastattn/_build_info.py",
    "fastattn/py.typed",
    "fastattn/demo/model.npz",
    "fastattn/demo/recipe.json",
    "fastattn/demo/held_out.txt",
)

_ALLOWED = re.compile(
    r"(fastattn/(\w+/)*\w+\.py"
    r"|fastattn/(py\.typed|_(host|direct)\.pyi)"
    r"|fastattn/demo/(model\.npz|recipe\.json|held_out\.txt)"
    r"|fastattn/_fastattn_ops\.so"
    r"|fastattn/_(host|direct)\.[\w.-]+\.so"
    r"|fastattn-[^/]+\.dist-info/.+)\Z"
)

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

    Examples
    --------
    >>> requirements("2.6.2", "1.26.4")[0], requirements("3.3.1", "1.26.4")[0]
    ('numpy>=1.21,<2', 'numpy>=1.21')
    """
    old = (paddle_version or "").startswith("2.") and (numpy_version or "").startswith("1.")
    # setuptools: Paddle imports it where it loads operators, and does not always ask for it.
    return ["numpy>=1.21,<2" if old else "numpy>=1.21", "ml_dtypes>=0.4", "rich>=12", "setuptools"]


def _label_problems(path: Path, archive: zipfile.ZipFile) -> list[str]:
    """Whether the file's name tells what the library was built for."""
    if "fastattn/_build_info.py" not in archive.namelist():
        return []  # said elsewhere
    with tempfile.TemporaryDirectory() as folder:
        info = runpy.run_path(archive.extract("fastattn/_build_info.py", folder))
    if not {"PADDLE_VERSION", "ARCHS"} <= set(info):
        return ["fastattn/_build_info.py does not tell PADDLE_VERSION and ARCHS"]
    expected = local_version(info["PADDLE_VERSION"], info["ARCHS"])
    found = path.name.split("-")[1].partition("+")[2]
    return [] if found == expected else [f"the version ends in +{found}, not +{expected}"]


def problems(names: Iterable[str], metadata: str = "") -> list[str]:
    """Say what is wrong with a wheel.

    Parameters
    ----------
    names : iterable of str
        Paths inside the wheel.
    metadata : str
        Text of its ``WHEEL`` file, if that is to be checked, too.

    Returns
    -------
    list of str
        One line a problem; empty for a good wheel.
    """
    names = [name for name in names if not name.endswith("/")]
    found = [f"missing: {name}" for name in _REQUIRED if name not in names]
    found += [f"must not be in the wheel: {name}" for name in names if not _ALLOWED.match(name)]
    # Paddle's generated stub would have this name and hide the library's loader.
    found += [
        f"must not be in the wheel: {name}" for name in names if name == "fastattn/_fastattn_ops.py"
    ]
    if metadata and "Root-Is-Purelib: false" not in metadata:
        found.append("the wheel is not tagged for a platform (Root-Is-Purelib)")
    return found


def check(path: Path) -> list[str]:
    """Problems of the wheel at `path`."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        (tag,) = (n for n in names if n.endswith(".dist-info/WHEEL"))
        return problems(names, archive.read(tag).decode()) + _label_problems(path, archive)


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


if __name__ == "__main__":
    failed = False
    for argument in sys.argv[1:]:
        lines = check(Path(argument))
        print("\n".join([f"{argument}: {len(lines)} problems", *lines]))
        failed = failed or bool(lines)
    sys.exit(int(failed))
