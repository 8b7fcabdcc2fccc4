"""``python -m fastattn collect-env``: one block about this machine to paste into a bug report.

The command is for machines on which something is broken, so it never raises. Every fact is found
separately, and a missing fact has a reason. Steps that could end the process (the import of Paddle,
the load of the library) run in another process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

#: Environment variables that affect Paddle, CUDA or this package.
_RELEVANT = re.compile(
    r"(FASTATTN|FLAGS|PADDLE|FD|CUDA|NVIDIA|NCCL|GLOO|OMP|KMP|MKL|GOMP|OPENBLAS|CCACHE)_\w+\Z"
    r"|(CC|CXX|CFLAGS|CXXFLAGS|CPPFLAGS|LDFLAGS|MAX_JOBS|PYTHONPATH|PYTHONHOME|VIRTUAL_ENV"
    r"|CONDA_PREFIX|LD_LIBRARY_PATH|LD_PRELOAD|TMPDIR)\Z"
)
_SECRET = re.compile(r"TOKEN|SECRET|PASS|KEY|CREDENTIAL|AUTH", re.I)

_DISTRIBUTIONS = (
    *("fastattn", "paddlepaddle", "paddlepaddle-gpu", "fastdeploy-gpu", "fastdeploy-cpu"),
    *("numpy", "ml_dtypes", "rich", "safetensors", "matplotlib", "setuptools", "pip"),
)

#: Runs in a separate process. Every answer is one line, so a crash loses only the later answers.
_PADDLE_PROBE = """
import json
def tell(name, find):
    try:
        value = find()
    except BaseException as error:
        lines = str(error).strip().splitlines() or ["no message"]
        value = f"{type(error).__name__}: {lines[0]}"
    print("@" + json.dumps([name, str(value)]), flush=True)
def version():
    import paddle
    return paddle.__version__
tell("Paddle", version)
try:
    import paddle
    tell("Paddle's folder", lambda: paddle.__path__[0])
    tell("Paddle's commit", lambda: paddle.version.commit)
    tell("Paddle's CUDA, cuDNN", lambda: f"{paddle.version.cuda()}, {paddle.version.cudnn()}"
         if paddle.is_compiled_with_cuda() else "none (CPU build)")
    tell("GPUs that Paddle sees", lambda: [
        paddle.device.cuda.get_device_name(i) for i in range(paddle.device.cuda.device_count())
    ] if paddle.is_compiled_with_cuda() else "none")
    tell("Paddle's default device", lambda: paddle.get_device())
    tell("Paddle's distributed", lambda: paddle.distributed.is_available())
except BaseException:
    pass
"""

_LIBRARY_PROBE = """
import json
def tell(name, value):
    print("@" + json.dumps([name, str(value)]), flush=True)
try:
    from fastattn import _ops
    names = sorted(_ops.load())
    tell("library loads", f"yes, {len(names)} operators")
except BaseException as error:
    tell("library loads", f"NO: {type(error).__name__}: {error}")
"""


def _guarded(find: Callable[[], Any]) -> Any:
    try:
        return find()
    except Exception as error:
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _output(command: Sequence[str]) -> str:
    if shutil.which(command[0]) is None:
        return f"{command[0]}: not found"
    try:
        done = subprocess.run(
            list(command),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=20.0,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    text = (done.stdout.strip() or done.stderr.strip()) if done.returncode else done.stdout.strip()
    return text or f"no output, status {done.returncode}"


def _first_line(command: Sequence[str]) -> str:
    return _output(command).splitlines()[0]


def _probe(code: str, timeout: float = 120.0) -> list[tuple[str, str]]:
    """Answers of a probe, and how it ended if it failed."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "FASTATTN_LOG": "0", "FASTATTN_DUMP": ""}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        output, status = done.stdout, done.returncode
        last = (done.stderr.strip().splitlines() or [""])[-1]
    except subprocess.TimeoutExpired as error:
        raw = error.stdout or b""
        output = raw.decode(errors="replace") if isinstance(raw, bytes) else raw
        status, last = 0, ""
        output += f'\n@["probe", "not done after {timeout:.0f} s"]'
    answers = [tuple(json.loads(line)) for line in re.findall(r"^@(\[.*\])$", output, re.M)]
    if status:
        how = f"signal {-status}" if status < 0 else f"status {status}"
        answers.append(("probe", f"the process ended with {how}: {last}"))
    return answers


def _os_name() -> str:
    release = Path("/etc/os-release")
    names = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', release.read_text(), re.M))
    return names.get("PRETTY_NAME", "unknown")


def _cpu() -> str:
    text = Path("/proc/cpuinfo").read_text()
    name = re.search(r"^model name\s*:\s*(.*)$", text, re.M)
    flags = set((re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.M) or [""])[0].split())
    known = [
        f for f in ("avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_tile") if f in flags
    ]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model = name[1] if name else platform.machine()
    return f"{model}, {os.cpu_count()} CPUs ({usable} usable), {' '.join(known) or 'no AVX2'}"


def _memory() -> str:
    text = Path("/proc/meminfo").read_text()
    sizes = {k: int(v) / 2**20 for k, v in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.M)}
    return f"{sizes['MemTotal']:.1f} GiB, {sizes['MemAvailable']:.1f} GiB available"


def system_facts() -> list[tuple[str, Any]]:
    """Operating system, processor, memory."""
    return [
        ("operating system", _guarded(_os_name)),
        ("kernel", _guarded(platform.platform)),
        ("C library", _guarded(lambda: " ".join(platform.libc_ver()))),
        ("CPU", _guarded(_cpu)),
        ("memory", _guarded(_memory)),
        ("container", _guarded(_container)),
    ]


def _container() -> str:
    marks = [name for name in ("/.dockerenv", "/run/.containerenv") if Path(name).exists()]
    return ", ".join(marks) or "not detected"


def python_facts() -> list[tuple[str, Any]]:
    """The interpreter and the packages."""
    import importlib.metadata

    found = []
    for name in _DISTRIBUTIONS:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except Exception:  # not installed, or its metadata is broken
            continue
    return [
        ("Python", f"{sys.version.split()[0]}, {sys.executable}"),
        ("packages", ", ".join(found) or "none of the relevant ones"),
    ]


def library_facts() -> list[tuple[str, Any]]:
    """The compiled library and how it was built."""
    from fastattn.cli.show_config import build_facts, library_path
    from fastattn.version import __version__

    path = library_path()
    rows: list[tuple[str, Any]] = [("fastattn", f"{__version__}, {Path(__file__).parents[1]}")]
    exists = path.exists()
    rows.append(
        ("library", f"{path} ({path.stat().st_size} bytes)" if exists else f"{path}: missing")
    )
    build = _guarded(lambda: build_facts(path))
    if not isinstance(build, dict):
        return [*rows, ("build", build)]
    return [
        *rows,
        *((f"build {k.replace('_', ' ')}", v) for k, v in build.items() if k != "operators"),
    ]


def gpu_facts() -> list[tuple[str, Any]]:
    """Driver and GPUs."""
    fields = "index,name,compute_cap,memory.total,driver_version"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    rows: list[tuple[str, Any]] = [("GPU", line) for line in _output(query).splitlines()]
    header = re.search(r"CUDA Version: *([\d.]+)", _output(["nvidia-smi"]))
    if header:
        rows.append(("driver's CUDA", header[1]))
    return rows


def _commit() -> str:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return "not a checkout"
    return _first_line(["git", "-C", str(root), "describe", "--always", "--dirty"])


def tool_facts() -> list[tuple[str, Any]]:
    """Compilers and toolkits."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or str(Path(home, "bin", "nvcc"))
    release = _output([nvcc, "--version"]).splitlines()
    return [
        ("g++", _first_line([*(os.environ.get("CXX") or "g++").split(), "--version"])),
        ("nvcc", f"{nvcc}: {next((x for x in release if 'release' in x), release[-1])}"),
        ("ccache", _first_line(["ccache", "--version"])),
        ("git commit", _guarded(_commit)),
    ]


def environment_facts(environ: Mapping[str, str]) -> list[tuple[str, Any]]:
    """Relevant environment variables. Values whose names suggest a secret are omitted."""
    rows: list[tuple[str, Any]] = []
    for name in sorted(environ):
        if _RELEVANT.match(name):
            rows.append((name, "(not shown)" if _SECRET.search(name) else environ[name]))
    return rows


def collect() -> dict[str, list[tuple[str, Any]]]:
    """Section -> facts. Never raises."""
    sections: dict[str, Callable[[], list[tuple[str, Any]]]] = {
        "fastattn": lambda: [*library_facts(), *_probe(_LIBRARY_PROBE)],
        "Paddle": lambda: list(_probe(_PADDLE_PROBE)),
        "GPU": gpu_facts,
        "Python": python_facts,
        "tools": tool_facts,
        "system": system_facts,
        "environment": lambda: environment_facts(os.environ),
    }
    result = {}
    for name, find in sections.items():
        rows = _guarded(find)
        result[name] = rows if isinstance(rows, list) else [("error", rows)]
    return result


def _one_line(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    return " | ".join(str(value).splitlines()) or "-"


def text(facts: Mapping[str, Sequence[tuple[str, Any]]]) -> str:
    """A fenced block of text."""
    lines = ["```text", "fastattn collect-env"]
    for section, rows in facts.items():
        lines += ["", f"[{section}]"]
        width = max((len(name) for name, _ in rows), default=0)
        lines += [f"{name:<{width}}  {_one_line(value)}" for name, value in rows] or ["-"]
    return "\n".join([*lines, "```"])


def run(arguments: argparse.Namespace) -> int:
    """Print the block."""
    facts = collect()
    if arguments.json:
        print(
            json.dumps(
                {k: [[n, v] for n, v in rows] for k, rows in facts.items()}, indent=2, default=str
            )
        )
    else:
        block = text(facts)
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(block.encode(encoding, "replace").decode(encoding, "replace"))
    return 0


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "collect-env", help="one block about this machine for a bug report", description=__doc__
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)
