"""Times of other libraries' kernels, which another program measured on the same machine.

Those libraries do not run in Paddle. The program's report is a JSON file ``{"rows": [..]}``, its
name is in the environment variable ``FASTATTN_BENCH_PEERS``. A row names its ``section`` and
``peer``, its shape, and its microseconds: as medians of replayed CUDA graphs, like those here.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any


@functools.lru_cache(maxsize=1)
def _rows() -> tuple[dict[str, Any], ...]:
    path = os.environ.get("FASTATTN_BENCH_PEERS")
    return tuple(json.loads(Path(path).read_text())["rows"]) if path else ()


def peers(section: str, **shape: object) -> list[dict[str, Any]]:
    """Rows of a section with these values of its fields; a field that a row lacks fits any."""
    return [
        row
        for row in _rows()
        if row["section"] == section
        and all(row.get(name, value) == value for name, value in shape.items())
    ]
