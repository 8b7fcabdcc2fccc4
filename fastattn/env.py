"""Every environment variable that fastattn reads, in one place; docs/install.md has the build's.

=========================  ========================================================================
variable                   meaning
=========================  ========================================================================
``FASTATTN_LIBRARY``       load this compiled library instead of the one inside the package
``FASTATTN_CACHE``         folder of the demo's trained model, default ``~/.cache/fastattn``
``FASTATTN_LOG``           0 (default): no log; 1: the first call of every configuration; 2: every
                           call with all its inputs, before its kernel starts. Read at import.
``FASTATTN_BENCH_PEERS``   JSON with other libraries' times for ``bench`` (docs/benchmarks.md)
=========================  ========================================================================
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path


def library() -> str | None:
    """Path of a compiled library to load instead of the packaged one, or None."""
    return os.environ.get("FASTATTN_LIBRARY") or None


def cache_dir() -> Path:
    """Folder for files that may be made again, such as the demo's model."""
    override = os.environ.get("FASTATTN_CACHE")
    return Path(override) if override else Path.home() / ".cache" / "fastattn"


def log_level() -> int:
    """Log level, 0 to 2; any other value warns and counts as 0."""
    text = os.environ.get("FASTATTN_LOG") or "0"
    if text not in ("0", "1", "2"):
        warnings.warn(f"FASTATTN_LOG: expected 0, 1 or 2, got {text!r}", stacklevel=2)
        return 0
    return int(text)
