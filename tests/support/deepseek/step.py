"""Tokens of a step, and the prompts that they come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.support.tensors import int32, to_paddle


class Batch:
    """Prompts of several sequences, and what a layer projects them to."""

    def __init__(self, lengths: Any) -> None:
        self.lengths = np.asarray(lengths, np.int64)
        self.first = np.concatenate([[0], np.cumsum(self.lengths)])
        self.positions = np.concatenate([np.arange(n) for n in self.lengths])


@dataclass
class Step:
    """New tokens of each sequence, one sequence behind the other."""

    rows: np.ndarray  #: of the batch
    seqs: np.ndarray
    positions: np.ndarray
    new: np.ndarray  #: tokens of each sequence
    totals: np.ndarray  #: tokens of each sequence with these
    place: str

    @staticmethod
    def of(batch: Batch, counts: np.ndarray, new: Any, place: str) -> Step:
        """The tokens behind the first `counts` of each sequence."""
        new = np.asarray(new, np.int64)
        totals = counts + new
        assert (new >= 0).all()
        assert (totals <= batch.lengths).all(), "more tokens than a prompt has"
        seqs = np.repeat(np.arange(len(new)), new)
        starts = np.concatenate([[0], np.cumsum(new)])[:-1]
        positions = np.arange(len(seqs)) - starts[seqs] + counts[seqs]
        return Step(batch.first[seqs] + positions, seqs, positions, new, totals, place)

    def tensor(self, array: np.ndarray) -> Any:
        """The step's rows of an array over the batch, on the device."""
        return to_paddle(array[self.rows], self.place)

    def ints(self, values: Any) -> Any:
        return int32(values, self.place)

    def longs(self, values: Any) -> Any:
        return to_paddle(np.asarray(values, np.int64), self.place)

    @property
    def starts(self) -> np.ndarray:
        """Of each sequence among the step's tokens, and their end."""
        return np.concatenate([[0], np.cumsum(self.new)])
