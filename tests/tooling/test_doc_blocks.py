"""The Python of pages that no test of a family runs, and how long pages may be."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from fastattn import _foreign
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


def test_the_two_lines_between_libraries():
    """With torch where it is installed; else NumPy's arrays stand for torch's tensors."""
    page = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
    section = page.partition("## Tensors are Paddle's\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"^```py\n(.*?)^```", section, re.S | re.M)
    assert len(code.splitlines()) == 2 and _foreign._OF_TORCH in code
    try:
        import torch

        x = torch.arange(6.0)
        numpy_of = torch.Tensor.numpy
    except ImportError:
        x, numpy_of = np.arange(6.0), np.asarray
        dlpack = SimpleNamespace(to_dlpack=lambda x: x.__dlpack__(), from_dlpack=_Capsule.array)
        torch = SimpleNamespace(utils=SimpleNamespace(dlpack=dlpack))
    given = {"x": x, "y": paddle.arange(4, dtype="float32"), "torch": torch, "paddle": paddle}
    both = {**given}
    exec(code, both)
    assert isinstance(both["x"], paddle.Tensor) and both["x"].numpy().tolist() == list(range(6))
    assert numpy_of(both["y"]).tolist() == [0, 1, 2, 3]
    numpy_of(x)[2] = 70  # the memory is shared, in both directions
    given["y"][3] = 90
    assert both["x"].numpy()[2] == 70 and numpy_of(both["y"])[3] == 90


class _Capsule:
    """What NumPy reads a DLPack capsule through."""

    def __init__(self, capsule):
        self.capsule = capsule

    def __dlpack__(self, **_):
        return self.capsule

    def __dlpack_device__(self):
        return 1, 0  # the CPU

    @classmethod
    def array(cls, capsule):
        return np.from_dlpack(cls(capsule))
