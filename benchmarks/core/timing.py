"""Host clocks, and facts about the host."""

from __future__ import annotations

import datetime
import functools
import gc
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Call = Callable[[], object]
#: A call of a function with arguments, of whatever types a table of shapes makes.
bind: Any = functools.partial


def interleaved(functions: Sequence[Call], repeats: int, calls: int = 1) -> list[list[float]]:
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


def medians(functions: Sequence[Call], repeats: int) -> list[float]:
    """Median microseconds of each function; see :func:`interleaved`."""
    return [statistics.median(times) for times in interleaved(functions, repeats)]


def _cpu_name() -> str:
    facts = Path("/proc/cpuinfo")
    text = facts.read_text() if facts.exists() else ""
    match = re.search(r"^model name\s*:\s*(.*)$", text, re.M)
    return match[1].strip() if match else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of the checkout, with + when it has changes."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        output = subprocess.check_output(
            command, cwd=Path(__file__).parent, text=True, timeout=10, stderr=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return output.strip() or None


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
