"""docs/debugging.md: its commands run, and print what the page says."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys

import pytest

from fastattn import _ops
from fastattn.dump import model
from tests.support import ROOT

PAGE = (ROOT / "docs" / "debugging.md").read_text(encoding="utf-8")


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.S | re.M)


def commands():
    """(command, what it prints) of every console block."""
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, _, output = part.partition("\n")
            yield command, output


def normal(text):
    """Without what differs between machines: process numbers, times, instruction sets."""
    text = re.sub(r"-p\d+", "-p#", text)
    text = re.sub(r"[\d.]+ us a call", "# us a call", text)
    return re.sub(r"OpenMP, \w+", "OpenMP, #", text)


def test_commands_print_what_the_page_says(tmp_path):
    pytest.importorskip("fastattn._host")
    (program,) = blocks("python")
    (tmp_path / "step.py").write_text(program)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FASTATTN_")}
    paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    for command, output in commands():
        line = command.replace("python ", f"{sys.executable} ")
        done = subprocess.run(
            line, shell=True, capture_output=True, text=True, cwd=tmp_path, env=environment
        )
        assert normal(done.stdout) == normal(output), f"{command}\n{done.stderr}"
    ast.parse((tmp_path / "report.py").read_text())


def test_operators_without_a_model_are_listed():
    for name in (*model.WITHOUT_MODEL, *model.NOT_REPLAYED):
        assert f"`{name}`" in PAGE and name in _ops.operators()
