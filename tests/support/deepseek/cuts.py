"""Runs of a layer over a batch of prompts, cut in steps, and what must agree between two runs."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.support.deepseek.step import Batch
from tests.support.deepseek.v4 import V4Layer, make_v4
from tests.support.deepseek.v32 import V32Layer, make_v32
from tests.support.deepseek.weights import (
    V4_CONFIGS,
    V32_CONFIGS,
    prompts,
    v4_weights,
    v32_weights,
)

#: Prompt lengths: the first groups of a compressor, the first entries of 1 : 128 and of a window
#: that slides, and one that has left all of that behind.
SHORT, AROUND_128, LONG = tuple(range(1, 10)), tuple(range(124, 133)), (300,)
BATCHES = {"1-9": SHORT, "124-132": AROUND_128, "300": LONG}
CONFIGS: dict[str, Any] = {**V32_CONFIGS, **V4_CONFIGS}

Results = dict[str, np.ndarray]
Snapshot = dict[str, list[tuple[int, np.ndarray]]]


class Problem:
    """A configuration, its weights and a batch of prompts."""

    def __init__(self, name: str, lengths: Any, seed: int = 7) -> None:
        self.config = CONFIGS[name]
        self.is_v4 = name in V4_CONFIGS
        make_weights, make = (v4_weights, make_v4) if self.is_v4 else (v32_weights, make_v32)
        self.weights = make_weights(self.config, seed)
        self.batch = Batch(lengths)
        self.x = prompts(lengths, seed + 1)
        self.shared = make(self.config, self.weights, self.batch, self.x)

    def layer(self, place: str, **options: Any) -> Any:
        return (V4Layer if self.is_v4 else V32Layer)(**self.shared, place=place, **options)

    @property
    def lengths(self) -> np.ndarray:
        """Of the prompts."""
        return self.batch.lengths

    def whole(self, place: str, **options: Any) -> tuple[Results, Any]:
        """Results of one step for everything, and the layer behind it."""
        layer = self.layer(place, **options)
        return run(layer, [self.lengths]), layer

    def of_seq(self, seq: int) -> slice:
        """Rows of a sequence."""
        return slice(int(self.batch.first[seq]), int(self.batch.first[seq + 1]))


def run(layer: Any, steps: Any, results: Results | None = None) -> Results:
    """Results of steps, rows in the batch's order; those that never ran are 0."""
    made = {} if results is None else results
    total = int(layer.batch.first[-1])
    for new in steps:
        if not np.any(new):
            continue
        found = layer.step(new)
        rows = found.pop("rows")
        for name, array in found.items():
            if name not in made:
                made[name] = np.zeros((total, *array.shape[1:]), array.dtype)
            made[name][rows] = array
    return made


def decode(counts: np.ndarray, lengths: np.ndarray, size: int = 1) -> list[np.ndarray]:
    """Steps of `size` new tokens a sequence from `counts` on; a sequence that is done has none."""
    left = lengths - counts
    steps = range(0, int(left.max(initial=0)), size)
    return [np.clip(left - done, 0, size) for done in steps]


def snapshot(layer: Any) -> Snapshot:
    """Bytes of every token that lives in a cache, by sequence; and nothing else was written."""
    made = {}
    for name, (pool, counts) in layer.caches().items():
        made[name] = [pool.tokens(seq, int(count)) for seq, count in enumerate(counts)]
        pool.check_the_rest(counts)
    return made


def assert_same_caches(got: Snapshot, want: Snapshot, what: str = "") -> None:
    """The same tokens, bit for bit."""
    assert got.keys() == want.keys()
    for name, seqs in want.items():
        for seq, (first, tokens) in enumerate(seqs):
            where = f"{what}: {name} of sequence {seq}"
            assert got[name][seq][0] == first, where
            np.testing.assert_array_equal(got[name][seq][1], tokens, err_msg=where)


def assert_outputs_agree(got: Results, want: Results, rows: Any, what: str = "") -> None:
    """Rows of two runs that selected the same tokens: outputs to rounding.

    Both round an fp32 sum to bf16, so that an element of the attention is at most one step off. An
    8-bit code moves by at most one for that, and the layer's output mixes all of them.
    """
    x, y = (r["attention"][rows].astype(np.float64) for r in (got, want))
    step = np.abs(x - y) - 2.0**-7 * np.abs(y)
    largest = np.abs(y).max(initial=0)
    assert step.max(initial=0) <= 2e-4 * largest, f"{what}: attention is {step.max():.1e} off"
    x, y = (r["output"][rows] for r in (got, want))
    error = np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-300)
    assert error <= 4e-3, f"{what}: output is {error:.1e} off"
