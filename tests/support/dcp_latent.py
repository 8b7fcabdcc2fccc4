"""Latent caches spread over the ranks of a group, and the program that one rank runs.

``python -m tests.support.dcp_latent FOLDER PLACE`` joins the group that the environment describes,
solves every problem and pickles its results to ``FOLDER/rank<r>.pickle``.
"""

from __future__ import annotations

import dataclasses
import functools
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist

import fastattn.functional as F
from fastattn import reference
from fastattn.distributed import (
    dcp_local_keys,
    dcp_stripe_block_tables,
    mla_attention_dcp,
    mla_sparse_attention_dcp,
)
from fastattn.reference.mla import FORMATS
from fastattn.reference.mla_sparse import selected_keys
from tests.support.dcp import (
    Assign,
    all_on_the_last,
    at_random,
    in_pairs,
    interleaved,
    whole_seqs,
)
from tests.support.latent import scale_of, width
from tests.support.mla_dense import Problem
from tests.support.mla_sparse import lse_noise
from tests.support.tensors import BF16, int32, to_numpy, to_paddle

#: Cached and new tokens: decode, a prefill, chunks, a resting sequence, some on one rank only.
CACHED, NEW = (300, 0, 63, 0, 64, 517, 5), (1, 66, 2, 0, 7, 1, 3)
#: A step of decode, for which a rank compacts its table.
ONE = (1, 1, 1, 0, 1, 1, 1)
TOPK = 150
#: Formats that mla_write_cache writes.
WRITTEN = tuple(name for name in FORMATS if name != "fp8_528")
SINKS = np.array([0.4, -3.0, 5.5, -np.inf, 30.0], np.float32)


def local_cache(cache: np.ndarray, tables: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The pages that a rank's table names, among pages of NaN, and the table of their new ids."""
    used = (tables >= 0) & (tables < len(cache))
    mine = np.unique(tables[used])
    ids = np.random.default_rng(rank).permutation(len(mine) + 2)[: len(mine)]
    poison = 0xFF if cache.dtype == np.uint8 else np.nan
    local = np.full((len(mine) + 2, *cache.shape[1:]), poison, cache.dtype)
    local[ids] = cache[mine]
    renamed = np.full(len(cache), -1, np.int32)
    renamed[mine] = ids
    return local, np.where(used, renamed[np.clip(tables, 0, len(cache) - 1)], -1).astype(np.int32)


@dataclasses.dataclass
class Case:
    """A step over a latent cache, how its pages are dealt to the ranks, and options of the call."""

    cache_format: str = "fp8_656"
    assign: Assign = interleaved
    heads: int = 5
    page_size: int = 64
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    sparse: bool = False
    compact: bool = True
    new: tuple[int, ...] = NEW
    precomputed: bool = False  # whether the rank's keys are found before the call

    @functools.cached_property
    def problem(self) -> Problem:
        return Problem(
            CACHED,
            self.new,
            heads=self.heads,
            cache_format=self.cache_format,
            page_size=self.page_size,
            rule="amax" if self.cache_format == "fp8_656" else "pow2",
            gap=0 if self.sparse else 2,
            seed=8,
        )

    def chosen(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that each query chose in its sequence, and the sequence of each query."""
        rng, rows = np.random.default_rng(9), []
        for cached, new in zip(CACHED, self.new):
            for i in range(new):
                seen = cached + i + 1
                row = rng.permutation(seen)[:TOPK]
                row = np.concatenate([row, rng.integers(0, seen, 3), [-1, 9999, -(2**31)]])
                rows.append(np.concatenate([row, np.full(TOPK + 6 - len(row), -1)]))
        ids = np.repeat(np.arange(len(self.new)), self.new)
        chosen = np.array(rows)
        chosen[3] = -1  # a query without a key
        chosen[5, 1:] = -1  # and one with a single one
        ids[7] = -1  # padding
        return chosen.astype(np.int32), ids.astype(np.int32)

    def results(self) -> dict[str, Any]:
        """Options of the whole result in the model."""
        return {k: v for k, v in self.options.items() if k in ("sinks", "causal")}

    def want(self) -> tuple[np.ndarray, np.ndarray]:
        """Output and LSE over the whole cache, in fp64."""
        if not self.sparse:
            return self.problem.want(**self.results())
        return reference.mla_sparse_attention(
            self.problem.q,
            self.problem.cache,
            self.slots(),
            **self.problem.options(**self.results()),
        )[:2]

    def slots(self) -> np.ndarray:
        """The tokens that each query chose in the whole cache, -1 for none."""
        chosen, ids = self.chosen()
        tables, size = self.problem.tables, self.page_size
        column = np.clip(chosen // size, 0, tables.shape[1] - 1)
        page = tables[ids[:, None], column]
        there = (chosen >= 0) & (chosen // size < tables.shape[1]) & (ids >= 0)[:, None]
        there &= (page >= 0) & (page < len(self.problem.cache))
        return np.where(there, page * size + chosen % size, -1)

    def noise(self) -> Any:
        """Of the LSE [H, T] of the sparse kernel on a GPU, which rounds keys to 16 bits."""
        if not self.sparse or self.cache_format not in ("fp8", "fp8_656"):
            return 0.0
        options = self.problem.options()
        rows = []
        for q, slots in zip(self.problem.q.astype(np.float64), self.slots()):
            keys = selected_keys(
                *(self.problem.cache, slots, None, self.cache_format),
                *(options["scale"], options.get("page_size"), q.shape[-1]),
            )
            rows.append(lse_noise(q, keys, options["softmax_scale"]))
        return np.array(rows).T

    def run(self, rank: int, world_size: int, place: str) -> dict[str, np.ndarray]:
        """What a rank gets."""
        problem = self.problem
        cache, table = local_cache(
            problem.cache, self.assign(problem.tables, rank, world_size), rank
        )
        options = problem.options(**self.options, return_softmax_lse=True)
        options = {
            k: to_paddle(np.asarray(v), place) if k in ("scale", "sinks") and v is not None else v
            for k, v in options.items()
        }
        q, held = to_paddle(problem.q, place), to_paddle(cache, place)
        if self.sparse:
            chosen, ids = self.chosen()
            slots, lengths = F.topk_to_slots(
                int32(chosen, place),
                int32(table, place),
                int32(ids, place),
                block_size=self.page_size,
                num_blocks=len(cache),
                compact=self.compact,
            )
            out, lse = mla_sparse_attention_dcp(q, held, slots, topk_length=lengths, **options)
        else:
            seqs = [int32(x, place) for x in problem.seq_arrays()[1:]]
            longest, most = max(a + b for a, b in zip(CACHED, self.new)), max(self.new)
            if self.precomputed:
                options["local_keys"] = dcp_local_keys(
                    *(int32(table, place), *seqs, most),
                    num_tokens=q.shape[0],
                    num_blocks=len(cache),
                    block_size=self.page_size,
                )
            out, lse = mla_attention_dcp(
                q, held, int32(table, place), *seqs, most, longest, **options
            )
        return {"out": to_numpy(out), "lse": to_numpy(lse)}


_EACH = (("dense", False), ("sparse", True))
CASES: dict[str, Case] = {
    **{f"{k}-{f}": Case(f, sparse=s) for k, s in _EACH for f in FORMATS},
    **{
        f"{k}-{a.__name__}": Case(assign=a, sparse=s)
        for k, s in _EACH
        for a in (in_pairs, whole_seqs, all_on_the_last, at_random)
    },
    **{
        f"{k}-{name}": Case("fp8_584", options=options, sparse=s)
        for k, s in _EACH
        for name, options in {
            "fp32_output": {"out_dtype": "float32"},
            "exchange_output": {"exchange_dtype": "output"},
        }.items()
    },
    **{f"{k}-heads_{h}": Case("bf16", heads=h, sparse=s) for k, s in _EACH for h in (1, 16, 64)},
    **{f"{k}-pages_of_{n}": Case(page_size=n, sparse=s) for k, s in _EACH for n in (7, 16)},
    **{f"dense-decode-{f}": Case(f, new=ONE) for f in FORMATS},
    **{
        f"dense-decode-{a.__name__}": Case("bf16", a, page_size=n, new=ONE)
        for a, n in ((whole_seqs, 64), (at_random, 16), (all_on_the_last, 7))
    },
    "dense-decode-local_keys": Case(new=ONE, precomputed=True),
    "dense-local_keys": Case(page_size=16, precomputed=True),
    "dense-decode-not_causal": Case("bf16", new=ONE, options={"causal": False}),
    "dense-not_causal": Case("bf16", options={"causal": False}),
    "sparse-not_compact": Case("fp8_584", sparse=True, compact=False),
}

#: These use arithmetic of Paddle, which not every Paddle has on every GPU.
SINK_CASES: dict[str, Case] = {
    **{f"{k}-sinks": Case(options={"sinks": SINKS}, sparse=s) for k, s in _EACH},
    **{
        f"{k}-sinks-all_on_the_last": Case(
            "bf16",
            all_on_the_last,
            options={"sinks": SINKS, "out_dtype": "float32"},
            sparse=s,
        )
        for k, s in _EACH
    },
}


def serve(cache_format: str, rank: int, world_size: int, place: str) -> dict[str, np.ndarray]:
    """Every rank gets all new tokens, writes those that it has, then attends; two steps.

    The last step's outputs, dense and over all tokens as chosen ones.
    """
    lengths, pages = np.array([[130, 3, 64], [1, 1, 2]]), -(-132 // 64)
    stripes = np.random.default_rng(20).permutation(9).reshape(3, 3).astype(np.int32)
    stripes = stripes[:, : -(-pages // world_size)]
    table = int32(dcp_stripe_block_tables(stripes, rank, world_size), place)
    elements, dtype = width(cache_format)
    unwritten = np.full((9, 64, elements), 0xFF if dtype == np.uint8 else np.nan, dtype)
    cache, scale = to_paddle(unwritten, place), scale_of(cache_format)
    scale = None if scale is None else to_paddle(np.asarray(scale), place)
    cached = np.zeros(3, np.int64)
    for new, (latent, rope, q) in zip(lengths, served_tokens(cache_format)):
        ids = np.repeat(np.arange(3), new)
        positions = np.concatenate([np.arange(c, c + n) for c, n in zip(cached, new)])
        named = (int32(positions[:, None], place), table, int32(ids, place))
        slots, _ = F.topk_to_slots(*named, num_blocks=9)
        F.mla_write_cache(
            to_paddle(latent, place),
            to_paddle(rope, place),
            cache,
            slots.reshape([-1]),
            cache_format=cache_format,
            scale=scale,
        )
        starts = np.concatenate([[0], np.cumsum(new)])
        step = [int32(x, place) for x in (starts, cached, new)]
        options = {"cache_format": cache_format, "scale": scale, "softmax_scale": 0.07}
        out = mla_attention_dcp(
            to_paddle(q, place), cache, table, *step, int(new.max()), 140, **options
        )
        seen = np.arange(140)[None] <= positions[:, None]
        chosen = int32(np.where(seen, np.arange(140)[None], -1), place)
        slots, count = F.topk_to_slots(chosen, *named[1:], num_blocks=9)
        sparse = mla_sparse_attention_dcp(
            to_paddle(q, place), cache, slots, topk_length=count, **options
        )
        cached = cached + new
    return {"out": to_numpy(out), "sparse": to_numpy(sparse)}


def served_tokens(cache_format: str) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Latents, rotated channels and queries of both steps of :func:`serve`."""
    rng, latent = np.random.default_rng(21), FORMATS[cache_format].latent

    def make(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(BF16)

    return [(make(n, latent), make(n, 64), make(n, 4, latent + 64)) for n in (197, 4)]


def served_results(cache_format: str) -> tuple[np.ndarray, np.ndarray]:
    """Both outputs of :func:`serve`, in fp64 over one whole cache.

    They differ in what a key is: dense attention rounds its channels to bfloat16.
    """
    (latent, rope, _), (more, more_rope, q) = served_tokens(cache_format)
    elements, dtype = width(cache_format)
    where = [*range(130), *range(192, 195), *range(384, 448), 130, 195, 448, 449]
    cache = reference.mla_write_cache(
        np.concatenate([latent, more]),
        np.concatenate([rope, more_rope]),
        np.zeros((9, 64, elements), dtype),
        np.array(where),
        cache_format=cache_format,
        scale=scale_of(cache_format),
    )
    tables = np.arange(9).reshape(3, 3)
    seqs = np.array([0, 1, 2, 4]), np.array([130, 3, 64]), np.array([1, 1, 2])
    options = {"scale": scale_of(cache_format), "softmax_scale": 0.07}
    options["cache_format"] = cache_format
    dense = reference.mla_attention(q, cache, tables, *seqs, **options)[0]
    slots = np.full((4, 131), -1)
    for row, (first, count) in zip(slots, [(0, 131), (192, 4), (384, 65), (384, 66)]):
        row[:count] = np.arange(first, first + count)
    return dense, reference.mla_sparse_attention(q, cache, slots, **options)[0]


def main(folder: str, place: str) -> None:
    """Program of one rank."""
    paddle.set_device("cpu" if place == "cpu" else "gpu:0")
    dist.init_parallel_env()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    cases = {**CASES, **SINK_CASES} if place == "cpu" else CASES
    results = {name: case.run(rank, world_size, place) for name, case in cases.items()}
    for cache_format in WRITTEN:
        results[f"serve-{cache_format}"] = serve(cache_format, rank, world_size, place)
    Path(folder, f"rank{rank}.pickle").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
