"""tests.support.fresh: its programs are as those of a Python that has just started."""

from __future__ import annotations

import os
import signal

import pytest

from tests.support import fresh


def test_output_arguments_environment_and_folder(tmp_path):
    (tmp_path / "beside.py").write_text("NAME = 'beside'\n")
    code = (
        "import os, sys, beside\nprint(__name__, sys.argv, os.environ, os.getcwd(), beside.NAME)\n"
        "print('told', file=sys.stderr)\nprint(sys.stdin.read())\n"
        "print([n for n in sys.modules if n.startswith(('fastattn', 'tests'))])\n"
    )
    done = fresh.run(code, "a", "b", env={"OWN": "x"}, cwd=tmp_path)
    first, *rest = done.stdout.splitlines()
    expected = f"__main__ ['-c', 'a', 'b'] environ({ {'OWN': 'x'} }) {tmp_path} beside"
    assert [first, *rest] == [expected, "", "[]"]
    assert done.returncode == 0 and done.stderr == "told\n"


def test_pythonpath_comes_first(tmp_path):
    (tmp_path / "fastattn.py").write_text("")
    code = "import fastattn\nprint(fastattn.__file__)"
    done = fresh.run(code, env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd="/")
    assert done.stdout == f"{tmp_path}/fastattn.py\n"


def test_programs_do_not_see_each_other():
    assert fresh.run("import builtins, os\nbuiltins.x = os.environ['Y'] = '1'").returncode == 0
    done = fresh.run("import os\nprint('Y' in os.environ, 'x' in dir(__builtins__))")
    assert done.stdout == "False False\n"


@pytest.mark.parametrize(
    ("code", "status", "text"),
    [
        ("raise ValueError('why')", 1, "ValueError: why"),
        ("raise SystemExit(7)", 7, ""),
        ("import os\nos.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
        ("import atexit, sys\natexit.register(lambda: sys.stderr.write('bye'))", 0, "bye"),
    ],
)
def test_how_a_program_ends(code, status, text):
    done = fresh.run(code)
    assert done.returncode == status and text in done.stderr


def test_a_program_that_does_not_end():
    assert fresh.run("while True: pass", timeout=0.2).returncode == -signal.SIGKILL


def test_a_module():
    done = fresh.run_module("fastattn", "--version")
    assert done.returncode == 0 and done.stdout.strip()
