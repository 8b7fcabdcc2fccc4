#!/usr/bin/env python3
"""List kernels that access global memory before their wait for the previous kernel.

    scripts/check_waits.py LIBRARY.so [--cuobjdump PATH]

A kernel that is launched before the end of its predecessor must wait for its results
(griddepcontrol.wait, ACQBULK in SASS) before its first access. ptxas does not always keep that
order: it treats loads by `__ldg` as constant and may move them before the wait. The library may be
anything that scripts/compare_sass.py accepts. The status is 1 if a kernel does not keep the order,
and 2 if the library cannot be read.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import compare_sass

WAIT = re.compile(r"\bACQBULK\b")
#: Loads, stores and copies of global memory. CCTL only prefetches into L2, which is harmless.
ACCESS = re.compile(r"\b(LDG|LD|STG|ST|ATOM|ATOMG|RED|REDG|LDGSTS|UBLKCP|UTMALDG|UTMASTG)\b")
#: Kernels that run concurrently with their predecessor and use none of its results
#: (PdlBeginConcurrent).
CONCURRENT = ("MergePartialsKernel", "ClearPaddingKernel")


def early(stream: Sequence[str]) -> list[str]:
    """Accesses to global memory before a kernel's first wait; none if it does not wait."""
    waits = [i for i, instruction in enumerate(stream) if WAIT.search(instruction)]
    return [x for x in stream[: waits[0]] if ACCESS.search(x)] if waits else []


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("--cuobjdump", default=compare_sass.find_cuobjdump())
    options = parser.parse_args(arguments)
    try:
        kernels = compare_sass.read_kernels(options.cuobjdump, options.library)
    except compare_sass.CannotCompare as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    wrong = 0
    for kernel in kernels:
        found = early(kernel.stream)
        if found and not any(name in kernel.name for name in CONCURRENT):
            wrong += 1
            print(f"{kernel.name} ({kernel.arch}): {found[0].partition('/*')[0].strip()}")
    print(f"{len(kernels)} kernels, {wrong} that touch global memory ahead of their wait")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
