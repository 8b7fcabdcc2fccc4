"""Build and install fastattn: ``python setup_ops.py install`` (or ``pip install .``).

custom_ops/builder does the work; docs/install.md describes the options.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SETUPTOOLS = "setuptools>=77,<86"  # as in pyproject.toml
OLDEST_SETUPTOOLS = 77
BORROWED = "FASTATTN_BORROWED_TOOLS"
BUILDING = {"install", "build", "build_ext", "bdist_wheel", "develop"}
BUILDING |= {"dist_info", "editable_wheel"}  # commands of pip


def recent_setuptools() -> bool:
    """Whether this Python has a setuptools that reads pyproject.toml."""
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        return False
    return int(re.match(r"\d+", version)[0]) >= OLDEST_SETUPTOOLS


def install_line(packages: list[str]) -> str:
    """Command line that installs these packages."""
    return f"\n\n    {shlex.join([sys.executable, '-m', 'pip', 'install', *packages])}\n"


def run_with_borrowed(packages: list[str]) -> int:
    """Run this script again, with these packages for this run only; return its exit status.

    The environment's own setuptools does not change, as in pip's isolated builds.
    """
    install = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    print(f"fetching {' and '.join(packages)} for this build (missing or too old here)", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.call([*install, "--target", folder, *packages]) != 0:
            sys.exit(f"error: that failed; install them yourself:{install_line(packages)}")
        environ = {**os.environ, BORROWED: folder}
        for name, value in (("PYTHONPATH", folder), ("PATH", os.path.join(folder, "bin"))):
            environ[name] = os.pathsep.join(filter(None, [value, os.environ.get(name)]))
        return subprocess.call([sys.executable, *sys.argv], env=environ)


def forget_borrowed() -> bool:
    """Hide the borrowed packages from child processes; return whether this run borrowed any."""
    if os.environ.pop(BORROWED, None) is None:
        return False
    rest = os.environ.pop("PYTHONPATH").partition(os.pathsep)[2]
    if rest:
        os.environ["PYTHONPATH"] = rest
    return True


def main() -> None:
    """Run setuptools, in a version that can read this package's metadata."""
    sys.path.insert(0, str(ROOT / "custom_ops"))
    from builder import toolchain
    from builder.toolchain import NINJA, BuildError, find_ninja, require_paddle, require_pip

    borrowed = forget_borrowed()
    by_pip = "builder.backend" in sys.modules
    builds = bool(BUILDING.intersection(sys.argv))
    missing = [] if recent_setuptools() else [SETUPTOOLS]
    if builds and find_ninja() is None:
        missing.append(NINJA)
    try:
        if builds:
            require_paddle()
            if (path := toolchain.not_writable_in(ROOT)) is not None:
                if not ("install" in sys.argv or (by_pip and "editable_wheel" not in sys.argv)):
                    raise toolchain.not_writable(path, ROOT)
                status = toolchain.build_elsewhere(ROOT, sys.argv[1:], by_pip)
                if status != 0 or not by_pip:
                    sys.exit(status)
                return
        if missing and (borrowed or by_pip):
            needs = " and ".join(missing)
            raise BuildError(f"setup_ops.py needs {needs}:{install_line(missing)}")
        if missing or "install" in sys.argv:
            require_pip()
        if missing:
            sys.exit(run_with_borrowed(missing))
        from builder import extension

        if "install" in sys.argv:
            extension.install(sys.argv[1:])
        else:
            extension.run(sys.argv[1:], builds, fill_tree=by_pip)
    except BuildError as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # a file that another user's build left
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not error.filename:
            raise
        sys.exit(f"error: {toolchain.not_writable(error.filename, ROOT)}")


if __name__ == "__main__":
    main()
