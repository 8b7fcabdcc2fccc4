"""docs/support.md is what the code and the log of runs say."""

from __future__ import annotations

import re
import runpy

import pytest

from tests.support import ROOT

MAKE = runpy.run_path(str(ROOT / "scripts" / "make_support_doc.py"))
PAGE = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
RUNS = (ROOT / "docs" / "test_runs.md").read_text(encoding="utf-8")
LOG = """# Test runs

## The whole suite

| commit | GPU | passed | skipped | failed | s | why tests failed |
|---|---|---|---|---|---|---|
| ccccccc | H100 | 30 | 1 | 2 | 1 | a fault |
| bbbbbbb | H200 | 25 | 1 | 1 | 1 | another |
| aaaaaaa | H100 | 20 | 1 | 0 | 1 | |
| 9999999 | H100 | | | 26 | | no count |
| 8888888 | H200 | 10 | 1 | 3 | 1 | |

## Parts of the suite

| 7777777 | H100 | a part | 1 | 1 | 0 |
"""


def test_the_page_is_up_to_date(monkeypatch):
    pytest.importorskip("fastattn._host")
    for name in ("FASTATTN_DEQUANTIZED_MIB", "FASTATTN_DEQUANTIZED_FROM"):
        monkeypatch.delenv(name, raising=False)
    assert MAKE["text"]() == PAGE, "run scripts/make_support_doc.py"


def test_runs_are_read_from_the_log():
    runs = MAKE["whole_runs"](LOG)
    assert [run.commit for run in runs] == ["ccccccc", "bbbbbbb", "aaaaaaa", "8888888"]
    assert MAKE["last_run"](runs, "H100").commit == "aaaaaaa"  # the newest without a failure
    assert MAKE["last_run"](runs, "H200").commit == "bbbbbbb"  # none is without
    assert MAKE["whole_runs"](RUNS)


def test_the_page_claims_no_run_that_the_log_does_not_have():
    whole = RUNS.partition("## The whole suite")[2].partition("\n## ")[0]
    for commit in set(re.findall(r"\b(?=\w*\d)[0-9a-f]{7}\b", PAGE)):
        assert f"| {commit} | H" in whole
    never = PAGE.partition("### sm_80")[2].partition("\n## ")[0]
    rows = [line for line in never.splitlines() if line.startswith("| `")]
    assert len(rows) > 1
    assert all(row.endswith("| compiled, never run |") for row in rows[1:])


def test_what_a_run_did_not_have_is_told():
    run = MAKE["Run"]("6fb5f88", "H200", "1", "0")
    assert MAKE["ran"](run, "block_wise_mxfp4") == "never in a whole run"
    assert MAKE["ran"](run, "block_wise_int4") == "6fb5f88, without 192"
    assert MAKE["ran"](run, "cache_fp8") == "6fb5f88"
    assert "`block_wise_mxfp4` came in after 6fb5f88" in RUNS
