#!/usr/bin/env python3
"""Coverage of lines and branches in the C++ sources, from gcov's counters; lists the misses.

python scripts/gcov_totals.py OBJECTS SOURCES [--missed FILE]

The instances of a template count together: a branch counts as taken if any of them took it.
Branches to exception handlers do not count.
"""

from __future__ import annotations

import argparse
import collections
import json
import subprocess
from pathlib import Path


def read(objects: Path, sources: Path):
    """Counts by (file, line), and by (file, line, branch), over all object files."""
    lines: collections.Counter = collections.Counter()
    branches: collections.Counter = collections.Counter()
    for counters in sorted(objects.rglob("*.gcno")):
        gcov = ["gcov", "--branch-probabilities", "--json-format", "--stdout"]
        done = subprocess.run(
            [*gcov, str(counters.resolve())],
            cwd=sources,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=True,
        )
        for file in json.loads(done.stdout)["files"]:
            if file["file"].startswith("/"):  # of the compiler or of Paddle
                continue
            for line in file["lines"]:
                at = (file["file"], line["line_number"])
                lines[at] += line["count"]
                taken = [b["count"] for b in line["branches"] if not b["throw"]]
                for i, count in enumerate(taken):
                    branches[(*at, i)] += count
    return lines, branches


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("objects", type=Path)
    parser.add_argument("sources", type=Path)
    parser.add_argument("--missed", type=Path)
    options = parser.parse_args()
    lines, branches = read(options.objects, options.sources)
    for kind, counts in (("lines", lines), ("branches", branches)):
        ran = sum(count > 0 for count in counts.values())
        print(f"{kind}: {ran / len(counts):.2%} ({ran} of {len(counts)})")
    if options.missed:
        places = {at[:2] for at, count in [*lines.items(), *branches.items()] if count == 0}
        options.missed.write_text("".join(f"{f}:{n}\n" for f, n in sorted(places)))


if __name__ == "__main__":
    main()
