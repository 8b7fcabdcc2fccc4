"""Whether a GPU runs the kernels of a library. This needs neither Paddle nor the library."""

from __future__ import annotations

import re


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether machine code for `arch` runs on a GPU of this compute capability.

    Code for "80" runs on later GPUs of the same major number, such as 8.6. Code for "90a" runs on
    9.0 alone, and code for "100f" on GPUs of its family, which has its major number.

    Parameters
    ----------
    arch : str
        Architecture as ``FASTATTN_ARCHS`` names it: "80", "90a", "100f".
    capability : tuple of int
        Major and minor number.
    """
    match = re.fullmatch(r"(\d+)(\d)([af]?)", arch)
    if match is None:
        return False
    built = int(match[1]), int(match[2])
    return (
        built == capability
        if match[3] == "a"
        else built[0] == capability[0] and built <= capability
    )


def problem(archs: list[str], capability: tuple[int, int]) -> str | None:
    """One line if no kernel image in a library for `archs` runs on a GPU; None if one does."""
    if any(runs_on(arch, capability) for arch in archs):
        return None
    gpu = f"{capability[0]}{capability[1]}"
    suffix = "a" if capability[0] >= 9 else ""
    return (
        f"no kernel image: built for {', '.join('sm_' + a for a in archs)}, the GPU is sm_{gpu}; "
        f'rebuild with FASTATTN_ARCHS="{gpu}{suffix}"'
    )
