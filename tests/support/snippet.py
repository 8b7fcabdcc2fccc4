"""``python -m tests.support.snippet FILE WORD``: runs the Python block of a file that has WORD."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def main(path: str, word: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", Path(path).read_text(encoding="utf-8"), re.S)
    (code,) = [block for block in blocks if word in block]
    exec(compile(code, path, "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main(*sys.argv[1:])
