"""docs/: written from the code where that is possible, and without dead links."""

from __future__ import annotations

import inspect
import re
import runpy

import pytest

import fastattn.functional as F
from fastattn import distributed
from tests.support import ROOT

MAKE = runpy.run_path(str(ROOT / "scripts" / "make_operators_doc.py"))
FUNCTIONS = [
    *(getattr(F, name) for name in F.__all__),
    *(getattr(distributed, name) for name in distributed.__all__),
]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").glob("*.md")),
]


def test_operators_page_is_up_to_date():
    path = ROOT / "docs" / "operators.md"
    assert path.read_text(encoding="utf-8") == MAKE["text"](), "run scripts/make_operators_doc.py"


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_docstring_has_every_argument(function):
    sections = MAKE["_sections"](inspect.getdoc(function))
    entries = MAKE["_entries"](sections["Parameters"])
    documented = [name for names, _, _ in entries for name in names.split(", ")]
    signature = list(inspect.signature(function).parameters)
    base_name = function.__name__.removesuffix("_dcp")
    if base_name != function.__name__:  # the rest is as for the operator
        base = set(inspect.signature(getattr(F, base_name)).parameters) - {"return_max_logits"}
        assert set(signature) - base <= set(documented) <= set(signature)
        assert set(signature) >= base
        return
    assert sorted(documented) == sorted(signature)
    assert MAKE["_entries"](sections["Returns"])
    if function is not distributed.dcp_num_local_blocks:
        assert MAKE["_entries"](sections["Raises"])


def test_dcp_takes_what_paged_attention_takes():
    ours, base = (
        inspect.signature(f).parameters
        for f in (distributed.paged_attention_dcp, F.paged_attention)
    )
    for name, parameter in base.items():
        assert ours[name].kind is parameter.kind and ours[name].default == parameter.default, name


def anchors(text):
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_tests_and_scripts_that_are_named_exist(page):
    for name in re.findall(r"`((?:tests|scripts|docs)/[\w./-]+)`", page.read_text()):
        assert (ROOT / name).exists(), f"{page.name}: {name}"
    tests = list((ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+\.py|test_\w+)`", page.read_text()):
        if name.endswith(".py"):
            found = name in [path.name for path in tests]
        else:
            found = any(f"def {name}(" in path.read_text() for path in tests)
        assert found, f"{page.name}: {name}"


def test_names_of_test_files_are_unique():
    """Pages name them without their folder."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)) > 60


def test_what_the_checks_find():
    assert anchors("# A `b_c`, d!\n## E\n") == {"a-b_c-d", "e"}
    assert MAKE["_markdown"](":func:`a.b` of ``x | y`` [1]_") == "`b` of `x \\| y` [1]"
