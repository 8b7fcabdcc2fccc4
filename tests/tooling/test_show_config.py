"""show-config on a good installation and on every kind of broken one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import paddle
import pytest

from fastattn import _ops
from fastattn.cli import main, show_config
from fastattn.version import __version__
from tests.support import ROOT, fresh


def run(*arguments, **environ):
    """Run the command in a process of its own, which need not import Paddle."""
    return fresh.run_module("fastattn", *arguments, env={**os.environ, **environ})


def run_alone(*arguments, **environ):
    """Run the command in a Python that has imported nothing."""
    return subprocess.run(
        [sys.executable, "-m", "fastattn", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environ},
    )


def config(run=run, **environ):
    done = run("show-config", "--json", **environ)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def blocked(tmp_path, name):
    """PYTHONPATH under which importing module `name` fails."""
    (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name} here')")
    return os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])


def test_good_installation():
    found = config()
    assert found["versions"]["fastattn"] == __version__
    assert found["paddle"]["version"] == paddle.__version__
    assert found["library"]["loads"] is True
    assert found["library"]["error"] is None
    assert found["library"]["operators"] == sorted(n[len("fastattn_") :] for n in _ops.load())
    assert set(found["dispatch"]) == set(found["library"]["operators"])
    assert all("C++" in places["cpu"] for places in found["dispatch"].values())


def test_text_tells_the_same():
    done = run("show-config", "--check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert paddle.__version__ in done.stdout
    assert "loads" in done.stdout and "DOES NOT LOAD" not in done.stdout
    assert all(name[len("fastattn_") :] in done.stdout for name in _ops.load())


def test_missing_library(tmp_path):
    missing = str(tmp_path / "none.so")
    found = config(FASTATTN_LIBRARY=missing)
    assert found["library"]["exists"] is False
    assert found["library"]["loads"] is False
    assert "missing" in found["library"]["error"] and missing in found["library"]["error"]


def test_broken_library(tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    found = config(FASTATTN_LIBRARY=str(broken))
    assert found["library"]["exists"] is True and found["library"]["loads"] is False
    assert "cannot be loaded" in found["library"]["error"]


def test_check_fails_on_a_broken_library(tmp_path):
    done = run("show-config", "--check", FASTATTN_LIBRARY=str(tmp_path / "none.so"))
    assert done.returncode == 1
    assert "DOES NOT LOAD" in done.stdout


def test_no_paddle(tmp_path):
    found = config(run_alone, PYTHONPATH=blocked(tmp_path, "paddle"))
    assert found["paddle"]["version"] is None
    assert "no paddle here" in found["paddle"]["error"]
    assert found["library"]["loads"] is False and "no paddle here" in found["library"]["error"]


def test_no_numpy(tmp_path):
    found = config(run_alone, PYTHONPATH=blocked(tmp_path, "numpy"))
    assert found["library"]["loads"] is False


def test_a_library_that_crashes_is_reported(monkeypatch):
    monkeypatch.setattr(show_config.sys, "executable", "/bin/false")
    facts = show_config.library_facts({"error": None})
    assert facts["loads"] is False
    assert "ended the process with status 1" in facts["error"]


def test_broken_build_info(tmp_path):
    (tmp_path / "_build_info.py").write_text("ARCHS = [")
    assert "SyntaxError" in show_config.build_facts(tmp_path / "lib.so")["error"]


def test_missing_host_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastattn._host", None)
    facts = show_config.host_facts()
    assert facts["cpu_isa"] is None and facts["error"]


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        (["90a"], "9.0", "CUDA kernel for sm_90a"),
        (["80", "100a"], "8.0", "CUDA kernel for sm_80"),
        (["90a"], "8.9", "no kernel image: built for sm_90a, the GPU is sm_89; rebuild with"),
        (["80"], "8.6", "CUDA kernel for sm_80"),
        (["100f"], "10.3", "CUDA kernel for sm_100f"),
        (
            ["89"],
            "8.6",
            "no kernel image: built for sm_89, the GPU is sm_86; rebuild with FASTATTN",
        ),
        (["90a"], "10.0", "no kernel image: built for sm_90a, the GPU is sm_100; rebuild with"),
    ],
)
def test_dispatch_names_the_architecture(archs, capability, expected):
    library = {"operators": ["merge", "append"]}
    build = {"archs": archs, "operators": {"merge": ["cpu"], "append": ["cpu", "cuda"]}}
    gpu = [{"name": "GPU", "compute_capability": capability, "driver": "1"}]
    table = show_config.dispatch_facts(library, build, {}, gpu)
    assert table["append"]["gpu"].startswith(expected)
    assert table["merge"]["gpu"] == "no CUDA kernel: NotImplementedError"


def test_gpus_without_a_driver(monkeypatch):
    monkeypatch.setattr(show_config.shutil, "which", lambda name: None)
    assert show_config.gpus() == []


def test_other_commands_may_be_broken(monkeypatch, capsys):
    for name in ("fastattn.demo.cli", "benchmarks.cli"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["demo"]) == 1
    assert "show-config" in capsys.readouterr().err
    assert main(["show-config", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["library"]["loads"] is True


def test_help_imports_no_command(monkeypatch, capsys):
    for name in ("fastattn.demo.cli", "fastattn.cli.bench", "fastattn.cli.show_config"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as status:
        main(["--help"])
    assert status.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("demo", "bench", "show-config"))


def test_library_of_another_paddle_is_refused(tmp_path):
    library = tmp_path / "_fastattn_ops.so"
    library.touch()
    (tmp_path / "_build_info.py").write_text("PADDLE_VERSION = '1.2.3'\n")
    with pytest.raises(ImportError) as error:
        _ops._check_build(library)
    assert "built for Paddle 1.2.3" in str(error.value)
    assert f"Paddle {paddle.__version__} is imported" in str(error.value)
    assert "setup_ops.py install" in str(error.value)
    found = config(FASTATTN_LIBRARY=str(library))
    assert "built for Paddle 1.2.3" in found["library"]["error"]
    assert found["build"] == {"paddle_version": "1.2.3"}


def test_library_of_this_paddle_is_accepted(tmp_path):
    (tmp_path / "_build_info.py").write_text(f"PADDLE_VERSION = {paddle.__version__!r}\n")
    _ops._check_build(tmp_path / "_fastattn_ops.so")
    _ops._check_build(tmp_path / "nothing" / "beside.so")


def test_another_paddle_is_refused_at_import(tmp_path):
    """In one line that names both, and the command that mends it."""
    (tmp_path / "_build_info.py").write_text("PADDLE_VERSION = '1.2.3'\n")
    library = tmp_path / "_fastattn_ops.so"
    library.touch()
    done = subprocess.run(
        [sys.executable, "-c", "import fastattn.functional"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "FASTATTN_LIBRARY": str(library)},
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith(f"ImportError: {library} was built for Paddle")
    assert f"Paddle {paddle.__version__} is imported" in last and "setup_ops.py install" in last


@pytest.mark.parametrize(
    ("archs", "capability", "warned"),
    [
        (["90a"], (9, 0), ""),
        (["80", "90a"], (8, 9), ""),
        (
            ["90a"],
            (8, 0),
            r"built for sm_90a, the GPU is sm_80; rebuild with FASTATTN_ARCHS=\"80\"$",
        ),
        (
            ["80"],
            (9, 0),
            r"built for sm_80, the GPU is sm_90; rebuild with FASTATTN_ARCHS=\"90a\"$",
        ),
        ([], (9, 0), ""),  # a library without CUDA: its calls say so
    ],
)
def test_other_gpus_are_told_at_import(tmp_path, monkeypatch, recwarn, archs, capability, warned):
    record = f"PADDLE_VERSION = {paddle.__version__!r}\nARCHS = {archs}\n"
    (tmp_path / "_build_info.py").write_text(record)
    monkeypatch.setenv("FASTATTN_LIBRARY", str(tmp_path / "_fastattn_ops.so"))
    monkeypatch.setattr(paddle.device, "get_device", lambda: "gpu:1")
    facts = SimpleNamespace(major=capability[0], minor=capability[1])
    asked = []
    monkeypatch.setattr(
        paddle.device.cuda, "get_device_properties", lambda number: asked.append(number) or facts
    )
    _ops.check_installation()
    assert asked == [1]
    lines = [str(warning.message) for warning in recwarn]
    assert len(lines) == bool(warned) and (not warned or re.search(warned, lines[0]))
    monkeypatch.setattr(paddle.device, "get_device", lambda: "cpu")
    _ops.check_installation()
    assert asked == [1] and len(recwarn) == bool(warned)


def test_paddles_word_on_ccache_is_not_repeated(tmp_path):
    """Paddle warns at each import where there is no ccache; other warnings stay."""
    code = "import runpy, sys, warnings; sys.argv = ['fastattn', 'show-config', '--json']\n"
    code += "import atexit, os, subprocess\n"
    code += "atexit.register(lambda: warnings.warn('another one'))\n"
    code += "runpy.run_module('fastattn', run_name='__main__')\n"
    path = os.pathsep.join(
        folder
        for folder in os.environ["PATH"].split(os.pathsep)
        if not os.path.exists(os.path.join(folder, "ccache"))
    )
    environ = {**os.environ, "PATH": path or str(tmp_path)}
    run_code = [sys.executable, "-c", code]
    done = subprocess.run(run_code, capture_output=True, text=True, cwd=ROOT, env=environ)
    assert done.returncode == 0 and "another one" in done.stderr
    assert "ccache" not in done.stderr
    # The same import without the command line does warn, so the test can fail.
    plain = [sys.executable, "-c", "import paddle"]
    done = subprocess.run(plain, capture_output=True, text=True, cwd=ROOT, env=environ)
    assert "No ccache found" in done.stderr
