"""Index keys, a top-k and its maps in a CUDA graph: contents change between replays."""

from __future__ import annotations

import numpy as np
import pytest

import fastattn.functional as F
from fastattn import reference
from fastattn.compat.fastdeploy import radix_topk_ragged_transform
from tests.support.compare import assert_same_bits
from tests.support.graph import capture
from tests.support.indexer_keys import empty_pages, keys
from tests.support.tensors import BF16, to_numpy, to_paddle

pytestmark = pytest.mark.gpu

TOKENS, ROWS, COLUMNS, K, PAGES = 150, 170, 5000, 200, 9


def contents(seed):
    """What a step reads: other slots, lengths, tables and padding at each seed."""
    rng = np.random.default_rng(seed)
    slots = rng.permutation(PAGES * 64)[:TOKENS]
    slots[rng.random(TOKENS) < 0.1] = -1
    cuts = np.sort(rng.integers(0, ROWS - 10, 2))
    return {
        "key": keys(rng, TOKENS, BF16),
        "cache": empty_pages(PAGES, 64, "fp8").reshape(PAGES, 64, 132),
        "slots": slots,
        "tables": np.stack([rng.permutation(PAGES + 2)[:5] - 1 for _ in range(3)]).astype(np.int32),
        "cu_seqlens": np.array([0, *cuts, ROWS - 5], np.int32),
        "codes": np.full((ROWS, 128), 7, np.uint8),
        "scales": np.full(ROWS, 3.0, np.float32),
        "logits": np.maximum(rng.standard_normal((6, COLUMNS)), 0.5).astype(np.float32),
        "lengths": rng.integers(0, COLUMNS, 6).astype(np.int32),
        "seqs": rng.integers(-1, 3, 6),
        "positions": rng.integers(-1, 400, 6),
        "output": np.full((6, K), -1, np.int32),
        "offsets": np.arange(6, dtype=np.int32),
    }


def step(t):
    """Everything that a step computes, in order."""
    F.indexer_k_write_cache(t["key"], t["cache"], t["slots"], scale_rule="amax")
    F.indexer_k_gather(
        t["cache"], t["tables"], t["cu_seqlens"], ROWS, out=t["codes"], out_scales=t["scales"]
    )
    picked = F.topk_indices(t["logits"], t["lengths"], K)
    slots, lengths = F.topk_to_slots(picked, t["tables"], t["seqs"], num_blocks=PAGES)
    window, window_lengths = F.window_indices(t["positions"], t["seqs"], window=50)
    short, short_lengths = F.short_context_indices(t["positions"], 64, compress_ratio=4)
    both, both_lengths = F.combine_topk_window(
        short, window, t["seqs"], topk_lengths=short_lengths, window_lengths=window_lengths,
        seq_stride=1000, window_offset=64,
    )  # fmt: skip
    radix_topk_ragged_transform(
        t["logits"], t["output"], t["offsets"], t["lengths"], None, None, None, None, 0, K, 1
    )
    return slots, lengths, both, both_lengths


def expected(c):
    """The same by the models: what is returned, and what is written."""
    cache = reference.indexer_k_write_cache(c["key"], c["cache"], c["slots"], scale_rule="amax")
    codes, scales = reference.indexer_k_gather(
        cache, c["tables"], c["cu_seqlens"], ROWS, out=c["codes"], out_scales=c["scales"]
    )
    picked = reference.topk_indices(c["logits"], c["lengths"], K)
    slots, lengths = reference.topk_to_slots(picked, c["tables"], c["seqs"], num_blocks=PAGES)
    window, _ = reference.window_indices(c["positions"], c["seqs"], window=50)
    short, _ = reference.short_context_indices(c["positions"], 64, compress_ratio=4)
    both, both_lengths = reference.combine_topk_window(
        short, window, c["seqs"], seq_stride=1000, window_offset=64
    )
    output = np.where(picked < 0, -1, picked + c["offsets"][:, None]).astype(np.int32)
    written = {"cache": cache, "codes": codes, "scales": scales, "output": output}
    return (slots, lengths, both, both_lengths), written


def compare(results, tensors, c, what):
    want, written = expected(c)
    for a, b in zip(results, want):
        assert_same_bits(to_numpy(a), b, what)
    for name, array in written.items():
        assert_same_bits(to_numpy(tensors[name]), array, f"{what}: {name}")


def test_a_step_in_a_graph():
    held = {name: to_paddle(array, "gpu") for name, array in contents(0).items()}
    compare(step(held), held, contents(0), "by itself")
    with capture() as graph:
        results = step(held)
    for seed in range(1, 6):
        for name, array in contents(seed).items():
            held[name].copy_(to_paddle(array, "gpu"), True)
        graph.replay()
        compare(results, held, contents(seed), f"replay {seed}")
    graph.reset()


def ragged(seed):
    """A step of three sequences in buffers of 40 tokens, whose lengths change with the seed."""
    rng = np.random.default_rng(seed)
    new = rng.integers(0, 12, 3)
    ids = np.full(40, -1)
    ids[: new.sum()] = np.repeat(np.arange(3), new)
    return {
        "ids": ids.astype(np.int32),
        "tables": rng.permutation(30).reshape(3, 10).astype(np.int32),
        "starts": np.concatenate([[0], np.cumsum(new)]).astype(np.int32),
        "cached": rng.integers(0, 600, 3).astype(np.int32),
        "q": rng.standard_normal((40, 8, 128)).astype(BF16),
        "weights": rng.standard_normal((40, 8)).astype(np.float32),
        "chosen": rng.integers(-1, 640, (8 * 8, K)).astype(np.int32),
    }


def maps_of(of, t):
    """The maps of a step and what takes them, by the operators or their models."""
    maps = of.token_maps(t["ids"], t["tables"], t["starts"], t["cached"], num_tokens=40)
    rows = of.query_rows(maps[0], maps[1], t["tables"], t["starts"], tile=8)
    folded = of.indexer_q_quant(t["q"], t["weights"], 0.3, token_of_query=rows[2])
    slots = of.topk_to_slots(t["chosen"], t["tables"], maps[0], row_ids=rows[3], num_blocks=30)
    return (*maps, *rows, *folded, *slots)


def test_maps_of_a_step_in_a_graph():
    held = {name: to_paddle(array, "gpu") for name, array in ragged(0).items()}
    maps_of(F, held)
    with capture() as graph:
        results = maps_of(F, held)
    for seed in range(6):
        for name, array in ragged(seed).items():
            held[name].copy_(to_paddle(array, "gpu"), True)
        graph.replay()
        for got, want in zip(results, maps_of(reference, ragged(seed))):
            assert_same_bits(to_numpy(got), want, f"replay {seed}")
    graph.reset()


def test_writing_and_gathering_100_times_in_one_stream():
    """The gather starts while the writer still runs; every byte must be the writer's."""
    c = contents(9)
    c["slots"] = np.arange(TOKENS)
    tables = np.array([[0, 1, 2]], np.int32)
    tensors = {name: to_paddle(array, "gpu") for name, array in c.items()}
    cu_seqlens = to_paddle(np.array([0, TOKENS], np.int32), "gpu")
    table = to_paddle(tables, "gpu")
    variants = [to_paddle(keys(np.random.default_rng(i), TOKENS, BF16), "gpu") for i in range(4)]
    got = []
    for i in range(100):
        F.indexer_k_write_cache(variants[i % 4], tensors["cache"], tensors["slots"])
        got.append(F.indexer_k_gather(tensors["cache"], table, cu_seqlens, TOKENS))
    for i in range(4):
        key = keys(np.random.default_rng(i), TOKENS, BF16)
        cache = reference.indexer_k_write_cache(key, c["cache"], c["slots"])
        want = reference.indexer_k_gather(cache, tables, [0, TOKENS], TOKENS)
        for codes, scales in got[i::4]:
            assert_same_bits(to_numpy(codes), want[0])
            assert_same_bits(to_numpy(scales), want[1])
