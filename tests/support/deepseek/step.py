"""Tokens of a step, and the prompts that they come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.support.tensors import int32, to_paddle


class Batch:
    """Sequences, and the few prompts that they begin with.

    Neighbours have different prompts, so that a mix-up of two shows; those with one prompt share
    its projections.
    """

    def __init__(self, lengths: Any) -> None:
        self.lengths = np.asarray(lengths, np.int64)
        self.first = np.concatenate([[0], np.cumsum(self.lengths)])
        self.prompt_of = np.arange(len(self.lengths)) % 3
        self.prompts = min(3, len(self.lengths))
        self.prompt_length = int(self.lengths.max())
        #: Position of each token of all prompts; token of each row of the batch.
        self.positions = np.tile(np.arange(self.prompt_length), self.prompts)
        self.source = np.concatenate(
            [np.arange(n) + p * self.prompt_length for p, n in zip(self.prompt_of, self.lengths)]
        )


@dataclass
class Step:
    """New tokens of each sequence, one sequence behind the other."""

    rows: np.ndarray  #: of the batch
    source: np.ndarray  #: of the prompts
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
        rows = batch.first[seqs] + positions
        return Step(rows, batch.source[rows], seqs, positions, new, totals, place)

    def tensor(self, array: np.ndarray) -> Any:
        """The step's tokens of an array over all prompts, on the device."""
        return to_paddle(array[self.source], self.place)

    def ints(self, values: Any) -> Any:
        return int32(values, self.place)

    def longs(self, values: Any) -> Any:
        return to_paddle(np.asarray(values, np.int64), self.place)

    @property
    def starts(self) -> np.ndarray:
        """Of each sequence among the step's tokens, and their end."""
        return np.concatenate([[0], np.cumsum(self.new)])
