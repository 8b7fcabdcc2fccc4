"""``python -m fastattn replay``: make dumped calls again, compare and time them.

Each call of a folder that ``FASTATTN_DUMP`` wrote is made again with the tensors that it had. Its
results, and those in the dump, are held to the NumPy model of the operator where there is one. The
exit status is 1 if a result is out of its bound, if a call raises another error than it did, or if
a dump cannot be read (docs/debugging.md).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastattn.dump import files

_WORDS = {True: "ok", False: "DIFFERS", None: "not compared"}


def _lines(title: str, verdicts: Mapping[str, Any]) -> list[str]:
    return [
        f"  {title}: {name}: {_WORDS[v.fits]}: {v.text}" for name, v in sorted(verdicts.items())
    ]


def _report(dump: files.Dump, call: Any, found: Any) -> str:
    """What a replay found, as text."""
    facts = dump.facts
    compared = [v.fits for v in (*found.dumped.values(), *found.replayed.values())]
    word = "ok" if any(compared) or found.again else "not compared"
    lines = [
        f"{dump.folder.name}: {word if found.fits else 'DIFFERS'}",
        f"  {facts['op']} on {facts['place']} ({facts['status']}), replayed on {call.place}",
        f"  kernel when dumped: {facts['plan']['kernel']}",
    ]
    if facts["nan"]:
        counts = ", ".join(f"{name} {count}" for name, count in facts["nan"].items())
        lines.append(f"  NaN when dumped: {counts}")
    if facts["made_up"]:
        lines.append(f"  contents from a seed: {', '.join(facts['made_up'])}")
    lines += _lines("dump against model", found.dumped)
    lines += _lines("replay against model", found.replayed)
    lines += _lines("replay against dump", found.again)
    if found.error is not None:
        lines.append(f"  raised: {found.error}")
    if found.us is not None:
        lines.append(f"  {found.us:.1f} us a call (median, host clock, on {call.place})")
    return "\n".join(lines)


def _as_json(dump: files.Dump, call: Any, found: Any) -> dict[str, Any]:
    parts = ("dumped", "replayed", "again")
    return {
        "folder": dump.folder.name,
        "op": dump.facts["op"],
        "place": call.place,
        "fits": found.fits,
        "error": found.error,
        "us": found.us,
        **{
            part: {name: [v.fits, v.text] for name, v in getattr(found, part).items()}
            for part in parts
        },
    }


def _one(folder: Path, arguments: argparse.Namespace) -> tuple[bool, Any]:
    """Replay a call: whether all is well, and what to print."""
    from fastattn.dump import replay, script, tensors

    try:
        dump = files.read_call(folder)
        call = replay.Call(
            dump,
            place=arguments.place,
            contiguous=arguments.contiguous,
            seed=arguments.seed,
        )
        found = replay.replay(call, with_model=arguments.model, timed=not arguments.no_time)
    except files.DumpError as error:
        text = f"{folder.name}: REFUSED: {error}"
        return False, {"folder": folder.name, "refused": str(error)} if arguments.json else text
    if arguments.json:
        return found.fits, _as_json(dump, call, found)
    text = _report(dump, call, found)
    if arguments.script:
        arrays = {name: tensors.array_of(value) for name, value in dump.inputs.items()}
        report = "".join(f"# {line}\n" for line in text.splitlines())
        text = f"{report}\n{script.minimal(dump, arrays)}"
    return found.fits, text


def run(arguments: argparse.Namespace) -> int:
    """Replay the calls of a folder."""
    os.environ.pop("FASTATTN_DUMP", None)  # a replay is no call to dump
    if not arguments.folder.is_dir():
        print(f"replay: {arguments.folder}: no such folder", file=sys.stderr)
        return 1
    folders = files.calls_in(arguments.folder)
    if not folders:
        print(f"replay: {arguments.folder}: no dumped call in it", file=sys.stderr)
        return 1
    fits = []
    for folder in folders:
        well, output = _one(folder, arguments)
        fits.append(well)
        print(json.dumps(output) if arguments.json else output, flush=True)
    if not arguments.json:
        print(f"{'# ' * arguments.script}{sum(fits)} of {len(fits)} calls ok")
    return int(not all(fits))


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "replay", help="make dumped calls again and compare them", description=__doc__
    )
    parser.add_argument("folder", type=Path, help="what FASTATTN_DUMP named, or one call of it")
    parser.add_argument(
        "--place",
        choices=("auto", "cpu", "gpu"),
        default="auto",
        help="where to run; auto: where it ran, or the CPU where there is no GPU",
    )
    parser.add_argument(
        "--model",
        choices=("auto", "always", "never"),
        default="auto",
        help="compare with the NumPy model; auto: unless it would take minutes",
    )
    parser.add_argument(
        "--contiguous", action="store_true", help="leave out the strides that tensors had"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of contents that the dump left out, default 0"
    )
    parser.add_argument("--no-time", action="store_true", help="do not time the calls")
    parser.add_argument(
        "--script", action="store_true", help="print Python that makes each call, for a report"
    )
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each call")
    parser.set_defaults(run=run)
