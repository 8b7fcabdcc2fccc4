"""Every environment variable that fastattn reads, in one place; docs/install.md has the build's.

=====================  ==========================================================================
variable               meaning
=====================  ==========================================================================
``FASTATTN_LIBRARY``   load this compiled library instead of the one inside the package
``FASTATTN_CACHE``     folder of the demo's trained model, default ``~/.cache/fastattn``
=====================  ==========================================================================
"""

from __future__ import annotations

import os
from pathlib import Path


def library() -> str | None:
    """Path of a compiled library to load instead of the packaged one, or None."""
    return os.environ.get("FASTATTN_LIBRARY") or None


def cache_dir() -> Path:
    """Folder for files that may be made again, such as the demo's model."""
    override = os.environ.get("FASTATTN_CACHE")
    return Path(override) if override else Path.home() / ".cache" / "fastattn"
