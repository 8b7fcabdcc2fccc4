"""English text in every Python installation: the prose of its language reference.

The text differs between releases, but the demo's model was trained on the text of one release. So
``held_out.txt`` lists the paragraphs for measurements, by digest. A Python with all of these
paragraphs measures with the same text as the recipe, and no Python measures with training text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from fastattn.reference.numerics import Array

#: Bytes 0 to 127 are the tokens.
VOCABULARY = 128

#: Digests of the paragraphs that are never trained on, one per line, in the order of the held-out
#: text.
HELD_OUT_FILE = Path(__file__).with_name("held_out.txt")

#: Held-out text and training text do not share a run of this many characters.
LONGEST_SHARED_RUN = 40

_HELD_OUT_EVERY = 6
_MIN_HELD_OUT = 2000
_MIN_CHARACTERS = 60
# fraction of letters and blanks; a paragraph below it is code, grammar or a table
_MIN_PROSE = 0.88
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
    """Text for training and text for measurements, without a long run of characters in common.

    Attributes
    ----------
    train, held_out : str
        Paragraphs, one per line.
    complete : bool
        Whether the running Python has every paragraph that ``held_out.txt`` lists.
    """

    train: str
    held_out: str
    complete: bool = True


def digest(text: str) -> str:
    """First 16 hexadecimal digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def held_out_digests() -> tuple[str, ...]:
    """The digests in ``held_out.txt``."""
    lines = HELD_OUT_FILE.read_text(encoding="ascii").splitlines()
    return tuple(line for line in lines if line and not line.startswith("#"))


def encode(text: str) -> Array:
    """Tokens (int64) of a text. A character outside ASCII becomes ``?``."""
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


def choose_held_out(releases: Sequence[Iterable[str]]) -> list[str]:
    """Digests of every sixth paragraph that all releases have, in the order of the first release.

    Parameters
    ----------
    releases : sequence of iterables of str
        Paragraphs of several Python releases.
    """
    others = [set(release) for release in releases[1:]]
    common = [p for p in dict.fromkeys(releases[0]) if all(p in other for other in others)]
    return [digest(p) for p in common[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY]]


def split(lines: Iterable[str], held_out: Sequence[str]) -> Corpus:
    """Separate the held-out paragraphs, and drop paragraphs that repeat a part of them.

    Parameters
    ----------
    lines : iterable of str
        Paragraphs.
    held_out : sequence of str
        Digests of the held-out paragraphs, in the order of the held-out text.

    Returns
    -------
    Corpus
    """
    by_digest = {digest(p): p for p in lines}
    aside = [by_digest.pop(d) for d in held_out if d in by_digest]
    known = {run for p in aside for run in _runs(p)}
    kept = [p for p in by_digest.values() if known.isdisjoint(_runs(p))]
    return Corpus("\n".join(kept), "\n".join(aside), len(aside) == len(held_out))


def _runs(paragraph: str) -> Iterable[str]:
    """Every run of :data:`LONGEST_SHARED_RUN` characters of a paragraph."""
    size = LONGEST_SHARED_RUN
    return (paragraph[i : i + size] for i in range(len(paragraph) - size + 1))


def all_paragraphs(topics: dict[str, str]) -> list[str]:
    """Distinct paragraphs of ``pydoc_data.topics.topics``, by topic."""
    return list(dict.fromkeys(p for name in sorted(topics) for p in paragraphs(topics[name])))


def load() -> Corpus:
    """Corpus of the running Python's ``pydoc_data.topics``.

    Raises
    ------
    ImportError
        If this Python was installed without it.
    ValueError
        If it has too little of the held-out text.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ImportError(
            "the demo's text is pydoc_data.topics, part of Python's standard library, and this "
            "Python was installed without it"
        ) from error
    corpus = split(all_paragraphs(topics), held_out_digests())
    if len(corpus.held_out) < _MIN_HELD_OUT:
        raise ValueError(
            f"the demo measures with paragraphs of pydoc_data.topics that {HELD_OUT_FILE} lists; "
            f"expected at least {_MIN_HELD_OUT} characters of them, this Python has "
            f"{len(corpus.held_out)}"
        )
    return corpus
