"""Every measured figure in README.md and docs/ is in a committed file.

Generated tables are those of ``scripts/make_gpu_tables.py --check``. What else the pages tell
stands in ``benchmarks/results/experiments``, a file a page: in ``docs/experiments`` every number
counts, on the other pages those before a unit of time, rate or share.
"""

from __future__ import annotations

import json

import pytest

from tests.support import ROOT
from tests.support.figures import figures, measured, recorded, sections

FOLDER = ROOT / "benchmarks" / "results" / "experiments"
PAGES = sorted(
    path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
)
FILES = {json.loads(path.read_text(encoding="utf-8"))["page"]: path for path in FOLDER.iterdir()}
#: Page, section -> numbers that are rules, examples or assumptions, and so not measured.
NOT_MEASURED = {
    ("docs/benchmarks.md", "Reading a row"): {
        3,
        10,
        90,
    },  # seconds of warm-up, a budget, an example
    ("docs/debugging.md", "Make calls again"): {5e-6, 1e-4},  # bounds
    ("docs/demo.md", "The shipped model"): {1},  # what a test allows
    ("docs/formats.md", "2. Quantisation rules"): {1e-10, 1e-6, 1e-4},
    ("docs/gpu.md", "What was measured"): {60},  # cells below are left out
    ("docs/host.md", "Host time"): {100, 12},  # what some host time would be in a step
    ("docs/install.md", "The build"): {41},  # a line of the build's output, explained
    ("docs/kernels/wgmma_fp16.md", "Scheduling"): {4},  # a limit of the schedule
    ("docs/numerics.md", "Attention"): {1e-6, 1.5e-8},  # a floor; a polynomial's error
    ("docs/numerics.md", "Codes and scales"): {
        1e-10,
        1e-6,
        5e-6,
        1e-3,
        2.5e-3,
        5e-3,
        1e-2,
    },  # floors, bounds
    ("docs/numerics.md", "Sparse latent attention"): {1e-6, 5e-6, 1e-3, 2.5e-3, 5e-3},  # bounds
    ("docs/operators.md", "`paged_attention_dcp`"): {1e-6},  # a default
}


def missing(page: str, text: str, known: dict[str, set[float]]) -> dict[str, list[float]]:
    """Section -> its figures that no file has."""
    of = figures if page.startswith("docs/experiments/") and "README" not in page else measured
    found = {
        heading: sorted(
            of(body) - known.get(heading, set()) - NOT_MEASURED.get((page, heading), set())
        )
        for heading, body in sections(text).items()
    }
    return {heading: numbers for heading, numbers in found.items() if numbers}


def known_of(page: str) -> dict[str, set[float]]:
    return recorded(FILES[page]) if page in FILES else {}


@pytest.mark.parametrize("page", PAGES)
def test_every_figure_is_in_a_file(page):
    """What fails here is new: write it, with what it is of, into the page's file."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert missing(page, text, known_of(page)) == {}, f"not in {FOLDER}"


@pytest.mark.parametrize("page", FILES)
def test_a_file_is_of_sections_that_the_page_has(page):
    report = json.loads(FILES[page].read_text(encoding="utf-8"))
    headings = sections((ROOT / page).read_text(encoding="utf-8"))
    assert report["gpu"] and report["how"] and report["date"].startswith("20")
    for section in report["sections"]:
        assert section["heading"] in headings, section["heading"]
        assert section["date"] and section["commit"], section["heading"]
        assert section.get("tables") or section.get("figures"), section["heading"]
        for table in section.get("tables", []):
            assert all(len(row) == len(table["columns"]) for row in table["rows"])


def test_no_exception_is_left_over():
    for page, heading in NOT_MEASURED:
        text = sections((ROOT / page).read_text(encoding="utf-8"))[heading]
        assert NOT_MEASURED[page, heading] <= measured(text), (page, heading)


@pytest.mark.parametrize("page", [page for page in FILES if "experiments" in page])
def test_a_changed_figure_is_found(page):
    """Each figure of a page in turn, with digits more."""
    text, known = (ROOT / page).read_text(encoding="utf-8"), known_of(page)
    for heading, body in sections(text).items():
        for line in body.splitlines():
            for number in figures(line):
                told = f"{number:g}"
                if line.count(told) == 1 and "." in told:
                    changed = line.replace(told, told + "137")
                    alone = f"# {heading}\n{body.replace(line, changed)}"
                    assert heading in missing(page, alone, known), line


def test_a_section_has_its_own_figures():
    page = "docs/experiments/plan.md"
    known = known_of(page)
    assert missing(page, "## Here\n\n| a | 388 / 382 |\n", known) == {"Here": [382, 388]}
    assert missing(page, "## Here\n\n| a | 388 / 382 |\n", {"Here": {388, 382}}) == {}


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("takes 12.5 us, or 3 us more", {12.5, 3}),
        ("0.98 to 1.06 of it, 64 x 8k in 377", {0.98, 1.06, 377}),
        ("`cache_fp8` D 128, H 32/8, 16-bit queries: 7.9 / 12.7", {7.9, 12.7}),
        ("on 2026-11-22 with Paddle 2.6.2 at 9474b72 ([17](a/18.md)): 5 %", {5, 17}),
        ("error 1.6e-3, c4k, n16k, e4m3, sm_90a, FA3", {1.6e-3}),
    ],
)
def test_figures_of_a_text(text, numbers):
    assert figures(text) == numbers


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("6 to 7 us, 13 and 41 s, 99.7 % of 12 tokens", {6, 7, 13, 41, 99.7}),
        ("0.1 to 0.6 % in 3 chunks; 6.2e-7 of it; Paddle 2.6 and 4 KB", {0.1, 0.6, 6.2e-7}),
        ("6788 passed, 346 skipped", set()),
        ("<!-- table: x -->\n| 5 us |\n<!-- end -->\n```\n6 us\n```\n`7 us`", set()),
    ],
)
def test_measured_figures_of_a_text(text, numbers):
    assert measured(text) == numbers


def test_the_demos_table_is_in_a_file():
    page = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    report = json.loads(FILES["docs/demo.md"].read_text(encoding="utf-8"))
    rows = next(s for s in report["sections"] if s["heading"] == "The table")["tables"][0]["rows"]
    block = page.partition("## The table")[2].split("```")[1].strip().splitlines()[2:]
    shown = [line.replace(" %", "").split() for line in block]
    assert [[name, *map(float, cells)] for name, *cells in shown] == rows
