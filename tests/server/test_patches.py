"""Functions of FastDeploy are replaced only if their source is known, or accepted by name."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest

from fastattn._plugin.patches import PATCHES, Patch, source_hash

SOURCE = """
class Owner:
    def method(self, value):
        return value + 1
"""
#: The same code with comments, blank lines, and another indentation of the class.
COMMENTED = """
if True:
    class Owner:
        def method(self, value):
            # adds one

            return value + 1
            # no code follows
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """A module of FastDeploy with a class."""

    def make(text: str) -> ModuleType:
        path = tmp_path / f"owner_{len(list(tmp_path.iterdir()))}.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("owner_of_patch", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setitem(sys.modules, "owner_of_patch", module)
        return module

    return make


def patch_of(module: ModuleType, **options) -> Patch:
    found = {source_hash(module.Owner.method): "1.0"}
    options = {"sources": found, "parameters": ("self, value",), **options}
    return Patch("owner_of_patch:Owner.method", "why", "until", **options)


def doubled(function):
    return lambda self, value: 2 * function(self, value)


def test_a_known_source_is_replaced_once(load):
    module = load(SOURCE)
    patch = patch_of(module)
    for _ in range(2):
        patch.apply(doubled)
    assert module.Owner().method(3) == 8


def test_comments_and_indentation_do_not_change_a_source(load):
    one = source_hash(load(SOURCE).Owner.method)
    assert one == source_hash(load(COMMENTED).Owner.method)
    assert one != source_hash(load(SOURCE.replace("+ 1", "+ 2")).Owner.method)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SOURCE.replace("+ 1", "+ 2"), r"\(self, value\) has another source, with hash [0-9a-f]"),
        (SOURCE.replace("method", "other"), r"Owner\.method is missing, .*supported: [0-9a-f]+ \("),
        (SOURCE.replace("value", "x"), r"\(self, x\) has another source"),
    ],
)
def test_another_source_is_refused(load, text, message):
    patch = patch_of(load(SOURCE))
    module = load(text)
    with pytest.raises(NotImplementedError, match=message):
        patch.apply(doubled)
    assert not any(getattr(x, "fastattn", False) for x in vars(module.Owner).values())


def test_another_source_can_be_accepted_by_name(load, monkeypatch):
    patch = patch_of(load(SOURCE))
    changed = load(SOURCE.replace("+ 1", "+ 2"))
    with pytest.raises(NotImplementedError, match=r"add Owner\.method to FASTATTN_IGNORED"):
        patch.apply(doubled)
    monkeypatch.setenv("FASTATTN_IGNORED", "other, Owner.method")
    patch.apply(doubled)
    assert changed.Owner().method(3) == 10


def test_other_parameters_cannot_be_accepted(load, monkeypatch):
    patch = patch_of(load(SOURCE))
    load(SOURCE.replace("value", "x"))
    monkeypatch.setenv("FASTATTN_IGNORED", "Owner.method")
    with pytest.raises(NotImplementedError, match=r"\(self, x\) has another source") as error:
        patch.apply(doubled)
    assert "FASTATTN_IGNORED" not in str(error.value)


def test_a_source_that_is_right_stays(load):
    module = load(SOURCE)
    own = source_hash(module.Owner.method)
    patch_of(module, sources={"0" * 16: "0.9"}, right=(own,)).apply(doubled)
    assert module.Owner().method(3) == 4


def test_a_function_without_a_source_is_refused(load):
    patch = patch_of(load(SOURCE))
    space: dict = {}
    exec(SOURCE, space)
    sys.modules["owner_of_patch"].Owner = space["Owner"]
    with pytest.raises(NotImplementedError, match="with hash unknown"):
        patch.apply(doubled)


def test_the_table_of_sources():
    for patch in PATCHES:
        assert patch.sources
        assert all(len(x) == 16 and int(x, 16) for x in (*patch.sources, *patch.right))
