"""The Python of pages that no test of a family runs, and how long pages may be."""

from __future__ import annotations

import re
from pathlib import Path

import paddle
import pytest

from tests.support import ROOT

LONGEST = 120  # lines of the README and of a kernel's page


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


@pytest.mark.parametrize("name", ["calibrate.md", "coming_from.md", "dcp.md"])
def test_blocks_run_one_after_the_other(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    page = ROOT / "docs" / name
    paddle.seed(0)
    namespace: dict[str, object] = {}
    assert blocks(page)
    for block in blocks(page):
        exec(compile(block, name, "exec"), namespace)


SHORT = [ROOT / "README.md", *sorted((ROOT / "docs" / "kernels").glob("*.md"))]


@pytest.mark.parametrize("page", SHORT, ids=lambda p: p.name)
def test_pages_are_short(page):
    assert len(page.read_text(encoding="utf-8").splitlines()) <= LONGEST
