"""What the command reports without a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


class CalibrationError(ValueError):
    """A file is not what the command expects, or nothing keeps the bound."""


@contextlib.contextmanager
def reading(path: Path, what: str = "cannot be read") -> Iterator[None]:
    """Turn whatever the parser of a file raises into a CalibrationError that names the file.

    NumPy, zipfile, its codecs, JSON and safetensors document no complete list of exceptions for
    damaged files, so only calls of these belong inside.
    """
    try:
        yield
    except CalibrationError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise CalibrationError(f"{path}: {what}: {reason}") from None
