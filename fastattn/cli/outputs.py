"""Checks, before minutes of work, that a command can write its files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def problem_of_file(path: Path) -> str | None:
    """Reason why a file cannot be written, or None. The check does not change the file."""
    try:
        if path.is_dir():
            return "it is a folder"
        if not path.absolute().parent.is_dir():
            return "no such folder"
        there = os.path.lexists(path)
        # File modes are not sufficient: for root, for a folder mounted read-only, for /proc.
        with path.open("ab"):
            pass
        if not there:
            path.unlink()
    except (OSError, ValueError) as error:  # ValueError: a null character
        return str(getattr(error, "strerror", None) or error)
    return None


def problem_of_folder(path: Path) -> str | None:
    """Reason why no file can be written into a folder, or None."""
    try:
        if not path.is_dir():
            return "no such folder"
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, ValueError) as error:
        return str(getattr(error, "strerror", None) or error)
    return None
