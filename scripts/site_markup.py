"""Markup of docstrings as the site shows it: reStructuredText becomes markdown (mkdocs.yml)."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_DIRECTIVE = re.compile(r"^\.\. math::(.*(?:\n(?:[ \t]+.*|[ \t]*)?)*)", re.M)


def _display(match: re.Match[str]) -> str:
    """A formula of a directive, whose text is indented."""
    lines = " ".join(textwrap.dedent(match[1]).split())
    formula = rf"\begin{{aligned}} {lines} \end{{aligned}}" if "&" in lines else lines
    return f"$$\n{formula}\n$$\n\n"


def markdown(text: str) -> str:
    """A docstring with its formulas, roles and references in markdown."""
    text = _DIRECTIVE.sub(_display, text)
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    text = re.sub(r":\w+:`~?([^`]*)`", lambda m: f"`{m[1].rpartition('.')[2]}`", text)
    text = re.sub(r"\[(\d+)\]_", r"[\1]", text)
    return re.sub(r"^\.\. (?=\[\d+\])", "", text, flags=re.M)


class Markup(griffe.Extension):
    """Changes docstrings when griffe has read them."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
