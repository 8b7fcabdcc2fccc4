"""Texts that every Python installation carries: to measure with, and others to calibrate with.

English is the prose of ``pydoc_data.topics``, of which :mod:`fastattn.demo.text` puts a part aside.
Code is the source of modules of the standard library. Neither is in this package's files, and both
are under the PSF licence.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastattn.demo import text as english
from fastattn.models.tokenizer import Tokenizer
from fastattn.reference.numerics import Array

#: Modules whose source is measured with, and those that are calibrated with.
EVALUATION_MODULES = ("statistics", "fractions", "tarfile", "turtle")
CALIBRATION_MODULES = ("heapq", "textwrap", "shlex", "optparse")


@dataclass(frozen=True)
class Text:
    """A text and what it is called."""

    name: str
    content: str

    @property
    def digest(self) -> str:
        """First 16 hexadecimal digits of its SHA-256."""
        return hashlib.sha256(self.content.encode()).hexdigest()[:16]


def _source(module: str) -> Text | None:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        return None
    content = Path(spec.origin).read_text(encoding="utf-8", errors="replace")
    return Text(f"source of {module}", content)


def _sources(modules: Sequence[str]) -> list[Text]:
    return [text for text in map(_source, modules) if text is not None]


def evaluation() -> list[Text]:
    """English that nothing is calibrated with, then code."""
    corpus = english.load()
    return [Text("pydoc_data.topics, held out", corpus.held_out), *_sources(EVALUATION_MODULES)]


def calibration() -> list[Text]:
    """The rest of that English, then other code."""
    corpus = english.load()
    return [Text("pydoc_data.topics, the rest", corpus.train), *_sources(CALIBRATION_MODULES)]


def haystack() -> str:
    """All of the English, for long contexts."""
    corpus = english.load()
    return corpus.train + "\n" + corpus.held_out


def from_files(paths: Sequence[Path]) -> list[Text]:
    """Texts of files.

    Raises
    ------
    OSError, ValueError
        If one cannot be read.
    """
    return [Text(str(path), path.read_text(encoding="utf-8")) for path in paths]


@dataclass(frozen=True)
class Window:
    """Tokens that are measured as one sequence, and where they are from."""

    source: Text
    tokens: Array


def windows(texts: Sequence[Text], tokenizer: Tokenizer, length: int, count: int) -> list[Window]:
    """Windows of `length` tokens that share none, in turns from the first text and the others.

    Fewer, if the texts are shorter. A window starts with the token that the model's texts start
    with, if there is one.

    Parameters
    ----------
    texts : sequence of Text
    tokenizer : Tokenizer
    length, count : int
    """
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    own = length - len(start)

    def of(text: Text, most: int) -> list[Window]:
        ids = tokenizer.encode(text.content[: most * own * 12], bos=False)
        return [
            Window(text, np.array([*start, *ids[at : at + own]], np.int64))
            for at in range(0, len(ids) - own + 1, own)
        ][:most]

    first = of(texts[0], count)
    others: list[Window] = []
    for text in texts[1:]:
        if len(others) < count:
            others += of(text, count - len(others))
    turns: list[Window] = []
    for i in range(max(len(first), len(others))):
        turns += first[i : i + 1] + others[i : i + 1]
    return turns[:count]
