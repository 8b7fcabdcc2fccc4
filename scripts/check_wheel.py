#!/usr/bin/env python3
"""Report problems of wheels of this package: ``scripts/check_wheel.py WHEEL...``."""

from __future__ import annotations

import re
import runpy
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "custom_ops"))

from builder.project import local_version

_REQUIRED = (
    "fastattn/_fastattn_ops.so",
    "fastattn/_build_info.py",
    "fastattn/py.typed",
    "fastattn/demo/model.npz",
    "fastattn/demo/recipe.json",
    "fastattn/demo/mla_sparse.npz",
    "fastattn/demo/mla_sparse.json",
    "fastattn/demo/held_out.txt",
)

_ALLOWED = re.compile(
    r"(fastattn/(?!bench/)(\w+/)*\w+\.py"  # benchmarks come with the source tree
    r"|fastattn/(py\.typed|_(host|direct)\.pyi)"
    r"|fastattn/demo/((model|mla_sparse)\.npz|(recipe|mla_sparse)\.json|held_out\.txt)"
    r"|fastattn/_fastattn_ops\.so"
    r"|fastattn/_(host|direct)\.[\w.-]+\.so"
    r"|fastattn-[^/]+\.dist-info/.+)\Z"
)


def _label_problems(path: Path, archive: zipfile.ZipFile) -> list[str]:
    """Whether the file name tells for what the library was built."""
    if "fastattn/_build_info.py" not in archive.namelist():
        return []  # reported elsewhere
    with tempfile.TemporaryDirectory() as folder:
        info = runpy.run_path(archive.extract("fastattn/_build_info.py", folder))
    if not {"PADDLE_VERSION", "ARCHS"} <= set(info):
        return ["fastattn/_build_info.py does not tell PADDLE_VERSION and ARCHS"]
    expected = local_version(info["PADDLE_VERSION"], info["ARCHS"])
    found = path.name.split("-")[1].partition("+")[2]
    return [] if found == expected else [f"the version ends in +{found}, not +{expected}"]


def problems(names: Iterable[str], metadata: str = "") -> list[str]:
    """Problems of a wheel.

    Parameters
    ----------
    names : iterable of str
        Paths inside the wheel.
    metadata : str
        Text of its ``WHEEL`` file, if it is to be checked as well.

    Returns
    -------
    list of str
        One line per problem; empty for a good wheel.
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


if __name__ == "__main__":
    failed = False
    for argument in sys.argv[1:]:
        lines = check(Path(argument))
        print("\n".join([f"{argument}: {len(lines)} problems", *lines]))
        failed = failed or bool(lines)
    sys.exit(int(failed))
