"""Files that a command writes after minutes of work: whether it may is found out before."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def problem_of_file(path: Path) -> str | None:
    """Why a file cannot be written, or None. It stays as it is, also where there is none."""
    try:
        if path.is_dir():
            return "it is a folder"
        if not path.absolute().parent.is_dir():
            return "no such folder"
        there = os.path.lexists(path)
        # Modes do not tell: of root, of a folder that is mounted read-only, of /proc.
        with path.open("ab"):
            pass
        if not there:
            path.unlink()
    except (OSError, ValueError) as error:  # ValueError: a null character
        return str(getattr(error, "strerror", None) or error)
    return None


def problem_of_folder(path: Path) -> str | None:
    """Why no file can be written into a folder, or None."""
    try:
        if not path.is_dir():
            return "no such folder"
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, ValueError) as error:
        return str(getattr(error, "strerror", None) or error)
    return None
