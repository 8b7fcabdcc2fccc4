"""``BlockSparseAttentionBackend``: steps of a server whose queries choose their key blocks."""

from __future__ import annotations

import numpy as np
import pytest

from fastattn import reference
from fastattn.backends import (
    BlockChoice,
    BlockSparseAttentionBackend,
    FlashAttentionBackend,
    make_config,
)
from fastattn.reference.attention import attention_mask, dense_attention
from fastattn.reference.block_selection import summarise, summary_shape
from fastattn.reference.sparse_attention import selected_mask
from tests.support.bounds import assert_error_ratio
from tests.support.serving import Model, Server
from tests.support.tensors import to_numpy


class Sparse(Server):
    """A server whose layers have summaries of garbage at first."""

    def __init__(self, model: Model, lengths: list[int], place: str, choice: BlockChoice, **given):
        super().__init__(FlashAttentionBackend, model, lengths, place, **given)
        self.choice = choice
        self.backend = BlockSparseAttentionBackend(
            self.config, model.kv_heads, model.heads, model.head_dim, choice=choice
        )
        shape = self.backend.get_summary_shape(self.caches[0].shape[0])
        for layer in self.layers:
            layer.cache_k_summaries = self.on(np.full(shape, np.nan, np.float32))
        if choice.kind == "pooled":
            rng = np.random.default_rng(5)
            self.weights = rng.uniform(
                0.1, 1, (model.kv_heads, choice.granularity, model.head_dim)
            ).astype(np.float32)
            for layer in self.layers:
                layer.cache_k_pool_weights = self.on(self.weights)


def lists_of(server: Sparse, layer: int, seq: int, new: int) -> np.ndarray:
    """Key blocks [n, KV, k] by NumPy, from the keys of the model as the cache gives them back."""
    model, choice = server.model, server.choice
    total = server.cached[seq] + new
    rows = server.tokens[seq][layer, :total]
    _, k, _ = model.project(rows)
    # The model's own queries: attention rounds them once more where it rotates them.
    q, _, _ = model.rotated(rows, np.arange(total))
    tokens = min(choice.granularity, 64)
    shape = summary_shape(
        -(-total // 64), model.kv_heads, model.head_dim, choice.granularity, choice.kind
    )
    summaries = np.zeros(shape, np.float32)
    for head in range(model.kv_heads):
        for begin in range(0, total, tokens):
            keys = k[begin : min(begin + tokens, total), head]
            place = begin % choice.granularity
            weights = (
                server.weights[head, place : place + len(keys)] if choice.kind == "pooled" else None
            )
            at = begin // 64, head, begin % 64 // tokens
            summaries[at] = summarise(keys, choice.kind, weights)
    return reference.select_key_blocks(
        q[server.cached[seq] :].astype(np.float32),
        summaries,
        np.arange(-(-total // 64))[None],
        np.array([0, new]),
        np.array([server.cached[seq]]),
        np.array([new]),
        choice.k,
        granularity=choice.granularity,
        kind=choice.kind,
        reduction=choice.reduction,
        first_blocks=choice.first_blocks,
        last_blocks=choice.last_blocks,
    )


def check(server: Sparse, new: list[int], outs: dict) -> int:
    """Hold outputs to dense attention over the chosen keys; how many keys were left out."""
    model, start, hidden = server.model, 0, 0
    group = model.heads // model.kv_heads
    for seq, n in enumerate(new):
        if n == 0:
            continue
        done = server.cached[seq]
        for layer, out in outs.items():
            chosen = lists_of(server, layer, seq, n)
            q, k, v = model.project(server.tokens[seq][layer, : done + n])
            for head in range(model.kv_heads):
                visible = attention_mask(n, done + n, causal=True)
                dense = visible.sum()
                for i, entries in enumerate(chosen[:, head]):
                    own = selected_mask(entries, done + i, server.choice.granularity)
                    visible[i, : done + i + 1] &= own
                hidden += int(dense - visible.sum())
                own, queries = slice(head, head + 1), slice(head * group, (head + 1) * group)
                exact, naive = (
                    dense_attention(
                        q[done:, queries],
                        *(k[:, own], v[:, own], visible),
                        softmax_scale=model.head_dim**-0.5,
                        precision=precision,
                    )[0]
                    for precision in ("float64", "bfloat16")
                )
                got = out[start : start + n].reshape(n, model.heads, -1)[:, queries]
                what = f"layer {layer}, sequence {seq}, head {head}"
                assert_error_ratio(got, exact, naive, "bfloat16", what)
        start += n
    return hidden


@pytest.mark.parametrize("quant", ["none", "cache_fp8", "block_wise_int8", "block_wise_fp8"])
@pytest.mark.parametrize("kind", ["mean", "minmax", "pooled"])
@pytest.mark.parametrize("granularity", [16, 64, 128])
def test_chunks_decode_and_drafts(place, quant, kind, granularity):
    """Blocks are chosen by keys in any case as the model made them, rotated in the cache or not."""
    k = 3 if granularity == 128 else 4
    choice = BlockChoice(k, granularity, kind, "sum" if kind == "mean" else "max", 1, 1)
    model = Model(cache_quant_type=quant, num_layers=2, centred=quant == "block_wise_fp8")
    longest = min(8 * granularity, 440)
    server = Sparse(model, [longest + 60, 90], place, choice)
    hidden = 0
    for new in ([longest - 7, 40], [30, 1], [1, 1], [3, 5], [1, 0]):
        outs = server.run(new)
        hidden += check(server, new, outs)
        server.cached = [done + n for done, n in zip(server.cached, new)]
    assert hidden > 100


def test_short_sequences_are_dense(place):
    server = Sparse(Model(cache_quant_type="block_wise_int4"), [250, 200], place, BlockChoice(4))
    for new in ([200, 5], [1, 60], [4, 1]):
        server.step(new)  # which compares with all keys


def test_the_comparison_sees_another_choice():
    server = Sparse(Model(), [500], "cpu", BlockChoice(4, first_blocks=0, last_blocks=1))
    outs = server.run([500])
    server.choice = BlockChoice(4, reduction="sum", first_blocks=0, last_blocks=1)
    with pytest.raises(AssertionError, match="layer 0, sequence 0"):
        check(server, [500], outs)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(k=2), "k: expected at least first_blocks"),
        (dict(k=4, granularity=8), "granularity: expected one of 16, 32, 64, 128, got 8"),
        (dict(k=4, kind="max"), "kind: expected one of mean"),
        (dict(k=4, reduction="mean"), "reduction: expected one of max, sum"),
        (dict(k=4, last_blocks=0), "last_blocks: expected 1 to 2147483647, got 0"),
        (dict(k=5000), "k: expected 1 to 4096, got 5000"),
    ],
)
def test_a_choice_out_of_range(given, message):
    with pytest.raises(ValueError, match=message):
        BlockChoice(**given)


def test_what_is_refused(monkeypatch):
    config = make_config(max_model_len=512)
    made = [config, 2, 4, 64]
    monkeypatch.setenv("FD_DETERMINISTIC_MODE", "1")
    with pytest.raises(NotImplementedError, match="deterministic mode"):
        BlockSparseAttentionBackend(*made, choice=BlockChoice(4))
    monkeypatch.delenv("FD_DETERMINISTIC_MODE")
    with pytest.raises(NotImplementedError, match=r"model_config\.causal = False"):
        both_ways = make_config(max_model_len=512, causal=False)
        BlockSparseAttentionBackend(both_ways, 2, 4, 64, choice=BlockChoice(4))
    server = Sparse(Model(window=30), [100], "cpu", BlockChoice(4))
    with pytest.raises(NotImplementedError, match="a layer with a window"):
        server.run([100])
    server = Sparse(Model(), [100], "cpu", BlockChoice(4))
    with pytest.raises(NotImplementedError, match="attn_mask_offsets"):
        server.run([100], attn_mask_offsets=server.on(np.zeros((100, 2), np.int32)))
    server.layers[0].cache_k_summaries = None
    with pytest.raises(
        ValueError, match=r"cache_k_summaries: expected a tensor \[\d+, 2, 1, 1, 64"
    ):
        server.run([100])


def test_summaries_hold_the_keys(place):
    """The mean of a whole block, whatever steps it came in."""
    server = Sparse(Model(), [130], place, BlockChoice(4))
    for new in ([50], [1], [13], [60]):
        server.run(new)
        server.cached = [server.cached[0] + new[0]]
    found = to_numpy(server.layers[0].cache_k_summaries)[server.tables[0, 0]]
    _, k, _ = server.model.project(server.tokens[0][0, :64])
    np.testing.assert_allclose(found[:, 0, 0], k.mean(axis=0), rtol=1e-5, atol=1e-6)
