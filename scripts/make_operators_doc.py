#!/usr/bin/env python3
"""Write docs/operators.md from the signatures and docstrings of the operators.

scripts/make_operators_doc.py           # writes it
scripts/make_operators_doc.py --check   # status 1 when it is not what would be written
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

Written by `scripts/make_operators_doc.py` from the signatures and docstrings; `help(function)` has
the formulas, notes and examples as well. T is the number of new tokens of a step, B of rows
(sequences), H and KV of query and KV heads, D the head dimension. Row metadata is FastDeploy's and
lies on the tensors' device; nothing copies it to the host.

What holds for all of them:

- An argument that is wrong raises before any kernel starts. The message reads
  `operator: argument: expected ..., got ...`.
- Lengths, positions and block ids on the device are clamped or skipped, never followed out of a
  tensor. A block id outside `[0, num_blocks)` is an unassigned block.
- They do the same in dygraph, in `paddle.jit.to_static`, after `paddle.jit.save` and `load`, and in
  a CUDA graph. `paged_attention_dcp` and `cascade_attention` run in dygraph only.
- 8-bit codes are `uint8` tensors; where Paddle has `float8_e4m3fn`, `float8_e5m2` and `int8`
  tensors those are taken, too.

"""


def _sections(docstring: str) -> dict[str, str]:
    """Name -> text of a numpydoc docstring; the part before the first one is ``""``."""
    parts = re.split(r"^(\w[\w ]+)\n-{3,}\n", docstring, flags=re.M)
    return {"": parts[0], **{n: text for n, text in zip(parts[1::2], parts[2::2])}}


def _markdown(text: str) -> str:
    """A docstring's inline markup in markdown, as one line."""
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    text = re.sub(r":\w+:`~?([^`]*)`", lambda m: f"`{m[1].rpartition('.')[2]}`", text)
    text = re.sub(r"``([^`]*)``", r"`\1`", text)
    text = re.sub(r" \[\d+\]_", "", text)
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


def _signature(function: Callable[..., Any]) -> str:
    signature = inspect.signature(function)
    parts = [re.sub(r": .*?(?= = |$)", "", str(p)) for p in signature.parameters.values()]
    parts = [p.replace(" = ", "=") for p in parts]
    first = next(
        (i for i, p in enumerate(signature.parameters.values()) if p.kind is p.KEYWORD_ONLY), None
    )
    if first is not None:
        parts.insert(first, "*")
    lines, line = [], f"{function.__name__}("
    for i, part in enumerate(parts):
        text = part + (", " if i < len(parts) - 1 else ")")
        if len(line) + len(text) > 96:
            lines.append(line.rstrip())
            line = "    "
        line += text
    return "\n".join([*lines, line])


def _operator(function: Callable[..., Any]) -> str:
    sections = _sections(inspect.getdoc(function) or "")
    summary = sections[""].strip().split("\n\n")[0]
    lines = [f"## `{function.__name__}`", "", _markdown(summary), ""]
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
    lines += ["", "| raises | |", "|---|---|"]
    lines += [f"| {name} | {text} |" for name, _, text in _entries(sections["Raises"])]
    return "\n".join([*lines, "", ""])


def text() -> str:
    """The whole file."""
    import fastattn.functional as functional
    from fastattn import distributed

    parts = [INTRODUCTION]
    for title, module in (
        ("fastattn.functional", functional),
        ("fastattn.distributed", distributed),
    ):
        functions = [getattr(module, name) for name in module.__all__]
        links = ", ".join(f"[`{f.__name__}`](#{f.__name__})" for f in functions)
        parts.append(f"`{title}`: {links}\n\n")
    for module in (functional, distributed):
        parts += [_operator(getattr(module, name)) for name in module.__all__]
    return "".join(parts).rstrip() + "\n"


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
