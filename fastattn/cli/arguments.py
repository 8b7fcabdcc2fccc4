"""Types of arguments that several commands take."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def int_from(least: int) -> Callable[[str], int]:
    """An int of at least `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected an int from {least} on, got {text!r:.40}")
        return value

    return parse
