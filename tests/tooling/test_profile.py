"""FASTATTN_PROFILE: ranges around operator calls, and nothing at all where it is off."""

from __future__ import annotations

import json
import os

import pytest

from tests.support import ROOT, fresh

#: Puts Paddle's functions of a GPU build in place of those that a CPU build lacks.
NVTX = """
import paddle
ranges = []
paddle.base.core.nvprof_nvtx_push = lambda name: ranges.append(name)
paddle.base.core.nvprof_nvtx_pop = lambda: ranges.append("end")
"""
CALLS = """
import paddle
paddle.set_device("cpu")
import fastattn.functional as F
x = paddle.ones([2, 4, 64], "float32")
F.quantize_fp8(x, granularity="token")
F.mxfp4_quantize(x)
"""


def run(code, value="1", cwd=ROOT, **environ):
    others = ("FASTATTN_LOG", "FASTATTN_PROFILE", "PYTHONWARNINGS")
    environment = {k: v for k, v in os.environ.items() if k not in others}
    if value is not None:
        environment["FASTATTN_PROFILE"] = value
    done = fresh.run(code, cwd=cwd, env={**environment, "PYTHONPATH": str(ROOT), **environ})
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("value", [None, "0", ""])
def test_nothing_is_wrapped_where_it_is_off(value):
    code = (
        "import sys\nfrom fastattn import _ops\nassert not hasattr(_ops.call, '__wrapped__')\n"
        "assert 'fastattn._profile' not in sys.modules\nassert ranges == []"
    )
    run(NVTX + CALLS + code, value)


def test_the_profiler_of_paddle_records_every_call(tmp_path):
    code = CALLS.replace(
        "F.quantize_fp8",
        "profiler = paddle.profiler.Profiler(targets=[paddle.profiler.ProfilerTarget.CPU])\n"
        "profiler.start()\nF.quantize_fp8",
    )
    # Paddle leaves a log of its own in the working folder.
    run(
        code + f"profiler.stop()\nprofiler.export({str(tmp_path / 'a.json')!r}, 'json')\n",
        cwd=tmp_path,
    )
    events = json.loads((tmp_path / "a.json").read_text())["traceEvents"]
    names = [e["name"].partition("[")[0] for e in events if "fastattn::" in e.get("name", "")]
    assert sorted(names) == ["fastattn::mxfp4_quantize", "fastattn::quantize_fp8"]


def test_nvtx_ranges_begin_and_end():
    code = (
        "assert ranges[2:] == ['fastattn::quantize_fp8', 'end', 'fastattn::mxfp4_quantize', 'end']"
    )
    run(NVTX + CALLS + "assert ranges[:2] == ['fastattn', 'end']\n" + code)


def test_a_refused_call_ends_its_range():
    code = (
        "try:\n    F.quantize_fp8(None)\nexcept TypeError:\n    pass\n"
        "assert ranges == ['fastattn::quantize_fp8', 'end'], ranges"
    )
    run(NVTX + CALLS + "ranges.clear()\n" + code)


def test_a_paddle_that_finds_no_nvtx_warns_and_runs():
    code = "def push(name):\n    raise RuntimeError('no libnvToolsExt')\n"
    code += "paddle.base.core.nvprof_nvtx_push = push\n"
    done = run(NVTX + code + CALLS)
    assert "FASTATTN_PROFILE: Paddle cannot push NVTX ranges: no libnvToolsExt" in done.stderr


def test_it_goes_with_the_log():
    done = run(NVTX + CALLS + "assert len(ranges) == 6", FASTATTN_LOG="1")
    assert done.stderr.count("first called so") == 2


def test_a_traced_program_runs_in_ranges(tmp_path):
    (tmp_path / "traced.py").write_text(
        "import paddle\nimport fastattn.functional as F\n"
        "@paddle.jit.to_static(full_graph=True)\n"
        "def f(x):\n    return F.quantize_fp8(x, granularity='token')\n"
        "f.eval()\nprint(f(paddle.ones([2, 64]))[0].shape)\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    assert "[2, 64]" in run("import traced", PYTHONPATH=path).stdout


def test_a_wrong_value_warns():
    code = "from fastattn import _ops\nassert not hasattr(_ops.call, '__wrapped__')"
    assert "FASTATTN_PROFILE: expected 0 or 1, got 'yes'" in run(code, "yes").stderr
