#!/usr/bin/env python3
"""Write docs/operators.md from the signatures and docstrings of the operators.

scripts/make_operators_doc.py           # writes it
scripts/make_operators_doc.py --check   # status 1 if the file is out of date
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "operators.md"

INTRODUCTION = """# Operators

This page lists signatures, shapes and errors in alphabetical order. The
[README](../README.md#operators) lists the operators by subject. [cache_types.md](cache_types.md)
describes the cache types, and [glossary.md](glossary.md) the terms. `help(function)` also shows
notes and examples.

- T is the number of new tokens of a step, and B the number of sequences. H and KV are the numbers
  of query heads and KV heads, and D is the head dimension.
- The metadata of sequences has FastDeploy's names and is on the tensors' device. It is never copied
  to the host.

For all operators:

- A wrong argument raises before any kernel starts. The message reads
  `operator: argument: expected ..., got ...`. A wrong type or dtype raises `TypeError`, a wrong
  shape, place or value `ValueError`, and what is not supported `NotImplementedError`.
  `help(function)` has every condition of the first two.
- Wrong lengths, positions and block ids on the device are clamped, or their tokens are skipped. No
  access leaves a tensor. A block id outside `[0, num_blocks)` means an unassigned block.
- The operators work in dygraph, in `paddle.jit.to_static`, after `paddle.jit.save` and `load`, and
  in a CUDA graph. `cascade_attention` and the functions of `fastattn.distributed` work in dygraph
  only.
- Codes are `uint8` tensors. If Paddle has `float8_e4m3fn`, `float8_e5m2` and `int8` tensors, the
  operators also accept these for 8-bit codes.

"""

#: Errors that the introduction explains for all operators.
USUAL_ERRORS = ("TypeError", "ValueError")


def _sections(docstring: str) -> dict[str, str]:
    """Sections of a numpydoc docstring by name; the text before the first section is ``""``."""
    head, *rest = re.split(r"^(\w[\w ]+)\n-{3,}\n", docstring, flags=re.M)
    return {"": head, **dict(zip(rest[::2], rest[1::2]))}


def _markdown(text: str) -> str:
    """Inline markup of a docstring as markdown, in one line."""
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    text = re.sub(r":\w+:`~?([^`]*)`", lambda m: f"`{m[1].rpartition('.')[2]}`", text)
    text = re.sub(r"``([^`]*)``", r"`\1`", text)
    text = re.sub(r"\[(\d+)\]_", r"[\1]", text)
    return " ".join(text.split()).replace("|", "\\|")


def _entries(section: str) -> list[tuple[str, str, str]]:
    """(name, type, description) of Parameters, Returns or Raises."""
    found: list[tuple[str, str, list[str]]] = []
    for line in section.splitlines():
        if line and not line.startswith(" "):
            name, _, kind = line.partition(" : ")
            found.append((name, kind, []))
        elif found:
            found[-1][2].append(line.strip())
    return [(name, _markdown(kind), _markdown(" ".join(lines))) for name, kind, lines in found]


def _references(section: str) -> list[str]:
    """Entries of References, ``.. [1] ...``, as paragraphs."""
    entries = re.split(r"^\.\. (?=\[\d+\])", section, flags=re.M)[1:]
    return [re.sub(r"(https?://\S+)", r"<\1>", _markdown(entry)) for entry in entries]


def _signature(function: Callable[..., Any]) -> str:
    signature = inspect.signature(function)
    arguments = [re.sub(r": .*?(?= = |$)", "", str(p)) for p in signature.parameters.values()]
    arguments = [argument.replace(" = ", "=") for argument in arguments]
    first = next(
        (i for i, p in enumerate(signature.parameters.values()) if p.kind is p.KEYWORD_ONLY), None
    )
    if first is not None:
        arguments.insert(first, "*")
    lines, line = [], f"{function.__name__}("
    for i, argument in enumerate(arguments):
        text = argument + (", " if i < len(arguments) - 1 else ")")
        if len(line) + len(text) > 96:
            lines.append(line.rstrip())
            line = "    "
        line += text
    return "\n".join([*lines, line])


def _math(formula: str) -> str:
    """A display formula; aligned if the docstring has alignment marks."""
    lines = " ".join(formula.split())
    if "&" in lines:
        lines = rf"\begin{{aligned}} {lines} \end{{aligned}}"
    return f"$$\n{lines}\n$$"


def _description(text: str) -> list[str]:
    """Paragraphs, lists and formulas before a docstring's first section."""
    blocks: list[str] = []
    paragraphs = iter(re.split(r"\n\s*\n", text.strip("\n")))
    for paragraph in paragraphs:
        directive, is_math, formula = paragraph.partition(".. math::")
        if is_math and not directive.strip():
            blocks.append(_math(formula or next(paragraphs)))
        else:
            items = re.split(r"^(?=- |\d+\. )", paragraph.strip(), flags=re.M)
            blocks.append("\n".join(_markdown(item) for item in items if item))
    return blocks


def _operator(function: Callable[..., Any]) -> str:
    sections = _sections(inspect.getdoc(function) or "")
    lines = [f"## `{function.__name__}`", ""]
    for block in _description(sections[""]):
        lines += [block, ""]
    lines += [
        "```py",
        _signature(function),
        "```",
        "",
        "| argument | shape and type | |",
        "|---|---|---|",
    ]
    for name, kind, text in _entries(sections["Parameters"]):
        names = ", ".join(f"`{n}`" for n in name.split(", "))
        lines.append(f"| {names} | {kind.removeprefix('Tensor, ')} | {text} |")
    for name, kind, text in _entries(sections["Returns"]):
        label = f"**returns** `{name}`" if kind else "**returns**"
        lines.append(f"| {label} | {(kind or _markdown(name)).removeprefix('Tensor, ')} | {text} |")
    lines += [
        f"| **raises** {name} | | {text} |"
        for name, _, text in _entries(sections["Raises"])
        if name not in USUAL_ERRORS
    ]
    for reference in _references(sections.get("References", "")):
        lines += ["", reference]
    return "\n".join([*lines, "", ""])


def text() -> str:
    """Text of the whole file."""
    import fastattn.functional as functional
    from fastattn import distributed

    chapters = [INTRODUCTION]
    for title, module in (
        ("fastattn.functional", functional),
        ("fastattn.distributed", distributed),
    ):
        functions = [getattr(module, name) for name in module.__all__]
        links = ", ".join(f"[`{f.__name__}`](#{f.__name__})" for f in functions)
        chapters.append(f"`{title}`: {links}\n\n")
    for module in (functional, distributed):
        chapters += [_operator(getattr(module, name)) for name in module.__all__]
    return "".join(chapters).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    wanted = text()
    if arguments.check:
        same = TARGET.exists() and TARGET.read_text(encoding="utf-8") == wanted
        print(f"{TARGET}: {'as it should be' if same else 'out of date'}")
        return int(not same)
    TARGET.write_text(wanted, encoding="utf-8")
    print(f"wrote {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
