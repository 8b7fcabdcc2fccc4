"""Rows of a benchmark, interleaved timing, and facts about the machine."""

from __future__ import annotations

import dataclasses
import datetime
import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass
class Row:
    """One measurement: an operator at one shape, beside a peer or a floor of the same run."""

    op: str
    shape: str
    us: float
    rate: float | None = None
    unit: str = ""  # of the rate: GB/s or GFLOP/s
    peer: str = ""
    peer_us: float | None = None
    error: float | None = None  # largest |ours - peer's| / largest |peer's|

    @property
    def ratio(self) -> float | None:
        """Speed relative to the peer: above 1 is faster."""
        return None if self.peer_us is None else self.peer_us / self.us

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**dataclasses.asdict(self), "ratio": self.ratio}


#: A benchmark yields rows; `quick` asks for small shapes and few repetitions.
Bench = Callable[[bool], Iterator[Row]]

#: Name -> benchmark, in the order of the table.
REGISTRY: dict[str, Bench] = {}


def register(name: str) -> Callable[[Bench], Bench]:
    """Register a benchmark under the name that ``--op`` takes.

    Several may share a name (an operator on the CPU and on a GPU): they run one after the other.
    """

    def add(bench: Bench) -> Bench:
        earlier = REGISTRY.get(name)
        REGISTRY[name] = bench if earlier is None else _chain(earlier, bench)
        return bench

    return add


def _chain(first: Bench, second: Bench) -> Bench:
    def both(quick: bool) -> Iterator[Row]:
        yield from first(quick)
        yield from second(quick)

    return both


def interleaved(
    functions: Sequence[Callable[[], object]], repeats: int, calls: int = 1
) -> list[list[float]]:
    """Time functions in turn, so that what else the machine does meets all of them alike.

    Parameters
    ----------
    functions : sequence of callable
    repeats : int
        Rounds; every function runs once in each.
    calls : int
        Calls of a function in its turn, timed together.

    Returns
    -------
    list of list of float
        Microseconds a call: one list a function, one entry a round.
    """
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(repeats):
            for function, taken in zip(functions, times):
                begin = time.perf_counter()
                for _ in range(calls):
                    function()
                taken.append((time.perf_counter() - begin) / calls * 1e6)
    finally:
        if collecting:
            gc.enable()
    return times


def medians(functions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median microseconds of each function; see :func:`interleaved`."""
    return [statistics.median(times) for times in interleaved(functions, repeats)]


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of the checkout that the package lies in, with + when it has changes."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None


def machine() -> dict[str, Any]:
    """What the numbers belong to."""
    import numpy as np
    import paddle

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_name(),
        "cores": cores,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "paddle": paddle.__version__,
        "numpy": np.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
