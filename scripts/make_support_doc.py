#!/usr/bin/env python3
"""Write docs/support.md: what runs where, by which kernel, and when it last ran there.

scripts/make_support_doc.py           # writes it
scripts/make_support_doc.py --check   # status 1 if the file is out of date

The kernels come from the functions that the operators ask (fastattn._plan), the cache types from
fastattn._formats, and the runs from docs/test_runs.md. No GPU is needed.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
TARGET = ROOT / "docs" / "support.md"
RUNS = ROOT / "docs" / "test_runs.md"

#: Architectures that are compiled, with the major number that the choice of kernels depends on.
NEVER_RUN = {"sm_80": 8, "sm_86": 8, "sm_89": 8, "sm_100a": 10, "sm_120a": 12}
#: What the code of a whole run did not have yet: (cache type, head dimension or None for all).
#: `git show COMMIT:custom_ops/common/head_dims.h` and docs/test_runs.md tell it.
_TWO_CODES = {("block_wise_k8v4", None), ("block_wise_kfp8v4", None)}
ABSENT = {
    "ec09a29": _TWO_CODES,
    "6fb5f88": {("block_wise_mxfp4", None), ("block_wise_int4", 192), *_TWO_CODES},
}
SHORT = {"mma_sm80": "mma", "wgmma_q16": "q16", "wgmma_fp8": "fp8", "dequantize_kv": "dq"}

INTRODUCTION = """# What runs where

This page says which kernel serves which cache type, head dimension and GPU, and when it last ran
there. `scripts/make_support_doc.py` writes it from the code and from [test_runs.md](test_runs.md).
What each cache type needs and costs: [cache_types.md](cache_types.md).
"""

CPU = """## CPU

Every operator, cache type and head dimension of this page has a CPU kernel. `.ci/run` runs its
tests with every change, under Paddle 3.3.1. The other versions of Paddle and Python that are
tested: [install.md](install.md#what-is-needed).
"""

LEGEND = """A cell has the kernel of decode and short sequences, then of long ones. `mma` is
[mma_sm80](kernels/mma_sm80.md), `q16` and `fp8` are [wgmma_q16](kernels/wgmma_q16.md) and
[wgmma_fp8](kernels/wgmma_fp8.md), and `dq` [dequantises K and V once](kernels/dequantize_kv.md)
first. The calls that were asked: 64 sequences of 8k keys with one new token each, and 4 sequences
of 4k new tokens, with 32 heads over 8. `python -m fastattn explain` asks for other sizes. A `mma`
after `dq + q16` takes the sequences for which there is no room in 16 bits. Heads of 192 channels
have values of 128, and no backend takes them.
"""


class Run(NamedTuple):
    """A row of "The whole suite" in docs/test_runs.md."""

    commit: str
    gpu: str
    passed: str
    failed: str

    def __str__(self) -> str:
        return f"{self.commit}: {self.passed} passed, {self.failed} failed"


def whole_runs(text: str) -> list[Run]:
    """Whole runs with counts, newest first."""
    section = text.partition("## The whole suite")[2].partition("\n## ")[0]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in section.splitlines()]
    found = [Run(r[0], r[1], r[2], r[4]) for r in rows if re.fullmatch("[0-9a-f]{7}", r[0])]
    return [run for run in found if run.passed.isdigit() and run.failed.isdigit()]


def last_run(runs: list[Run], gpu: str) -> Run:
    """Newest whole run of a GPU without a failure, or else the newest one."""
    of_gpu = [run for run in runs if run.gpu == gpu]
    return next((run for run in of_gpu if run.failed == "0"), of_gpu[0])


def kernels(cache_type: str, q_dtype: str, head_dim: int, major: int) -> str:
    """Kernels of a decode call and of a prefill call, ``mma / fp16``."""
    from fastattn import _plan

    device = _plan.Device("gpu", major, 132)
    key = _plan.key_dtype(cache_type, q_dtype, "e4m3")
    found = []
    for seqs, new, keys in ((64, 1, 8192), (4, 4096, 4096)):
        call = _plan.AttentionCall(
            "paged_attention",
            q_dtype,
            key,
            cache_type,
            seqs * new,
            seqs,
            32,
            8,
            head_dim,
            new,
            keys,
        )
        names = [SHORT[n] for n in _plan.decision(call, device)["kernels"] if n in SHORT]
        found.append(" + ".join(names))
    return " / ".join(found)


def rows(major: int) -> list[tuple[str, str, list[str]]]:
    """(cache type, queries, a cell for each head dimension); equal query types share a row."""
    from fastattn._formats import FORMATS
    from fastattn.functional._cache_types import HEAD_DIMS

    found: list[tuple[str, str, list[str]]] = []
    for row in FORMATS:
        by_cells: dict[tuple[str, ...], list[str]] = {}
        # A cache of 16 bits has queries of its own type.
        types = ("bfloat16", "float16", *(["float8_e4m3fn"] if row.name != "none" else []))
        for q in types:
            cells = tuple(kernels(row.name, q, dim, major) for dim in HEAD_DIMS)
            name = {"bfloat16": "bf16", "float16": "fp16"}.get(q, "e4m3")
            by_cells.setdefault(cells, []).append(name)
        found += [(row.name, ", ".join(names), list(cells)) for cells, names in by_cells.items()]
    return found


def ran(run: Run, cache_type: str) -> str:
    """Commit of the last run, with what it did not have of a cache type."""
    absent = [dim for name, dim in ABSENT.get(run.commit, ()) if name == cache_type]
    if None in absent:
        return "never in a whole run"
    but = ", ".join(map(str, absent))
    return run.commit + (f", without {but}" if but else "")


def table(header: list[str], lines: list[list[str]]) -> str:
    """A table in markdown."""
    every = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in every) + "\n"


def gpu_table(runs: dict[str, Run]) -> str:
    """The GPUs and their newest runs."""
    lines = []
    for gpu, run in runs.items():
        state = "last whole run without a failure" if run.failed == "0" else "last whole run"
        lines.append([gpu, "sm_90a", f"{state}: {run}"])
    never = [["none", ", ".join(NEVER_RUN), "compiled, never run"]]
    return table(["GPU", "architecture", "the suite's CUDA tests"], lines + never)


def attention(runs: dict[str, Run]) -> str:
    """The tables of kernels."""
    from fastattn.functional._cache_types import HEAD_DIMS

    header = ["`cache_quant_type`", "queries", *map(str, HEAD_DIMS)]
    hopper = [
        [f"`{name}`", queries, *cells, *(ran(run, name) for run in runs.values())]
        for name, queries, cells in rows(9)
    ]
    others = {tuple(map(str, rows(major))) for major in NEVER_RUN.values()}
    if len(others) != 1:
        raise ValueError("the GPUs that never ran take different kernels: give each a table")
    rest = [[f"`{n}`", q, *cells, "compiled, never run"] for n, q, cells in rows(8)]
    return "\n".join(
        [
            "## Attention over a paged cache\n",
            LEGEND,
            "### Hopper (sm_90a): H100, H200\n",
            table([*header, *(f"last run on {gpu}" for gpu in runs)], hopper),
            f"### {', '.join(NEVER_RUN)}\n",
            table([*header, "last run"], rest),
        ]
    )


def latent() -> str:
    """The other families."""
    source = (ROOT / "custom_ops" / "params" / "mla_cache.h").read_text(encoding="utf-8")
    formats = re.findall(r'return "((?:bf16|fp8)\w*)";', source)
    return f"""## Latent attention, indexer and the rest

Latent caches are {", ".join(f"`{name}`" for name in formats)}. Each is attended on the CPU, on
Hopper and, by a portable kernel, on every other architecture of this page. Each other operator has
one kernel family for all GPUs; latent attention and the indexer's logits have Hopper kernels
besides ([dense](kernels/mla_attention.md), [sparse](kernels/mla_sparse_attention.md),
[logits](kernels/mqa_logits.md)). They ran where attention ran: the whole suite has their tests.
"""


def text() -> str:
    """Text of the whole file."""
    log = RUNS.read_text(encoding="utf-8")
    found = whole_runs(log)
    runs = {gpu: last_run(found, gpu) for gpu in ("H100", "H200")}
    paddle = re.findall(r"paddlepaddle-gpu (\d[\d.]*\d)", log)[0]
    return "\n".join(
        [
            INTRODUCTION,
            "## GPUs\n",
            gpu_table(runs),
            f"All GPU runs were under paddlepaddle-gpu {paddle}. Other CUDA builds of Paddle have "
            'run nothing on\na GPU. "Compiled, never run" means that nvcc accepts the kernels, and '
            "nothing more.\n",
            CPU,
            attention(runs),
            latent().rstrip(),
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    wanted = text()
    if arguments.check:
        same = TARGET.exists() and TARGET.read_text(encoding="utf-8") == wanted
        print(f"{TARGET}: {'as it should be' if same else 'out of date'}")
        return int(not same)
    TARGET.write_text(wanted, encoding="utf-8")
    print(f"wrote {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
