"""Problems whose cache is spread over the ranks of a group, and the program that one rank runs.

``python -m tests.support.dcp FOLDER PLACE`` joins the group that the environment describes, solves
every problem and pickles its results to ``FOLDER/rank<r>.pickle``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist

import fastattn.functional as F
from fastattn import _check
from fastattn.distributed import (
    dcp_local_block_tables,
    dcp_local_keys,
    dcp_stripe_block_tables,
    paged_attention_dcp,
)
from fastattn.distributed.local_keys import LocalKeys
from fastattn.reference.rope import make_rotary_embs
from tests.support.attention import (
    BLOCK_WISE_FP8,
    BLOCK_WISE_INT4,
    BLOCK_WISE_INT8,
    BLOCK_WISE_MXFP4,
    CACHE_KINDS,
    FEW_KINDS,
    MIXED_KINDS,
    PLAIN,
    CacheKind,
    PagedProblem,
    paged_problem,
)
from tests.support.cache import make_cache
from tests.support.tensors import int32, to_numpy, to_paddle

#: (cached, new): a prefill, chunks of one, decode and speculative sequences, a resting one, some
#: shorter than a block, some of fewer blocks than there are ranks.
SEQS = [(0, 65), (1023, 1), (320, 63), (0, 0), (64, 1), (1, 64), (0, 1), (70, 5), (517, 4), (9, 0)]
SHORT = [(70, 5), (0, 66), (129, 1), (0, 0), (3, 2)]
TOKENS = sum(new for _, new in SHORT)
#: One new token at most: no masks are needed.
DECODE = [(1023, 1), (64, 1), (0, 1), (130, 0), (5, 1), (517, 1), (63, 1)]

Assign = Callable[[np.ndarray, int, int], np.ndarray]


def interleaved(tables: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    return dcp_local_block_tables(tables, rank, world_size)


def in_pairs(tables: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    return dcp_local_block_tables(tables, rank, world_size, interleave=2)


def whole_seqs(tables: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """Every sequence on one rank."""
    seqs = np.arange(len(tables))[:, None]
    return np.where(seqs % world_size == rank, tables, -1).astype(np.int32)


def all_on_the_last(tables: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    return tables if rank == world_size - 1 else np.full_like(tables, -1)


def at_random(tables: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    owner = np.random.default_rng(5).integers(0, world_size, tables.shape)
    return np.where(owner == rank, tables, -1).astype(np.int32)


@dataclasses.dataclass
class Case:
    """A problem, how its blocks are dealt to the ranks, and options of the distributed call."""

    make: Callable[[], PagedProblem]
    assign: Assign = interleaved
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    precomputed: bool = False  # whether the rank's keys are found before the call

    def local(self, rank: int, world_size: int) -> PagedProblem:
        """The problem as `rank` sees it: a smaller cache with ids of its own, and its table."""
        problem = self.make()
        tables = self.assign(problem.block_tables, rank, world_size)
        count = problem.k.elements.shape[0]
        mine = np.unique(tables[(tables >= 0) & (tables < count)])
        # Ids are the rank's own, in another order than elsewhere; -7 blocks more hold poison.
        ids = np.random.default_rng(rank).permutation(len(mine) + 2)[: len(mine)]
        renamed = np.full(count, -1, np.int32)
        renamed[mine] = ids
        problem.block_tables = np.where(
            (tables >= 0) & (tables < count), renamed[np.clip(tables, 0, count - 1)], -1
        ).astype(np.int32)
        for stored in (problem.k, problem.v):
            stored.elements = _gathered(stored.elements, mine, ids, len(mine) + 2)
            if stored.kind.dynamic:
                stored.scales = _gathered(stored.scales, mine, ids, len(mine) + 2)
            spare = np.setdiff1d(np.arange(len(mine) + 2), ids)
            stored.poison((spare, slice(None), slice(None)))
        return problem

    def run(self, rank: int, world_size: int, place: str) -> dict[str, np.ndarray]:
        problem = self.local(rank, world_size)
        positional, keywords = problem.arguments(place)
        if self.precomputed:
            keywords["local_keys"] = local_keys(positional, keywords)
        # The attention's checks allow for blocks of other ranks, but not for a NaN that it reads.
        with contextlib.nullcontext() if self.make is poisoned else _check.checking():
            out, lse = paged_attention_dcp(
                *positional, return_softmax_lse=True, **keywords, **self.options
            )
        return {"out": to_numpy(out), "lse": to_numpy(lse)}


def local_keys(positional: list[Any], keywords: dict[str, Any]) -> LocalKeys:
    """What :func:`dcp_local_keys` finds for a call."""
    q, key, _, *seqs, max_seqlen_q, _ = positional
    mask = {k: v for k, v in keywords.items() if k in ("causal", "window_size", "mask_offsets")}
    return dcp_local_keys(
        *seqs, max_seqlen_q, num_tokens=q.shape[0], num_blocks=key.shape[0], **mask
    )


def _gathered(array: np.ndarray, blocks: np.ndarray, ids: np.ndarray, count: int) -> np.ndarray:
    result = np.zeros((count, *array.shape[1:]), array.dtype)
    result[ids] = array[blocks]
    return result


def _case(seqs, assign: Assign = interleaved, dcp: dict[str, Any] | None = None, **kwargs) -> Case:
    return Case(lambda: paged_problem(seqs, **kwargs), assign, dcp or {})


def poisoned() -> PagedProblem:
    """A NaN in a key of sequence 1, and in a value of sequences 2 and 7, there in one head."""
    problem = paged_problem(SEQS, kind=BLOCK_WISE_FP8, seed=7)
    problem.poison("k", 1, 500)
    problem.poison("v", 2, 100)
    problem.poison("v", 7, 70, head=1)
    return problem


SINKS = np.array([0.4, -3.0, 5.5, -np.inf], np.float32)
SCALE = np.array([0.013], np.float32)
MASK = np.array([(i * 3 % 50, 40 + i * 31 % 90) for i in range(TOKENS)], np.int32)
NOTHING = np.zeros((TOKENS, 2), np.int32)
KEYS = {
    "kind": BLOCK_WISE_INT8,
    "k_rotation": "hadamard",
    "k_center": np.random.default_rng(5).normal(size=(2, 64)).astype(np.float32),
}

CASES: dict[str, Case] = {
    **{f"type-{kind}": _case(SEQS, kind=kind, seed=3) for kind in CACHE_KINDS},
    **{f"dim128-{kind}": _case(SHORT, kind=kind, dim=128, heads=(6, 2)) for kind in FEW_KINDS},
    **{
        f"dim192-{kind}": _case(SHORT, kind=kind, dim=192)
        for kind in (PLAIN, BLOCK_WISE_FP8, BLOCK_WISE_INT4, BLOCK_WISE_MXFP4, *MIXED_KINDS)
    },
    **{
        f"{assign.__name__}-{kind}": _case(SEQS, assign, kind=kind, seed=4)
        for assign in (in_pairs, whole_seqs, all_on_the_last, at_random)
        for kind in (PLAIN, BLOCK_WISE_FP8)
    },
    **{f"fp8_output-{kind}": _case(SEQS, kind=kind, out_scale=SCALE, seed=5) for kind in FEW_KINDS},
    "fp8_output-whole_seqs": _case(SEQS, whole_seqs, kind=BLOCK_WISE_FP8, out_scale=SCALE),
    "fp32_queries": _case(SEQS, kind=BLOCK_WISE_INT8, q_type="float32"),
    "fp16_queries": _case(SEQS, kind=BLOCK_WISE_FP8, q_type="float16"),
    "fp8_queries": _case(SEQS, kind=BLOCK_WISE_FP8, q_type="e4m3:token_head"),
    "fp8_queries-fp16": _case(
        SHORT, dcp={"out_dtype": "float16"}, kind=BLOCK_WISE_FP8, q_type="e4m3:tensor"
    ),
    "quantize_q": _case(SEQS, kind=BLOCK_WISE_FP8, quantize_q=True),
    "batch_invariant": _case(SEQS, dcp={"batch_invariant": True}, kind=BLOCK_WISE_FP8),
    "fp32_output": _case(SEQS, dcp={"out_dtype": "float32"}, kind=BLOCK_WISE_FP8, seed=6),
    "exchange_output": _case(SEQS, dcp={"exchange_dtype": "output"}, kind=BLOCK_WISE_FP8, seed=6),
    "exchange_output-fp8": _case(
        SEQS, dcp={"exchange_dtype": "output"}, kind=BLOCK_WISE_FP8, out_scale=SCALE
    ),
    "transformed_keys": _case(SHORT, **KEYS),
    "not_causal": _case(SHORT, kind=BLOCK_WISE_FP8, causal=False),
    "window": _case(SHORT, kind=BLOCK_WISE_FP8, window_size=(17, -1)),
    "softcap": _case(SHORT, softcap=1.3),
    "mask_offsets": _case(SHORT, causal=False, mask_offsets=MASK),
    "nothing_visible": _case(SHORT, mask_offsets=NOTHING),
    "nan": Case(poisoned),
    "nan-whole_seqs": Case(poisoned, whole_seqs),
    "padding": _case([(3, 2), (70, 0), (9, 2)], spans=[2, 5, 4], padding=3),
    **{
        f"decode-{assign.__name__}-{kind}": _case(DECODE, assign, kind=kind, seed=8)
        for assign in (interleaved, whole_seqs, at_random)
        for kind in FEW_KINDS
    },
    "decode-not_causal": _case(DECODE, kind=BLOCK_WISE_FP8, causal=False),
    "decode-window": _case(DECODE, kind=BLOCK_WISE_FP8, window_size=(100, 0)),
    "decode-fp8_output": _case(DECODE, kind=BLOCK_WISE_FP8, out_scale=SCALE),
    "decode-batch_invariant": _case(DECODE, dcp={"batch_invariant": True}, kind=BLOCK_WISE_FP8),
    "window-both_sides": _case(SEQS, at_random, window_size=(40, 7), causal=False),
    "window-whole_seqs": _case(SEQS, whole_seqs, kind=BLOCK_WISE_FP8, window_size=(100, 0)),
    "mask_offsets-causal": _case(SHORT, at_random, kind=BLOCK_WISE_FP8, mask_offsets=MASK),
    "shared_blocks": _case([(200, 5), (133, 1), (64, 70)], kind=BLOCK_WISE_FP8, share=True),
}

#: Where the rank's keys are found once for several calls: cases of the same results.
PRECOMPUTED = (
    *("window", "mask_offsets", "padding", "exchange_output", "not_causal", "quantize_q"),
    *("decode-window", f"decode-interleaved-{PLAIN}", f"at_random-{BLOCK_WISE_FP8}"),
)
CASES.update(
    {
        f"local_keys-{name}": dataclasses.replace(CASES[name], precomputed=True)
        for name in PRECOMPUTED
    }
)

#: These use arithmetic of Paddle, which not every Paddle has on every GPU.
SINK_CASES: dict[str, Case] = {
    "sinks": _case(SEQS, kind=BLOCK_WISE_FP8, sinks=SINKS),
    "sinks-whole_seqs": _case(SEQS, whole_seqs, sinks=SINKS),
    "sinks-decode": _case(DECODE, at_random, kind=BLOCK_WISE_FP8, sinks=SINKS),
    "sinks-window": _case(SEQS, window_size=(100, 0), sinks=SINKS),
    "sinks-fp8_output": _case(SHORT, sinks=SINKS, out_scale=SCALE),
    "sinks-transformed_keys": _case(SHORT, sinks=SINKS, **KEYS),
    "sinks-nothing_visible": _case(SHORT, sinks=SINKS, mask_offsets=NOTHING),
}


# --- a server's steps: every rank writes what is its own, then attends --------------------------

#: New tokens of each sequence by step: a prefill in two chunks, decode, speculation, decode.
STEPS = [(130, 65, 3, 0, 1), (70, 1, 1, 0, 64), (1, 1, 4, 200, 1), (4, 3, 1, 1, 2), (1, 1, 1, 1, 1)]
MAX_STRIPES = 5
HEADS, KV_HEADS, DIM = 4, 2, 64
SERVED = [
    CacheKind(),
    CacheKind("cache_int8", "channel"),
    CacheKind("cache_fp8", "head", "e5m2"),
    BLOCK_WISE_FP8,
    BLOCK_WISE_INT8,
]


def serve(kind: CacheKind, rank: int, world_size: int, place: str) -> dict[str, np.ndarray]:
    """Outputs of all steps, and the bytes that the rank's cache holds for every logical block.

    The tables are those of a scheduler that allocates stripes of one block a rank.
    """
    rng = np.random.default_rng(11)
    seqs, stripes = len(STEPS[0]), -(-MAX_STRIPES // world_size) + 1
    ids = rng.permutation(seqs * stripes).reshape(seqs, stripes).astype(np.int32)
    tables = dcp_stripe_block_tables(ids, rank, world_size)
    cache = make_cache(
        kind.quant_type, ids.size, KV_HEADS, DIM, fp8_format=kind.fp8_format, seed=rank
    )
    if not kind.dynamic:  # the layer's, the same on every rank
        granularity = "channel" if kind.granularity == "channel" else "head"
        layer = make_cache(kind.quant_type, 1, KV_HEADS, DIM, granularity=granularity)
        cache.k_scales, cache.v_scales = layer.k_scales, layer.v_scales
    arrays = (cache.key, cache.value, cache.k_scales, cache.v_scales)
    key, value, k_scales, v_scales = (None if a is None else to_paddle(a, place) for a in arrays)
    stored = {"cache_k_scales": k_scales, "cache_v_scales": v_scales, **cache.options}
    angles = to_paddle(make_rotary_embs(64 * (MAX_STRIPES + 2), DIM), place)
    results: dict[str, np.ndarray] = {}
    cached = np.zeros(seqs, np.int32)
    data = np.random.default_rng(12)
    for i, new in enumerate(STEPS):
        qkv = data.normal(size=(sum(new), (HEADS + 2 * KV_HEADS) * DIM)).astype(np.float32)
        step = [
            int32(x, place) for x in (tables, np.concatenate([[0], np.cumsum(new)]), cached, new)
        ]
        q, _ = F.rope_write_cache_kv(
            to_paddle(
                qkv.astype(cache.key.dtype if kind.quant_type == "none" else "float16"), place
            ),
            key,
            value,
            angles,
            *step,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            **stored,
        )
        longest = int((cached + new).max())
        out = paged_attention_dcp(q, key, value, *step, max(new), longest, **stored)
        results[f"out{i}"] = to_numpy(out)
        cached = (cached + np.asarray(new)).astype(np.int32)
    results["tables"] = tables
    results["lengths"] = cached
    for name, tensor in (("key", key), ("value", value), ("k_scales", k_scales)):
        if tensor is not None:
            results[name] = to_numpy(tensor)
    return results


def solve_all(rank: int, world_size: int, place: str) -> dict[str, dict[str, np.ndarray]]:
    """Results of everything."""
    results = {
        name: case.run(rank, world_size, place)
        for name, case in CASES.items()
        if name != "fp32_queries" or place != "gpu"  # GPU kernels take 16 and 8 bits
    }
    for kind in SERVED:
        results[f"serve-{kind}"] = serve(kind, rank, world_size, place)
    if place == "cpu":
        for name, case in SINK_CASES.items():
            results[name] = case.run(rank, world_size, place)
        results["groups"] = in_groups(rank, place)
    return results


def in_groups(rank: int, place: str) -> dict[str, np.ndarray]:
    """A problem in the group of ranks 0 and 1 and on rank 0 alone; the other ranks are refused."""
    groups = []
    for members in ([0, 1], [0]):
        groups.append(dist.new_group(members))
        dist.barrier()  # gloo's set-up of two groups at once can fail
    case = CASES["type-block_wise_fp8-token-float32"]
    pair, alone = (dataclasses.replace(case, options={"group": group}) for group in groups)
    results = {}
    if rank < 2:
        results.update(pair.run(rank, 2, place))
    if rank < 1:
        results["alone"] = alone.run(0, 1, place)["out"]
    else:
        try:
            alone.run(0, 1, place)
        except ValueError as error:
            results["refused"] = np.array(str(error))
    dist.barrier()
    return results


def main(folder: str, place: str) -> None:
    """Program of one rank."""
    paddle.set_device("cpu" if place == "cpu" else "gpu:0")
    dist.init_parallel_env()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    results = solve_all(rank, world_size, place)
    Path(folder, f"rank{rank}.pickle").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
