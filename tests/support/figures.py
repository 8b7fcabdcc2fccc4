"""Numbers of a page, and those that the files of ``benchmarks/results/experiments`` hold."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: What is no figure: generated tables, code, addresses of links, dates, versions, commits.
_NO_FIGURES = [
    re.compile(r"<!-- table: .*?<!-- end -->", re.S),
    re.compile(r"```.*?```", re.S),
    re.compile(r"`[^`\n]*`"),
    re.compile(r"\]\([^)]*\)"),
    re.compile(r"\b\d{4}-\d{2}-\d{2}\b"),
    re.compile(r"\b\d+\.\d+\.\d+\b"),
    re.compile(r"\b(?:Paddle|Python|CUDA|nvcc|ptxas|FastDeploy|vLLM) \d+\.\d+"),
]
#: Shapes that figures are of, and widths of types.
_SHAPES = re.compile(
    r"\b[BDHT] \d+(?: ?/ ?\d+)?(?: KV)?|\b\d+k?(?: x \d+k?)+\b|\b\d+k\b"
    r"|\b\d+(?:-bit| bits?\b|-byte)"
)
_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?(?![\w]|\.\d)")
#: What measurements are told in.
_MEASURED = re.compile(
    r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?"
    r"(?=(?:(?:,| to| and| or|-| /| beside) ?\d[\d.]*(?:e-\d+)?)* ?"
    r"(?:%|us\b|ms\b|s\b|GB/s|[GT]FLOP/s|minutes|seconds|tokens/s))"
    r"|(?<![\w.])\d+(?:\.\d+)?e-\d+"
)


def figures(text: str, shapes: bool = False) -> set[float]:
    """Numbers of a text that are no part of code, links, dates, versions and generated tables."""
    for pattern in _NO_FIGURES:
        text = pattern.sub(" ", text)
    if not shapes:
        text = _SHAPES.sub(" ", text)
    return {float(match[0]) for match in _NUMBER.finditer(text)}


def measured(text: str) -> set[float]:
    """Numbers of a text that stand before a unit of time, rate or share."""
    for pattern in _NO_FIGURES:
        text = pattern.sub(" ", text)
    return {float(match[0]) for match in _MEASURED.finditer(text)}


def sections(page: str) -> dict[str, str]:
    """Heading -> text below it; what stands above the first one is under the page's title."""
    found: dict[str, str] = {}
    heading = ""
    for line in _NO_FIGURES[1].sub("", page).splitlines():
        if match := re.match(r"#+ (.*)", line):
            heading = match[1]
            assert heading not in found, f"two sections: {heading}"
            found[heading] = ""
        else:
            found[heading] = found.get(heading, "") + line + "\n"
    return found


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (int, float)):
        yield float(value)
    elif isinstance(value, str):
        yield from figures(value, shapes=True)
    elif value is not None:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)


def recorded(path: Path) -> dict[str, set[float]]:
    """Heading -> numbers that a file has for that section of its page."""
    report = json.loads(path.read_text(encoding="utf-8"))
    return {
        section["heading"]: set(_numbers([section.get("tables", []), section.get("figures", [])]))
        for section in report["sections"]
    }
