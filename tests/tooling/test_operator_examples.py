"""Every operator's docstring has an example, and the example runs."""

from __future__ import annotations

import doctest

import pytest

import fastattn.functional as F
from fastattn import distributed


@pytest.mark.parametrize("name", [*F.__all__, *distributed.__all__])
def test_the_example_gives_what_it_says(name):
    function = getattr(F, name, None) or getattr(distributed, name)
    (test,) = doctest.DocTestFinder(recurse=False).find(function, name, globs={})
    assert test.examples
    lines: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=lines.append)
    assert not lines, "".join(lines)
