#!/usr/bin/env python3
"""Try the three lines of "In short" in docs/install.md in fresh environments.

    scripts/check_install.py [--all] [--only TEXT] [--list] [--pythons] [--work build/ci/install]

A case is a Python, a Paddle and the versions of setuptools to try with them, one after the other.
Each case has a copy of the sources in a folder whose path has spaces, and a virtual environment. By
default a few cases cover every Python, Paddle and setuptools; `--all` runs the whole matrix. A
Python that this machine lacks is skipped with a message.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PADDLES = {"3.3.1": ["paddlepaddle==3.3.1"], "2.6.2": ["paddlepaddle==2.6.2", "numpy<2"]}
SETUPTOOLS = {"65": "setuptools==65.5.*", "77": "setuptools==77.0.*", "newest": "setuptools"}


class Failure(RuntimeError):
    """A line did not do what docs/install.md says."""


@dataclass(frozen=True)
class Python:
    """A Python of this machine."""

    path: str
    version: tuple[int, int]
    debian: bool  # its distutils has the hooks of Debian and Ubuntu

    def __str__(self) -> str:
        return f"{'Debian ' if self.debian else ''}Python {self.version[0]}.{self.version[1]}"


@dataclass(frozen=True)
class Case:
    """The versions that are installed together."""

    python: Python
    paddle: str
    setuptools: tuple[str, ...]  # keys of SETUPTOOLS, or "none"

    def __str__(self) -> str:
        return f"{self.python}, Paddle {self.paddle}, setuptools {' '.join(self.setuptools)}"


def in_short() -> list[str]:
    """The lines to try, without their comments."""
    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    block = re.search(r"^## In short\n\n```bash\n(.*?)^```", text, re.M | re.S)
    lines = [line.partition("#")[0].strip() for line in block[1].splitlines()] if block else []
    if len(lines) != 3 or lines[0] != "pip install paddlepaddle":
        raise Failure(
            f'docs/install.md: "In short" has other lines than this script knows: {lines}'
        )
    return lines


def find_pythons() -> list[Python]:
    """Every Python from 3.9 to 3.13, one of each version, and Debian's."""
    names = [f"python3.{minor}" for minor in range(9, 14)]
    candidates = [sys.executable, "/usr/bin/python3", *filter(None, map(shutil.which, names))]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates += sorted(map(str, pyenv.glob("3.*/bin/python3")))
    code = (
        "import sys, importlib.util as u, venv, ensurepip; print(*sys.version_info[:2], "
        "u.find_spec('_distutils_system_mod') is not None, sys.prefix == sys.base_prefix)"
    )
    found: dict[tuple[tuple[int, int], bool], Python] = {}
    for path in candidates:
        try:
            done = subprocess.run([path, "-c", code], capture_output=True, text=True)
        except OSError:
            continue
        words = done.stdout.split()
        if done.returncode != 0 or len(words) != 4 or words[3] != "True":
            continue  # too old, without venv, or itself in a virtual environment
        python = Python(path, (int(words[0]), int(words[1])), words[2] == "True")
        if (3, 9) <= python.version <= (3, 13):
            found.setdefault((python.version, python.debian), python)
    return sorted(found.values(), key=lambda python: (python.version, python.debian))


def fits(python: Python, paddle: str, setuptools: str) -> bool:
    """Whether these versions exist together."""
    if paddle == "2.6.2" and python.version > (3, 12):
        return False
    return setuptools != "65" or python.version < (3, 12)


def covering(pythons: list[Python]) -> list[Case]:
    """A few cases that together try every setuptools, Paddle and kind of Python."""
    wanted = [
        ("Debian's Python", "3.3.1", ("77", "newest"), lambda p: p.debian),
        ("python.org's Python, 3.11 or older", "3.3.1", ("65", "77"), lambda p: not p.debian),
        (
            "Python 3.12, which starts without setuptools",
            "2.6.2",
            ("none", "newest"),
            lambda p: p.version == (3, 12),
        ),
    ]
    cases = []
    for number, (what, paddle, versions, suits) in enumerate(wanted):
        fitting = [p for p in pythons if all(fits(p, paddle, v) for v in versions)]
        first = [p for p in fitting if suits(p)]
        if first:
            cases.append(Case(first[-1], paddle, versions))
        elif fitting and number > 0:  # the other parts of the case are still tried
            print(f"{what} is not on this machine: trying with {fitting[-1]}", flush=True)
            cases.append(Case(fitting[-1], paddle, versions))
        else:
            print(f"skipped: {what} is not on this machine", flush=True)
    return cases


def matrix(pythons: list[Python]) -> list[Case]:
    """Every combination that exists."""
    every = ("none", *SETUPTOOLS)
    cases = [
        Case(python, paddle, tuple(v for v in every if fits(python, paddle, v)))
        for python in pythons
        for paddle in PADDLES
    ]
    # Paddle 2.6.2 has no wheel for Python 3.13.
    return [case for case in cases if case.setuptools]


class Environment:
    """A copy of the sources with a virtual environment, and a log of the commands in it."""

    def __init__(self, folder: Path, python: Python) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self.tree = folder / "source tree"
        listed = ["git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard"]
        files = subprocess.run(listed, capture_output=True, text=True, check=True).stdout
        for name in filter(None, files.split("\0")):
            if (ROOT / name).is_file():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.tree / name)
        self.away = folder / "elsewhere"
        self.away.mkdir()
        self.log = folder / "log"
        venv = folder / "virtual environment"
        subprocess.run([python.path, "-m", "venv", str(venv)], check=True)
        self.environ = {**os.environ, "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        self.environ["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
        for name in ("PYTHONPATH", "PYTHONHOME", "FASTATTN_LIBRARY", "VIRTUAL_ENV"):
            self.environ.pop(name, None)

    def run(self, line: str, fails: bool = False, away: bool = False) -> str:
        """Output of a shell line that must succeed, or must fail with `fails`."""
        start = time.monotonic()
        done = subprocess.run(
            line,
            shell=True,
            cwd=self.away if away else self.tree,
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        with open(self.log, "a", encoding="utf-8") as file:
            seconds = time.monotonic() - start
            file.write(f"$ {line}\n{done.stdout}[status {done.returncode}, {seconds:.1f} s]\n\n")
        if (done.returncode != 0) != fails:
            tail = "\n".join(done.stdout.splitlines()[-25:])
            raise Failure(f"`{line}` ended with status {done.returncode}:\n{tail}\nsee {self.log}")
        return done.stdout

    def version(self, distribution: str) -> str:
        """Version of an installed distribution, or "none"."""
        code = (
            "import importlib.metadata as m\n"
            f"print(*[d.version for d in m.distributions(name='{distribution}')][:1] or ['none'])"
        )
        return self.run(f'python -c "{code}"', away=True).strip()

    def forget(self) -> None:
        """Remove the package and the files that its build added to the tree; objects stay."""
        self.run("python -m pip uninstall -q -y fastattn")
        for path in [*self.tree.glob("fastattn/*.so"), self.tree / "fastattn" / "_build_info.py"]:
            path.unlink(missing_ok=True)


def expect(condition: bool, what: str) -> None:
    """Fail with `what` unless the condition holds."""
    if not condition:
        raise Failure(what)


def try_without_paddle(case: Environment, install: str) -> None:
    """Both ways to install must refuse, name the command to type, and fetch nothing."""
    for line in (install, "pip install ."):
        text = case.run(line, fails=True)
        expect("pip install paddlepaddle" in text, f"`{line}` names no line to type:\n{text}")
        expect("Traceback" not in text, f"`{line}` without Paddle ends in a traceback:\n{text}")
    for name in ("paddlepaddle", "numpy", "fastattn"):
        expect(case.version(name) == "none", f"{name} was installed without being asked for")


def try_lines(case: Environment, install: str, check: str) -> None:
    """Install, then check in the tree and outside it."""
    case.forget()
    names = ("numpy", "setuptools", "paddlepaddle")
    before = [case.version(name) for name in names]
    text = case.run(install)
    expect("deprecat" not in text.lower(), f"`{install}` speaks of a deprecation:\n{text}")
    after = [case.version(name) for name in names]
    changed = [
        f"{name} {old} became {new}"
        for name, old, new in zip(names, before, after)
        if old not in ("none", new)
    ]
    expect(not changed, f"`{install}` changed the environment: {', '.join(changed)}")
    for away in (False, True):
        text = case.run(check, away=away)
        expect("DOES NOT LOAD" not in text, f"`{check}`:\n{text}")
        where = case.run('python -c "import fastattn; print(fastattn.__file__)"', away=away)
        expect(("site-packages" in where) is away, f"imported from {where.strip()}")


def try_case(case: Case, folder: Path) -> None:
    """One Python and Paddle, with each of its setuptools."""
    paddle_line, install, check = in_short()
    environment = Environment(folder, case.python)
    try_without_paddle(environment, install)
    packages = " ".join(f"'{package}'" for package in PADDLES[case.paddle])
    environment.run(paddle_line.replace("paddlepaddle", packages))
    for version in case.setuptools:
        if version == "none":
            environment.run("python -m pip uninstall -q -y setuptools")
        else:
            environment.run(f"python -m pip install -q -U '{SETUPTOOLS[version]}'")
        try_lines(environment, install, check)
        if version == case.setuptools[0]:
            try_lines(environment, "pip install .", check)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="the whole matrix")
    parser.add_argument("--only", default="", help="cases whose line of --list has this in it")
    parser.add_argument("--list", action="store_true", help="only say which cases there are")
    parser.add_argument("--pythons", action="store_true", help="only list one of each version")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "ci" / "install")
    arguments = parser.parse_args()
    if arguments.pythons:
        first = {python.version: python.path for python in reversed(find_pythons())}
        print(*(first[version] for version in sorted(first)), sep="\n")
        return
    cases = (matrix if arguments.all else covering)(find_pythons())
    cases = [case for case in cases if arguments.only in str(case)]
    failed = 0
    for number, case in enumerate(cases):
        start = time.monotonic()
        if arguments.list:
            print(case)
            continue
        try:
            try_case(case, arguments.work.resolve() / f"case {number + 1}")
        except Failure as error:
            failed += 1
            print(f"FAILED: {case}: {error}", flush=True)
        else:
            print(f"passed: {case} ({time.monotonic() - start:.0f} s)", flush=True)
    if failed or not cases:
        sys.exit(f"{failed} of {len(cases)} cases failed" if cases else "no case fits this machine")


if __name__ == "__main__":
    main()
