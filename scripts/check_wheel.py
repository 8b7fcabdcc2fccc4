#!/usr/bin/env python3
"""Report problems of wheels of this package: ``scripts/check_wheel.py WHEEL...``.

It checks the files, the label, the tags, and what the compiled files need of a machine: shared
libraries, and versions of symbols of glibc and libstdc++. A wheel for this machine alone may need
newer ones: ``--newest GLIBC=2.39 --newest GLIBCXX=3.4.33``.
"""

from __future__ import annotations

import argparse
import re
import runpy
import subprocess
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

# What a compiled file may need from outside the wheel. Paddle has loaded libpaddle.so by then, and
# _host works without it.
_LIBRARIES = re.compile(
    r"(lib(stdc\+\+|gcc_s|gomp|m|c|dl|rt|pthread)\.so\.\d+|ld-linux-[\w-]+\.so\.\d|libpaddle\.so)\Z"
)
#: Newest versions of symbols. Debian 12, Ubuntu 22.04 and RHEL 9 have them (the last, GCC 11's).
NEWEST = {
    "GLIBC": (2, 34),
    "GLIBCXX": (3, 4, 29),
    "CXXABI": (1, 3, 13),
    "GCC": (11, 0),
    "GOMP": (5, 0),
    "OMP": (5, 0),
}


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _readelf(option: str, path: Path) -> str:
    command = ["readelf", "-W", option, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env={"LC_ALL": "C"})
    return done.stdout


def needs(path: Path) -> dict[str, list[str]]:
    """What a compiled file needs: ``libraries``, ``versions``, ``python`` symbols, ``paths``."""
    dynamic = _readelf("-d", path)
    versions = re.findall(r"Name: ([A-Z]+_[\d.]+) ", _readelf("-V", path))
    symbols = re.findall(r" UND (_?Py\w+)", _readelf("--dyn-syms", path))
    return {
        "libraries": re.findall(r"\(NEEDED\) .*\[(.*)\]", dynamic),
        "versions": sorted(set(versions)),
        "python": symbols,
        "paths": re.findall(r"\((?:RPATH|RUNPATH)\) .*\[(.*)\]", dynamic),
    }


def binary_problems(
    name: str, found: dict[str, list[str]], newest: dict[str, tuple[int, ...]]
) -> list[str]:
    """Problems of what a compiled file needs; `found` is of :func:`needs`."""
    problems = [f"{name} holds a path: {path}" for path in found["paths"]]
    for library in found["libraries"]:
        if not _LIBRARIES.match(library) or ("_host." in name and library == "libpaddle.so"):
            problems.append(f"{name} needs {library}")
    for text in found["versions"]:
        kind, _, version = text.partition("_")
        if _version(version) > newest.get(kind, ()):
            limit = ".".join(map(str, newest.get(kind, ()))) or "none"
            problems.append(f"{name} needs {text}; newest: {limit}: build on an older system")
    if found["python"] and name.endswith("_fastattn_ops.so"):
        problems.append(f"{name} does not fit every Python: it needs {found['python'][0]}")
    if not found["libraries"]:
        problems.append(f"{name} is no shared library, or there is no readelf (binutils)")
    return problems


def _compiled_problems(
    archive: zipfile.ZipFile, newest: dict[str, tuple[int, ...]], verbose: bool
) -> list[str]:
    """Problems of the compiled files of a wheel."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for name in archive.namelist():
            if name.endswith(".so"):
                found = needs(Path(archive.extract(name, folder)))
                lines += binary_problems(name, found, newest)
                if verbose:
                    print(f"{name} needs {', '.join(found['libraries'] + found['versions'])}")
    return lines


def tag_problems(wheel: str, names: Iterable[str]) -> list[str]:
    """Whether a wheel for several Pythons has the modules of each."""
    pythons, abi = wheel.split("-")[2:4]
    if abi != "none":
        return []
    modules = {
        m[0] for name in names for m in [re.search(r"_(?:host|direct)\.cpython-\d+", name)] if m
    }
    wanted = {
        f"_{module}.cpython-{python[2:]}"
        for python in pythons.split(".")
        for module in ("host", "direct")
    }
    return [f"the tags and the modules differ: {name}" for name in sorted(wanted ^ modules)]


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
    """Problems of the wheel at `path`, apart from its compiled files."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        (tag,) = (n for n in names if n.endswith(".dist-info/WHEEL"))
        found = problems(names, archive.read(tag).decode())
        return found + tag_problems(path.name, names) + _label_problems(path, archive)


def check_compiled(
    path: Path, newest: dict[str, tuple[int, ...]] = NEWEST, verbose: bool = False
) -> list[str]:
    """Problems of the compiled files of the wheel at `path`."""
    with zipfile.ZipFile(path) as archive:
        return _compiled_problems(archive, newest, verbose)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", type=Path, nargs="+", metavar="WHEEL")
    parser.add_argument("--newest", action="append", default=[], metavar="GLIBC=2.39")
    parser.add_argument("--verbose", action="store_true", help="also print what files need")
    arguments = parser.parse_args()
    newest = dict(NEWEST)
    for text in arguments.newest:
        kind, _, version = text.partition("=")
        newest[kind] = _version(version)
    failed = False
    for path in arguments.wheels:
        lines = check(path) + check_compiled(path, newest, arguments.verbose)
        print("\n".join([f"{path}: {len(lines)} problems", *lines]))
        failed = failed or bool(lines)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
