"""Compiles sources with ninja, shows its progress, and ends with the first failure."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from .toolchain import ToolchainError, find_ninja

_RULE = """\
builddir = {folder}
rule compile
  command = $compiler -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $name
"""
_STATUS = re.compile(r"\[(\d+)/(\d+)\] (\d+)[\d.]* (.*)")


class CompileError(RuntimeError):
    """A source did not compile. The compiler's message was already shown."""


@dataclass(frozen=True)
class Unit:
    """One source and how to compile it."""

    name: str  # in the log
    source: str  # seen from the folder that the compilers run in
    object: Path
    compiler: tuple[str, ...]  # the compiler and its flags, without input and output


def _write(path: Path, text: str) -> Path:
    """Write a file unless it has this text: its time tells when it changed."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    return path


def _touch_changed(root: Path, record: Path) -> None:
    """Renew the time of sources that have changed since the last build and yet are older than it.

    ninja compares times, and a release that is unpacked over another one has times of its own.
    """
    files = [p for p in root.rglob("*.*") if p.suffix in (".h", ".cuh", ".cc", ".cu")]
    found = {os.fspath(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    if record.exists():
        known, last = json.loads(record.read_text(encoding="utf-8")), record.stat().st_mtime
        for path, digest in found.items():
            if known.get(path) != digest and os.stat(path).st_mtime <= last:
                os.utime(path)
    record.write_text(json.dumps(found), encoding="utf-8")


def _script(units: Sequence[Unit], root: Path, folder: Path, identity: Path) -> str:
    def path(target: str | Path) -> str:
        return re.sub(r"([$ :])", r"$\1", os.path.relpath(root / target, root))

    lines = [_RULE.format(folder=path(folder))]
    for unit in units:
        lines += [
            f"build {path(unit.object)}: compile {path(unit.source)} | {path(identity)}",
            f"  name = {unit.name}",
            "  compiler = " + shlex.join(unit.compiler).replace("$", "$$"),
        ]
    return "\n".join([*lines, ""])


def compile_all(
    units: Sequence[Unit],
    root: Path,
    folder: Path,
    jobs: int = 1,
    identity: str = "",
    say: Callable[[str], None] = print,
) -> dict[str, float]:
    """Bring the objects of `units` up to date; the seconds of those compiled, longest first.

    The compilers run in `root`, `jobs` at a time; `folder` is for what ninja remembers. `identity`
    is what else decides the objects, such as the compiler's version. A `CompileError` follows the
    message of the first compiler that fails, on standard error; no others are started then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _touch_changed(root, folder / "sources.json")
    decides = _write(folder / "identity", identity)
    script = _write(folder / "build.ninja", _script(units, root, folder, decides))
    ninja = find_ninja()
    if ninja is None:
        line = shlex.join([sys.executable, "-m", "pip", "install", "ninja"])
        raise ToolchainError(f"ninja, which runs the compilers, is missing:\n\n    {line}\n")
    done = _run([ninja, "-f", os.path.relpath(script, root), f"-j{jobs}"], units, root, say)
    names = {os.path.relpath(unit.object, root): unit.name for unit in units}
    seconds = {}
    if done:
        for line in (folder / ".ninja_log").read_text(encoding="utf-8").splitlines()[1:]:
            start, end, _, target, _ = line.split("\t")
            if names.get(target) in done:
                seconds[names[target]] = (int(end) - int(start)) / 1000
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _run(
    command: list[str], units: Sequence[Unit], root: Path, say: Callable[[str], None]
) -> set[str]:
    """Names of what ninja compiled; shows its progress and the message of the first failure."""
    environ = {**os.environ, "NINJA_STATUS": "[%f/%t] %e "}
    process = subprocess.Popen(
        command,
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environ,
    )
    done: set[str] = set()
    first: list[str] = []  # of the failures: its name, its command, what the compiler wrote
    line, failures = "", 0
    assert process.stdout is not None
    for line in map(str.rstrip, process.stdout):
        status = _STATUS.match(line)
        if status:
            count, total, elapsed, name = status.groups()
            if not done and int(total) < len(units):
                say(f"{len(units) - int(total)} of {len(units)} sources are up to date")
            done.add(name)
            say(f"[{count}/{total}] {elapsed:>3} s  {name}")
            writes = False
        elif line.startswith("FAILED: "):
            failures, writes = failures + 1, True
            say(f"{name} FAILED")
            first = first or [name]
        elif line.startswith("ninja: "):
            continue
        elif not failures or not writes:
            say(line)
        elif failures == 1:
            first.append(line)
            if len(first) > 2:
                print(line, file=sys.stderr, flush=True)
    if process.wait() != 0:
        if not first:
            raise CompileError(f"ninja ended with status {process.returncode}: {line}")
        print(f"command: {first[1]}", file=sys.stderr, flush=True)
        raise CompileError(f"{first[0]} did not compile")
    if not done:
        say(f"{len(units)} of {len(units)} sources are up to date")
    return done
