"""The Python of README.md runs."""

from __future__ import annotations

import re

import pytest

from tests.support import ROOT

README = ROOT / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)


def test_there_are_blocks():
    assert BLOCKS


@pytest.mark.parametrize("code", BLOCKS)
def test_block_runs(code):
    exec(compile(code, str(README), "exec"), {})
