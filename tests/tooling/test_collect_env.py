"""collect-env tells about good machines and about every kind of broken one, and never raises."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import paddle
import pytest

from fastattn.cli import collect_env, main
from fastattn.version import __version__
from tests.support import ROOT

SECTIONS = ("fastattn", "Paddle", "GPU", "Python", "tools", "system", "environment")


def run(*arguments, **environ):
    return subprocess.run(
        [sys.executable, "-m", "fastattn", "collect-env", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environ},
    )


def facts(**environ):
    done = run("--json", **environ)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert tuple(found) == SECTIONS
    return {section: dict(rows) for section, rows in found.items()}


def blocked(tmp_path, name, code):
    """PYTHONPATH under which module `name` is `code`."""
    (tmp_path / f"{name}.py").write_text(code)
    return os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])


def test_one_block_to_paste():
    """Also where a variable's bytes are no text."""
    own = {b"FASTATTN_LOG": b"0", b"NCCL_DEBUG": b"WARN", b"MY_OWN_VARIABLE": b"private"}
    environment = {os.fsencode(k): os.fsencode(v) for k, v in os.environ.items()}
    done = subprocess.run(
        [sys.executable, "-m", "fastattn", "collect-env"],
        capture_output=True,
        cwd=ROOT,
        env={**environment, **own, b"FASTATTN_ODD": b"\xff`"},
    )
    assert done.returncode == 0 and not done.stderr
    text = done.stdout.decode(errors="replace")
    lines = text.splitlines()
    assert (lines[0], lines[-1]) == ("```text", "```")
    assert [line[1:-1] for line in lines if line.startswith("[")] == list(SECTIONS)
    assert text.count("```") == 2
    assert f"{__version__}, {ROOT}" in text and paddle.__version__ in text
    assert "NCCL_DEBUG" in text and "private" not in text and "FASTATTN_ODD" in text


def test_good_installation():
    found = facts()
    assert found["fastattn"]["library loads"].startswith("yes, ")
    assert found["Paddle"]["Paddle"] == paddle.__version__
    assert "GiB" in found["system"]["memory"]


def test_secrets_are_left_out():
    rows = collect_env.environment_facts(
        {
            "FD_API_KEY": "abc",
            "PADDLE_TOKEN": "abc",
            "HOME": "abc",
            "NCCL_DEBUG": "INFO",
            "CXX": "g",
        }
    )
    assert dict(rows) == {
        "CXX": "g",
        "FD_API_KEY": "(not shown)",
        "NCCL_DEBUG": "INFO",
        "PADDLE_TOKEN": "(not shown)",
    }


def test_no_paddle(tmp_path):
    found = facts(PYTHONPATH=blocked(tmp_path, "paddle", "raise ImportError('no paddle here')"))
    assert found["Paddle"] == {"Paddle": "ImportError: no paddle here"}
    assert "NO: ImportError: no paddle here" in found["fastattn"]["library loads"]


def test_a_paddle_that_ends_the_process(tmp_path):
    path = blocked(tmp_path, "paddle", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    found = facts(PYTHONPATH=path)
    assert "ended with signal 11" in found["Paddle"]["probe"]
    assert "ended with signal 11" in found["fastattn"]["probe"]


def test_a_paddle_that_never_comes_back(monkeypatch):
    answers = collect_env._probe('print(\'@["a", "b"]\', flush=True)\nwhile True: pass', 1.0)
    assert answers[0] == ("a", "b") and "not done after 1 s" in answers[1][1]


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_broken_library(tmp_path, monkeypatch, content):
    library = tmp_path / "lib.so"
    if content:
        library.write_bytes(content)
    (tmp_path / "_build_info.py").write_text("ARCHS = [")
    monkeypatch.setenv("FASTATTN_LIBRARY", str(library))
    monkeypatch.setattr(collect_env, "_PADDLE_PROBE", "")  # other tests ask Paddle
    found = dict(collect_env.collect()["fastattn"])
    assert found["library loads"].startswith("NO: ")
    assert found["library"].endswith("bytes)" if content else "missing")
    assert "SyntaxError" in found["build error"]


def test_no_tools(tmp_path, monkeypatch, capsys):
    for name in ("PATH", "CUDA_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(collect_env, "_probe", lambda code: [])  # other tests ask Paddle
    assert main(["collect-env", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out).items()
    found = {section: dict(rows) for section, rows in rows}
    assert found["GPU"]["GPU"] == "nvidia-smi: not found"
    assert found["tools"]["g++"].endswith("not found")
    assert "not found" in found["tools"]["nvcc"]


def test_sections_fail_apart(monkeypatch, capsys):
    def broken():
        raise RuntimeError("first line\nsecond")

    for name in ("gpu_facts", "library_facts", "python_facts", "system_facts", "tool_facts"):
        monkeypatch.setattr(collect_env, name, broken)
    assert main(["collect-env"]) == 0
    text = capsys.readouterr().out
    assert text.count("RuntimeError: first line") == 5 and "second" not in text


def test_odd_values_keep_to_their_line():
    text = collect_env.text({"a": [("name", "x\ny"), ("list", ["p", "q"]), ("none", "")], "b": []})
    assert text.splitlines()[3:] == [
        "[a]",
        "name  x | y",
        "list  p, q",
        "none  -",
        "",
        "[b]",
        "-",
        "```",
    ]
