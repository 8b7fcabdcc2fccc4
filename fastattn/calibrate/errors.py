"""Errors that the command reports without a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


class CalibrationError(ValueError):
    """A file is not as the command expects, or no candidate is within the bound."""


@contextlib.contextmanager
def reading(path: Path, what: str = "cannot be read") -> Iterator[None]:
    """Turn any exception of a file parser into a CalibrationError that names the file.

    NumPy, zipfile and its codecs, JSON and safetensors do not document all exceptions for damaged
    files. Only calls of these parsers belong in this context.
    """
    try:
        yield
    except CalibrationError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise CalibrationError(f"{path}: {what}: {reason}") from None
