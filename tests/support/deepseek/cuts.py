"""Runs of a layer over a batch of prompts, cut in steps, and what must agree between two runs."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from tests.support.deepseek.dense import make_dense, mask_of
from tests.support.deepseek.step import Batch
from tests.support.deepseek.v4 import V4Layer, make_v4
from tests.support.deepseek.v32 import V32Layer, make_v32
from tests.support.deepseek.weights import (
    RANK_CONFIGS,
    V4_CONFIGS,
    V32_CONFIGS,
    V4Config,
    prompts,
    v4_weights,
    v32_weights,
    with_ties,
)

#: Prompt lengths: the first groups of a compressor, the first entries of 1 : 128 and of a window
#: that slides, and one that has left all of that behind.
SHORT, AROUND_128, LONG = tuple(range(1, 10)), tuple(range(124, 133)), (300,)
BATCHES = {"1-9": SHORT, "124-132": AROUND_128, "300": LONG}
CONFIGS: dict[str, Any] = {**V32_CONFIGS, **V4_CONFIGS}
_ALL = {**CONFIGS, **RANK_CONFIGS}

Results = dict[str, np.ndarray]
Snapshot = dict[str, list[tuple[int, np.ndarray]]]


@functools.lru_cache(maxsize=2)
def _weights(config: Any, seed: int) -> Any:
    return (v4_weights if isinstance(config, V4Config) else v32_weights)(config, seed)


def weights_of(name: str, seed: int) -> Any:
    """Weights of a configuration; not to be written to."""
    made = _weights(_ALL[name], seed)
    return with_ties(made) if name.endswith("_ties") else made


class Problem:
    """A configuration, its weights and a batch of prompts."""

    def __init__(self, name: str, lengths: Any, seed: int = 7) -> None:
        self.config = _ALL[name]
        self.is_v4 = isinstance(self.config, V4Config)
        self.weights = weights_of(name, seed)
        self.batch = Batch(lengths)
        self.x = prompts(len(self.batch.positions), seed + 1)
        make = make_v4 if self.is_v4 else make_v32
        self.shared = make(self.config, self.weights, self.batch, self.x)
        self._dense: dict[int, Any] = {}

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

    def dense(self, seq: int) -> Any:
        """The fp64 model of a sequence."""
        batch, prompt = self.batch, int(self.batch.prompt_of[seq])
        if prompt not in self._dense:
            x = self.x.reshape(batch.prompts, batch.prompt_length, -1)[prompt]
            self._dense[prompt] = make_dense(self.config, self.weights, x)
        return self._dense[prompt].first(int(self.lengths[seq]))

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


def assert_outputs_agree(
    layer: Any, got: Results, want: Results, place: str, what: str = ""
) -> None:
    """Rows of two runs that selected the same tokens: outputs to rounding.

    A CPU rounds an fp32 sum to bf16: an element of the attention is at most one step off. A GPU
    multiplies weights of 16 bits, of other parts of the keys in each of its kernels. An 8-bit code
    moves by at most one for either, and the layer's output mixes all of them.
    """
    x, y = (r["attention"].astype(np.float64) for r in (got, want))
    relative, absolute = (2.0**-7, 2e-4) if place == "cpu" else (2.0**-6, 2.0**-8)
    excess = np.abs(x - y) - relative * np.abs(y)
    assert excess.max(initial=0) <= absolute * np.abs(y).max(initial=0), f"{what}: attention"
    for name, (a, b), bound in (
        ("attention", (x, y), 3.5e-3),
        ("output", (layer.output(got), want["output"]), 6e-3 if place == "cpu" else 2.5e-2),
    ):
        error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300)
        assert error <= bound, f"{what}: {name} is {error:.1e} off"


def same_selections(problem: Problem, place: str, got: Results, want: Results) -> np.ndarray:
    """Rows of the batch where two runs selected the same tokens.

    On a CPU all of them. A GPU scores gathered keys and pages by two kernels, whose sums round
    apart: where they select otherwise, both selections must be right by :func:`check_selections`.
    """
    if "indices" not in want:
        return np.ones(len(want["attention"]), bool)
    if place == "cpu":
        np.testing.assert_array_equal(got["indices"], want["indices"])
    same = (got["indices"] == want["indices"]).all(axis=1)
    assert same.mean() > 0.9, "selections differ"
    if not same.all():
        for seq in range(len(problem.lengths)):
            for results in (got, want):
                check_selections(problem, seq, results["indices"][problem.of_seq(seq)], place)
    return same


#: How far a logit may be from fp64, of what it would be if nothing cancelled: fp32 sums on a CPU;
#: Hopper's sums of FP8 products keep 14 bits.
LOGIT_ERROR = {"cpu": 2e-6, "gpu": 2e-4}


def assert_same(problem: Problem, place: str, layer: Any, got: Results, want: Any) -> None:
    """A run in steps is that of one step: `want` is its results and its snapshot."""
    results, caches = want
    if "output" not in results:  # kept: many runs are compared with it
        results["output"] = layer.output(results)
    assert_same_caches(snapshot(layer), caches)
    same = same_selections(problem, place, got, results)
    rows = ({name: array[same] for name, array in r.items()} for r in (got, results))
    assert_outputs_agree(layer, *rows, place)


def first_chunk(problem: Problem, place: str, tokens: int) -> tuple[Any, Results]:
    """A layer that has had the first tokens of each prompt, and what it said."""
    layer = problem.layer(place, seed=tokens)
    return layer, run(layer, [np.minimum(tokens, problem.lengths)])


def check_cut(problem: Problem, place: str, cut: int, want: Any, started: Any = None) -> Any:
    """A chunk of `cut` tokens of each prompt, one token, and the rest.

    The first two leave the caches of one chunk of `cut + 1` tokens. Where that holds for every cut,
    decoding from any token on leaves those of one chunk as well: a step sees nothing else.

    `started` is :func:`first_chunk` of `cut`; returns that of `cut + 1`.
    """
    lengths = problem.lengths
    first, second = (np.minimum(n, lengths) for n in (cut, cut + 1))
    layer, got = started or first_chunk(problem, place, cut)
    run(layer, [second - first], got)
    other = first_chunk(problem, place, cut + 1)
    assert_same_caches(snapshot(layer), snapshot(other[0]), f"cut at {cut}")
    run(layer, [lengths - second], got)
    assert_same(problem, place, layer, got, want)
    return other


def check_selections(problem: Problem, seq: int, indices: np.ndarray, place: str) -> np.ndarray:
    """The mask of a sequence's selections [T, entries], which are those of its largest logits.

    They are judged by logits in fp64: none that was left out is larger than one that was selected,
    by more than the error of both.
    """
    dense = problem.dense(seq)
    mask = mask_of(indices, dense.visible.shape[1])
    assert not (mask & ~dense.visible).any(), "a token sees what comes after it"
    counts = np.minimum(dense.visible.sum(axis=1), problem.config.topk)
    np.testing.assert_array_equal(mask.sum(axis=1), counts)
    if not hasattr(dense, "logits"):
        return mask
    for row, (chosen, seen) in enumerate(zip(mask, dense.visible)):
        left = seen & ~chosen
        if left.any():
            logits, size = dense.logits[row], dense.logit_sizes[row][seen].max()
            behind = logits[left].max() - logits[chosen].min()
            assert behind <= 2 * LOGIT_ERROR[place] * size, f"row {row}: {behind / size:.1e}"
    return mask
