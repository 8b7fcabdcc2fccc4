"""A layer whose heads are spread over processes: the program of one rank.

Indexer, latents and compressed entries are the same on every rank, as servers have them; each rank
has pages in an order of its own, its share of the heads and their part of the output projection.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import paddle
import paddle.distributed as dist

from tests.support.deepseek.cuts import Problem, Results, run
from tests.support.deepseek.weights import HEADS, RANK_CONFIGS
from tests.support.tensors import to_numpy, to_paddle

#: Tokens of two prompts, and steps: chunks, decoding beside a chunk, drafts, an inactive sequence.
LENGTHS = (260, 131)
STEPS = [(120, 9), (3, 119), (1, 1), (1, 0), (2, 2), (133, 0)]


def solve(name: str, rank: int, world_size: int) -> Results:
    """Results of all steps of one rank; `output` is its share."""
    problem = Problem(name, LENGTHS)
    heads = HEADS // world_size
    own = slice(rank * heads, (rank + 1) * heads)
    layer = problem.layer("cpu", heads=own, seed=100 + rank)
    results = run(layer, STEPS)
    return {**results, "output": layer.output(results).astype(np.float32)}


def main(folder: str) -> None:
    """Program of one rank."""
    paddle.set_device("cpu")
    dist.init_parallel_env()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    made = {}
    for name in RANK_CONFIGS:
        results = solve(name, rank, world_size)
        total = to_paddle(results["output"])
        dist.all_reduce(total)
        made[name] = {**results, "output": to_numpy(total)}
    Path(folder, f"rank{rank}.pickle").write_bytes(pickle.dumps(made))


if __name__ == "__main__":
    main(*sys.argv[1:])
