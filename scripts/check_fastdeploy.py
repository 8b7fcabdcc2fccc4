#!/usr/bin/env python3
"""Run the plug-in inside FastDeploy's own Python, on a machine without a GPU.

scripts/check_fastdeploy.py --tree FastDeploy                # all groups of cases
scripts/check_fastdeploy.py --tree FastDeploy -k "int8, neox"  # cases with this in their name
scripts/check_fastdeploy.py --tree FastDeploy --group options --verbose

FastDeploy's plug-in loader, configuration, scheduler, model runner, whole models, loaders, proposer
and graph optimisation run as they are in the tree. Stand-ins replace its compiled operators,
imported packages that are not installed, and parts of Paddle that need CUDA. Every result is
compared with attention in float64 NumPy. A case passes, is refused (the plug-in names what it does
not support), fails, lacks a stand-in (the tree calls an operator that this check does not know), or
is not run (its model cannot be made here). The exit status is 1 if a case failed or lacks a
stand-in.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STATES = ("passed", "refused", "failed", "no stand-in", "not run")

#: Seconds after which a case counts as hanging. The check then ends with a stack trace, whatever
#: blocks the process.
LONGEST = 60


def prepare(tree: Path) -> None:
    """Make the tree importable, as in the process of a worker that names the plug-in."""
    sys.dont_write_bytecode = True  # the tree is only read
    warnings.simplefilter("ignore")
    os.environ["FD_PLUGINS"] = "fastattn"
    os.environ["FD_LOG_DIR"] = tempfile.mkdtemp(prefix="check_fastdeploy_log_")
    os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", tempfile.mkdtemp(prefix="check_fastdeploy_"))
    sys.path[:0] = [str(tree), str(ROOT), str(ROOT / "scripts"), str(_entry_point())]
    from fastdeploy_check import machine, ops, stubs

    sys.meta_path.append(stubs.StubFinder())
    machine.pretend_cuda()
    machine.install_ops(ops.OPS)
    logging.disable(logging.CRITICAL)
    import fastdeploy  # noqa: F401


def _entry_point() -> Path:
    """Metadata of an installed fastattn, for a checkout that is not installed."""
    folder = Path(tempfile.mkdtemp(prefix="check_fastdeploy_")) / "site"
    info = folder / "fastattn-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fastattn\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[fastdeploy.model_register_plugins]\nfastattn = fastattn._plugin:register\n"
    )
    return folder


def outcome(run: Callable[[], float]) -> tuple[str, str]:
    """State of a case, and its message."""
    from fastdeploy_check.cases import NotRun
    from fastdeploy_check.machine import OpNotStoodInFor

    try:
        return "passed", f"error {run():.4f}"
    except NotRun as error:
        return "not run", str(error)
    except NotImplementedError as error:
        ours = any("fastattn" in f.filename for f in traceback.extract_tb(error.__traceback__)[-4:])
        return ("refused" if ours else "not run"), str(error)
    except Exception as error:
        lacking = next((x for x in _causes(error) if isinstance(x, OpNotStoodInFor)), None)
        if lacking is not None:
            return "no stand-in", f"the check lacks a stand-in: {lacking}"
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        return "failed", f"{type(error).__name__}: {error} ({where})"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and the errors that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def chosen(group: str | None, wanted: str) -> Iterator[tuple[str, Callable[[], float]]]:
    """The cases to run."""
    from fastdeploy_check import disaggregation, endtoend, latent, newer, upstream
    from fastdeploy_check.cases import GROUPS

    more = {
        "disaggregation": disaggregation.cases,
        "latent": latent.cases,
        "newer": newer.cases,
        "end to end": endtoend.cases,
        "upstream": upstream.cases,
    }
    for name, cases in {**GROUPS, **more}.items():
        if group not in (None, name):
            continue
        for label, run in cases():
            if wanted in label:
                yield label, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tree", type=Path, required=True, help="checkout of FastDeploy")
    parser.add_argument("--group", help="only this group of cases")
    parser.add_argument("-k", dest="wanted", default="", help="only cases with this in their name")
    parser.add_argument("--verbose", action="store_true", help="also the cases that passed")
    parser.add_argument("--trace", action="store_true", help="tracebacks of the cases that failed")
    options = parser.parse_args()
    if not (options.tree / "fastdeploy" / "__init__.py").exists():
        parser.error(f"--tree {options.tree}: no package fastdeploy in there")
    if not (options.tree / "custom_ops" / "gpu_ops").is_dir():
        parser.error(f"--tree {options.tree}: no custom_ops/gpu_ops, whose sources tell versions")
    with tempfile.TemporaryDirectory(prefix="check_fastdeploy_") as scratch:
        tempfile.tempdir = scratch  # also for FastDeploy's temporary files
        return run_cases(options)


def run_cases(options: argparse.Namespace) -> int:
    """Run the chosen cases and print all that did not pass; return the exit status."""
    start = time.perf_counter()
    sys.argv = sys.argv[:1]
    prepare(options.tree.resolve())
    counts: collections.Counter[str] = collections.Counter()
    for label, run in chosen(options.group, options.wanted):
        faulthandler.dump_traceback_later(LONGEST, exit=True, file=sys.__stderr__)
        state, text = outcome(run)
        faulthandler.cancel_dump_traceback_later()
        counts[state] += 1
        if options.verbose or state != "passed":
            print(f"{state:11} {label}: {' '.join(text.split())[:220]}", flush=True)
        if options.trace and state == "failed":
            try:
                run()
            except Exception:
                traceback.print_exc()
    total = sum(counts.values())
    numbers = ", ".join(f"{counts[state]} {state}" for state in STATES)
    print(f"{options.tree}: {total} cases: {numbers} ({time.perf_counter() - start:.0f} s)")
    return 1 if counts["failed"] or counts["no stand-in"] or not total else 0


if __name__ == "__main__":
    sys.exit(main())
