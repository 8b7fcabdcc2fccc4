"""One table of cache types: Python's copy is what is compiled, and no kernel asks for a code."""

from __future__ import annotations

import re
import sys

import pytest

from tests.support import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import make_formats

CUSTOM_OPS = ROOT / "custom_ops"
SUFFIXES = (".h", ".cc", ".cu", ".cuh")
#: A code that stands for what its scales cover, and a list of types.
ASKS_FOR_A_CODE = re.compile(r"[=!]= DType::kE2M1\b|DType::kE2M1 [=!]=")
LISTS_TYPES = re.compile(r"CacheType::kBlockWise\w+")


def test_pythons_table_is_the_compiled_one():
    pytest.importorskip("fastattn._host")
    assert make_formats.TARGET.read_text(encoding="utf-8") == make_formats.text()


def test_another_table_is_found(monkeypatch, tmp_path):
    pytest.importorskip("fastattn._host")
    text = make_formats.text()
    assert '"block_wise_mxfp4", "e2m1", "e2m1", "e2m1", 4, 4, "group", 32, "ue8m0"' in text
    target = tmp_path / "_formats.py"
    monkeypatch.setattr(make_formats, "TARGET", target)
    monkeypatch.setattr(make_formats, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_formats.py", "--check"])
    target.write_text(text, encoding="utf-8")
    make_formats.main()
    target.write_text(text.replace("32", "16"), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"_formats\.py: run scripts/make_formats\.py"):
        make_formats.main()


def found(pattern: re.Pattern[str], text: str) -> list[str]:
    return pattern.findall(re.sub(r"//.*", "", text))


def test_what_scales_cover_comes_from_the_table():
    for path in sorted(CUSTOM_OPS.rglob("*")):
        if path.suffix not in SUFFIXES:
            continue
        text, name = path.read_text(encoding="utf-8"), path.relative_to(CUSTOM_OPS).as_posix()
        assert not found(ASKS_FOR_A_CODE, text), name
        if not name.startswith(("formats/", "cuda/compat/gqa_rope/")):
            assert not found(LISTS_TYPES, text), name


def test_such_a_test_is_found():
    assert found(ASKS_FOR_A_CODE, "x = kElement == DType::kE2M1;")
    assert found(LISTS_TYPES, "dispatch<CacheType::kBlockWiseInt4>(type)")
    assert not found(ASKS_FOR_A_CODE, "// kElement == DType::kE2M1\nElement<DType::kE2M1>")
