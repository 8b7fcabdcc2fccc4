#!/usr/bin/env python3
"""Compare the machine code of the kernels of two builds.

    scripts/compare_sass.py A.so B.so [--cuobjdump PATH]

The inputs are libraries, objects or cubins that cuobjdump can read, or files `*.sass` with the
output of `cuobjdump -sass`, which save most of the time of a later comparison. Names, source files
and instruction addresses are ignored. Two kernels are equal if both have the same instructions with
the same encodings for the same architecture; the encodings include the scheduling. Branch targets
are relative to the start of the kernel, so they are compared. Operands that name a symbol are
compared without the name.

Kernels without an equal are paired by name, or by the common words of their demangled names. The
first differing instruction of each pair is shown. The status is 0 if all kernels are equal, 1 if
any differs or occurs in only one build, and 2 if the builds could not be compared.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

#: Kernels with less similar names are not shown as one changed kernel.
LEAST_SIMILARITY = 0.6

INSTRUCTION = re.compile(rb"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;?\s*(/\* 0x[0-9a-f]+ \*/)?\s*$")
ENCODING = re.compile(rb"\s*(/\* 0x[0-9a-f]+ \*/)\s*$")
#: `(name) as in a call, and 32@lo((name + label@srel)) as in a move. The linker fills in the bits.
SYMBOL = re.compile(rb"`\([^()]*(?:\([^()]*\)[^()]*)*\)|\b\d+@\w+\((?:[^()]|\([^()]*\))*\)")


class CannotCompare(Exception):
    """A build that has no kernels, or that cuobjdump cannot read."""


@dataclasses.dataclass
class Kernel:
    """Instructions of one function for one architecture."""

    name: str
    arch: str
    count: int
    digest: bytes
    # the compressed stream, because the streams of a large library would fill the memory
    compressed: bytes

    @property
    def stream(self) -> list[str]:
        """The instructions in the form that is compared."""
        return zlib.decompress(self.compressed).decode(errors="replace").splitlines()


def normalise(text: bytes, encodings: list[bytes]) -> bytes:
    """One instruction without its address, and without its encoding if a symbol is part of it."""
    without = SYMBOL.sub(b"<symbol>", text)
    if without != text:
        return without
    return b" ".join([text, *encodings])


def make_kernel(name: str, arch: str, instructions: list[tuple[bytes, list[bytes]]]) -> Kernel:
    stream = b"\n".join(normalise(*instruction) for instruction in instructions)
    digest = hashlib.sha256(arch.encode() + b"\n" + stream).digest()
    return Kernel(name, arch, len(instructions), digest, zlib.compress(stream, 1))


def parse(lines: Iterable[bytes]) -> Iterator[Kernel]:
    """Kernels in the output of ``cuobjdump -sass``."""
    name, arch = "", "?"
    instructions: list[tuple[bytes, list[bytes]]] = []
    for line in lines:
        if b"/*" in line:
            if match := ENCODING.match(line):
                if instructions:
                    instructions[-1][1].append(match[1])
            elif name and (match := INSTRUCTION.match(line)):
                instructions.append((match[1], [match[2]] if match[2] else []))
        elif b"Function : " in line or b"code for sm_" in line:
            if name:
                yield make_kernel(name, arch, instructions)
            name, instructions = "", []
            if b"Function : " in line:
                name = line.partition(b"Function : ")[2].strip().decode(errors="replace")
            else:
                arch = line.split()[-1].decode()
    if name:
        yield make_kernel(name, arch, instructions)


def drain(pipe: IO[bytes], into: list[bytes]) -> threading.Thread:
    """Read a pipe in a thread, so that the process never waits for a reader of its errors."""
    thread = threading.Thread(target=lambda: into.append(pipe.read()), daemon=True)
    thread.start()
    return thread


def read_kernels(cuobjdump: str | None, path: Path) -> list[Kernel]:
    """Kernels of a build, disassembled."""
    if not path.is_file():
        raise CannotCompare(f"{path}: no such file")
    if path.suffix == ".sass":
        with path.open("rb") as lines:
            return checked(path, list(parse(lines)))
    if cuobjdump is None:
        raise CannotCompare("no cuobjdump: set CUDA_HOME, PATH or --cuobjdump")
    errors: list[bytes] = []
    with subprocess.Popen(
        [cuobjdump, "-sass", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        reader = drain(process.stderr, errors)
        kernels = list(parse(process.stdout))
        reader.join()
    if process.returncode != 0:
        text = b"".join(errors).decode(errors="replace").strip()
        raise CannotCompare(f"{path}: cuobjdump ended with status {process.returncode}: {text}")
    return checked(path, kernels)


def checked(path: Path, kernels: list[Kernel]) -> list[Kernel]:
    """The kernels of a build, after a check that there are some and that each has instructions."""
    if empty := [kernel.name for kernel in kernels if kernel.count == 0]:
        raise CannotCompare(f"{path}: no instructions were found in {empty[0]}")
    if not kernels:
        raise CannotCompare(f"{path}: no kernels")
    return kernels


def by_digest(kernels: Iterable[Kernel]) -> dict[tuple[str, bytes], list[Kernel]]:
    groups: dict[tuple[str, bytes], list[Kernel]] = collections.defaultdict(list)
    for kernel in kernels:
        groups[kernel.arch, kernel.digest].append(kernel)
    return groups


def without_equals(a: list[Kernel], b: list[Kernel]) -> tuple[list[Kernel], list[Kernel], int]:
    """The kernels of both builds after equal ones are removed in pairs, preferably of the same
    name.

    Also returns the number of pairs with different names.
    """
    left_a: list[Kernel] = []
    left_b: list[Kernel] = []
    renamed = 0
    groups_a, groups_b = by_digest(a), by_digest(b)
    for key in {**groups_a, **groups_b}:
        ours, theirs = groups_a.get(key, []), groups_b.get(key, [])
        same = collections.Counter(k.name for k in ours) & collections.Counter(
            k.name for k in theirs
        )
        rest_a, rest_b = _without_names(ours, same), _without_names(theirs, same)
        pairs = min(len(rest_a), len(rest_b))
        renamed += pairs
        left_a += rest_a[pairs:]
        left_b += rest_b[pairs:]
    return left_a, left_b, renamed


def _without_names(kernels: list[Kernel], names: collections.Counter[str]) -> list[Kernel]:
    budget, left = collections.Counter(names), []
    for kernel in kernels:
        if budget[kernel.name]:
            budget[kernel.name] -= 1
        else:
            left.append(kernel)
    return left


def demangle(names: Iterable[str]) -> dict[str, str]:
    """Names as in the source, by c++filt; unchanged if c++filt is missing."""
    mangled = sorted(set(names))
    filt = shutil.which("cu++filt") or shutil.which("c++filt")
    if filt and mangled:
        done = subprocess.run([filt], input="\n".join(mangled), capture_output=True, text=True)
        plain = done.stdout.splitlines()
        if done.returncode == 0 and len(plain) == len(mangled):
            return dict(zip(mangled, plain))
    return {name: name for name in mangled}


def similarity(a: collections.Counter[str], b: collections.Counter[str]) -> float:
    """Fraction of the words of two names that both have, 0 to 1."""
    return 2 * sum((a & b).values()) / max(1, sum(a.values()) + sum(b.values()))


def pair(
    a: list[Kernel], b: list[Kernel], plain: dict[str, str]
) -> tuple[list[tuple[Kernel, Kernel]], list[Kernel], list[Kernel]]:
    """Pairs of kernels that are probably the same, and each side's kernels without a partner."""
    words = {
        kernel.name: collections.Counter(re.findall(r"[A-Za-z_]+|\d+", plain[kernel.name]))
        for kernel in (*a, *b)
    }
    candidates = sorted(
        (
            (x.name != y.name, -similarity(words[x.name], words[y.name]), abs(x.count - y.count)),
            i,
            j,
        )
        for (i, x), (j, y) in itertools.product(enumerate(a), enumerate(b))
        if x.arch == y.arch
    )
    pairs, used_a, used_b = [], set(), set()
    for (renamed, negative, _), i, j in candidates:
        if i in used_a or j in used_b or (renamed and -negative < LEAST_SIMILARITY):
            continue
        used_a.add(i)
        used_b.add(j)
        pairs.append((a[i], b[j]))
    return (
        pairs,
        [kernel for i, kernel in enumerate(a) if i not in used_a],
        [kernel for j, kernel in enumerate(b) if j not in used_b],
    )


def first_difference(a: Kernel, b: Kernel) -> str:
    for index, (x, y) in enumerate(itertools.zip_longest(a.stream, b.stream)):
        if x != y:
            return f"instruction {index}:\n      A: {x or 'none'}\n      B: {y or 'none'}"
    raise AssertionError("equal kernels were paired as different ones")


def report(a: list[Kernel], b: list[Kernel]) -> int:
    """Print the differences; return the exit status."""
    left_a, left_b, renamed = without_equals(a, b)
    plain = demangle(kernel.name for kernel in (*left_a, *left_b))
    pairs, only_a, only_b = pair(left_a, left_b, plain)
    for label, kernels in (("A", a), ("B", b)):
        instructions = sum(kernel.count for kernel in kernels)
        archs = ", ".join(sorted({kernel.arch for kernel in kernels}))
        print(f"{label}: {len(kernels)} kernels for {archs}, {instructions} instructions")
    same = len(a) - len(left_a)
    print(f"the same: {same}" + (f", {renamed} of them by another name" if renamed else ""))
    if pairs:
        print(f"different: {len(pairs)}")
    for x, y in pairs:
        print(f"  {plain[x.name]} ({x.arch})")
        if x.name != y.name:
            print(f"    B: {plain[y.name]}")
        print(f"    {x.count} and {y.count} instructions; {first_difference(x, y)}")
    for label, kernels in (("A", only_a), ("B", only_b)):
        if kernels:
            print(f"only in {label}: {len(kernels)}")
        for kernel in kernels:
            print(f"  {plain[kernel.name]} ({kernel.arch}), {kernel.count} instructions")
    return 1 if left_a or left_b else 0


def find_cuobjdump() -> str | None:
    """Path of cuobjdump, from PATH or from CUDA_HOME, CUDA_PATH or /usr/local/cuda."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [str(Path(home) / "bin") for home in homes if home]
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(folders))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("a", type=Path, metavar="A", help="library, object or cubin")
    parser.add_argument("b", type=Path, metavar="B", help="the one to compare it with")
    parser.add_argument("--cuobjdump", default=find_cuobjdump(), help="the program to use")
    arguments = parser.parse_args(argv)
    try:
        with ThreadPoolExecutor(2) as pool:
            read = [
                pool.submit(read_kernels, arguments.cuobjdump, path)
                for path in (arguments.a, arguments.b)
            ]
            a, b = (future.result() for future in read)
    except (CannotCompare, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return report(a, b)


if __name__ == "__main__":
    sys.exit(main())
