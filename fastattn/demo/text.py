"""English text that every Python installation carries: the prose of its language reference."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from fastattn.reference.numerics import Array

#: Bytes 0 to 127 are the tokens.
VOCABULARY = 128

_HELD_OUT_EVERY = 12
_MIN_CHARACTERS = 60
_MIN_PROSE = 0.88  # letters and blanks; below it a paragraph is code, grammar or a table
_ASCII = {  # typographic characters by code point
    0x2018: "'",
    0x2019: "'",
    0x201C: '"',
    0x201D: '"',
    0x2013: "-",
    0x2014: "-",
    0x2026: "...",
}


@dataclass(frozen=True)
class Corpus:
    """Text to train on and text to measure with; no paragraph is in both."""

    train: str
    held_out: str


def encode(text: str) -> Array:
    """Tokens (int64) of a text; a character outside ASCII becomes ``?``."""
    data = text.translate(_ASCII).encode("ascii", "replace")
    return np.frombuffer(data, np.uint8).astype(np.int64)


def decode(tokens: Array | list[int]) -> str:
    """Text of tokens."""
    return bytes(int(t) for t in tokens).decode("ascii", "replace")


def paragraphs(source: str) -> list[str]:
    """Paragraphs of prose, each on one line, without markup."""
    found = []
    for block in re.split(r"\n\s*\n", source.translate(_ASCII)):
        line = re.sub(r"^([*-]|\d+\.) ", "", " ".join(block.split()))
        line = re.sub(r"(?<!\w)\*(\w[^*]*)\*(?!\w)", r"\1", line)  # *emphasis*
        if len(line) < _MIN_CHARACTERS or not line.isascii() or not line.isprintable():
            continue
        prose = sum(c.isalpha() or c == " " for c in line) / len(line)
        if prose >= _MIN_PROSE and line[-1] in ".:" and "::=" not in line:
            found.append(line)
    return found


def split(lines: list[str]) -> Corpus:
    """Put every twelfth distinct paragraph aside, in the order given."""
    distinct = list(dict.fromkeys(lines))
    held_out = distinct[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY]
    kept = set(held_out)
    return Corpus("\n".join(p for p in distinct if p not in kept), "\n".join(held_out))


def load() -> Corpus:
    """Corpus of the running Python's ``pydoc_data.topics``.

    Raises
    ------
    ImportError
        If this Python was installed without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ImportError(
            "the demo's text is pydoc_data.topics, part of Python's standard library, and this "
            "Python was installed without it"
        ) from error
    return split([p for name in sorted(topics) for p in paragraphs(topics[name])])
