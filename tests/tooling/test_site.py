"""The site over docs/ (mkdocs.yml): its hooks, its menu and its pins. `.ci/run` builds it."""

from __future__ import annotations

import re
import runpy
import sys
from types import SimpleNamespace

import pytest

from fastattn import functional
from tests.support import ROOT

HOOKS = runpy.run_path(str(ROOT / "scripts" / "site_hooks.py"))
CONFIG = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("gpu.md", "[a](host.md#x)", "[a](host.md#x)"),
        ("gpu.md", "[a](#x)", "[a](#x)"),
        ("gpu.md", "[a](https://example.com/b.md)", "[a](https://example.com/b.md)"),
        ("gpu.md", "[a](../README.md#operators)", "[a](overview.md#operators)"),
        ("kernels/plan.md", "[a](../../CONTRIBUTING.md)", "[a](../contributing.md)"),
        ("overview.md", "[a](docs/gpu.md#goals)", "[a](gpu.md#goals)"),
        ("overview.md", "![a](benchmarks/plots/x.png)", "![a](benchmarks/plots/x.png)"),
        (
            "kernels/plan.md",
            "[a](../../benchmarks/results/x.json)",
            "[a](../benchmarks/results/x.json)",
        ),
        ("gpu.md", "[`a`](../scripts/x.py)", "`a`"),
        ("gpu.md", "`[a](../scripts/x.py)`", "`[a](../scripts/x.py)`"),
        ("gpu.md", "```\n[a](../scripts/x.py)\n```", "```\n[a](../scripts/x.py)\n```"),
        ("gpu.md", "[a](none.md)", "[a](none.md)"),  # so that a strict build finds it
    ],
)
def test_links_lead_to_the_pages_of_the_site(page, link, expected):
    assert HOOKS["rewrite"](link, page, None) == expected


def test_links_to_sources_with_an_address():
    found = HOOKS["rewrite"]("[a](../scripts/x.py#b)", "gpu.md", "https://example.com/r/")
    assert found == "[a](https://example.com/r/blob/main/scripts/x.py#b)"


def test_anchors_are_a_git_hosts():
    assert HOOKS["anchor"]("A `b_c`, d & e") == "a-b_c-d--e"


def test_every_page_is_in_the_menu():
    listed = re.findall(r"^ +- ([\w./]+\.md)$", CONFIG, re.M)
    assert len(listed) == len(set(listed))
    pages = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    own = {name for name in HOOKS["PAGES"].values() if not name.startswith("examples/")}
    assert {*listed, "README.md"} == pages | own | set(HOOKS["api_pages"]())


def test_the_reference_has_every_operator():
    page = HOOKS["api_pages"]()["api/functional.md"]
    names = re.findall(r"^::: fastattn\.functional\.(\w+)$", page, re.M)
    assert sorted(names) == sorted(functional.__all__)


def test_markup_of_docstrings(monkeypatch):
    monkeypatch.setitem(sys.modules, "griffe", SimpleNamespace(Extension=object, Object=object))
    markdown = runpy.run_path(str(ROOT / "scripts" / "site_markup.py"))["markdown"]
    text = "A :math:`x^2` of :func:`~a.b.c` [1]_.\n\n.. math:: y = 1,\n          z\n\nMore.\n"
    text += "\n.. [1] B"
    expected = "A $x^2$ of `c` [1].\n\n$$\ny = 1, z\n$$\n\nMore.\n\n[1] B"
    assert markdown(text) == expected
    two = markdown(".. math::\n\n    a &= 1 \\\\\n    b &= 2\n\nMore")
    assert "aligned" in two and two.endswith("$$\n\nMore")


def test_the_pins_of_ci_are_the_extra(tmp_path):
    """.ci/run reads them with sed."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^docs = \[\n(.*?)^\]", text, re.M | re.S)[1]
    pins = re.findall(r'"([\w\[\]-]+==[\w.]+)"', block)
    assert len(pins) == len(block.splitlines()) >= 5
    assert "sed -n '/^docs = \\[/,/^]/" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
