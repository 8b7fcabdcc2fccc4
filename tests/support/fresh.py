"""Runs programs in processes that have imported Paddle and nothing else that matters.

Importing Paddle takes a second of a processor. What the package does at its own import, in its
environment or when its process ends needs a process in which the package was never imported, but
not a Paddle that was never imported: one process imports it and forks for each program.

Programs whose subject is how Paddle is found, imported or given threads need ``subprocess``.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

from tests.support import ROOT

_START = "from tests.support import fresh; fresh.serve()"
_server: subprocess.Popen[str] | None = None


def _started() -> subprocess.Popen[str]:
    global _server
    if _server is None or _server.poll() is not None:
        names = ("FASTATTN_", "PYTHONPATH", "PYTHONWARNINGS")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(names)}
        _server = subprocess.Popen(
            [sys.executable, "-c", _START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            env={**environment, "PYTHONPATH": str(ROOT)},
        )
        atexit.register(_server.communicate)  # ends stdin, and waits
    return _server


def run(
    code: str,
    *arguments: str,
    env: dict[str, str] | None = None,
    cwd: str | Path = ROOT,
    timeout: float = 300.0,
) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run([python, "-c", code, *arguments], capture_output=True, text=True)``.

    `env` is the whole environment, this process's without it.
    """
    server = _started()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        files = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        request = {
            "code": code,
            "arguments": arguments,
            "env": dict(os.environ if env is None else env),
            "cwd": str(cwd),
            "files": files,
            "timeout": timeout,
        }
        print(json.dumps(request), file=server.stdin, flush=True)
        answer = server.stdout.readline()
        assert answer, "the process that forks has ended"
        texts = [Path(file).read_text(errors="replace") for file in files]
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.CompletedProcess(command, int(answer), *texts)


def run_module(
    module: str, *arguments: str, env: dict[str, str] | None = None, cwd: str | Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """As ``python -m module arguments``."""
    code = f"import runpy\nrunpy.run_module({module!r}, run_name='__main__', alter_sys=True)\n"
    return run(code, *arguments, env=env, cwd=cwd)


# --- the process that forks ---------------------------------------------------------------------


def serve() -> None:
    """Fork for each line of stdin, and print each program's exit status, or minus its signal."""
    import paddle  # noqa: F401  what the programs need not import again

    gc.collect()
    gc.freeze()  # else each program's end goes over all of Paddle's objects
    paths = [path for path in sys.path if path not in ("", str(ROOT))]
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(request, paths)
            # Its errors and exits end this process as they end any program.
            exec(compile(request["code"], "<string>", "exec"), sys.modules["__main__"].__dict__)
            sys.exit()
        print(_status(pid, request["timeout"]), flush=True)


def _become(request: dict[str, Any], paths: list[str]) -> None:
    """Have this process be one that has just started."""
    for target, source in enumerate((os.devnull, *request["files"])):
        flags = os.O_RDONLY if target == 0 else os.O_WRONLY | os.O_CREAT
        file = os.open(source, flags, 0o600)
        os.dup2(file, target)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    given = filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = ["", *given, *paths]
    sys.argv[:] = ["-c", *request["arguments"]]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    sys.modules["__main__"] = types.ModuleType("__main__")


def _status(pid: int, timeout: float) -> int:
    end = time.monotonic() + timeout
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
