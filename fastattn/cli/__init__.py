"""The command line: ``python -m fastattn COMMAND``, see :data:`COMMANDS`.

The module of a subcommand is imported only if that subcommand is requested. So a module that cannot
be imported (no Paddle, no matplotlib, a broken library) does not affect the others.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from fastattn.version import __version__

#: Subcommand -> (module with ``add_parser(subparsers)``, line of help)
COMMANDS = {
    "demo": ("fastattn.demo.cli", "serve a tiny model with every cache type"),
    "evaluate": ("fastattn.evaluate.cli", "what cache types cost a real model"),
    "bench": ("fastattn.cli.bench", "time the operators on this machine"),
    "calibrate": ("fastattn.calibrate.cli", "scales, centres and cache types from samples"),
    "replay": ("fastattn.cli.replay", "make dumped calls again and compare them"),
    "explain": ("fastattn.cli.explain", "which kernel a call takes, and why not another"),
    "show-config": ("fastattn.cli.show_config", "versions, what is compiled, what would run"),
    "collect-env": ("fastattn.cli.collect_env", "one block about this machine for a bug report"),
}


def _requested(argv: Sequence[str]) -> str | None:
    """The subcommand in `argv`: its first word that is not an option."""
    return next((word for word in argv if not word.startswith("-")), None)


def _parser(requested: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastattn",
        description="Attention over a quantised KV cache for PaddlePaddle.",
    )
    parser.add_argument("--version", action="version", version=f"fastattn {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, (module, text) in COMMANDS.items():
        if name == requested:
            importlib.import_module(module).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=text)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments. Default: the arguments of the process.

    Returns
    -------
    int
        Exit status.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    requested = _requested(argv)
    try:
        parser = _parser(requested)
        arguments = parser.parse_args(argv)
        handler = getattr(arguments, "run", None) or arguments.func
        return int(handler(arguments) or 0)
    except ImportError as error:
        print(f"fastattn {requested}: {error}", file=sys.stderr)
        print("`python -m fastattn show-config` tells what is installed.", file=sys.stderr)
        return 1
