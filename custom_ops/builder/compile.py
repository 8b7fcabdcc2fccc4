"""Compiles sources: in parallel, incrementally, with progress, up to the first failure."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

_TOOK_SHOWN = 5


class CompileError(RuntimeError):
    """A source did not compile. The compiler's message was already shown."""


@dataclass(frozen=True)
class Unit:
    """One source and how to compile it."""

    name: str  # relative to the source folder, also the name in the log
    object: Path
    compiler: tuple[str, ...]  # the compiler and its flags, without input and output
    identity: str = ""  # what else decides the object: versions of the compiler and of Paddle
    launcher: tuple[str, ...] = ()  # ccache

    @property
    def depfile(self) -> Path:
        """Where the compiler lists the headers that it read."""
        return self.object.with_suffix(".d")

    @property
    def stamp(self) -> Path:
        """Where a successful compilation leaves the digest of all that went into it."""
        return self.object.with_suffix(".json")

    def command(self) -> list[str]:
        """Full command, to run in the source folder."""
        return [
            *self.launcher,
            *self.compiler,
            *("-MMD", "-MF", str(self.depfile), "-c", self.name, "-o", str(self.object)),
        ]


@dataclass
class Report:
    """What a build did."""

    total: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # of each source compiled just now

    def slowest(self) -> list[tuple[str, float]]:
        """The five sources that took longest, longest first."""
        return sorted(self.seconds.items(), key=lambda item: -item[1])[:_TOOK_SHOWN]


def parse_depfile(text: str) -> list[str]:
    """Files named in a Makefile rule as compilers write it (escaped spaces, continued lines)."""
    text = text.replace("\\\n", " ")
    _, _, rest = text.partition(": ")
    names = re.findall(r"(?:\\.|[^\s\\])+", rest.splitlines()[0] if rest else "")
    return [re.sub(r"\\(.)", r"\1", name).replace("$$", "$") for name in names]


def _digest(unit: Unit, root: Path, files: Iterable[str]) -> str:
    """Digest of the command, the compiler's identity and the contents of all files read."""
    sha = hashlib.sha256(json.dumps([unit.compiler, unit.identity, unit.name]).encode())
    for name in files:
        sha.update(b"\0" + name.encode() + b"\0")
        sha.update((root / name).read_bytes())
    return sha.hexdigest()


def is_current(unit: Unit, root: Path) -> bool:
    """Whether the object exists and nothing that it was made from has changed since."""
    try:
        stamp = json.loads(unit.stamp.read_text(encoding="utf-8"))
        return unit.object.exists() and stamp["digest"] == _digest(unit, root, stamp["files"])
    except (OSError, ValueError, KeyError):
        return False  # never built, a header is gone, or another version's stamp


class _Runner:
    """Runs compilers and can stop all of them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def run(self, unit: Unit) -> tuple[int, str, float]:
        """Exit status, output and seconds of one compilation."""
        unit.object.parent.mkdir(parents=True, exist_ok=True)
        unit.stamp.unlink(missing_ok=True)
        start = time.monotonic()
        with self._lock:
            if self._stopped:
                return -1, "", 0.0
            process = subprocess.Popen(
                unit.command(),
                cwd=self._root,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # a group of its own: the driver and what it starts
            )
            self._running.add(process)
        output, _ = process.communicate()
        with self._lock:
            self._running.discard(process)
        if process.returncode == 0:
            files = parse_depfile(unit.depfile.read_text(encoding="utf-8"))
            stamp = {"digest": _digest(unit, self._root, files), "files": files}
            unit.stamp.write_text(json.dumps(stamp), encoding="utf-8")
        return process.returncode, output, time.monotonic() - start

    def stop(self) -> None:
        """End the compilers that still run and start no others."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                try:
                    os.killpg(process.pid, signal.SIGTERM)
                except ProcessLookupError:
                    continue


def compile_all(
    units: Sequence[Unit],
    root: Path,
    jobs: int = 1,
    say: Callable[[str], None] = print,
) -> Report:
    """Bring the objects of `units` up to date.

    Parameters
    ----------
    units : sequence of Unit
        What to compile.
    root : Path
        Source folder; the compilers run in it.
    jobs : int
        Compilers to run at a time.
    say : callable
        Takes each line of progress.

    Returns
    -------
    Report
        Number of sources, and the seconds of those that were compiled.

    Raises
    ------
    CompileError
        At the first source that does not compile, after its compiler's message was written to
        standard error. Compilers that still run are stopped.
    """
    report = Report(total=len(units))
    stale = [unit for unit in units if not is_current(unit, root)]
    if len(stale) < len(units):
        say(f"{len(units) - len(stale)} of {len(units)} sources are up to date")
    if not stale:
        return report
    runner = _Runner(root)
    with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        pending: dict[Future[tuple[int, str, float]], Unit] = {
            pool.submit(runner.run, unit): unit for unit in stale
        }
        try:
            while pending:
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    unit = pending.pop(future)
                    code, output, seconds = future.result()
                    report.seconds[unit.name] = seconds
                    count = f"[{len(report.seconds)}/{len(stale)}] {unit.name}"
                    if code != 0:
                        _fail(unit, count, code, output, say)
                    say(f"{count} {seconds:.1f} s")
                    if output.strip():
                        say(output.rstrip())
        finally:
            for future in pending:
                future.cancel()
            runner.stop()
    return report


def _fail(unit: Unit, count: str, code: int, output: str, say: Callable[[str], None]) -> None:
    say(f"{count} FAILED")
    sys.stdout.flush()
    sys.stderr.write(output if output.endswith("\n") else output + "\n")
    sys.stderr.write(f"command: {shlex.join(unit.command())}\n")
    sys.stderr.flush()
    raise CompileError(f"{unit.name} did not compile (exit status {code} of {unit.compiler[0]})")
