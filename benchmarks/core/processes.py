"""Runs a module in a few processes that form a ``paddle.distributed`` group.

A process that fails ends the others at once, and all of them end when the time is over: a rank that
waits for another one never hangs a run. No network is needed but the loopback.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

#: What Paddle says when somebody else has taken the port since it was chosen.
_PORT_TAKEN = ("address already in use", "eaddrinuse", "bind on endpoint")


class ProcessesFailed(RuntimeError):
    """A process ended with an error, or all ran out of time."""


def python_path() -> str:
    """A child's ``PYTHONPATH``, with which it finds this package wherever it runs."""
    root = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _environment(rank: int, world_size: int, port: int, backend: str) -> dict[str, str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PADDLE_", "TRAINER_", "POD_", "FLAGS_selected_"))
    }
    endpoints = [f"127.0.0.1:{port + i}" for i in range(world_size)]
    environment = {
        **inherited,
        "PADDLE_DISTRI_BACKEND": backend,
        "PADDLE_TRAINER_ID": str(rank),
        "PADDLE_TRAINERS_NUM": str(world_size),
        "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
        "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
        "PADDLE_MASTER": endpoints[0],
        "PYTHONPATH": python_path(),
        "OMP_NUM_THREADS": "1",
    }
    if backend == "gloo" and sys.platform == "linux":
        # Else the address is that of the host's name, which a container may not resolve.
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    if backend == "nccl":  # each process sees one GPU, as its number 0
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(i) for i in range(world_size)]
        environment["CUDA_VISIBLE_DEVICES"] = devices[rank]
        environment["FLAGS_selected_gpus"] = "0"
        # Multicast over NVLink may take GPUs down that a virtual machine shares with others.
        environment.setdefault("NCCL_NVLS_ENABLE", "0")
    return environment


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()


def _attempt(command: list[str], world_size: int, backend: str, logs: Path, timeout: float) -> str:
    """Run once; an empty string when all succeeded, else what went wrong."""
    port = _free_port()
    processes, files = [], []
    deadline = time.monotonic() + timeout
    try:
        for rank in range(world_size):
            file = open(logs / f"rank{rank}.log", "w+")  # noqa: SIM115  closed below
            files.append(file)
            processes.append(
                subprocess.Popen(
                    command,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=_environment(rank, world_size, port, backend),
                    start_new_session=True,
                )
            )
        trouble = ""
        while not trouble and any(p.poll() is None for p in processes):
            time.sleep(0.05)
            if any(p.poll() not in (None, 0) for p in processes):
                time.sleep(0.5)  # let the others tell their reason, too
                trouble = "a process failed"
            elif time.monotonic() > deadline:
                trouble = f"not done after {timeout:.0f} s"
        if any(p.poll() not in (None, 0) for p in processes):
            trouble = trouble or "a process failed"
        states = [p.poll() for p in processes]
    finally:
        _end(processes)
        texts = []
        for file in files:
            file.seek(0)
            texts.append(file.read()[-4000:])
            file.close()
    if not trouble:
        return ""
    reports = [f"--- rank {r}, status {s}\n{t}" for r, (s, t) in enumerate(zip(states, texts))]
    return "\n".join([trouble, *reports])


def run_group(
    module: str,
    *arguments: str,
    world_size: int,
    logs: Path,
    backend: str = "gloo",
    timeout: float = 150.0,
) -> None:
    """Run ``python -m module arguments`` as ranks 0 to `world_size` - 1.

    Raises
    ------
    ProcessesFailed
        With the ends of all logs.
    """
    command = [sys.executable, "-m", module, *arguments]
    for attempt in range(3):
        trouble = _attempt(command, world_size, backend, logs, timeout)
        if not trouble:
            return
        taken = any(text in trouble.lower() for text in _PORT_TAKEN)
        if not taken or attempt == 2:
            raise ProcessesFailed(f"{' '.join(command[2:])}, {world_size} ranks: {trouble}")
