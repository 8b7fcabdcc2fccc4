"""``python -m fastattn`` and the command ``fastattn``; see :mod:`fastattn.cli`."""

from __future__ import annotations

import os
import sys
import warnings

from fastattn.cli import main


def run() -> int:
    """Run the command line and return its exit status."""
    # Paddle says this whenever it is imported; only a build compiles anything.
    warnings.filterwarnings("ignore", "No ccache found", UserWarning)
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    return status


if __name__ == "__main__":
    sys.exit(run())
