"""What pages say of committed results, drawings and head dimensions is so."""

from __future__ import annotations

import re

import pytest

import fastattn.functional as F
from benchmarks.core import plots
from fastattn.functional._cache_types import HEAD_DIMS
from tests.support import ROOT

COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}


def test_the_table_of_files_has_every_file():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    table = page.partition("<!-- table: files -->")[2].partition("<!-- end -->")[0]
    named = re.findall(r"^\| \[([^\]]+\.json)\]", table, re.M)
    committed = (ROOT / "benchmarks" / "results").glob("*.json")
    assert sorted(named) == sorted(path.name for path in committed)


def test_the_readme_counts_the_panels_of_its_drawing():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (count,) = re.findall(r"!\[time of a decode call over context, (\w+) batch sizes\]", readme)
    chart = plots.CHARTS[0]
    assert chart.title.startswith("Paged decode")
    assert COUNTS[count] == len(chart.panels)


@pytest.mark.parametrize(
    "function", [F.flash_attention, F.paged_attention], ids=lambda f: f.__name__
)
def test_errors_name_the_head_dimensions(function):
    """Of those that an unsupported one is told apart from."""
    section = (function.__doc__ or "").partition("NotImplementedError")[2].partition("See Also")[0]
    assert {int(n) for n in re.findall(r"\b\d{2,3}\b", section)} == set(HEAD_DIMS)
