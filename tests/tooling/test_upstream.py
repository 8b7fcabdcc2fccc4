"""Changes that docs/upstream/ proposes: each has a page, and is a change that git reads."""

from __future__ import annotations

import subprocess

import pytest

from tests.support import ROOT

DIFFS = sorted((ROOT / "docs" / "upstream").glob("*.diff"))


def test_there_are_changes():
    assert len(DIFFS) >= 2


@pytest.mark.parametrize("diff", DIFFS, ids=lambda path: path.stem)
def test_a_change_has_a_page(diff):
    page = diff.with_suffix(".md")
    assert f"]({diff.name})" in page.read_text(encoding="utf-8")
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert f"- upstream/{page.name}\n" in nav


@pytest.mark.parametrize("diff", DIFFS, ids=lambda path: path.stem)
def test_git_reads_a_change(diff):
    command = ["git", "apply", "--numstat", str(diff)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        added, removed, file = line.split("\t")
        assert file.startswith("fastdeploy/") and int(added) > int(removed)
