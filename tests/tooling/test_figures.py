"""Every measured figure in README.md and docs/ has a source that its page names.

Tables between markers are written from the committed rows (``scripts/make_gpu_tables.py --check``).
A figure beside them is a number with a unit of time, rate or share, or an error. It is in a file of
``benchmarks/results`` that its section links to, or its section names the command that makes it, or
its paragraph (of an experiments page: the page's head) says when and on which GPU it was measured
once. On the pages of ``ROWS_ONLY`` a command is not enough.
"""

from __future__ import annotations

import json

import pytest

from tests.support import ROOT
from tests.support.figures import Figure, is_in, measured, rates, sections, without_source

PAGES = sorted(
    path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
)
RESULTS = ROOT / "benchmarks" / "results"
ROWS_ONLY = ("README.md", "docs/cache_types.md", "docs/gpu.md", "docs/measurements.md")
#: Page, section -> numbers that are rules, examples or bounds, and so not measured.
NOT_MEASURED = {
    ("docs/debugging.md", "Make calls again"): {"5e-6", "1e-4"},  # bounds
    ("docs/backends.md", "Upgrading a server in place"): {"1e-6"},  # the norm's epsilon
    ("docs/coming_from.md", "Unchanged calls: `fastattn.compat.flashinfer`"): {"1e-5"},  # a bound
    ("docs/formats.md", "2. Quantisation rules"): {"1e-10", "1e-6", "1e-4"},
    ("docs/host.md", "Host time"): {"100 us", "12 ms"},  # what some host time would be in a step
    ("docs/kernels/wgmma_q16.md", "Scheduling"): {"4 %"},  # a limit of the schedule
    ("docs/numerics.md", "Attention"): {"1e-6", "1.5e-8"},  # a floor; a polynomial's error
    ("docs/numerics.md", "Codes and scales"): {
        "1e-10", "1e-6", "5e-6", "1e-3", "2.5e-3", "5e-3", "1e-2",
    },  # floors, bounds
    ("docs/numerics.md", "Sparse latent attention"): {"1e-6", "5e-6", "1e-3", "2.5e-3", "5e-3"},
    ("docs/operators.md", "`paged_attention_dcp`"): {"1e-6"},  # a default
}  # fmt: skip
#: Sections that have to name their source yet.
UNNAMED = {
    ("docs/dcp.md", "Precision"),
    ("docs/demo.md", "The text, and what no training sees"),
    ("docs/demo.md", "What runs"),
    ("docs/numerics.md", "Batch invariance"),
    ("docs/numerics.md", "K and V of long sequences in bf16"),
    ("docs/numerics.md", "What `quantize_q` costs"),
}


@pytest.mark.parametrize("page", PAGES)
def test_every_figure_has_a_source(page):
    """What fails here is new: link to its rows, name its command, or say when it was measured."""
    found = without_source((ROOT / page).read_text(encoding="utf-8"), rows_only=page in ROWS_ONLY)
    lost = {
        heading: sorted(set(told) - NOT_MEASURED.get((page, heading), set()))
        for heading, told in found.items()
        if (page, heading) not in UNNAMED
    }
    assert {heading: told for heading, told in lost.items() if told} == {}


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/experiments/")])
def test_a_page_of_experiments_says_when_and_where(page):
    head = (ROOT / page).read_text(encoding="utf-8").partition("\n## ")[0]
    assert page.endswith("README.md") or ("Measured once, 2026-" in head and "H100" in head)


def test_a_file_beside_the_rows_is_used():
    """A page links to it, or a table is written from it; a copy of a page proves nothing."""
    pages = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    for path in (RESULTS / "experiments").glob("*.json"):
        used = f"benchmarks/results/experiments/{path.name})" in pages
        assert used or path.name == "demo.json", path.name


def test_the_demos_table_is_in_its_file():
    """The table of cache types has its perplexities from there."""
    page = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    report = json.loads((RESULTS / "experiments" / "demo.json").read_text(encoding="utf-8"))
    rows = next(s for s in report["sections"] if s["heading"] == "The table")["tables"][0]["rows"]
    block = page.partition("## The table")[2].split("```")[1].strip().splitlines()[2:]
    shown = [line.replace(" %", "").split() for line in block]
    assert [[name, *map(float, cells)] for name, *cells in shown] == rows


# --- the comparison can fail ----------------------------------------------------------------------

ROWS = "([rows](../benchmarks/results/h100-decode.json))"


@pytest.fixture(scope="module")
def told():
    """A time, a rate and a share of h100-decode.json, at three digits and more."""
    values = rates(RESULTS / "h100-decode.json")
    return f"{values['us'][0]:.2f} us, {values['GB/s'][0]:.1f} GB/s and {values['%'][0]:.2f} %"


def test_a_figure_of_the_rows_is_found(told):
    assert without_source(f"# A\n\nIt takes {told} {ROWS}.\n", rows_only=True) == {}


@pytest.mark.parametrize("unit", ["us", "GB/s", "%"])
def test_a_changed_figure_is_not(told, unit):
    number = told.partition(f" {unit}")[0].split()[-1]
    changed = f"{float(number) + 1e5:g}"
    page = f"# A\n\nIt takes {told.replace(number, changed, 1)} {ROWS}.\n"
    assert without_source(page, rows_only=True) == {"A": [f"{changed} {unit}"]}


def test_a_figure_without_a_link_is_not_found(told):
    assert len(without_source(f"# A\n\nIt takes {told}.\n\n## B\n\n{ROWS}\n")["A"]) == 3


def test_a_figure_counts_at_its_own_digits_and_in_its_own_unit():
    values = {"us": [375.22]}
    assert is_in(Figure("375", "us"), values) and is_in(Figure("375.2", "us"), values)
    assert not is_in(Figure("375.3", "us"), values) and not is_in(Figure("376", "us"), values)
    assert not is_in(Figure("375", "%"), values)


def test_a_mark_counts_for_its_paragraph():
    once = "It takes 5 us (measured once, 2026-11-22, H100)."
    assert without_source(f"# A\n\n## B\n\n{once}\n") == {}
    assert without_source(f"# A\n\n## B\n\n{once}\n\nOr 6 us.\n") == {"B": ["6 us"]}
    assert without_source("# A\n\n## B\n\nIt takes 5 us (measured once).\n") == {"B": ["5 us"]}


def test_a_mark_at_the_head_counts_for_the_page():
    head = "# A\n\nMeasured once, 2026-11-21 to 2026-11-22, H100 80GB HBM3.\n\n"
    assert without_source(f"{head}## B\n\nIt takes 5 us.\n") == {}


def test_a_command_counts_for_its_section():
    page = "# A\n\nIt takes 5 us.\n\n```bash\npython -m fastattn bench --op x\n```\n"
    assert without_source(page) == {} and without_source(page, rows_only=True) == {"A": ["5 us"]}


@pytest.mark.parametrize(
    ("text", "figures"),
    [
        ("6 to 7 us, 13 and 41 s, 99.7 % of 12 tokens", "6 us|7 us|13 s|41 s|99.7 %"),
        ("0.1 to 0.6 % in 3 chunks; 6.2e-7 of it; Paddle 2.6 and 4 KB", "0.1 %|0.6 %|6.2e-7"),
        ("6788 passed, 346 skipped", ""),
        ("<!-- table: x -->\n| 5 us |\n<!-- end -->\n```\n6 us\n```\n`7 us`", ""),
        ("| call, us | old | new |\n|---|---|---|\n| a 4 | 5 | 6.5 |\n", "5 us|6.5 us"),
        ("| call | us | of it |\n|---|---|---|\n| a | 5 | 7 |\n", "5 us"),
        ("| call | GB/s |\n|---|---|\n| 64 x 8k | 3004 |\n\n5 times\n", "3004 GB/s"),
    ],
)
def test_measured_figures_of_a_text(text, figures):
    assert "|".join(sorted(" ".join(f).strip() for f in measured(text))) == "|".join(
        sorted(figures.split("|"))
    )


def test_sections_keep_code_and_ignore_its_comments():
    page = "# A\n\none\n\n```bash\n# no heading\n```\n\n## B\n\ntwo\n"
    assert list(sections(page)) == ["A", "B"] and "# no heading" in sections(page)["A"]


def test_rows_have_the_units_of_their_rates(tmp_path):
    row = '{"us": 2.0, "peer_us": 4.0, "rate": 100.0, "unit": "TFLOP/s"}'
    (tmp_path / "a.json").write_text(f'{{"rows": [{row}]}}')
    found = rates(tmp_path / "a.json")
    assert found["us"] == [2.0, 4.0] and found["%"] == [200.0]
    assert found["TFLOP/s"] == [100.0, 50.0]


def test_files_of_tables_have_the_unit_of_their_head(tmp_path):
    table = '{"columns": ["call, us", "new"], "rows": [["a", 5.5]]}'
    (tmp_path / "a.json").write_text(f'{{"sections": [{{"tables": [{table}]}}]}}')
    assert rates(tmp_path / "a.json")["us"] == [5.5]
