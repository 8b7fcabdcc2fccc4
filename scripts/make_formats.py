#!/usr/bin/env python3
"""Write the rows of fastattn/_formats.py, Python's copy of the table of cache types.

    python scripts/make_formats.py [--check]

The table is `custom_ops/formats/cache_format.h`. It is read from `fastattn._host`, so build first.
`--check` writes nothing and fails where the file differs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TARGET = ROOT / "fastattn" / "_formats.py"
FIRST = "FORMATS = (\n"
CODES = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}


def text() -> str:
    """What the file has to be."""
    from fastattn import _host

    rows = []
    for row in _host.cache_formats():
        cells = [f'"{CODES.get(x, x)}"' if isinstance(x, str) else str(x) for x in row]
        rows.append(f"    CacheFormat({', '.join(cells)}),\n")
    head = TARGET.read_text(encoding="utf-8").partition(FIRST)[0]
    return f"{head}{FIRST}{''.join(rows)})\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail where the file differs")
    wanted = text()
    if parser.parse_args().check:
        if TARGET.read_text(encoding="utf-8") != wanted:
            sys.exit(f"error: {TARGET.relative_to(ROOT)}: run scripts/make_formats.py")
        return
    TARGET.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
