#!/usr/bin/env python3
"""Write the tables of measured times in README.md and docs/ from benchmarks/results.

scripts/make_gpu_tables.py           # writes them
scripts/make_gpu_tables.py --check   # status 1 if a table is not what the results say
scripts/make_gpu_tables.py --plots   # writes them, and draws benchmarks/plots (needs matplotlib,
                                     # and rows that are committed)

A table is between the lines `<!-- table: NAME -->` and `<!-- end -->`. A dash marks a row that the
results lack. The script needs neither a GPU nor Paddle, except for --plots, which calls the
benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_tables import (
    ahead,
    attention,
    cache_types,
    drawn,
    latent,
    latent_targets,
    memory,
    pages,
    quality,
    sparse_quality,
    targets,
)
from gpu_tables.results import Results

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "docs/gpu.md",
    "docs/measurements.md",
    "docs/host.md",
    "docs/benchmarks.md",
    "docs/cache_types.md",
    "docs/backends.md",
    "docs/dcp.md",
    "docs/kernels/invariant.md",
    "docs/kernels/sparse_attention.md",
    "docs/quality.md",
)
#: Name of a table -> function from the results to its text.
TABLES: dict[str, Callable[[Results], str]] = {
    "runs": pages.runs,
    "files": pages.files,
    "figures": pages.figures,
    "ahead": ahead.ahead,
    "cpu": pages.cpu,
    "host": pages.host,
    "decode": attention.decode,
    "prefill": attention.prefill,
    "mixed": attention.mixed,
    "batch invariant": attention.batch_invariant,
    "split invariant": attention.split_invariant,
    "chosen keys": attention.chosen_keys,
    "step": attention.step,
    "step ranges": attention.step_ranges,
    "head_dims": attention.head_dims,
    "signals": attention.signals,
    "dcp": attention.dcp,
    "cache types": cache_types.cache_types,
    "gain": cache_types.gain,
    "quality smollm": quality.smollm2,
    "quality gemma": quality.gemma3,
    "quality smollm feedback": quality.smollm2_feedback,
    "quality gemma feedback": quality.gemma3_feedback,
    "quality smollm mix": quality.smollm2_mix,
    "quality gemma mix": quality.gemma3_mix,
    "quality smollm gpu": quality.smollm2_gpu,
    "quality needles": quality.needles,
    "quality both": quality.both,
    "sparse quality": sparse_quality.short,
    "sparse quality long": sparse_quality.long,
    "sparse quality operators": sparse_quality.operators,
    "targets": targets.targets,
    "operators": memory.operators,
    "rope options": memory.rope_options,
    "key transforms": memory.key_transforms,
    "cache writers": memory.cache_writers,
    "merge": memory.merge,
    "indexer queries": memory.indexer_queries,
    "topk": memory.topk,
    "logits": memory.logits,
    "indexer topk": latent.indexer_topk,
    "sparse attention": latent.sparse_attention,
    "dense attention": latent.dense_attention,
    "latent targets": latent_targets.latent_targets,
    "latent writers": latent.latent_writers,
    "sparse step": latent.sparse_step,
    "sparse parts": latent.sparse_parts,
    "plots": pages.plots,
}
_BLOCK = re.compile(r"(<!-- table: ([\w ]+) -->\n).*?(<!-- end -->)", re.S)


def written(page: str, results: Results, base: str) -> str:
    """A page with every table made from the results.

    Parameters
    ----------
    page : str
        Text of the page.
    results : Results
    base : str
        Path from the page's folder to the root, for links.

    Raises
    ------
    KeyError
        If a marker names no table.
    """
    return _BLOCK.sub(
        lambda m: m[1] + TABLES[m[2]](results).replace("](ROOT/", f"]({base}") + "\n" + m[3], page
    )


def draw(results: Path, plots: Path) -> None:
    """Draw the plots from committed rows by the benchmark's own command.

    Raises
    ------
    ValueError
        If a file of rows differs from the last commit.
    """
    for name, plot in pages.PLOTS.items():
        source = results / f"{plot.source}.json"
        if not source.exists():
            print(f"left out {name}.png: no {source.name}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / source.name
            rows.write_text(json.dumps(drawn.prepared(drawn.committed(source))))
            command = [sys.executable, "-m", "fastattn", "bench", "--load", str(rows)]
            command += ["--op", plot.op] * bool(plot.op) + ["--plot", str(plots / f"{name}.png")]
            environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        print(f"drew {name}.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--plots", action="store_true", help="draw the plots as well")
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout")
    arguments = parser.parse_args()
    results = Results.read(arguments.root / "benchmarks" / "results")
    stale = 0
    for name in PAGES:
        path = arguments.root / name
        text = path.read_text(encoding="utf-8")
        wanted = written(text, results, "../" * name.count("/"))
        if arguments.check and wanted != text:
            print(f"{path}: out of date: run scripts/make_gpu_tables.py")
            stale = 1
        elif not arguments.check:
            path.write_text(wanted, encoding="utf-8")
            print(f"wrote {path}")
    if arguments.plots:
        draw(arguments.root / "benchmarks" / "results", arguments.root / "benchmarks" / "plots")
    return stale


if __name__ == "__main__":
    sys.exit(main())
