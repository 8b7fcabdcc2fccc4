"""``python -m fastattn bench``: the benchmarks of the source tree, which no wheel contains."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import fastattn

_ABSENT = (
    "fastattn bench: benchmarks come with the source tree, and {folder} has none: run "
    "`python -m fastattn bench` in the root of a git checkout or of an unpacked sdist, after "
    "`python setup_ops.py build_ext --inplace`"
)


def add_parser(subparsers: Any) -> None:
    """Add the ``bench`` subcommand, from the folder ``benchmarks`` beside the package.

    Raises
    ------
    SystemExit
        If there is none, with the line that says where benchmarks are.
    """
    root = Path(fastattn.__file__).resolve().parents[1]
    if not (root / "benchmarks" / "cli.py").is_file():
        raise SystemExit(_ABSENT.format(folder=root))
    if sys.path[0] != str(root):  # first: other projects have a folder of this name
        sys.path.insert(0, str(root))
    importlib.import_module("benchmarks.cli").add_parser(subparsers)
