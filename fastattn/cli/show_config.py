"""``python -m fastattn show-config``: what is installed, what is compiled, what would run.

The command is for broken installations, so every part is found separately and reports its own
failure. At import, this module loads neither Paddle nor compiled code.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from fastattn import _gpu_fits, env
from fastattn.version import __version__

LIBRARY_NAME = "_fastattn_ops.so"
_DISTRIBUTIONS = ("numpy", "ml_dtypes", "rich", "safetensors")


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, Any]:
    """Versions of the packages that this package uses."""
    return {
        "fastattn": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version_of(name) for name in _DISTRIBUTIONS},
    }


def paddle_facts() -> dict[str, Any]:
    """Version and kind of the imported Paddle; ``error`` if the import fails."""
    try:
        import paddle

        return {
            "version": paddle.__version__,
            "path": str(Path(paddle.__file__).parent),
            "cuda": paddle.version.cuda() if paddle.is_compiled_with_cuda() else None,
            "error": None,
        }
    except Exception as error:
        # A broken Paddle fails in many ways (OSError of a library, AttributeError, ...).
        return {"version": None, "path": None, "cuda": None, "error": _reason(error)}


def library_path() -> Path:
    """The library that ``fastattn`` would load."""
    override = env.library()
    return Path(override) if override else Path(__file__).parents[1] / LIBRARY_NAME


def build_facts(library: Path) -> dict[str, Any]:
    """Build record next to the library; empty if there is none."""
    path = library.parent / "_build_info.py"
    if not path.exists():
        return {}
    try:
        return {k.lower(): v for k, v in runpy.run_path(str(path)).items() if k.isupper()}
    except Exception as error:
        return {"error": _reason(error)}


def host_facts() -> dict[str, Any]:
    """Facts from the compiled module ``_host``; ``error`` if it is missing."""
    try:
        host = importlib.import_module("fastattn._host")
        return {
            "head_dims": host.head_dims(),
            "cache_types": host.cache_types(),
            "block_size": host.block_size(),
            "cpu_isa": host.cpu_isa(),
            "error": None,
        }
    except Exception as error:
        return {"cpu_isa": None, "error": _reason(error)}


def _load_in_child() -> dict[str, Any]:
    """Load the library in a separate process, because a crash must not end this command."""
    code = (
        "import json, sys\n"
        "try:\n"
        "    from fastattn import _ops\n"
        "    result = {'loads': True, 'operators': sorted(_ops.load()), 'error': None}\n"
        "except Exception as error:\n"
        "    result = {'loads': False, 'operators': [], 'error':\n"
        "              type(error).__name__ + ': ' + str(error)}\n"
        "sys.stdout.write('\\n@' + json.dumps(result) + '\\n')\n"
    )
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONPATH": path},
    )
    answer = re.search(r"^@(\{.*\})$", done.stdout, re.M)
    if answer is not None:
        return json.loads(answer[1])
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
    error = f"loading the library ended the process with {how}: {last}"
    return {"loads": False, "operators": [], "error": error}


def library_facts(paddle: dict[str, Any]) -> dict[str, Any]:
    """Whether the compiled library exists and loads, and the operators that it registers."""
    path = library_path()
    facts: dict[str, Any] = {"path": str(path), "exists": path.exists()}
    if paddle["error"]:
        return {**facts, "loads": False, "operators": [], "error": f"Paddle: {paddle['error']}"}
    loaded = _load_in_child()
    names = [name[len("fastattn_") :] for name in loaded["operators"]]
    return {**facts, **loaded, "operators": names}


def gpus() -> list[dict[str, str]]:
    """The GPUs that ``nvidia-smi`` lists."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.split(", ") for line in done.stdout.splitlines() if done.returncode == 0]
    keys = ("name", "compute_capability", "driver")
    return [dict(zip(keys, row)) for row in rows if len(row) == len(keys)]


def _gpu_dispatch(build: dict[str, Any], places: list[str], found: list[dict[str, str]]) -> str:
    """Kernels for a GPU tensor."""
    if "cuda" not in places:
        return "no CUDA kernel: NotImplementedError"
    archs = build.get("archs") or []
    if not found:
        return f"CUDA kernel for {', '.join('sm_' + a for a in archs)} (no GPU found here)"
    major, _, minor = found[0]["compute_capability"].partition(".")
    capability = int(major), int(minor or 0)
    for arch in archs:
        if _gpu_fits.runs_on(arch, capability):
            return f"CUDA kernel for sm_{arch}"
    return str(_gpu_fits.problem(archs, capability))


def dispatch_facts(
    library: dict[str, Any],
    build: dict[str, Any],
    host: dict[str, Any],
    found: list[dict[str, str]],
) -> dict[str, dict[str, str]]:
    """For every operator, the code that runs for a CPU tensor and for a GPU tensor."""
    places = build.get("operators") or {}
    isa = f" (attention: {host['cpu_isa']})" if host.get("cpu_isa") else ""
    table = {}
    for name in sorted(library["operators"] or places):
        cpu = "C++ and OpenMP" + (isa if "attention" in name else "")
        table[name] = {"cpu": cpu, "gpu": _gpu_dispatch(build, places.get(name, ["cpu"]), found)}
    return table


def collect() -> dict[str, Any]:
    """Everything that the command reports."""
    paddle = paddle_facts()
    library = library_facts(paddle)
    build = build_facts(Path(library["path"]))
    host = host_facts()
    found = gpus()
    return {
        "versions": versions(),
        "paddle": paddle,
        "library": library,
        "build": build,
        "host": host,
        "gpus": found,
        "dispatch": dispatch_facts(library, build, host, found),
    }


def _text(value: Any) -> str:
    if value is None or value == []:
        return "-"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)


def _print_text(config: dict[str, Any]) -> None:
    paddle, library = config["paddle"], config["library"]
    status = "loads" if library["loads"] else f"DOES NOT LOAD: {library['error']}"
    rows: list[tuple[str, Any]] = list(config["versions"].items())
    rows.append(("paddle", paddle["error"] or paddle["version"]))
    rows.append(("paddle's CUDA", paddle["cuda"] or "none (CPU build)"))
    rows += [("library", library["path"]), ("", status)]
    build = {k: v for k, v in config["build"].items() if k != "operators"}
    rows += [(f"build {k.replace('_', ' ')}", v) for k, v in build.items()]
    rows += [(f"host {k.replace('_', ' ')}", v) for k, v in config["host"].items() if v]
    rows += [("GPU", " ".join(gpu.values())) for gpu in config["gpus"]] or [("GPU", "none found")]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {_text(value)}")
    if config["dispatch"]:
        print("\noperators")
        width = max(map(len, config["dispatch"]))
        for name, places in config["dispatch"].items():
            print(f"  {name:<{width}}  CPU: {places['cpu']}; GPU: {places['gpu']}")


def run(arguments: argparse.Namespace) -> int:
    """Print the configuration. With ``--check``, the status is 1 if the library does not load."""
    config = collect()
    if arguments.json:
        print(json.dumps(config, indent=2))
    else:
        _print_text(config)
    return int(arguments.check and not config["library"]["loads"])


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "show-config", help="versions, what is compiled, what would run", description=__doc__
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--check", action="store_true", help="exit with status 1 if the library does not load"
    )
    parser.set_defaults(run=run)
