"""FASTATTN_LOG: what is logged, where it goes, and that it costs nothing when it is off."""

from __future__ import annotations

import os
import re

import pytest

from tests.support import fresh

CALLS = """
import numpy as np, paddle
paddle.set_device("cpu")
import fastattn.functional as F
x = paddle.ones([2, 4, 64], "float32")
for tokens in (2, 3, 2):
    x = paddle.ones([tokens, 4, 64], "float32")
    F.quantize_fp8(x, granularity="token")
F.quantize_fp8(x, paddle.ones([1]))
"""


def run(code, level=None, **environ):
    others = ("FASTATTN_LOG", "FASTATTN_PROFILE", "PYTHONWARNINGS")
    environment = {k: v for k, v in os.environ.items() if k not in others}
    if level is not None:
        environment["FASTATTN_LOG"] = level
    done = fresh.run(code, env={**environment, **environ})
    lines = [line for line in done.stderr.splitlines() if re.search(r" fastattn \d+ ", line)]
    return done, lines


@pytest.mark.parametrize("level", [None, "0", ""])
def test_nothing_is_wrapped_at_level_0(level):
    code = CALLS + (
        "from fastattn import _ops\nimport sys\n"
        "assert not hasattr(_ops.call, '__wrapped__')\nassert 'fastattn._log' not in sys.modules\n"
    )
    done, lines = run(code, level)
    assert done.returncode == 0, done.stderr
    assert lines == []


def test_level_1_logs_a_configuration_once():
    done, lines = run(CALLS, "1")
    assert done.returncode == 0, done.stderr
    assert len(lines) == 2, done.stderr
    assert "INFO quantize_fp8 first called so: x=float32[2, 4, 64] cpu" in lines[0]
    assert "granularity='token'" in lines[0]
    assert "scale=float32[1] cpu" in lines[1]


def test_level_2_logs_every_call():
    _, lines = run(CALLS, "2")
    calls = [line for line in lines if "DEBUG call" in line]
    assert [
        re.search(r"call (\d+): quantize_fp8: x=float32\[(\d), 4, 64\]", c)[2] for c in calls
    ] == [*("2", "3", "2", "2")]
    assert len(lines) == 6  # and two first uses


def test_the_line_is_there_when_the_process_dies_in_the_call():
    code = (
        "import os\nfrom fastattn import _ops\nimport paddle\nimport fastattn.functional as F\n"
        "run, operators = _ops._load_direct()\n"
        "_ops._load_direct = lambda: (lambda *a: os.kill(os.getpid(), 9), operators)\n"
        "F.quantize_fp8(paddle.ones([2, 64]), paddle.ones([1]))\n"
    )
    done, lines = run(code, "2")
    assert done.returncode == -9
    assert "DEBUG call 1: quantize_fp8: x=float32[2, 64] cpu" in lines[-1]


def test_a_refused_call_is_logged_first():
    code = "import fastattn.functional as F\nF.quantize_fp8(None)\n"
    done, lines = run(code, "2")
    assert done.returncode == 1 and "x: expected a tensor, got None" in done.stderr
    assert "x=None" in lines[-1]


@pytest.mark.parametrize("imports", ["", "from fastattn import _ops"])
def test_a_handler_of_the_application_gets_the_lines_alone(imports):
    code = (
        f"import logging, sys\n{imports}\nhandler = logging.StreamHandler(sys.stdout)\n"
        "handler.setFormatter(logging.Formatter('APP %(name)s %(message)s'))\n"
        "logging.getLogger('fastattn').addHandler(handler)\n" + CALLS
    )
    done, lines = run(code, "1")
    assert lines == []
    assert done.stdout.count("APP fastattn quantize_fp8 first called so") == 2


def test_a_root_handler_does_not_repeat_the_lines():
    done, lines = run("import logging\nlogging.basicConfig(level=10)\n" + CALLS, "1")
    assert len(lines) == done.stderr.count("first called so") == 2


def test_a_wrong_level_warns():
    done, lines = run(CALLS, "verbose")
    assert done.returncode == 0 and lines == []
    assert "FASTATTN_LOG: expected 0, 1, 2 or 3, got 'verbose'" in done.stderr


def test_a_traced_program_is_logged_while_it_is_traced(tmp_path):
    (tmp_path / "traced.py").write_text(
        "import paddle\nimport fastattn.functional as F\n"
        "@paddle.jit.to_static(full_graph=True)\n"
        "def f(x):\n    return F.quantize_fp8(x, granularity='token')\n"
        "f.eval()\nf(paddle.ones([2, 64]))\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done, lines = run("import traced", "2", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert any("quantize_fp8" in line for line in lines)


def test_what_cannot_be_described_is_no_error():
    code = (
        "from fastattn import _log\n"
        "class Bad:\n    dtype = 1\n    @property\n    def shape(self):\n        raise OSError\n"
        "class Worse:\n    def __repr__(self):\n        raise OSError\n"
        "print(_log.describe(Bad()), _log.describe(Worse()), _log.describe([1]))\n"
    )
    done, _ = run(code, "1")
    assert done.returncode == 0, done.stderr
    assert "<Worse: OSError> [1]" in done.stdout
