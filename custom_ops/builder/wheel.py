"""What a wheel of this package may hold."""

from __future__ import annotations

import re
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

_REQUIRED = ("fastattn/_fastattn_ops.so", "fastattn/_build_info.py", "fastattn/py.typed")

_ALLOWED = re.compile(
    r"(fastattn/(\w+/)*\w+\.py"
    r"|fastattn/(py\.typed|_host\.pyi)"
    r"|fastattn/_fastattn_ops\.so"
    r"|fastattn/_host\.[\w.-]+\.so"
    r"|fastattn-[^/]+\.dist-info/.+)\Z"
)


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
        return problems(names, archive.read(tag).decode())


if __name__ == "__main__":
    failed = False
    for argument in sys.argv[1:]:
        lines = check(Path(argument))
        print("\n".join([f"{argument}: {len(lines)} problems", *lines]))
        failed = failed or bool(lines)
    sys.exit(int(failed))
